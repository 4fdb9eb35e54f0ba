"""Timer for the sections of a training step, such as `data`, `teacher` and `backward`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SectionTimer:
    """Measures which part of the host's time each section of a step takes, such as `data`, `teacher`, `backward`.

    The times are meaningful only if the host waits for the computation, that is, on a CPU and without a compiler.
    Otherwise the timer is disabled. Code inside the step reads `enabled` before it calls `end_section`, so that a
    compiled step contains no call.

    Args:
        enabled: whether time is measured.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds: dict[str, float] = {}
        self.section_start = time.perf_counter()
        self._listener: Callable[[str], None] | None = None

    def end_section(self, name: str) -> None:
        """Adds the time since the last call (or since `restart`) to the section `name`."""
        if not self.enabled:
            return
        if self._listener is not None:
            self._listener(name)
            return
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.section_start
        self.section_start = now

    def restart(self) -> None:
        """Discards the time since the last call of `end_section`, which was spent outside of training."""
        self.section_start = time.perf_counter()

    def fractions(self) -> dict[str, float]:
        """Returns section -> fraction of the measured time since the last call, and resets the measured times."""
        total = sum(self.seconds.values()) or 1.0
        result = {name: round(seconds / total, 4) for name, seconds in self.seconds.items()}
        self.seconds = {}
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: disables the timer inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def forwarded_to(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Context manager: calls `listener` with the name of each section that ends, instead of measuring time."""
        before = self.enabled, self._listener
        self.enabled, self._listener = True, listener
        try:
            yield
        finally:
            self.enabled, self._listener = before
