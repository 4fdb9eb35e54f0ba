"""The mistakes of a recipe are collected and told together."""

from __future__ import annotations

import re

from kdbench.errors import ConfigError, Location


class ErrorList:
    """The faults found so far, one line each; the same line is kept once."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, location: Location | str, message: str) -> None:
        """Adds a fault; `text` alone when it names its place already."""
        line = f"{location}: {message}" if str(location) else message
        number = location.line if isinstance(location, Location) else None
        if number is None and (match := re.match(r"[^:\n]+:(\d+) ", line)):
            number = int(match[1])
        self._found.setdefault(line, number or 0)

    @property
    def lines(self) -> list[str]:
        """In the order of the file's lines; overrides and the file as a whole come first."""
        return sorted(self._found, key=lambda line: self._found[line])

    def raise_any(self, subject: str) -> None:
        """Raises all of them as one ConfigError."""
        lines = self.lines
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError("\n".join([f"{subject} has {len(lines)} mistakes:", *lines]))
