"""Takes the keys of a recipe's mapping one by one, checks their types, and finds fault with those left over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.compose.hydra import nearest_location
from kdbench.config.error_list import ErrorList
from kdbench.errors import Location, suggest
from kdbench.registry import type_mismatch

Check = tuple[Callable[[Any], bool], str]
"""A property that a value must have, and the words for it: (lambda n: n > 0, "above 0")."""


POSITIVE: Check = (lambda n: n > 0 and math.isfinite(n), "above 0")


NOT_NEGATIVE: Check = (lambda n: n >= 0 and math.isfinite(n), "0 or more")


AT_LEAST_ONE: Check = (lambda n: n >= 1, "1 or more")


FINITE: Check = (math.isfinite, "finite")


FRACTION: Check = (lambda n: 0 < n < 1, "between 0 and 1, both excluded")


FRACTION_OR_COUNT: Check = (
    lambda n: 0 < n < 1 or n == 1 or (n > 1 and float(n).is_integer()),
    "a share above 0 up to 1, or a whole number of samples (2 or more)",
)


PERCENTAGE: Check = (lambda n: 0 <= n <= 100, "a percentage from 0 to 100")


@dataclass(frozen=True)
class ParseContext:
    """Where keys were written, and the faults found so far."""

    locations: Mapping[str, Location]
    errors: ErrorList = field(default_factory=ErrorList)
    also_known: tuple[str, ...] = ()
    """Keys of the top level that somebody else reads; they are offered where a key is unknown."""

    def location(self, key: str) -> Location:
        return nearest_location(self.locations, key)

    def error(self, key: str, message: str) -> None:
        self.errors.add(self.location(key), message)


class KeyReader:
    """One mapping of the recipe under its dotted key. A null stands for the default."""

    def __init__(self, context: ParseContext, data: Any, key: str, subject: str) -> None:
        self.context = context
        self.key = key
        self.subject = subject
        self.known: list[str] = []
        if not isinstance(data, Mapping):
            context.error(key, f"{subject} must be a mapping, got {data!r}.")
            data = {}
        self.data: Mapping[str, Any] = data

    def subkey(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name

    def location(self, name: str = "") -> Location:
        return self.context.location(self.subkey(name) if name else self.key)

    def error(self, name: str, message: str) -> None:
        self.context.error(self.subkey(name) if name else self.key, message)

    def has(self, name: str) -> bool:
        return self.data.get(name) is not None

    def get_raw(self, name: str, default: Any = None) -> Any:
        """Takes a value as it stands."""
        self.known.append(name)
        value = self.data.get(name)
        return default if value is None else value

    def read(self, name: str, annotation: str, default: Any = None, check: Check | None = None) -> Any:
        """Takes a value of a type, such as `float | None`; a fault yields the default."""
        value = self.get_raw(name)
        if value is None:
            return default
        fault = type_mismatch(annotation, value)
        if fault:
            hint = nearest_option(annotation, value)
            self.error(name, f"must be {fault}, got {value!r}.{hint}")
            return default
        if check is not None and not check[0](value):
            self.error(name, f"must be {check[1]}, got {value!r}.")
            return default
        return value

    def read_strings(self, name: str) -> tuple[str, ...]:
        """Takes a text or a list of texts."""
        value = self.get_raw(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.error(name, f"must be text or a list of texts, got {value!r}.")
            return ()
        return tuple(value)

    def remaining(self) -> dict[str, Any]:
        """The keys that were not taken."""
        return {name: value for name, value in self.data.items() if name not in self.known}

    def finish(self) -> None:
        """Finds fault with every key that nobody took."""
        known = {*self.known, *(() if self.key else self.context.also_known)}
        for name in self.remaining():
            self.error(name, f"unknown key {name!r} in {self.subject}.{suggest(name, known, limit=16)}")


def nearest_option(annotation: str, value: Any) -> str:
    """The nearest word of a Literal."""
    if not annotation.startswith("Literal["):
        return ""
    options = [word.strip(" '\"") for word in annotation[8:-1].split(",")]
    return suggest(str(value), options) if isinstance(value, str) else ""
