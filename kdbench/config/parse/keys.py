"""Reads and type-checks the keys of one recipe mapping, by their declarations in `kdbench.config.schema`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kdbench.config.compose.hydra import nearest_location
from kdbench.config.error_list import ErrorList
from kdbench.config.schema.keys import Key, plain_keys
from kdbench.errors import Location, suggest
from kdbench.registry import type_mismatch

Config = TypeVar("Config")


@dataclass(frozen=True)
class ParseContext:
    """The locations of all keys (dotted key -> location), and the errors so far."""

    locations: Mapping[str, Location]
    errors: ErrorList = field(default_factory=ErrorList)

    def location(self, key: str) -> Location:
        return nearest_location(self.locations, key)

    def error(self, key: str, message: str) -> None:
        self.errors.add(self.location(key), message)


class KeyReader:
    """Reads the keys of one mapping. A null means the default.

    Unknown keys are reported when the reader is created, so that nothing depends on the order in which keys are read.

    Args:
        data: the mapping; anything else is reported and read as an empty mapping.
        key: its dotted key; empty for the top level.
        subject: the mapping in messages, such as "role 'student'".
        keys: the declared keys.
        parameters: whether other keys are parameters of a part, which `parameters` returns.
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
        if not isinstance(data, Mapping):
            context.error(key, f"{subject} must be a mapping, got {data!r}.")
            data = {}
        self.data: Mapping[str, Any] = data
        for name in () if parameters else self.parameters():
            self.error(name, f"unknown key {name!r} in {subject}.{suggest(name, keys, limit=16)}")

    def subkey(self, name: str) -> str:
        """Returns the dotted key of a key of the mapping."""
        return f"{self.key}.{name}" if self.key else name

    def location(self, name: str = "") -> Location:
        """Returns the location of a key, or of the mapping itself."""
        return self.context.location(self.subkey(name) if name else self.key)

    def error(self, name: str, message: str) -> None:
        """Reports a mistake in the value of a key, or in the mapping itself."""
        self.context.error(self.subkey(name) if name else self.key, message)

    def has(self, name: str) -> bool:
        """Returns whether a key is present and not null."""
        return self.get_raw(name) is not None

    def get_raw(self, name: str) -> Any:
        """Returns the value of a declared key without checks; None if it is absent."""
        assert name in self.keys, f"{name!r} is not a declared key of {self.subject}"
        return self.data.get(name)

    def parameters(self) -> dict[str, Any]:
        """Returns the entries whose keys are not declared."""
        return {name: value for name, value in self.data.items() if name not in self.keys}

    def read(self, name: str, default: Any = None) -> Any:
        """Reads the value of a key with a plain type. Lists become tuples; so does one text in place of a list.

        Args:
            default: in place of the declared default.

        Returns:
            The default if the key is absent, null or invalid.
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
        """Reads every field of a dataclass that one key of a plain type sets.

        Returns:
            Field name -> value, as arguments of the dataclass.
        """
        return {declared.field: self.read(declared.name) for declared in plain_keys(config_class)}

    def read_config(self, config_class: type[Config]) -> Config | None:
        """Reads a dataclass whose keys all have plain types; None if a required key is missing."""
        values = self.read_plain_fields(config_class)
        return config_class(**values) if self.check_required() else None

    def check_required(self) -> bool:
        """Reports required keys that are missing; returns whether there are none."""
        missing = [declared for declared in self.keys.values() if declared.required and not self.has(declared.name)]
        for declared in missing:
            self.error("", f"{self.subject} needs `{declared.name}`: {declared.doc}, such as `{declared.example}`.")
        return not missing

    def check_type(self, name: str, value: Any) -> bool:
        """Reports a value of another type than declared; returns whether the type is right."""
        expected_type = type_mismatch(self.keys[name].type, value)
        if expected_type:
            self.error(name, f"must be {expected_type}, got {value!r}.{_nearest_option(self.keys[name].type, value)}")
        return not expected_type

    def check_value(self, name: str, value: Any) -> bool:
        """Reports a value that fails the declared check; of a mapping, each value that does."""
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
        """Returns a mapping of names to entries, unchecked; empty if it is absent or not a mapping."""
        value = self.get_raw(name)
        if value is not None and not isinstance(value, Mapping):
            self.error(name, f"must be a mapping such as `{example}`, got {value!r}.")
        return value if isinstance(value, Mapping) else {}


def _nearest_option(annotation: str, value: Any) -> str:
    """Returns a hint with the nearest option of a Literal."""
    if not annotation.startswith("Literal[") or not isinstance(value, str):
        return ""
    return suggest(value, [option.strip(" '\"") for option in annotation[8:-1].split(",")])
