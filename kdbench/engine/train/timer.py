"""Where the time of a step goes."""

from __future__ import annotations

import time


class SectionTimer:
    """Shares of the time between two readings, by part; only where the host runs in step with the device (CPU)."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[part] = self.spent.get(part, 0.0) + now - self.last
        self.last = now

    def read(self) -> dict[str, float]:
        total = sum(self.spent.values()) or 1.0
        shares = {part: round(seconds / total, 4) for part, seconds in self.spent.items()}
        self.spent = {}
        return shares
