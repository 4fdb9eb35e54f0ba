"""Profiler: the sections of a step sum to the full step, and profiling leaves the step unchanged."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kdbench.speed.profiling.peaks as peaks
from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration, with_synthetic_data  # noqa: F401
from kdbench.config.load import load_recipe
from kdbench.speed.profiling import profiler as profiler_module
from kdbench.speed.profiling.profiler import (
    OperationCounter,
    SectionRecorder,
    StepTimes,
    add_section_row,
    count_step,
    profile_steps,
    record_sections,
    run_step,
    time_sections,
)

ADVERSARIAL = """
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


def shipped_stage(name: str) -> StageHarness:
    """Builds a shipped recipe and takes one step, so that the optimizer has its state."""
    return build_stage(with_synthetic_data(load_recipe(name, []), batch_size=4)).step()


def section_names(harness: StageHarness) -> list[str]:
    """Returns the sections of one step, in order."""
    with record_sections(harness.runner, SectionRecorder(lambda _: 0)) as recorder:
        run_step(harness.runner, harness.windows())
    return [section for section, _ in recorder.costs(lambda start, end: 0)]


@pytest.mark.parametrize("name", ["digits/kd", "cifar100/kd", "cifar100/hint"])
def test_sections_contain_all_operations_and_flops_of_an_unrecorded_step(name):
    harness = shipped_stage(name)
    counts = count_step(harness.runner, harness.windows())
    unrecorded = shipped_stage(name)
    with OperationCounter() as operations:
        run_step(unrecorded.runner, unrecorded.windows())
    with FlopCounterMode(display=False) as flops:
        run_step(unrecorded.runner, unrecorded.windows())
    assert sum(counts.operations.values()) == operations.total > 100
    assert sum(counts.flops.values()) == flops.get_total_flops() > 0
    rows = harness.recipe.stages[0].data["train"].batch_size
    student, teacher = harness.plan.roles["student"], harness.plan.roles["teacher"]
    assert counts.flops["forward student"] == rows * student.flops
    assert counts.flops["forward teacher"] == rows * teacher.flops, "up to its last feature"
    if teacher.stop_module is None:
        assert teacher.flops == teacher.full_forward_flops
    else:
        assert teacher.flops < teacher.full_forward_flops


def test_sections_are_named_and_in_order():
    harness = shipped_stage("digits/kd")
    roles = ["forward teacher", "forward student"]
    terms = [f"term {name}" for name in harness.plan.resolved_stage.terms]
    expected = ["data", "schedules", *roles, *terms, "sum of terms", "backward", "optimizer", "optimizer"]
    assert section_names(harness) == expected


def test_each_update_ends_with_its_optimizer():
    sections = section_names(build_stage(ADVERSARIAL).step())
    assert sections.count("backward") == 2 and sections[sections.index("backward") + 1] == "optimizer"


def test_recorded_steps_give_the_same_bits_as_unrecorded_ones():
    recorded, unrecorded = shipped_stage("cifar100/hint"), shipped_stage("cifar100/hint")
    windows = recorded.windows()
    with record_sections(recorded.runner, SectionRecorder(lambda _: 0)):
        for _ in range(3):
            run_step(recorded.runner, windows)
    unrecorded.step(3)
    assert equal_weights(recorded.weights(), unrecorded.weights())


def test_recording_removes_its_hooks_even_after_an_error():
    harness = shipped_stage("digits/kd")
    timer = harness.runner.timer
    state_before = vars(timer).copy()
    with pytest.raises(RuntimeError), record_sections(harness.runner, SectionRecorder(lambda _: 0)):
        raise RuntimeError
    assert harness.runner.timer is timer and vars(timer) == state_before
    modules = [harness.network.role(name) for name in harness.plan.resolved_stage.order]
    modules += [harness.network.term(name) for name in harness.plan.resolved_stage.terms]
    assert not any(module._forward_hooks for module in modules)
    assert not any(update.optimizer._optimizer_step_post_hooks for update in harness.runner.updates)


def times_by_operations(harness: StageHarness, steps: int, monkeypatch) -> StepTimes:
    """Times sections with a clock that each operation advances by a second, whatever else the machine does."""
    clock = OperationCounter()
    monkeypatch.setattr(profiler_module.time, "perf_counter", lambda: float(clock.total))
    windows = harness.windows()
    next(windows)  # samples the augmentation parameters of the epoch
    with clock:
        return time_sections(harness.runner, windows, steps)


def test_times_of_the_sections_sum_to_the_step(monkeypatch):
    harness = shipped_stage("cifar100/kd")
    times = times_by_operations(harness, 5, monkeypatch)
    assert len(times.step_seconds) == 5 and len(set(times.step_seconds)) == 1 and times.step_seconds[0] > 100
    assert sum(times.section_seconds.values()) == times.step_seconds[0]
    assert times.samples == 5 * harness.recipe.stages[0].data["train"].batch_size


class _Handle:
    def remove(self) -> None:
        pass


def test_section_without_a_hook_would_be_part_of_the_next(monkeypatch):
    """Negative control: without its hook, the work of a term belongs to the section that ends next."""
    harness = shipped_stage("cifar100/kd")
    seconds = times_by_operations(harness, 1, monkeypatch).section_seconds
    term_class = type(harness.network.term("kd"))
    monkeypatch.setattr(term_class, "register_forward_hook", lambda self, hook: _Handle())
    without_hooks = times_by_operations(harness, 1, monkeypatch).section_seconds
    assert "term kd" not in without_hooks
    terms = sum(value for section, value in seconds.items() if section.startswith("term ")) + seconds["sum of terms"]
    assert without_hooks["sum of terms"] == terms > seconds["sum of terms"]


def test_backward_is_attributed_to_the_forward_that_created_it():
    harness = shipped_stage("cifar100/kd")
    fractions = profile_steps(harness.runner, harness.windows(), 2, mark_sections=True)[0].backward_fractions
    assert sum(fractions.values()) == pytest.approx(1)
    assert max(fractions, key=fractions.__getitem__) == "forward student"
    assert "forward teacher" not in fractions, "it is frozen, and nothing before it is trained"
    adversarial = build_stage(ADVERSARIAL).step()
    fractions = profile_steps(adversarial.runner, adversarial.windows(), 2, mark_sections=True)[0].backward_fractions
    assert {"forward teacher", "forward generator", "forward student"} <= set(fractions)


def test_trace_has_a_row_with_the_sections(tmp_path):
    harness = shipped_stage("digits/kd")
    profile, profiler = profile_steps(harness.runner, harness.windows(), 2, mark_sections=True)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    row = [event for event in add_section_row(trace)["traceEvents"] if event.get("cat") == "section"]
    assert [event["name"] for event in row].count("forward teacher") == 2
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(row)), "one after another"
    convolutions = [event for event in trace["traceEvents"] if event.get("name") == "aten::mkldnn_convolution"]
    sections = [s["name"] for c in convolutions for s in row if s["ts"] <= c["ts"] <= s["ts"] + s["dur"]]
    assert len(sections) == len(convolutions) and set(sections) <= {"forward teacher", "forward student"}
    assert profile.kernels is None and profile.busy_seconds > 0


def test_union_of_intervals_counts_overlaps_once():
    assert profiler_module._union_length([(0, 4), (1, 2), (6, 7), (6.5, 8)]) == 6
    assert profiler_module._union_length([]) == 0


def test_peak_of_a_gpu_is_its_datasheet_value_or_unknown(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peaks.device_peak(cuda, "bf16").flops == pytest.approx(989.4e12)
    assert peaks.device_peak(cuda, "tf32").flops == pytest.approx(494.7e12)
    assert peaks.device_peak(cuda, "float32").flops == pytest.approx(66.9e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 MIG 1g.18gb")
    unknown = peaks.device_peak(cuda, "bf16")
    assert unknown.flops is None and "MIG" in unknown.source


def test_peak_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(peaks, "PROBE_SIZE", 64)
    monkeypatch.setattr(peaks, "PROBE_SECONDS", 0.0)
    peak = peaks.device_peak(torch.device("cpu"), "float32")
    assert peak.flops is not None and peak.flops > 1e6 and "measured" in peak.source
