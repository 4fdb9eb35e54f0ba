"""Reads and type-checks the keys of one recipe mapping. `kdbench.config.schema` declares the keys and their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kdbench.config.compose.hydra import nearest_location
from kdbench.config.error_list import ErrorList
from kdbench.config.schema.keys import Key, plain_keys
from kdbench.errors import Location, did_you_mean, suggest
from kdbench.registry import type_mismatch

Config = TypeVar("Config")


_KEY_LISTING = "docs/recipe.md lists all keys."


@dataclass(frozen=True)
class ParseContext:
    """The state that all parsers of a recipe share.

    Attributes:
        locations: dotted key -> location (file and line, or override) at which the key was set.
        errors: list of all mistakes that were found so far.
        invalid: names such as `source train` and `term kd` whose definition has a mistake. References to them are not
            reported, because they would only repeat that mistake.
    """

    locations: Mapping[str, Location]
    errors: ErrorList = field(default_factory=ErrorList)
    invalid: set[str] = field(default_factory=set)

    def location(self, key: str) -> Location:
        return nearest_location(self.locations, key)

    def error(self, key: str, message: str) -> None:
        self.errors.add(self.location(key), message)


class KeyReader:
    """Reads the keys of one mapping of a recipe. A key with the value null has its default.

    Unknown keys are reported when the reader is created.

    Args:
        data: the mapping. A value of another type is reported and treated as an empty mapping.
        key: dotted key of the mapping; empty for the top level of the recipe.
        subject: name of the mapping in messages, such as "role 'student'".
        keys: name -> declaration of a key that the mapping may have.
        parameters: whether undeclared keys are allowed, as parameters of a registered part. The method `parameters`
            returns these entries.
    """

    def __init__(
        self,
        context: ParseContext,
        data: Any,
        key: str,
        subject: str,
        keys: Mapping[str, Key],
        *,
        parameters: bool = False,
    ) -> None:
        self.context = context
        self.key = key
        self.subject = subject
        self.keys = keys
        self.is_mapping = isinstance(data, Mapping)
        if not self.is_mapping:
            context.error(key, f"{subject} must be a mapping, got {data!r}.")
        self.data: Mapping[str, Any] = data if self.is_mapping else {}
        for name in () if parameters else self.parameters():
            self.error(name, f"unknown key {name!r} in {subject}.{suggest(name, keys, limit=16, listing=_KEY_LISTING)}")

    def subkey(self, name: str) -> str:
        """Returns the dotted key of the entry `name`, such as `models.student.weights` for `weights`."""
        return f"{self.key}.{name}" if self.key else name

    def location(self, name: str = "") -> Location:
        """Returns the location (file and line) of the entry `name`; without `name`, the location of the mapping."""
        return self.context.location(self.subkey(name) if name else self.key)

    def error(self, name: str, message: str) -> None:
        """Reports a mistake in the entry `name` of the mapping, or in the mapping if `name` is empty."""
        self.context.error(self.subkey(name) if name else self.key, message)

    def has(self, name: str) -> bool:
        """Returns whether a key is present and not null."""
        return self.get_raw(name) is not None

    def get_raw(self, name: str) -> Any:
        """Returns the unchecked value of a declared key, or None if the key is absent."""
        assert name in self.keys, f"{name!r} is not a declared key of {self.subject}"
        return self.data.get(name)

    def parameters(self) -> dict[str, Any]:
        """Returns the entries of the mapping whose keys are not declared."""
        return {name: value for name, value in self.data.items() if name not in self.keys}

    def read(self, name: str, default: Any = None) -> Any:
        """Checks and returns the value of a key whose type is a Python type.

        Args:
            default: value that replaces the declared default.

        Returns:
            The value (a list as a tuple), or the default if the key is absent, null or invalid.
        """
        declared, value = self.keys[name], self.get_raw(name)
        if default is None and not declared.required:
            default = declared.default
        if value is None or not self.check_type(name, value) or not self.check_value(name, value):
            return default
        if isinstance(value, str) and declared.takes_strings:
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    def read_plain_fields(self, config_class: type) -> dict[str, Any]:
        """Reads all keys of a dataclass that need no special parser.

        Returns:
            Name of a field -> value, for the constructor of the dataclass.
        """
        return {declared.field: self.read(declared.name) for declared in plain_keys(config_class)}

    def read_config(self, config_class: type[Config]) -> Config | None:
        """Builds a dataclass from the mapping. Returns None if a required key is missing.

        Args:
            config_class: dataclass of the schema whose keys all have Python types.
        """
        values = self.read_plain_fields(config_class)
        return config_class(**values) if self.check_required() else None

    def check_required(self) -> bool:
        """Reports required keys that are missing. Returns whether the mapping has all required keys."""
        missing = [declared for declared in self.keys.values() if declared.required and not self.has(declared.name)]
        for declared in missing if self.is_mapping else ():
            self.error("", f"the key `{declared.name}` ({declared.doc}) is missing. Example: `{declared.example}`.")
        return not missing

    def check_type(self, name: str, value: Any) -> bool:
        """Returns whether a value has the declared type of its key, and reports a value that does not."""
        expected_type = type_mismatch(self.keys[name].type, value)
        if expected_type:
            self.error(name, f"must be {expected_type}, got {value!r}.{_nearest_option(self.keys[name].type, value)}")
        return not expected_type

    def check_value(self, name: str, value: Any) -> bool:
        """Returns whether a value satisfies the declared condition of its key, and reports a value that does not.

        If the value is a mapping, the condition applies to each value in the mapping.
        """
        check = self.keys[name].check
        if check is None:
            return True
        entries = (
            {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        failures = {key: item for key, item in entries.items() if not check.holds(item)}
        for key, item in failures.items():
            self.error(key, f"must be {check.text}, got {item!r}.")
        return not failures

    def read_mapping(self, name: str, example: str) -> Mapping[str, Any]:
        """Returns the value of a key that must be a mapping. The entries are not checked.

        Returns an empty mapping if the key is absent. Reports a value that is not a mapping.
        """
        value = self.get_raw(name)
        if value is not None and not isinstance(value, Mapping):
            self.error(name, f"must be a mapping such as `{example}`, got {value!r}.")
        return value if isinstance(value, Mapping) else {}


def _nearest_option(annotation: str, value: Any) -> str:
    """Returns the hint " Did you mean 'x'?" if the annotation is a Literal with an option near the value, else ""."""
    if not annotation.startswith("Literal[") or not isinstance(value, str):
        return ""
    return did_you_mean(value, [option.strip(" '\"") for option in annotation[8:-1].split(",")])
