"""The position of a run within a stage, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from kdbench.config.schedules import Schedule


@dataclass
class Progress:
    """Position within a stage, counted in optimizer steps. It determines the next batch of a resumed run.

    Attributes:
        total_steps: optimizer steps of the stage.
        steps_per_epoch: optimizer steps in one epoch of the training source.
        log_every: steps between two log lines.
        eval_every: epochs between two evaluations.
        steps_done: completed steps.
    """

    total_steps: int
    steps_per_epoch: int
    log_every: int
    eval_every: int
    steps_done: int = 0

    @property
    def epochs(self) -> int:
        """Number of epochs of the stage. The last epoch is incomplete if the recipe states a number of steps."""
        return -(-self.total_steps // self.steps_per_epoch) if self.total_steps else 0

    @property
    def epoch(self) -> int:
        """The epoch (from 1) of the last completed step."""
        return self.epoch_of(self.steps_done)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch (from 1) that contains a step (from 1)."""
        return (step - 1) // self.steps_per_epoch + 1

    def evaluates_after(self, step: int) -> bool:
        """Returns whether an evaluation follows a step: every `eval_every` epochs, and at the end of the stage."""
        epochs, remainder = divmod(step, self.steps_per_epoch)
        return step == self.total_steps or (remainder == 0 and epochs % self.eval_every == 0)

    def logs_after(self, step: int) -> bool:
        """Returns whether a log line follows a step: every `log_every` steps, and before each evaluation."""
        return step % self.log_every == 0 or self.evaluates_after(step)

    def value_of(self, schedule: Schedule) -> float:
        """Returns the value of a schedule at the next step."""
        if schedule.by == "epoch":
            return schedule(self.steps_done // self.steps_per_epoch, self.epochs)
        return schedule(self.steps_done, self.total_steps)
