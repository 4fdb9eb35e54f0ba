"""Takes the keys of a recipe's mapping one by one, checks their types, and finds fault with those left over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.compose.hydra import place_of
from kdbench.config.error_list import Faults
from kdbench.errors import Location, nearest
from kdbench.registry import type_mismatch

Test = tuple[Callable[[Any], bool], str]
"""A property that a value must have, and the words for it: (lambda n: n > 0, "above 0")."""


POSITIVE: Test = (lambda n: n > 0 and math.isfinite(n), "above 0")


NOT_NEGATIVE: Test = (lambda n: n >= 0 and math.isfinite(n), "0 or more")


AT_LEAST_ONE: Test = (lambda n: n >= 1, "1 or more")


FINITE: Test = (math.isfinite, "finite")


SHARE: Test = (lambda n: 0 < n < 1, "between 0 and 1, both excluded")


SHARE_OR_COUNT: Test = (
    lambda n: 0 < n < 1 or n == 1 or (n > 1 and float(n).is_integer()),
    "a share above 0 up to 1, or a whole number of samples (2 or more)",
)


PERCENT: Test = (lambda n: 0 <= n <= 100, "a percentage from 0 to 100")


@dataclass(frozen=True)
class Context:
    """Where keys were written, and the faults found so far."""

    places: Mapping[str, Location]
    faults: Faults = field(default_factory=Faults)
    also_known: tuple[str, ...] = ()
    """Keys of the top level that somebody else reads; they are offered where a key is unknown."""

    def place(self, key: str) -> Location:
        return place_of(self.places, key)

    def fault(self, key: str, text: str) -> None:
        self.faults.add(self.place(key), text)


class Fields:
    """One mapping of the recipe under its dotted key. A null stands for the default."""

    def __init__(self, context: Context, data: Any, key: str, what: str) -> None:
        self.context = context
        self.key = key
        self.what = what
        self.known: list[str] = []
        if not isinstance(data, Mapping):
            context.fault(key, f"{what} must be a mapping, got {data!r}.")
            data = {}
        self.data: Mapping[str, Any] = data

    def path(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name

    def place(self, name: str = "") -> Location:
        return self.context.place(self.path(name) if name else self.key)

    def fault(self, name: str, text: str) -> None:
        self.context.fault(self.path(name) if name else self.key, text)

    def has(self, name: str) -> bool:
        return self.data.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        """Takes a value as it stands."""
        self.known.append(name)
        value = self.data.get(name)
        return default if value is None else value

    def take(self, name: str, annotation: str, default: Any = None, test: Test | None = None) -> Any:
        """Takes a value of a type, such as `float | None`; a fault yields the default."""
        value = self.raw(name)
        if value is None:
            return default
        fault = type_mismatch(annotation, value)
        if fault:
            hint = nearest_option(annotation, value)
            self.fault(name, f"must be {fault}, got {value!r}.{hint}")
            return default
        if test is not None and not test[0](value):
            self.fault(name, f"must be {test[1]}, got {value!r}.")
            return default
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Takes a text or a list of texts."""
        value = self.raw(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fault(name, f"must be text or a list of texts, got {value!r}.")
            return ()
        return tuple(value)

    def rest(self) -> dict[str, Any]:
        """The keys that were not taken."""
        return {name: value for name, value in self.data.items() if name not in self.known}

    def done(self) -> None:
        """Finds fault with every key that nobody took."""
        known = {*self.known, *(() if self.key else self.context.also_known)}
        for name in self.rest():
            self.fault(name, f"unknown key {name!r} in {self.what}.{nearest(name, known, limit=16)}")


def nearest_option(annotation: str, value: Any) -> str:
    """The nearest word of a Literal."""
    if not annotation.startswith("Literal["):
        return ""
    options = [word.strip(" '\"") for word in annotation[8:-1].split(",")]
    return nearest(str(value), options) if isinstance(value, str) else ""
