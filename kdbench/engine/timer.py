"""Time of the sections of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SectionTimer:
    """Attributes the host's time to the sections of a step, such as `data`, `teacher`, `backward`.

    The times are meaningful only where the host computes in step with the device, that is on a CPU and without a
    compiler. Elsewhere the timer is disabled; code inside the step reads `enabled` before it calls `end_section`, so
    that a compiled step contains no call.

    Args:
        enabled: whether time is measured.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds: dict[str, float] = {}
        self.section_start = time.perf_counter()
        self._listener: Callable[[str], None] | None = None

    def end_section(self, name: str) -> None:
        """Adds the time since the last call (or `restart`) to a section."""
        if not self.enabled:
            return
        if self._listener is not None:
            self._listener(name)
            return
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.section_start
        self.section_start = now

    def restart(self) -> None:
        """Leaves out the time since the last call: it was spent outside of training."""
        self.section_start = time.perf_counter()

    def fractions(self) -> dict[str, float]:
        """Returns each section's fraction of the time since the last call, and resets the timer."""
        total = sum(self.seconds.values()) or 1.0
        result = {name: round(seconds / total, 4) for name, seconds in self.seconds.items()}
        self.seconds = {}
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignores the ends of sections inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def forwarded_to(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Calls `listener` at the end of every section inside the block, instead of measuring time."""
        before = self.enabled, self._listener
        self.enabled, self._listener = True, listener
        try:
            yield
        finally:
            self.enabled, self._listener = before
