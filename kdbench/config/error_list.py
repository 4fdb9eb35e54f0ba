"""The mistakes of a recipe are collected and told together."""

from __future__ import annotations

import re

from kdbench.errors import ConfigError, Location


class Faults:
    """The faults found so far, one line each; the same line is kept once."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, place: Location | str, text: str) -> None:
        """Adds a fault; `text` alone when it names its place already."""
        line = f"{place}: {text}" if str(place) else text
        number = place.line if isinstance(place, Location) else None
        if number is None and (match := re.match(r"[^:\n]+:(\d+) ", line)):
            number = int(match[1])
        self._found.setdefault(line, number or 0)

    @property
    def lines(self) -> list[str]:
        """In the order of the file's lines; overrides and the file as a whole come first."""
        return sorted(self._found, key=lambda line: self._found[line])

    def raise_any(self, what: str) -> None:
        """Raises all of them as one ConfigError."""
        lines = self.lines
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError("\n".join([f"{what} has {len(lines)} mistakes:", *lines]))
