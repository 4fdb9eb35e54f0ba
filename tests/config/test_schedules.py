"""Schedules equal their formulas at every position."""

from __future__ import annotations

import math

import pytest

from kdbench.config.schedules import build_schedule
from kdbench.config.schema import PartConfig


def values(schedule: dict | float | None, length: int) -> list[float]:
    schedule_at = build_schedule(schedule)
    return [schedule_at(position, length) for position in range(length)]


def test_number_is_constant_and_none_is_one():
    assert values(0.25, 3) == [0.25, 0.25, 0.25]
    assert values(None, 2) == [1.0, 1.0]


def test_linear_interpolates_and_then_stays_at_end():
    assert values({"type": "linear", "start": 0, "end": 1, "over": 4}, 6) == [0, 0.25, 0.5, 0.75, 1, 1]


def test_linear_without_over_spans_the_stage():
    assert values({"type": "linear"}, 4) == [1, 0.75, 0.5, 0.25]


def test_cosine_equals_its_formula():
    for position, value in enumerate(values({"type": "cosine", "start": 2, "end": 1}, 8)):
        assert value == pytest.approx(1 + (1 + math.cos(math.pi * position / 8)) / 2)
    assert build_schedule({"type": "cosine", "over": 3})(7, 9) == pytest.approx(0.0)


def test_step_multiplies_at_each_milestone():
    schedule_at = build_schedule({"type": "step", "milestones": [150, 180, 210], "gamma": 0.1})
    expected = {0: 1, 149: 1, 150: 0.1, 179: 0.1, 180: 0.01, 210: 0.001, 239: 0.001}
    assert {position: schedule_at(position, 240) for position in expected} == pytest.approx(expected)


def test_warmup_equals_the_released_code_of_dkd():
    # mdistiller: min(kwargs["epoch"] / warmup, 1.0); its first epoch is number 1
    expected = [5.0 * min(epoch / 20, 1.0) for epoch in range(1, 31)]
    assert values({"type": "warmup", "over": 20, "value": 5.0}, 30) == pytest.approx(expected)


def test_chain_runs_each_part_over_its_own_length():
    parts = [{"type": "linear", "start": 0, "end": 1, "length": 2}, {"type": "constant", "value": 1, "length": 1}]
    parts.append({"type": "linear", "start": 1, "end": 0})
    assert values({"type": "chain", "parts": parts}, 7) == [0, 0.5, 1, 1, 0.75, 0.5, 0.25]


def test_warmup_of_a_scheduler_does_not_shift_milestones():
    config = PartConfig(type="step", params={"milestones": [3], "gamma": 0.5, "warmup": 2})
    schedule_at = build_schedule(config)
    assert [schedule_at(p, 5) for p in range(5)] == [0.5, 1, 1, 0.5, 0.5]


def test_schedule_counts_epochs_or_steps():
    assert build_schedule({"type": "cosine"}).by == "epoch"
    assert build_schedule({"type": "cosine", "by": "step", "warmup": 5}).by == "step"
    assert build_schedule(0.5).by == "epoch"


def test_ramp_up_equals_its_formula():
    for position, value in enumerate(values({"type": "ramp_up", "over": 4, "value": 20}, 8)):
        assert value == pytest.approx(20 * math.exp(-5 * (1 - min(position / 4, 1)) ** 2))
    assert build_schedule({"type": "ramp_up", "over": 5})(0, 9) == pytest.approx(math.exp(-5))
