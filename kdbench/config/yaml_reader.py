"""Reads a YAML file of ours into plain data with the line of every key, and refuses what YAML or Hydra would misread.

Only mappings, lists and scalars get through: no tags, no `hydra:` or `_target_` node, no resolver such as
`${oc.env:HOME}`, no key given twice, and none of YAML 1.1's surprises (`on` is true, `010` is 8, `1:30` is 90).
All faults of a file are reported together.
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

_CORE = "tag:yaml.org,2002:"


_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+|[-+]?\.\d+[eE][-+]?\d+")


_INTERPOLATION = re.compile(r"\$\{[^}]*\}?")


_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.[\w-]+)*\}")


_HYDRA_KEY = re.compile(r"_\w+_")


_RESOLVER = yaml.SafeLoader("")


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


_MAX_WHOLE = 2**63 - 1


_MAX_NODES = 100_000  # a file of nested aliases can stand for more nodes than there is memory


@dataclass(frozen=True)
class YamlSource:
    """One YAML file: its data, and where each dotted key was written (`terms.kd.weight`, `augment.0`)."""

    file: str
    data: Mapping[str, Any]
    locations: Mapping[str, Location]


def display_path(path: Path) -> str:
    """The path as messages give it: relative to the working folder when it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def read_yaml(path: Path) -> YamlSource:
    """Reads one file.

    Raises:
        ConfigError: it cannot be read, is no YAML mapping, or holds something that is refused.
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
    """Reads YAML text; `file` is its name in messages."""
    try:
        return _parsed(text, file)
    except RecursionError:
        raise ConfigError(f"{file}: lists and mappings stand within each other more deeply than can be read.") from None


def _parsed(text: str, file: str) -> YamlSource:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{Location(file=file, line=line)}: this is not valid YAML: {said}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: this is not valid YAML: {error}") from None
    if root is None:
        raise ConfigError(f"{file}: the file is empty; a mapping of keys such as `dataset:` and `terms:` was expected.")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file}:{root.start_mark.line + 1}: a mapping such as `dataset: digits` was expected.")
    reader = _NodeReader(file)
    data = reader.value(root, "")
    reader.faults.raise_any(file)
    return YamlSource(file, data, reader.places)


class _NodeReader:
    def __init__(self, file: str) -> None:
        self.file = file
        self.faults = ErrorList()
        self.places: dict[str, Location] = {}
        self.open: list[yaml.Node] = []
        self.count = 0

    def value(self, node: yaml.Node, key: str) -> Any:
        place = self.places.get(key) or self.place(node, key)
        self.places.setdefault(key, place)
        self.count += 1
        if self.count > _MAX_NODES:
            raise ConfigError(f"{place}: the file unfolds to more than {_MAX_NODES} values; use fewer aliases.")
        if node in self.open:
            raise ConfigError(f"{place}: an alias that contains itself is refused.")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, place)
        expected = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"{_CORE}{expected}":
            self.tag(node, place)
            return None
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, key)
            return [self.value(child, f"{key}.{i}" if key else str(i)) for i, child in enumerate(node.value)]
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = self.name(name_node, key)
            if name is None:
                continue
            dotted = f"{key}.{name}" if key else name
            place = self.place(name_node, dotted)
            if name in result:
                first = self.places[dotted].line
                self.faults.add(place, f"the key {name!r} is given twice, first on line {first}; keep one of them.")
                continue
            if (not key and name in ("hydra", "defaults")) or _HYDRA_KEY.fullmatch(name):
                reach = "a recipe is data: it cannot reach Hydra's own node or call Python"
                self.faults.add(place, f"the key {name!r} is refused; {reach}. Remove it.")
                continue
            self.places[dotted] = place
            result[name] = self.value(value_node, dotted)
        return result

    def name(self, node: yaml.Node, parent: str) -> str | None:
        place = self.place(node, parent)
        if not isinstance(node, yaml.ScalarNode):
            self.faults.add(place, "a key must be plain text.")
            return None
        if node.value == "<<":
            self.faults.add(place, "merge keys (`<<`) are refused; write the keys out.")
            return None
        value = self.scalar(node, place, what="the key")
        if isinstance(value, str):
            return value
        if value is not None or node.tag == f"{_CORE}null":
            self.faults.add(place, f"the key {node.value!r} must be text, such as \"'{node.value}'\" in quotes.")
        return None

    def scalar(self, node: yaml.ScalarNode, place: Location, what: str = "the value") -> Any:
        text, kind = node.value, node.tag.removeprefix(_CORE)
        if node.tag == "!":
            self.tag(node, place)
            return None
        if node.style is not None:
            if kind != "str":
                self.tag(node, place)
            return self.text(text, place)
        if node.tag != _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)):
            self.tag(node, place)
            return None
        fault = None
        if kind == "null":
            return None
        if kind == "bool":
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            truth = "true" if text.lower() in ("on", "yes") else "false"
            fault = f"YAML reads it as {truth}; write {truth}, or '{text}' in quotes for text."
        elif kind == "int":
            if _DECIMAL.fullmatch(text):
                value = int(text.replace("_", "")[:30])
                if abs(value) <= _MAX_WHOLE:
                    return value
                self.faults.add(place, f"{what} is a whole number of more than 64 bits.")
                return None
            meant = yaml.safe_load(text)
            fault = f"YAML reads it as {meant}; write the decimal number, or '{text}' in quotes for text."
        elif kind == "float":
            if ":" not in text:
                return float(yaml.safe_load(text))
            fault = f"YAML reads it as {yaml.safe_load(text)}; write the number, or '{text}' in quotes for text."
        elif kind == "timestamp":
            fault = f"YAML reads it as a date; write '{text}' in quotes for text."
        elif kind == "str":
            return float(text.replace("_", "")) if _EXPONENT.fullmatch(text) else self.text(text, place)
        else:
            fault = "only numbers, text, true, false and null are values here; put it in quotes for text."
        self.faults.add(place, f"{what} {text!r} is ambiguous: {fault}")
        return None

    def text(self, text: str, place: Location) -> str:
        fault = interpolation_error(text)
        if _CONTROLS.search(text):
            fault = f"{text!r} holds control characters, which a terminal would take for commands; take them out."
        if fault:
            self.faults.add(place, fault)
        return text

    def tag(self, node: yaml.Node, place: Location) -> None:
        name = node.tag.replace(_CORE, "!!")
        self.faults.add(place, f"the YAML tag {name!r} is refused; a recipe holds only mappings, lists and values.")

    def place(self, node: yaml.Node, key: str) -> Location:
        return Location(key=key, file=self.file, line=node.start_mark.line + 1)


def interpolation_error(text: str) -> str | None:
    """Says why an interpolation in `text` is refused; plain references such as `${vars.width}` are fine."""
    for match in _INTERPOLATION.finditer(text):
        found = match.group()
        if not _REFERENCE.fullmatch(found) or found.startswith(("${hydra.", "${hydra}")):
            return (
                f"{found!r} is refused; only references to the recipe's own keys, such as ${{vars.width}}, are "
                "resolved, never the environment, Hydra or another resolver."
            )
    return None


def iterate_scalars(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of nested data with its dotted key."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from iterate_scalars(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list | tuple):
        for position, value in enumerate(data):
            yield from iterate_scalars(value, f"{key}.{position}" if key else str(position))
    else:
        yield key, data
