"""Section timer: attributes time to the sections of a step, can pause, and can forward their ends."""

from __future__ import annotations

import itertools

import pytest

from helpers.recipes import build_stage, plugin_registration  # noqa: F401
from kdbench.engine.timer import SectionTimer


class FakeClock:
    """Replaces `time.perf_counter`; the test advances it."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("kdbench.engine.timer.time.perf_counter", clock)
    return clock


def end_sections(timer: SectionTimer, clock: FakeClock, *sections: tuple[str, float]) -> None:
    for name, seconds in sections:
        clock.seconds += seconds
        timer.end_section(name)


def test_time_since_the_last_end_belongs_to_the_section_that_ends(clock):
    timer = SectionTimer()
    end_sections(timer, clock, ("data", 1.0), ("student", 2.0), ("data", 0.5))
    assert timer.seconds == pytest.approx({"data": 1.5, "student": 2.0})


def test_fractions_add_up_to_one_and_reset_the_timer(clock):
    timer = SectionTimer()
    assert timer.fractions() == {}
    end_sections(timer, clock, ("data", 1.0), ("student", 3.0))
    assert timer.fractions() == {"data": 0.25, "student": 0.75}
    assert timer.seconds == {} and timer.fractions() == {}
    end_sections(timer, clock, ("backward", 5.0))
    assert timer.fractions() == {"backward": 1.0}


def test_restart_leaves_out_the_time_since_the_last_end(clock):
    timer, control = SectionTimer(), SectionTimer()
    clock.seconds += 10.0
    timer.restart()
    clock.seconds += 1.0
    timer.end_section("data")
    control.end_section("data")
    assert timer.seconds == {"data": 1.0} and control.seconds == {"data": 11.0}


def test_disabled_timer_measures_nothing(clock):
    timer, control = SectionTimer(enabled=False), SectionTimer()
    for each in (timer, control):
        end_sections(each, clock, ("data", 1.0))
    assert timer.seconds == {} and timer.fractions() == {} and control.seconds


def test_disabled_timer_reads_no_clock(monkeypatch):
    timer, control = SectionTimer(enabled=False), SectionTimer()

    def fail() -> float:
        raise AssertionError("the timer reads the clock")

    monkeypatch.setattr("kdbench.engine.timer.time.perf_counter", fail)
    timer.end_section("data")
    with pytest.raises(AssertionError, match="reads the clock"):
        control.end_section("data")


def test_paused_timer_ignores_ends_and_attributes_their_time_to_the_next_section(clock):
    timer = SectionTimer()
    with timer.paused():
        assert not timer.enabled
        end_sections(timer, clock, ("student", 2.0))
    assert timer.enabled and timer.seconds == {}
    end_sections(timer, clock, ("backward", 1.0))
    assert timer.seconds == {"backward": 3.0}


@pytest.mark.parametrize("enabled", [True, False])
def test_pause_restores_the_state_after_an_error(enabled):
    timer = SectionTimer(enabled)
    with pytest.raises(ValueError, match="inside"), timer.paused():
        raise ValueError("inside")
    assert timer.enabled is enabled


@pytest.mark.parametrize("enabled", [True, False])
def test_listener_receives_all_ends_inside_the_block_and_no_time_is_measured(clock, enabled):
    timer, names = SectionTimer(enabled), []
    with timer.forwarded_to(names.append):
        assert timer.enabled
        end_sections(timer, clock, ("data", 1.0), ("student", 1.0))
    assert names == ["data", "student"] and timer.seconds == {}
    end_sections(timer, clock, ("backward", 1.0))
    assert names == ["data", "student"] and timer.enabled is enabled
    assert set(timer.seconds) == ({"backward"} if enabled else set())  # control: the timer measures again


def test_listener_is_removed_after_an_error_and_nested_listeners_replace_each_other():
    timer, outer, inner = SectionTimer(enabled=False), [], []
    with pytest.raises(ValueError, match="inside"), timer.forwarded_to(outer.append):
        with timer.forwarded_to(inner.append):
            timer.end_section("student")
        timer.end_section("backward")
        raise ValueError("inside")
    timer.end_section("data")
    assert (outer, inner) == (["backward"], ["student"]) and not timer.enabled


def test_pause_inside_of_a_forwarding_block_ignores_ends():
    timer, names = SectionTimer(), []
    with timer.forwarded_to(names.append):
        with timer.paused():
            timer.end_section("student")
        timer.end_section("backward")
    assert names == ["backward"]


TEXT = """
student: t_layers
teacher: t_layers
terms: {ce: cross_entropy, kd: kd}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
batch_size: 16
"""


def test_step_ends_its_sections_in_order():
    stage = build_stage(TEXT)
    names: list[str] = []
    with stage.runner.timer.forwarded_to(names.append):
        stage.step(2)
    sections = ["student", "teacher"] if names[0] == "student" else ["teacher", "student"]
    assert names == [*sections, "terms", "backward", "optimizer"] * 2
    stage.step()
    assert len(names) == 10  # control: nothing is forwarded after the block


def test_disabled_timer_is_not_called_inside_the_forward(monkeypatch):
    stage = build_stage(TEXT)
    calls: list[str] = []
    monkeypatch.setattr(stage.network.timer, "end_section", calls.append)
    batches = next(itertools.islice(stage.windows(), 1))[0]
    wiring = stage.runner.updates[0].wiring
    counts = stage.network.valid_counts([batches], wiring.terms)
    stage.network(batches, counts, wiring, 1.0)
    assert calls == []
    stage.network.timer.enabled = True
    stage.network(batches, counts, wiring, 1.0)
    assert sorted(calls) == ["student", "teacher", "terms"]  # negative control


def test_observation_of_operands_ends_no_section():
    text = TEXT.replace(
        "optimizer",
        "updates: [{models: [student], terms: [ce, kd], "
        "select: {type: learnability, keep: 4, reference: teacher, student: student}}]\noptimizer",
    )
    stage = build_stage(text)
    names: list[str] = []
    with stage.runner.timer.forwarded_to(names.append):
        stage.step()
    assert names.count("student") == names.count("teacher") == 1  # the selector runs both roles a second time
