"""Profiler of a training step: time, operations and FLOPs of each section, and what ran on the device.

One mechanism serves all measurements. A `SectionRecorder` takes a stamp at the end of every section of a step: the
host's clock, a CUDA event, a count of operations, a mark in the trace of torch's profiler. The cost of a section is the
difference of two neighbouring stamps. The runner's timer reports the ends of its sections to the recorder; temporary
hooks on roles, terms and optimizers report the others. A step that is not profiled contains no hooks.
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
"""Prefix of the marks at the ends of sections in the profiler's trace."""


Windows = Iterator[list[MicroBatch]]


class SectionRecorder:
    """Takes a stamp at the end of each section of a step.

    Args:
        stamp: called with the name of the section; its return value is recorded.

    Attributes:
        ends: (section, stamp), in order.
    """

    def __init__(self, stamp: Callable[[str], Any]) -> None:
        self.stamp = stamp
        self.ends: list[tuple[str, Any]] = []

    def end(self, section: str) -> None:
        """Records the end of a section."""
        self.ends.append((section, self.stamp(section)))

    def end_timer_section(self, name: str) -> None:
        """Records the end of a section of the runner's timer, except `student` and `teacher`, which have hooks."""
        if name not in ("student", "teacher"):
            self.end("sum of terms" if name == "terms" else name)

    def costs(self, difference: Callable[[Any, Any], Any]) -> list[tuple[str, Any]]:
        """Returns (section, cost) in order.

        Args:
            difference: computes a cost from the stamps at the start and at the end of a section.
        """
        return [(section, difference(start, end)) for (_, start), (section, end) in itertools.pairwise(self.ends)]


@contextmanager
def record_sections(runner: Runner, recorder: SectionRecorder) -> Iterator[SectionRecorder]:
    """Records the sections of every step inside the block.

    Sections: `data`, `schedules`, `forward ROLE`, `term NAME`, `sum of terms`, `backward`, `optimizer`. The runner must
    execute its steps eagerly: a compiled step or a CUDA graph has no sections.
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
    """Runs one step as in training; returns the number of samples of the training source in it."""
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
    """Times of steps.

    Attributes:
        step_seconds: of each unrecorded step.
        section_seconds: section -> median over the recorded steps, in the order of a step; of `data` the mean.
        samples: number of samples in the unrecorded steps.
    """

    step_seconds: list[float]
    section_seconds: dict[str, float]
    samples: int


def time_steps(runner: Runner, windows: Windows, steps: int) -> StepTimes:
    """Times unrecorded steps, the device's work included.

    On a device that works asynchronously, steps are timed in up to ten equal groups, so that the synchronisation at the
    end of a group does not slow every step.
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
    """Times `steps` unrecorded and `steps` recorded steps, alternating, so that disturbances affect both alike."""
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
    """Returns section -> median over steps of its total in a step.

    Of `data` it returns the mean: batches may be augmented, and frozen roles prefetched, for several steps at once.
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
    """Returns a stamp, and a function that computes the seconds between two stamps.

    On CUDA a stamp is an event in the stream: the time at which the device, not the host, reaches the end of a section.
    """
    if device.type != "cuda":
        return lambda _: time.perf_counter(), lambda start, end: end - start

    def record_event(_: str) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return record_event, lambda start, end: start.elapsed_time(end) / 1000


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher below autograd: about one kernel each, except for views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step, by section.

    Attributes:
        operations: operations below autograd.
        flops: of convolutions, matrix products and attention; a multiply-add is two.
    """

    operations: dict[str, int]
    flops: dict[str, int]


def count_step(runner: Runner, windows: Windows) -> StepCounts:
    """Counts the operations of one step and the FLOPs of the next, with torch's FLOP counter."""
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
    """Measurements of torch's profiler, per step, in seconds.

    Attributes:
        steps: number of profiled steps.
        busy_seconds: time in which the device worked: kernels and copies on CUDA, operations on the CPU.
        kernels: number of kernels on CUDA, without copies and fills; None on other devices.
        copies: number of copies and fills on CUDA; None on other devices.
        backward_fractions: `forward ROLE` or `term NAME` -> fraction of the backward that belongs to its forward;
            `gradients` for accumulating into the parameters' gradients.
        slowest_operations: (operation, seconds without its callees, calls); on CUDA the device's time.
    """

    steps: int
    busy_seconds: float
    kernels: float | None
    copies: float | None
    backward_fractions: dict[str, float] = field(default_factory=dict)
    slowest_operations: list[tuple[str, float, float]] = field(default_factory=list)


def profile_steps(runner: Runner, windows: Windows, steps: int, *, mark_sections: bool) -> tuple[StepProfile, Any]:
    """Profiles some steps with torch's profiler.

    Args:
        runner: of the stage.
        windows: micro-batches of the coming steps.
        steps: number of steps.
        mark_sections: marks the ends of sections in the trace; False for a compiled step, which has none.

    Returns:
        The measurements, and torch's profiler, which can export its trace.
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
    """Returns True for marks of this module and annotations of optimizers and the profiler, which are no work."""
    name = getattr(event, "name", None) or event.key
    return bool(getattr(event, "is_user_annotation", False)) or name.startswith(
        (MARK_PREFIX, "Optimizer.", "ProfilerStep")
    )


def _union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, covered_until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total


def _section_intervals(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """Returns (start, end, section) on the host's clock, in order, from the marks in the trace."""
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
    """Returns section -> fraction of the backward that belongs to the forward of this section.

    Autograd numbers its nodes. The last forward operation with a node's number created the node, and the node's
    backward has the same number.
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
    """Returns a Chrome trace with an additional row that contains the sections of the steps, from the marks in it."""
    events = list(chrome_trace["traceEvents"])
    marks = [e for e in events if e.get("cat") == "user_annotation" and e.get("name", "").startswith(MARK_PREFIX)]
    marks.sort(key=lambda mark: mark["ts"])
    row = {"ph": "X", "cat": "section", "pid": "sections of the step", "tid": "step"}
    for before, after in itertools.pairwise(marks):
        name, start = after["name"][len(MARK_PREFIX) :], before["ts"] + before["dur"]
        if name != "begin":
            events.append({**row, "name": name, "ts": start, "dur": max(after["ts"] - start, 0)})
    return {**chrome_trace, "traceEvents": events}
