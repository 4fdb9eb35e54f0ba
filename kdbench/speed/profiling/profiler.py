"""A step taken apart: what each of its parts costs in time, in operations and in FLOPs, and what ran on the device.

One mechanism measures everything. `Laps` notes something at the end of every part of a step (the clock, an event of
the device, what has been counted so far, a mark in the profiler's trace); a part's cost is the difference between two
neighbours. The runner calls it where it already tells its own clock; hooks on roles, terms and optimisers, which are
taken off again, call it in between. A step that is not being taken apart has none of this.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdbench.engine.network.operands import Batch
from kdbench.engine.train.runner import Runner
from kdbench.engine.train.timer import SectionTimer

MARK_PREFIX = "kdbench: "
"""Before the name of a part, in the profiler's trace."""


Windows = Iterator[list[Batch]]


class SectionRecorder(SectionTimer):
    """The ends of a step's parts, in order.

    Args:
        stamp: called at each end with the part's name; returns what is noted.
    """

    def __init__(self, stamp: Callable[[str], Any]) -> None:
        super().__init__()
        self.stamp = stamp
        self.ends: list[tuple[str, Any]] = []

    def lap(self, part: str) -> None:
        self.ends.append((part, self.stamp(part)))

    def costs(self, between: Callable[[Any, Any], Any]) -> list[tuple[str, Any]]:
        """Returns (part, cost) in order; `between` takes what was noted at the part's beginning and at its end."""
        return [(part, between(before, after)) for (_, before), (part, after) in itertools.pairwise(self.ends)]


@contextmanager
def record_sections(runner: Runner, recorder: SectionRecorder) -> Iterator[SectionRecorder]:
    """While the block runs, every part of the runner's steps ends with a lap.

    The parts: `data`, `schedules`, `forward ROLE`, `term NAME`, `sum of terms`, `backward`, `optimiser`. The runner's
    step must run as it is written: a compiled or captured one has no parts.
    """
    network, before = runner.network, (runner.clock, runner.network.lap)
    runner.clock = recorder
    network.lap = lambda part: recorder.lap("sum of terms") if part == "terms" else None  # roles have hooks of their own
    parts: dict[str, torch.nn.Module] = {f"forward {n}": network.role(n) for n in runner.plan.resolved_stage.order}
    parts |= {f"term {n}": network.term(n) for n in runner.plan.resolved_stage.terms}
    handles: list[Any] = [module.register_forward_hook(_ends(recorder, part)) for part, module in parts.items()]
    for update in runner.updates:
        handles.append(update.optimizer.register_step_post_hook(_ends(recorder, "optimiser")))
    try:
        yield recorder
    finally:
        runner.clock, network.lap = before
        for handle in handles:
            handle.remove()


def _ends(laps: SectionRecorder, part: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        laps.lap(part)

    return hook


def run_step(runner: Runner, windows: Windows) -> int:
    """One step as training takes it; returns how many samples of the first source it saw."""
    runner.lap("begin")
    window = next(windows)
    runner.lap("data")
    runner.begin_step()
    runner.lap("schedules")
    runner.step(window)
    return sum(next(iter(batch[runner.plan.train_source].values())).shape[0] for batch in window)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class StepTimes:
    """Times of steps. whole: seconds of each, not taken apart. parts: seconds by part, in the order of a step, of those
    that were taken apart: each part's median over them, of `data` the mean. samples: of all steps that were not taken
    apart."""

    step_seconds: list[float]
    section_seconds: dict[str, float]
    samples: int


def time_steps(runner: Runner, windows: Windows, steps: int) -> StepTimes:
    """Times steps as they run, from one end to the next: what the device does meanwhile is waited for at the end.

    On a device that runs behind the host, the steps are timed together, in up to ten equal groups, so that waiting
    does not slow them.
    """
    group = 1 if runner.device.type == "cpu" else -(-steps // 10)
    whole, samples, left = [], 0, steps
    while left > 0:
        count = min(group, left)
        synchronize(runner.device)
        began = time.perf_counter()
        samples += sum(run_step(runner, windows) for _ in range(count))
        synchronize(runner.device)
        whole += [(time.perf_counter() - began) / count] * count
        left -= count
    return StepTimes(whole, {}, samples)


def time_sections(runner: Runner, windows: Windows, steps: int) -> StepTimes:
    """Times `steps` steps whole and as many taken apart, in turn, so that whatever disturbs them falls on both."""
    whole, apart, samples = [], [], 0
    stamp, between = _device_clock(runner.device)
    for _ in range(steps):
        one = time_steps(runner, windows, 1)
        whole += one.step_seconds
        samples += one.samples
        with record_sections(runner, SectionRecorder(stamp)) as laps:
            run_step(runner, windows)
        synchronize(runner.device)
        apart.append(laps.costs(between))
    return StepTimes(whole, _typical(apart), samples)


def _typical(steps: list[list[tuple[str, float]]]) -> dict[str, float]:
    """Each part's median over the steps; a part that comes several times in a step is added up first.

    Of `data` it is the mean: batches may be made, and what does not move run ahead, for several steps at once.
    """
    sums: list[defaultdict[str, float]] = []
    for costs in steps:
        together: defaultdict[str, float] = defaultdict(float)
        for part, seconds in costs:
            together[part] += seconds
        sums.append(together)
    parts = dict.fromkeys(part for together in sums for part in together)
    return {
        part: (statistics.mean if part == "data" else statistics.median)([together[part] for together in sums])
        for part in parts
    }


def _device_clock(device: torch.device) -> tuple[Callable[[str], Any], Callable[[Any, Any], float]]:
    """What to note at the end of a part, and the seconds between two notes.

    On CUDA an event in the stream: the time at which the device came to the end of the part, not the host.
    """
    if device.type != "cuda":
        return lambda _: time.perf_counter(), lambda before, after: after - before

    def event(_: str) -> torch.cuda.Event:
        noted = torch.cuda.Event(enable_timing=True)
        noted.record(torch.cuda.current_stream(device))
        return noted

    return event, lambda before, after: before.elapsed_time(after) / 1000


class OperationCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd: about one kernel each, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepCounts:
    """operations, flops: of one step, by part. A multiply-add is two FLOPs; only convolutions, products of matrices and
    attention count."""

    operations: dict[str, int]
    flops: dict[str, int]


def count_step(runner: Runner, windows: Windows) -> StepCounts:
    """Counts in two steps, one for the operations and one for the FLOPs (torch's own counter)."""
    with OperationCounter() as operations:
        counted = _differences(runner, windows, lambda: operations.total)
    with FlopCounterMode(display=False) as flops:
        return StepCounts(counted, _differences(runner, windows, flops.get_total_flops))


def _differences(runner: Runner, windows: Windows, total: Callable[[], int]) -> dict[str, int]:
    with record_sections(runner, SectionRecorder(lambda _: total())) as laps:
        run_step(runner, windows)
    found: Counter[str] = Counter()
    for part, difference in laps.costs(lambda before, after: after - before):
        found[part] += difference
    return dict(found)


@dataclass(frozen=True)
class StepProfile:
    """What torch's profiler saw, per step. Times are seconds.

    busy: in which the device worked: kernels and copies on CUDA, operations on the CPU. kernels: on CUDA, copies and
    fills aside; None elsewhere. copies: those. backward: share of the backward pass by whose forward it goes back
    through (`ROLE` or a term's name as the parts have them), `gradients` for adding into the parameters' gradients.
    slowest: (operation, seconds by itself, calls), the device's time on CUDA.
    """

    steps: int
    busy_seconds: float
    kernels: float | None
    copies: float | None
    backward_fractions: dict[str, float] = field(default_factory=dict)
    slowest_operations: list[tuple[str, float, float]] = field(default_factory=list)


def profile_steps(runner: Runner, windows: Windows, steps: int, *, mark_sections: bool) -> tuple[StepProfile, Any]:
    """Profiles a few steps with torch's profiler; returns what it saw, and the profiler, to export its trace.

    Args:
        apart: mark the ends of the parts in the trace; not where the step is compiled.
    """
    cuda = runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def mark(part: str) -> None:
        with record_function(f"{MARK_PREFIX}{part}"):
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
    return _read(list(profiler.events() or []), profiler.key_averages(), steps, cuda), profiler


def _read(events: list[Any], averages: Iterable[Any], steps: int, cuda: bool) -> StepProfile:
    worked = [e for e in events if not _is_note(e)]
    on_device = [e for e in worked if "CUDA" in str(e.device_type)]
    on_host = [e for e in worked if "CPU" in str(e.device_type)]
    copies = [e for e in on_device if e.name.startswith(("Memcpy", "Memset"))]
    kept = on_device if cuda else on_host
    itself = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [(row.key, getattr(row, itself) / 1e6 / steps, row.count / steps) for row in averages if not _is_note(row)]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    return StepProfile(
        steps=steps,
        busy_seconds=_covered((e.time_range.start, e.time_range.end) for e in kept) / 1e6 / steps,
        kernels=(len(on_device) - len(copies)) / steps if cuda else None,
        copies=len(copies) / steps if cuda else None,
        backward_fractions=_backward(on_host, _intervals(events), cuda),
        slowest_operations=rows[:12],
    )


def _is_note(event: Any) -> bool:
    """Whether an event is somebody's mark (ours, an optimiser's) and no work."""
    name = getattr(event, "name", None) or event.key
    return bool(getattr(event, "is_user_annotation", False)) or name.startswith((MARK_PREFIX, "Optimizer.", "ProfilerStep"))


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _intervals(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """(begin, end, part) on the host's clock, in order."""
    marks = sorted((e for e in events if e.name.startswith(MARK_PREFIX) and "CPU" in str(e.device_type)), key=_start)
    pairs = itertools.pairwise(marks)
    return [
        (a.time_range.end, b.time_range.start, b.name[len(MARK_PREFIX) :]) for a, b in pairs if not b.name.endswith("begin")
    ]


def _start(event: Any) -> float:
    return event.time_range.start


def _backward(events: Iterable[Any], parts: list[tuple[float, float, str]], cuda: bool) -> dict[str, float]:
    """Shares of the backward by the part whose forward it goes back through.

    Autograd numbers its nodes; the last operation of the forward that carries a node's number made it, and the node's
    backward carries the same number.
    """
    makers: dict[int, str] = {}
    spent: defaultdict[str, float] = defaultdict(float)
    position = 0
    for event in sorted(events, key=_start):
        start = event.time_range.start
        while position < len(parts) and parts[position][1] < start:
            position += 1
        if position == len(parts):
            break
        begin, _, part = parts[position]
        if event.name.startswith("autograd::engine::evaluate_function"):
            whose = makers.get(event.sequence_nr, "") if event.sequence_nr >= 0 else "gradients"
            spent[whose or "sum of terms"] += event.device_time_total if cuda else event.cpu_time_total
        elif event.sequence_nr >= 0 and begin <= start and part != "backward":
            makers[event.sequence_nr] = part
    total = sum(spent.values())
    return {part: time / total for part, time in spent.items()} if total else {}


def add_section_row(chrome: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a row of its own with the parts of the steps to a Chrome trace, read from the marks in it."""
    events = list(chrome["traceEvents"])
    marks = [e for e in events if e.get("cat") == "user_annotation" and e.get("name", "").startswith(MARK_PREFIX)]
    marks.sort(key=lambda e: e["ts"])
    row = {"ph": "X", "cat": "part", "pid": "parts of the step", "tid": "step"}
    for before, after in itertools.pairwise(marks):
        name, begin = after["name"][len(MARK_PREFIX) :], before["ts"] + before["dur"]
        if name != "begin":
            events.append({**row, "name": name, "ts": begin, "dur": max(after["ts"] - begin, 0)})
    return {**chrome, "traceEvents": events}
