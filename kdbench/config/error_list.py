"""Collects the error messages about a recipe, so that all mistakes are reported together."""

from __future__ import annotations

import math
import re

from kdbench.errors import ConfigError, Location


class ErrorList:
    """A list of error messages about one recipe, one line each, without duplicates."""

    def __init__(self) -> None:
        self._line_numbers: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._line_numbers)

    def add(self, location: Location | str, message: str) -> None:
        """Adds one error message.

        Args:
            location: location of the mistake, which precedes the message; empty if the message contains it.
        """
        line = f"{location}: {message}" if str(location) else message
        number = location.line if isinstance(location, Location) else None
        if number is None and (match := re.match(r"[^:\n]+:(\d+) ", line)):
            number = int(match[1])
        self._line_numbers.setdefault(line, math.inf if number is None else number)

    @property
    def lines(self) -> list[str]:
        """Error messages in the order of their line numbers. Messages without a line number come last."""
        return sorted(self._line_numbers, key=lambda line: self._line_numbers[line])

    def raise_any(self, subject: str) -> None:
        """Raises all errors as one ConfigError, if there are any.

        Args:
            subject: name of the recipe's file, for the headline above several error messages.
        """
        lines = self.lines
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError("\n".join([f"{subject} has {len(lines)} mistakes:", *lines]))
