"""Collects the mistakes of a recipe, so that all are reported together."""

from __future__ import annotations

import re

from kdbench.errors import ConfigError, Location


class ErrorList:
    """Error messages, one line each, without duplicates."""

    def __init__(self) -> None:
        self._line_numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._line_numbers)

    def add(self, location: Location | str, message: str) -> None:
        """Adds one error.

        Args:
            location: empty if the message begins with its location.
        """
        line = f"{location}: {message}" if str(location) else message
        number = location.line if isinstance(location, Location) else None
        if number is None and (match := re.match(r"[^:\n]+:(\d+) ", line)):
            number = int(match[1])
        self._line_numbers.setdefault(line, number or 0)

    @property
    def lines(self) -> list[str]:
        """The errors in the order of the file's lines; errors without a line come first."""
        return sorted(self._line_numbers, key=lambda line: self._line_numbers[line])

    def raise_any(self, subject: str) -> None:
        """Raises all errors as one ConfigError, if there are any.

        Args:
            subject: the name of the file, for the headline of several errors.
        """
        lines = self.lines
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError("\n".join([f"{subject} has {len(lines)} mistakes:", *lines]))
