"""The training loop of one stage: feeds batches to the runner and triggers log lines, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kdbench.data.loading.batch import Batch, MicroBatch
from kdbench.data.loading.source import Source
from kdbench.engine.state.run_state import History
from kdbench.engine.train.runner import Runner

DEFAULT_MINUTES = 10.0
"""Minutes between checkpoints, in addition to the checkpoint after every evaluation."""


class TrainingLog(Protocol):
    """Protocol of the log that the training loop writes to."""

    def progress(self, steps_done: int, phase: str = "") -> None: ...
    def train(self, record: Any) -> None: ...


class BatchFeed(Protocol):
    """Protocol of an object that yields the micro-batches of every step.

    Attributes:
        main: name of the source (dataset split with its loader) whose rows are counted in `images_per_s`.
    """

    main: str

    def windows(self, step: int) -> Iterator[list[MicroBatch]]: ...


class Feed:
    """Yields the batches of all sources. A batch depends on the seed and the step number only.

    Args:
        sources: name -> source that a step reads.
        main: name of the source whose length defines an epoch. Each other source starts again after its own last
            batch.
        accumulate: micro-batches per step. The last step of an epoch has the micro-batches that remain, which can be
            fewer.
    """

    def __init__(self, sources: Mapping[str, Source], main: str, accumulate: int = 1) -> None:
        self.sources, self.main, self.accumulate = dict(sources), main, accumulate
        self.batches_per_epoch = sources[main].steps_per_epoch
        self.steps_per_epoch = -(-self.batches_per_epoch // accumulate)

    def first_microbatch(self, step: int) -> int:
        """Returns the number of the first micro-batch of a step, counted from the start of the stage."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + step_in_epoch * self.accumulate

    def windows(self, step: int) -> Iterator[list[MicroBatch]]:
        """Yields one list of micro-batches per step, beginning with step `step`. The iterator never ends."""
        first = self.first_microbatch(step)
        streams = {name: self._stream(source, first) for name, source in self.sources.items()}
        while True:
            remaining = self.batches_per_epoch - first % self.batches_per_epoch
            count = min(self.accumulate, remaining)
            yield [{name: next(stream) for name, stream in streams.items()} for _ in range(count)]
            first += count

    @staticmethod
    def _stream(source: Source, first: int) -> Iterator[Batch]:
        epoch, start = divmod(first, source.steps_per_epoch)
        while True:
            yield from source.batches(epoch, start)
            epoch, start = epoch + 1, 0


@dataclass
class TrainingLoop:
    """Trains the network of one stage with a runner, and triggers log lines, evaluations and checkpoints.

    Attributes:
        evaluate: function of the number of finished epochs that evaluates the networks, logs the metrics and keeps
            the best epoch.
        checkpoint: function that saves a checkpoint. It is called after all log lines up to the current step are
            written.
        steps_before: number of steps in all earlier stages.
    """

    runner: Runner
    feed: BatchFeed
    log: TrainingLog
    history: History
    evaluate: Callable[[int], None]
    checkpoint: Callable[[], None]
    steps_before: int = 0

    def run(self) -> None:
        """Trains from the runner's position to the end of the stage."""
        runner, progress = self.runner, self.runner.progress
        windows = self.feed.windows(progress.steps_done)
        last_checkpoint = time.monotonic()
        samples, interval_start = 0, time.perf_counter()
        while progress.steps_done < progress.total_steps:
            window = next(windows)
            samples += sum(batches[self.feed.main].size for batches in window)
            runner.timer.end_section("data")
            runner.begin_step()
            runner.step(window)
            step = progress.steps_done
            if progress.logs_after(step):
                self._log(samples, time.perf_counter() - interval_start)
                samples, interval_start = 0, time.perf_counter()
            self.log.progress(step)
            evaluates = progress.evaluates_after(step)
            if evaluates or self._checkpoint_is_due(step, last_checkpoint):
                pause_start = time.perf_counter()
                runner.check_finite_weights()
                if evaluates:
                    runner.eager.sync_buffers()
                    self.log.progress(step, "evaluating")
                    self.evaluate(-(-step // progress.steps_per_epoch))
                self.checkpoint()
                last_checkpoint = time.monotonic()
                # Evaluation and checkpoint count neither as training time nor as a section of the step.
                interval_start += time.perf_counter() - pause_start
                runner.timer.restart()

    def _checkpoint_is_due(self, step: int, last_checkpoint: float) -> bool:
        """Returns whether the recipe's `checkpoint_every` requires a checkpoint after a step without evaluation."""
        every = self.runner.stage.checkpoint_every
        steps = every.get("steps")
        minutes = every.get("minutes", math.inf if steps else DEFAULT_MINUTES)
        if steps and step % int(steps) == 0:
            return True
        if minutes == math.inf:
            return False
        world = self.runner.world
        if world.size > 1 and step % self.runner.stage.log_every:
            return False  # the clocks of the ranks differ, so they agree by a broadcast, once per log interval only
        return bool(world.broadcast((time.monotonic() - last_checkpoint) > 60 * minutes))

    def _log(self, samples: int, seconds: float) -> None:
        runner = self.runner
        _, values = runner.read_log()
        self.history.seconds += seconds
        self.log.train(
            {
                "stage": runner.stage.name,
                "epoch": runner.progress.epoch,
                "step": self.steps_before + runner.progress.steps_done,
                **values,
                "images_per_s": round(samples * runner.world.size / seconds, 1),
                "seconds": round(self.history.seconds, 2),
            }
        )
