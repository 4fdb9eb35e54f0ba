"""Profiler of a training step: time, operations and FLOPs of each section, and the work of the device.

A section is a part of a step, such as the forward of the teacher or the backward. All measurements use the same
mechanism: a `SectionRecorder` takes a stamp at the end of every section. A stamp is a time of the host's clock, a
CUDA event, a count of operations, or a mark in the trace of torch's profiler. The cost of a section is the difference
between the stamps at its end and at the end of the section before. The runner's timer reports the ends of some
sections to the recorder, and temporary hooks on roles, terms and optimizers report the remaining ends. A step that is
not profiled contains no hooks.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.train.runner import Runner

MARK_PREFIX = "kdbench: "
"""Prefix of the names of marks in the profiler's trace. Each mark is at the end of a section."""


Windows = Iterator[list[MicroBatch]]


class SectionRecorder:
    """Recorder of a stamp (a time, an event or a count) at the end of each section (part of a training step).

    Args:
        stamp: function that takes the name of a section and returns the stamp.

    Attributes:
        ends: recorded pairs (section, stamp), in order.
    """

    def __init__(self, stamp: Callable[[str], Any]) -> None:
        self.stamp = stamp
        self.ends: list[tuple[str, Any]] = []

    def end(self, section: str) -> None:
        """Records a stamp (such as a time) at the end of a section (part of a training step)."""
        self.ends.append((section, self.stamp(section)))

    def end_timer_section(self, name: str) -> None:
        """Records the end of a section (part of a training step) that the timer of the training loop reports.

        The timer's sections `student` and `teacher` are ignored, because hooks record the end of each network's
        forward.
        """
        if name not in ("student", "teacher"):
            self.end("sum of terms" if name == "terms" else name)

    def costs(self, difference: Callable[[Any, Any], Any]) -> list[tuple[str, Any]]:
        """Returns (section, cost) for all recorded sections (parts of a step), in order.

        A cost, such as a time, is the difference between the stamps at the end and at the start of the section.
        Args:
            difference: function that computes a cost from the stamps at the start and at the end of a section.
        """
        return [(section, difference(start, end)) for (_, start), (section, end) in itertools.pairwise(self.ends)]


@contextmanager
def record_sections(runner: Runner, recorder: SectionRecorder) -> Iterator[SectionRecorder]:
    """Records the sections (parts) of every training step that is executed inside the `with` block.

    The sections are `data`, `schedules`, `forward ROLE` (one for each network), `term NAME` (one for each loss term),
    `sum of terms`, `backward` and `optimizer`. The runner must execute its steps eagerly, because a compiled step or
    a CUDA graph has no sections.
    """
    network = runner.network
    modules: dict[str, torch.nn.Module] = {f"forward {n}": network.role(n) for n in runner.plan.resolved_stage.order}
    modules |= {f"term {n}": network.term(n) for n in runner.plan.resolved_stage.terms}
    handles: list[Any] = [module.register_forward_hook(_end_hook(recorder, name)) for name, module in modules.items()]
    for update in runner.updates:
        handles.append(update.optimizer.register_step_post_hook(_end_hook(recorder, "optimizer")))
    try:
        with runner.timer.forwarded_to(recorder.end_timer_section):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _end_hook(recorder: SectionRecorder, section: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        recorder.end(section)

    return hook


def run_step(runner: Runner, windows: Windows) -> int:
    """Runs one training step on the next window (the step's micro-batches); returns the number of training samples."""
    runner.timer.end_section("begin")
    window = next(windows)
    runner.timer.end_section("data")
    runner.begin_step()
    runner.timer.end_section("schedules")
    runner.step(window)
    return sum(batches[runner.plan.train_source].size for batches in window)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class StepTimes:
    """Measured times of training steps.

    Attributes:
        step_seconds: times of the steps that were timed as a whole, one time for each step.
        section_seconds: section (part of a step) -> median time over the steps that were timed section by section.
            For the section `data`, the time is the mean.
        samples: number of training samples in the steps of `step_seconds`.
    """

    step_seconds: list[float]
    section_seconds: dict[str, float]
    samples: int


def time_steps(runner: Runner, windows: Windows, steps: int) -> StepTimes:
    """Times training steps as a whole, without their sections. The times include the work of the device.

    On a GPU, steps are timed in up to ten groups with one synchronisation each, because a synchronisation after every
    step would slow down the steps.
    """
    group_size = 1 if runner.device.type == "cpu" else -(-steps // 10)
    step_seconds: list[float] = []
    samples, remaining = 0, steps
    while remaining > 0:
        count = min(group_size, remaining)
        synchronize(runner.device)
        start = time.perf_counter()
        samples += sum(run_step(runner, windows) for _ in range(count))
        synchronize(runner.device)
        step_seconds += [(time.perf_counter() - start) / count] * count
        remaining -= count
    return StepTimes(step_seconds, {}, samples)


def time_sections(runner: Runner, windows: Windows, steps: int) -> StepTimes:
    """Times `steps` training steps as a whole, and `steps` further steps section by section.

    A section is a part of a step, such as the backward. The two kinds of steps alternate, so that other work on the
    machine slows both kinds equally.
    """
    step_seconds: list[float] = []
    costs: list[list[tuple[str, float]]] = []
    samples = 0
    stamp, difference = _device_clock(runner.device)
    for _ in range(steps):
        times = time_steps(runner, windows, 1)
        step_seconds += times.step_seconds
        samples += times.samples
        with record_sections(runner, SectionRecorder(stamp)) as recorder:
            run_step(runner, windows)
        synchronize(runner.device)
        costs.append(recorder.costs(difference))
    return StepTimes(step_seconds, _average_sections(costs), samples)


def _average_sections(costs: Sequence[Sequence[tuple[str, float]]]) -> dict[str, float]:
    """Returns section (part of a step) -> median over all steps of the time that the section takes in a step.

    For the section `data`, the result is the mean over all steps: one step may load the data of several steps.
    """
    totals: list[defaultdict[str, float]] = []
    for step_costs in costs:
        total: defaultdict[str, float] = defaultdict(float)
        for section, seconds in step_costs:
            total[section] += seconds
        totals.append(total)
    sections = dict.fromkeys(section for total in totals for section in total)
    return {
        section: (statistics.mean if section == "data" else statistics.median)([total[section] for total in totals])
        for section in sections
    }


def _device_clock(device: torch.device) -> tuple[Callable[[str], Any], Callable[[Any, Any], float]]:
    """Returns a function that records a time stamp, and a function that computes the seconds between two stamps.

    On CUDA, a stamp is a CUDA event, so the device measures the time. Otherwise, a stamp is a time of the host's
    clock.
    """
    if device.type != "cuda":
        return lambda _: time.perf_counter(), lambda start, end: end - start

    def record_event(_: str) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return record_event, lambda start, end: start.elapsed_time(end) / 1000


class OperationCounter(TorchDispatchMode):
    """Counter of the operations that torch dispatches below autograd. Most operations, except views, are one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepCounts:
    """Counts of operations and FLOPs in one training step, by section (part of the step).

    Attributes:
        operations: section -> number of operations below autograd.
        flops: section -> FLOPs of convolutions, matrix products and attention. A multiply-add counts as two FLOPs.
    """

    operations: dict[str, int]
    flops: dict[str, int]


def count_step(runner: Runner, windows: Windows) -> StepCounts:
    """Counts the operations of one step, and the FLOPs of the following step."""
    with OperationCounter() as counter:
        operations = _count_sections(runner, windows, lambda: counter.total)
    with FlopCounterMode(display=False) as flop_counter:
        return StepCounts(operations, _count_sections(runner, windows, flop_counter.get_total_flops))


def _count_sections(runner: Runner, windows: Windows, total: Callable[[], int]) -> dict[str, int]:
    with record_sections(runner, SectionRecorder(lambda _: total())) as recorder:
        run_step(runner, windows)
    counts: Counter[str] = Counter()
    for section, count in recorder.costs(lambda start, end: end - start):
        counts[section] += count
    return dict(counts)


@dataclass(frozen=True)
class StepProfile:
    """Measurements of torch's profiler, as averages per step. Times are in seconds.

    Attributes:
        steps: number of profiled steps.
        busy_seconds: time in which the device worked: kernels and copies on CUDA, operations on the CPU.
        kernels: number of kernels on CUDA, without copies and fills; None on other devices.
        copies: number of copies and fills on CUDA; None on other devices.
        backward_fractions: section (`forward ROLE` or `term NAME`) -> fraction of the backward time that is spent on
            the backward of this section. The entry `gradients` is the accumulation into the parameters' gradients.
        slowest_operations: (operation, seconds, calls) for each of the slowest operations. The seconds are GPU time
            on CUDA, and exclude inner operations that the operation calls.
    """

    steps: int
    busy_seconds: float
    kernels: float | None
    copies: float | None
    backward_fractions: dict[str, float] = field(default_factory=dict)
    slowest_operations: list[tuple[str, float, float]] = field(default_factory=list)


def profile_steps(runner: Runner, windows: Windows, steps: int, *, mark_sections: bool) -> tuple[StepProfile, Any]:
    """Profiles some training steps with torch's profiler.

    Args:
        runner: training loop that executes the steps.
        windows: iterator over the micro-batches of the next steps.
        steps: number of steps.
        mark_sections: True marks the end of each section (part of a step) in the trace. A compiled step has no
            sections, so it needs False.

    Returns:
        The measurements, and torch's profiler, which can export the trace.
    """
    is_cuda = runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]

    def mark(section: str) -> None:
        with record_function(f"{MARK_PREFIX}{section}"):
            pass

    synchronize(runner.device)
    with torch.profiler.profile(activities=activities) as profiler:
        if mark_sections:
            with record_sections(runner, SectionRecorder(mark)):
                for _ in range(steps):
                    run_step(runner, windows)
        else:
            for _ in range(steps):
                run_step(runner, windows)
        synchronize(runner.device)
    return _summarize(list(profiler.events() or []), profiler.key_averages(), steps, is_cuda), profiler


def _summarize(events: list[Any], averages: Iterable[Any], steps: int, is_cuda: bool) -> StepProfile:
    operations = [event for event in events if not _is_annotation(event)]
    device_events = [event for event in operations if "CUDA" in str(event.device_type)]
    host_events = [event for event in operations if "CPU" in str(event.device_type)]
    copies = [event for event in device_events if event.name.startswith(("Memcpy", "Memset"))]
    worked = device_events if is_cuda else host_events
    self_time = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    rows = [
        (average.key, getattr(average, self_time) / 1e6 / steps, average.count / steps)
        for average in averages
        if not _is_annotation(average)
    ]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    return StepProfile(
        steps=steps,
        busy_seconds=_union_length((e.time_range.start, e.time_range.end) for e in worked) / 1e6 / steps,
        kernels=(len(device_events) - len(copies)) / steps if is_cuda else None,
        copies=len(copies) / steps if is_cuda else None,
        backward_fractions=_backward_fractions(host_events, _section_intervals(events), is_cuda),
        slowest_operations=rows[:12],
    )


def _is_annotation(event: Any) -> bool:
    """Returns True if a profiler event is not an operation: the mark of a section, or an annotation that torch adds."""
    name = getattr(event, "name", None) or event.key
    return bool(getattr(event, "is_user_annotation", False)) or name.startswith(
        (MARK_PREFIX, "Optimizer.", "ProfilerStep")
    )


def _union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals (start, end)."""
    total, covered_until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total


def _section_intervals(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """Returns (start, end, section) for each section (part of a step) in the trace, in order, on the host's clock.

    Section ends are marked in the trace, so a section is the interval between two marks.
    """
    marks = [event for event in events if event.name.startswith(MARK_PREFIX) and "CPU" in str(event.device_type)]
    marks.sort(key=_start)
    return [
        (before.time_range.end, after.time_range.start, after.name[len(MARK_PREFIX) :])
        for before, after in itertools.pairwise(marks)
        if not after.name.endswith("begin")
    ]


def _start(event: Any) -> float:
    return event.time_range.start


def _backward_fractions(
    events: Iterable[Any], intervals: Sequence[tuple[float, float, str]], is_cuda: bool
) -> dict[str, float]:
    """Returns section (part of a step) -> fraction of the backward time that is spent on operations of this section.

    Autograd numbers its nodes. The forward operation that creates a node and the backward of the node have the same
    number in the trace. If several forward operations have this number, the last one created the node.
    """
    creators: dict[int, str] = {}
    seconds: defaultdict[str, float] = defaultdict(float)
    position = 0
    for event in sorted(events, key=_start):
        start = event.time_range.start
        while position < len(intervals) and intervals[position][1] < start:
            position += 1
        if position == len(intervals):
            break
        section_start, _, section = intervals[position]
        if event.name.startswith("autograd::engine::evaluate_function"):
            creator = creators.get(event.sequence_nr, "") if event.sequence_nr >= 0 else "gradients"
            seconds[creator or "sum of terms"] += event.device_time_total if is_cuda else event.cpu_time_total
        elif event.sequence_nr >= 0 and section_start <= start and section != "backward":
            creators[event.sequence_nr] = section
    total = sum(seconds.values())
    return {section: value / total for section, value in seconds.items()} if total else {}


def add_section_row(chrome_trace: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a Chrome trace with an additional row that shows the sections (parts) of each training step."""
    events = list(chrome_trace["traceEvents"])
    marks = [e for e in events if e.get("cat") == "user_annotation" and e.get("name", "").startswith(MARK_PREFIX)]
    marks.sort(key=lambda mark: mark["ts"])
    row = {"ph": "X", "cat": "section", "pid": "sections of the step", "tid": "step"}
    for before, after in itertools.pairwise(marks):
        name, start = after["name"][len(MARK_PREFIX) :], before["ts"] + before["dur"]
        if name != "begin":
            events.append({**row, "name": name, "ts": start, "dur": max(after["ts"] - start, 0)})
    return {**chrome_trace, "traceEvents": events}
