"""Messages to the user and entries of the manifest, as far as the engine produces them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Notices(Protocol):
    """Receives what the engine reports about a run while it trains."""

    def notice(self, text: str) -> None:
        """Shows one sentence to the user."""
        ...

    def record(self, entries: Mapping[str, Any]) -> None:
        """Merges entries about the present session into the run's manifest."""
        ...


class PrintedNotices:
    """Prints notices and keeps no manifest; for runners that are built outside of a run."""

    def notice(self, text: str) -> None:
        print(text)

    def record(self, entries: Mapping[str, Any]) -> None:
        """Drops the entries: there is no manifest."""


class CollectedNotices:
    """Keeps notices and manifest entries in lists."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.entries: list[Mapping[str, Any]] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)

    def record(self, entries: Mapping[str, Any]) -> None:
        self.entries.append(entries)
