"""Interface through which the engine sends messages to the user and entries to the run's manifest.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Notices(Protocol):
    """Protocol of an object that receives messages to the user and manifest entries during training."""

    def notice(self, text: str) -> None:
        """Shows one sentence to the user."""
        ...

    def record(self, entries: Mapping[str, Any]) -> None:
        """Merges entries into the record of the current process in the run's manifest.json."""
        ...


class PrintedNotices:
    """Prints messages and discards manifest entries. Used to train without a run folder."""

    def notice(self, text: str) -> None:
        print(text)

    def record(self, entries: Mapping[str, Any]) -> None:
        """Discards the entries, because there is no manifest."""


class CollectedNotices:
    """Collects messages and manifest entries in lists."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.entries: list[Mapping[str, Any]] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)

    def record(self, entries: Mapping[str, Any]) -> None:
        self.entries.append(entries)
