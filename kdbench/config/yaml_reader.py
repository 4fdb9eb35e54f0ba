"""Reads a YAML file into plain data, and records the location of every key.

The result contains only mappings, lists and scalars. The reader rejects tags, `hydra:` and `_target_` keys, resolvers
such as `${oc.env:HOME}`, duplicate keys, and scalars that YAML 1.1 interprets unexpectedly (`on` as true, `010` as 8,
`1:30` as 90). All errors of a file are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdbench.config.error_list import ErrorList
from kdbench.errors import ConfigError, Location

_CORE_TAG = "tag:yaml.org,2002:"


_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+|[-+]?\.\d+[eE][-+]?\d+")


_INTERPOLATION = re.compile(r"\$\{[^}]*\}?")


_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.[\w-]+)*\}")


_HYDRA_KEY = re.compile(r"_\w+_")


_TAG_RESOLVER = yaml.SafeLoader("")


_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


_MAX_INTEGER = 2**63 - 1


_MAX_NODES = 100_000  # nested aliases of a small file can expand to more nodes than fit into memory


@dataclass(frozen=True)
class YamlSource:
    """A YAML file: its name in messages, its data, and `locations` (dotted key such as `augment.0` -> location)."""

    file: str
    data: Mapping[str, Any]
    locations: Mapping[str, Location]


def display_path(path: Path) -> str:
    """Returns the path that messages show: relative if the file is inside the working directory, else absolute."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def read_yaml(path: Path) -> YamlSource:
    """Reads a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not a YAML mapping, or contains a rejected construct.
    """
    file = display_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    return parse_yaml(text, file)


def parse_yaml(text: str, file: str) -> YamlSource:
    """Reads YAML text.

    Args:
        file: name of the file in messages.

    Raises:
        ConfigError: the text is not a YAML mapping, or contains a rejected construct.
    """
    try:
        root = _compose_root(text, file)
        reader = _NodeReader(file)
        data = reader.read_node(root, "")
    except RecursionError:
        raise ConfigError(f"{file}: lists and mappings are nested too deeply.") from None
    reader.errors.raise_any(file)
    return YamlSource(file, data, reader.locations)


def _compose_root(text: str, file: str) -> yaml.MappingNode:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{Location(file=file, line=line)}: not valid YAML: {reason}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if root is None:
        raise ConfigError(f"{file}: the file is empty; expected a mapping of keys such as `dataset:` and `terms:`.")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file}:{root.start_mark.line + 1}: expected a mapping such as `dataset: digits`.")
    return root


class _NodeReader:
    """Converts YAML nodes to plain data, and collects locations and errors."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.errors = ErrorList()
        self.locations: dict[str, Location] = {}
        self.open_nodes: list[yaml.Node] = []
        self.count = 0

    def read_node(self, node: yaml.Node, key: str) -> Any:
        location = self.locations.get(key) or self.locate(node, key)
        self.locations.setdefault(key, location)
        self.count += 1
        if self.count > _MAX_NODES:
            raise ConfigError(
                f"{location}: the YAML aliases expand to more than {_MAX_NODES} values; use fewer aliases."
            )
        if node in self.open_nodes:
            raise ConfigError(f"{location}: a YAML alias that contains itself is rejected.")
        if isinstance(node, yaml.ScalarNode):
            return self.read_scalar(node, location)
        expected_tag = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"{_CORE_TAG}{expected_tag}":
            self.reject_tag(node, location)
            return None
        self.open_nodes.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.read_mapping(node, key)
            return [self.read_node(child, f"{key}.{i}" if key else str(i)) for i, child in enumerate(node.value)]
        finally:
            self.open_nodes.pop()

    def read_mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = self.read_name(name_node, key)
            if name is None:
                continue
            dotted = f"{key}.{name}" if key else name
            location = self.locate(name_node, dotted)
            if name in result:
                line = self.locations[dotted].line
                self.errors.add(location, f"duplicate key {name!r}, already set on line {line}; keep one of them.")
                continue
            if (not key and name in ("hydra", "defaults")) or _HYDRA_KEY.fullmatch(name):
                reason = "a recipe cannot configure Hydra or call Python"
                self.errors.add(location, f"the key {name!r} is rejected, because {reason}. Remove the key.")
                continue
            self.locations[dotted] = location
            result[name] = self.read_node(value_node, dotted)
        return result

    def read_name(self, node: yaml.Node, parent: str) -> str | None:
        location = self.locate(node, parent)
        if not isinstance(node, yaml.ScalarNode):
            self.errors.add(location, "a key must be plain text.")
            return None
        if node.value == "<<":
            self.errors.add(location, "merge keys (`<<`) are rejected; repeat the keys.")
            return None
        value = self.read_scalar(node, location, subject="the key")
        if isinstance(value, str):
            return value
        if value is not None or node.tag == f"{_CORE_TAG}null":
            self.errors.add(location, f"the key {node.value!r} must be text, such as \"'{node.value}'\" in quotes.")
        return None

    def read_scalar(self, node: yaml.ScalarNode, location: Location, subject: str = "the value") -> Any:
        """Converts a scalar as YAML 1.2 does, and reports a scalar that YAML 1.1 interprets unexpectedly."""
        text, kind = node.value, node.tag.removeprefix(_CORE_TAG)
        if node.style is not None and node.tag != "!":
            # Quoted text is text, whatever it looks like.
            if kind != "str":
                self.reject_tag(node, location)
            return self.read_text(text, location)
        if node.tag == "!" or node.tag != _TAG_RESOLVER.resolve(yaml.ScalarNode, text, (True, False)):
            # An explicit tag: the resolver would have given the plain scalar another one.
            self.reject_tag(node, location)
            return None
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "int" and _DECIMAL.fullmatch(text):
            value = int(text.replace("_", "")[:30])  # 30 digits decide; int() of thousands of digits would raise
            if abs(value) <= _MAX_INTEGER:
                return value
            self.errors.add(location, f"{subject} is a whole number that does not fit into 64 bits.")
            return None
        if kind == "float" and ":" not in text:
            return float(yaml.safe_load(text))
        if kind == "str":
            # YAML 1.1 takes `1e-3` for text.
            return float(text.replace("_", "")) if _EXPONENT.fullmatch(text) else self.read_text(text, location)
        self.errors.add(location, f"{subject} {text!r} is ambiguous: {_ambiguity(kind, text)}")
        return None

    def read_text(self, text: str, location: Location) -> str:
        error = interpolation_error(text)
        if _CONTROL_CHARACTERS.search(text):
            error = f"{text!r} contains control characters, which a terminal would execute; remove them."
        if error:
            self.errors.add(location, error)
        return text

    def reject_tag(self, node: yaml.Node, location: Location) -> None:
        name = node.tag.replace(_CORE_TAG, "!!")
        self.errors.add(location, f"the YAML tag {name!r} is rejected; a recipe has only mappings, lists and values.")

    def locate(self, node: yaml.Node, key: str) -> Location:
        return Location(key=key, file=self.file, line=node.start_mark.line + 1)


def _ambiguity(kind: str, text: str) -> str:
    """Returns an error text about a scalar: its interpretation by YAML 1.1, and how to write the intended value."""
    if kind == "bool":
        truth = "true" if text.lower() in ("on", "yes") else "false"
        return f"YAML reads it as {truth}; write {truth}, or '{text}' in quotes for text."
    if kind == "int":
        return f"YAML reads it as {yaml.safe_load(text)}; write the decimal number, or '{text}' in quotes for text."
    if kind == "float":
        return f"YAML reads it as {yaml.safe_load(text)}; write the number, or '{text}' in quotes for text."
    if kind == "timestamp":
        return f"YAML reads it as a date; write '{text}' in quotes for text."
    return "values are numbers, text, true, false and null; put it in quotes for text."


def interpolation_error(text: str) -> str | None:
    """Returns an error message if `text` has an invalid interpolation, else None. `${vars.width}` is valid."""
    for match in _INTERPOLATION.finditer(text):
        interpolation = match.group()
        if not _REFERENCE.fullmatch(interpolation) or interpolation.startswith(("${hydra.", "${hydra}")):
            return (
                f"{interpolation!r} is rejected; a recipe can refer only to its own keys, such as ${{vars.width}}, "
                "not to the environment, to Hydra or to a resolver."
            )
    return None


def iterate_scalars(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key and the value of every scalar in nested data."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from iterate_scalars(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from iterate_scalars(value, f"{key}.{index}" if key else str(index))
    else:
        yield key, data
