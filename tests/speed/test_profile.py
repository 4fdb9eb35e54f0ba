"""A step taken apart: its parts are the whole step's, and a step that was not taken apart knows nothing of it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kdbench.speed.profiling.peaks as peaks
from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration, with_synthetic_data  # noqa: F401
from kdbench.config.load import load_recipe
from kdbench.speed.profiling import profiler as profile
from kdbench.speed.profiling.profiler import (
    OperationCounter,
    SectionRecorder,
    add_section_row,
    count_step,
    profile_steps,
    record_sections,
    run_step,
    time_sections,
)

GAME = """
models: {generator: {model: t_generator, input: noise.z}}
teacher: {model: t_layers, input: "generator:image"}
student: {model: t_layers, input: "generator:image"}
data: {noise: {type: gaussian, shape: [6], samples: 64}}
terms: {fool: {type: kd, weight: -1, teacher_grad: true}, mimic: kd}
updates: [{models: [generator], terms: [fool]}, {models: [student], terms: [mimic]}]
optimizer: {type: Adam, lr: 0.01}
epochs: 2
batch_size: 16
"""


def shipped(name: str) -> StageHarness:
    """After one step, so that the optimiser has its state."""
    return build_stage(with_synthetic_data(load_recipe(name, []), batch_size=4)).step()


@pytest.mark.parametrize("name", ["digits/kd", "cifar100/kd", "cifar100/hint"])
def test_the_parts_have_all_operations_and_all_flops_of_a_plain_step(name):
    counted = count_step((run := shipped(name)).runner, run.windows())
    other = shipped(name)
    with OperationCounter() as operations:
        run_step(other.runner, other.windows())
    with FlopCounterMode(display=False) as flops:
        run_step(other.runner, other.windows())
    assert sum(counted.operations.values()) == operations.total > 100
    assert sum(counted.flops.values()) == flops.get_total_flops() > 0
    rows = run.recipe.stages[0].data["train"].batch_size
    assert counted.flops["forward student"] == rows * run.plan.roles["student"].flops
    teacher = run.plan.roles["teacher"]
    assert counted.flops["forward teacher"] == rows * teacher.flops, "as far as its last feature"
    assert teacher.flops == teacher.full_forward_flops if teacher.stop_module is None else teacher.flops < teacher.full_forward_flops


def test_the_parts_are_named_and_in_order():
    run = shipped("digits/kd")
    with record_sections(run.runner, SectionRecorder(lambda _: 0)) as laps:
        run_step(run.runner, run.windows())
    names = [part for part, _ in laps.costs(lambda before, after: 0)]
    roles = ["forward teacher", "forward student"]
    terms = [f"term {name}" for name in run.plan.resolved_stage.terms]
    assert names == ["data", "schedules", *roles, *terms, "sum of terms", "backward", "optimiser", "optimiser"]


def test_several_updates_end_each_with_its_own_optimiser():
    run = build_stage(GAME).step()
    with record_sections(run.runner, SectionRecorder(lambda _: 0)) as laps:
        run_step(run.runner, run.windows())
    names = [part for part, _ in laps.costs(lambda before, after: 0)]
    assert names.count("backward") == 2 and names[names.index("backward") + 1] == "optimiser"


def test_a_step_that_is_taken_apart_gives_the_bits_of_one_that_is_not():
    apart, plain = shipped("cifar100/hint"), shipped("cifar100/hint")
    windows = apart.windows()
    with record_sections(apart.runner, SectionRecorder(lambda _: 0)):
        for _ in range(3):
            run_step(apart.runner, windows)
    plain.step(3)
    assert equal_weights(apart.weights(), plain.weights())


def test_nothing_is_left_behind():
    run = shipped("digits/kd")
    before = run.runner.clock, run.network.lap
    with pytest.raises(RuntimeError), record_sections(run.runner, SectionRecorder(lambda _: 0)):
        raise RuntimeError
    assert (run.runner.clock, run.network.lap) == before
    modules = [run.network.role(name) for name in run.plan.resolved_stage.order]
    modules += [run.network.term(name) for name in run.plan.resolved_stage.terms]
    assert not any(module._forward_hooks for module in modules)
    assert not any(update.optimizer._optimizer_step_post_hooks for update in run.runner.updates)


def timed_by_operations(run: StageHarness, steps: int, monkeypatch) -> profile.StepTimes:
    """Times with a clock that each operation moves by a second, so that a busy machine makes no difference."""
    clock = OperationCounter()
    monkeypatch.setattr(profile.time, "perf_counter", lambda: float(clock.total))
    windows = run.windows()
    next(windows)  # draws what the whole epoch needs
    with clock:
        return time_sections(run.runner, windows, steps)


def test_the_times_of_the_parts_add_up_to_a_step(monkeypatch):
    run = shipped("cifar100/kd")
    timed = timed_by_operations(run, 5, monkeypatch)
    assert len(timed.step_seconds) == 5 and len(set(timed.step_seconds)) == 1 and timed.step_seconds[0] > 100
    assert sum(timed.section_seconds.values()) == timed.step_seconds[0]
    assert timed.samples == 5 * run.recipe.stages[0].data["train"].batch_size


def test_a_part_that_is_not_told_would_be_booked_elsewhere(monkeypatch):
    """Negative control: without its hook, what a term does is found in the part that ends next."""
    run = shipped("cifar100/kd")
    told = timed_by_operations(run, 1, monkeypatch).section_seconds
    monkeypatch.setattr(type(run.network.term("kd")), "register_forward_hook", lambda self, hook: Nothing())
    untold = timed_by_operations(run, 1, monkeypatch).section_seconds
    assert "term kd" not in untold
    terms = sum(seconds for part, seconds in told.items() if part.startswith("term ")) + told["sum of terms"]
    assert untold["sum of terms"] == terms > told["sum of terms"]


class Nothing:
    def remove(self) -> None:
        pass


def test_the_backward_is_told_by_whose_forward_it_goes_back_through():
    run = shipped("cifar100/kd")
    seen, _ = profile_steps(run.runner, run.windows(), 2, mark_sections=True)
    assert sum(seen.backward_fractions.values()) == pytest.approx(1)
    assert max(seen.backward_fractions, key=seen.backward_fractions.__getitem__) == "forward student"
    assert "forward teacher" not in seen.backward_fractions, "it is frozen, and nothing that moves stands before it"
    game = build_stage(GAME).step()
    seen, _ = profile_steps(game.runner, game.windows(), 2, mark_sections=True)
    assert {"forward teacher", "forward generator", "forward student"} <= set(seen.backward_fractions)


def test_the_trace_has_a_row_with_the_parts(tmp_path):
    run = shipped("digits/kd")
    seen, profiler = profile_steps(run.runner, run.windows(), 2, mark_sections=True)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    chrome = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    row = [event for event in add_section_row(chrome)["traceEvents"] if event.get("cat") == "part"]
    assert [e["name"] for e in row].count("forward teacher") == 2
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(row)), "one after another"
    inner = [e for e in chrome["traceEvents"] if e.get("name") == "aten::mkldnn_convolution"]
    home = [p["name"] for e in inner for p in row if p["ts"] <= e["ts"] <= p["ts"] + p["dur"]]
    assert len(home) == len(inner) and set(home) <= {"forward teacher", "forward student"}
    assert seen.kernels is None and seen.busy_seconds > 0


def test_the_union_of_intervals_counts_nothing_twice():
    assert profile._covered([(0, 4), (1, 2), (6, 7), (6.5, 8)]) == 6
    assert profile._covered([]) == 0


def test_the_peak_of_a_device_is_by_its_datasheet_or_not_claimed(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peaks.device_peak(cuda, "bf16").flops == pytest.approx(989.4e12)
    assert peaks.device_peak(cuda, "tf32").flops == pytest.approx(494.7e12)
    assert peaks.device_peak(cuda, "float32").flops == pytest.approx(66.9e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 MIG 1g.18gb")
    unknown = peaks.device_peak(cuda, "bf16")
    assert unknown.flops is None and "MIG" in unknown.source


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(peaks, "PROBE_SIZE", 64)
    monkeypatch.setattr(peaks, "PROBE_SECONDS", 0.0)
    found = peaks.device_peak(torch.device("cpu"), "float32")
    assert found.flops is not None and found.flops > 1e6 and "measured" in found.source
