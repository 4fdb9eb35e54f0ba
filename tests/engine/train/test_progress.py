"""Position within a stage, compared with an enumeration of its steps, epoch by epoch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from helpers.recipes import build_stage, plugin_registration  # noqa: F401
from kdbench.config.schedules import By, Schedule, build_schedule
from kdbench.config.schema import PartConfig
from kdbench.engine.train.progress import Progress


@dataclass(frozen=True)
class Step:
    """One step of an enumerated stage: its epoch (from 0), and whether log line and evaluation follow it."""

    epoch: int
    logs: bool
    evaluates: bool


def enumerate_steps(progress: Progress) -> list[Step]:
    """Lists the steps of a stage by counting up epochs and the steps in them."""
    steps: list[Step] = []
    epoch = 0
    while len(steps) < progress.total_steps:
        remaining = progress.total_steps - len(steps)
        for step_in_epoch in range(1, min(progress.steps_per_epoch, remaining) + 1):
            ends_epoch = step_in_epoch == progress.steps_per_epoch
            ends_stage = len(steps) + 1 == progress.total_steps
            evaluates = ends_stage or (ends_epoch and (epoch + 1) % progress.eval_every == 0)
            logs = evaluates or (len(steps) + 1) % progress.log_every == 0
            steps.append(Step(epoch, logs, evaluates))
        epoch += 1
    return steps


STAGES = [
    Progress(total_steps, steps_per_epoch, log_every, eval_every)
    for total_steps, steps_per_epoch, log_every, eval_every in itertools.product(
        (1, 5, 12, 13), (1, 4, 5), (1, 3, 100), (1, 2, 3)
    )
]


@pytest.mark.parametrize("progress", STAGES, ids=repr)
def test_log_lines_evaluations_and_epochs_equal_those_of_the_enumeration(progress):
    steps = enumerate_steps(progress)
    numbers = range(1, progress.total_steps + 1)
    assert [progress.evaluates_after(number) for number in numbers] == [step.evaluates for step in steps]
    assert [progress.logs_after(number) for number in numbers] == [step.logs for step in steps]
    assert [progress.epoch_of(number) for number in numbers] == [step.epoch + 1 for step in steps]
    assert progress.epochs == steps[-1].epoch + 1


@pytest.mark.parametrize(("key", "value"), [("log_every", 4), ("eval_every", 1), ("steps_per_epoch", 3)])
def test_each_interval_has_an_effect(key, value):
    """Negative control of the test above: an interval that was ignored would give equal steps."""
    values = {"total_steps": 13, "steps_per_epoch": 4, "log_every": 3, "eval_every": 2}
    assert enumerate_steps(Progress(**values)) != enumerate_steps(Progress(**(values | {key: value})))


def test_last_epoch_may_be_cut_short():
    progress = Progress(total_steps=10, steps_per_epoch=4, log_every=100, eval_every=2)
    assert progress.epochs == 3
    assert [step for step in range(1, 11) if progress.evaluates_after(step)] == [8, 10]
    complete = Progress(total_steps=12, steps_per_epoch=4, log_every=100, eval_every=2)  # control
    assert complete.epochs == 3 and [step for step in range(1, 13) if complete.evaluates_after(step)] == [8, 12]


def test_stage_without_steps_has_no_epoch():
    assert Progress(total_steps=0, steps_per_epoch=4, log_every=1, eval_every=1).epochs == 0


def test_epoch_is_that_of_the_last_completed_step():
    progress = Progress(total_steps=12, steps_per_epoch=4, log_every=1, eval_every=1)
    epochs = []
    for steps_done in (1, 4, 5, 12):
        progress.steps_done = steps_done
        epochs.append(progress.epoch)
    assert epochs == [1, 1, 2, 3]


class RecordingSchedule:
    """Returns the fraction of the stage and keeps its arguments."""

    def __init__(self, by: By) -> None:
        self.by: By = by
        self.arguments: list[tuple[float, float]] = []

    def __call__(self, position: float, length: float) -> float:
        self.arguments.append((position, length))
        return position / length


@pytest.mark.parametrize(("total_steps", "steps_per_epoch"), [(12, 4), (10, 4), (3, 5), (4, 1)])
@pytest.mark.parametrize("by", ["step", "epoch"])
def test_schedule_receives_position_and_length_of_the_coming_step(by, total_steps, steps_per_epoch):
    progress = Progress(total_steps, steps_per_epoch, log_every=1, eval_every=1)
    schedule, values = RecordingSchedule(by), []
    for steps_done in range(total_steps):
        progress.steps_done = steps_done
        values.append(progress.value_of(schedule))
    if by == "step":
        expected = [(step, total_steps) for step in range(total_steps)]
    else:
        steps = enumerate_steps(progress)
        expected = [(step.epoch, steps[-1].epoch + 1) for step in steps]
    assert schedule.arguments == expected
    assert values == [position / length for position, length in expected]


def test_step_and_epoch_schedules_differ_within_an_epoch():
    """Negative control of the test above."""
    progress = Progress(total_steps=12, steps_per_epoch=4, log_every=1, eval_every=1, steps_done=5)
    linear = {"start": 0.0, "end": 1.0}
    schedules: list[Schedule] = [
        build_schedule(PartConfig(type="linear", params={**linear, "by": by})) for by in ("step", "epoch")
    ]
    assert [progress.value_of(schedule) for schedule in schedules] == pytest.approx([5 / 12, 1 / 3])


@pytest.mark.parametrize("length", ["epochs: 3\n", "steps: 10\n"])
def test_runner_counts_steps_as_the_recipe_states(length):
    text = "student: t_linear\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nbatch_size: 16\n"
    progress = build_stage(text + length + "log_every: 3\neval_every: 2\n").runner.progress
    total = 12 if length.startswith("epochs") else 10
    assert progress == Progress(total, steps_per_epoch=4, log_every=3, eval_every=2)
