"""One stage from its first step to its last: batches in, log lines, evaluations and checkpoints out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kdbench.data.loading.source import Source
from kdbench.engine.network.operands import Batch
from kdbench.engine.train.runner import Runner

DEFAULT_MINUTES = 10.0  # between checkpoints, besides the one after every evaluation


class TrainingLog(Protocol):
    """What training needs of a tracker."""

    def progress(self, steps_done: int, phase: str = "") -> None: ...
    def train(self, record: Any) -> None: ...


class BatchFeed(Protocol):
    """What training needs of a feed: the source whose rows it counts, and the micro-batches of every step."""

    main: str

    def windows(self, step: int) -> Iterator[list[Batch]]: ...


class Feed:
    """The batches of all sources at any step, as functions of the step alone.

    Args:
        sources: those that the step reads.
        main: the one whose length is an epoch; the others go round at their own length.
        accumulate: micro-batches per step; the last step of an epoch takes what is left.
    """

    def __init__(self, sources: Mapping[str, Source], main: str, accumulate: int = 1) -> None:
        self.sources, self.main, self.accumulate = dict(sources), main, accumulate
        self.batches_per_epoch = sources[main].steps_per_epoch
        self.steps_per_epoch = -(-self.batches_per_epoch // accumulate)

    def first_microbatch(self, step: int) -> int:
        """Returns the number of the first micro-batch of a step, counted from the begin of the stage."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + inside * self.accumulate

    def windows(self, step: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of every step from `step` on, without end."""
        first = self.first_microbatch(step)
        streams = {name: self._stream(source, first) for name, source in self.sources.items()}
        while True:
            left = self.batches_per_epoch - first % self.batches_per_epoch
            count = min(self.accumulate, left)
            yield [{name: next(stream) for name, stream in streams.items()} for _ in range(count)]
            first += count

    @staticmethod
    def _stream(source: Source, first: int) -> Iterator[Any]:
        epoch, start = divmod(first, source.steps_per_epoch)
        while True:
            yield from source.batches(epoch, start)
            epoch, start = epoch + 1, 0


@dataclass
class History:
    """What a run has found so far; it goes into every checkpoint.

    seconds: time in training steps. evaluations: all of them, in order. best: the chosen evaluation of each stage.
    frozen: what roles that do not move reached, by role and split.
    """

    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    frozen: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass
class TrainingLoop:
    """Drives one runner through one stage.

    evaluate: called after an epoch with its number (finished epochs); it logs, and keeps the best.
    checkpoint: called when everything may be written down; the logs are complete up to here.
    """

    runner: Runner
    feed: BatchFeed
    log: TrainingLog
    history: History
    evaluate: Callable[[int], None]
    checkpoint: Callable[[], None]
    steps_before: int = 0

    def run(self) -> None:
        """Goes on from where the runner stands, to the end of the stage."""
        runner, stage = self.runner, self.runner.stage
        per_epoch = runner.steps_per_epoch
        windows = self.feed.windows(runner.steps_done)
        every = stage.checkpoint_every
        minutes = every.get("minutes", math.inf if "steps" in every else DEFAULT_MINUTES)
        saved = time.monotonic()
        images = 0
        began = time.perf_counter()
        while runner.steps_done < runner.total_steps:
            window = next(windows)
            images += sum(next(iter(batch[self.feed.main].values())).shape[0] for batch in window)
            runner.lap("data")
            runner.begin_step()
            runner.step(window)
            done = runner.steps_done
            if runner.logs_at(done):
                now = time.perf_counter()
                self._log(images, now - began)
                images, began = 0, time.perf_counter()
            self.log.progress(done)
            at_end = done == runner.total_steps
            epoch_over = done % per_epoch == 0
            if at_end or (epoch_over and (done // per_epoch) % stage.eval_every == 0):
                paused = time.perf_counter()
                runner.check_finite_weights()
                runner.sync_buffers()
                self.log.progress(done, "evaluating")
                self.evaluate(-(-done // per_epoch))
                self.checkpoint()
                saved = time.monotonic()
                began += time.perf_counter() - paused
                runner.forget_lap()
            elif self._due(done, every.get("steps"), minutes, saved):
                paused = time.perf_counter()
                runner.check_finite_weights()
                self.checkpoint()
                saved = time.monotonic()
                began += time.perf_counter() - paused
                runner.forget_lap()

    def _due(self, done: int, steps: float | None, minutes: float, saved: float) -> bool:
        if steps and done % int(steps) == 0:
            return True
        if minutes == math.inf:
            return False
        world = self.runner.world
        if world.size > 1 and done % self.runner.stage.log_every:
            return False  # the ranks' clocks differ: they agree once per log interval, not in every step
        return bool(world.broadcast((time.monotonic() - saved) > 60 * minutes))

    def _log(self, images: int, seconds: float) -> None:
        runner = self.runner
        _, values = runner.read()
        self.history.seconds += seconds
        self.log.train(
            {
                "stage": runner.stage.name,
                "epoch": (runner.steps_done - 1) // runner.steps_per_epoch + 1,
                "step": self.steps_before + runner.steps_done,
                **values,
                "images_per_s": round(images * runner.world.size / seconds, 1),
                "seconds": round(self.history.seconds, 2),
            }
        )
