"""`kdbench profile`: measures a training step and its sections; writes JSON, a Chrome trace and a figure."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kdbench
from kdbench.config.schema import Recipe
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.device import describe_device
from kdbench.engine.train.loop import BatchFeed
from kdbench.engine.train.runner import Runner
from kdbench.errors import ConfigError, UserError
from kdbench.experiment.reopened import OpenStage, open_stage
from kdbench.files import translate_disk_errors, write_atomic, write_json
from kdbench.report.console import with_unit_prefix
from kdbench.report.figures import Picture, draw_bars
from kdbench.speed.profiling import profiler as engine
from kdbench.speed.profiling.peaks import device_peak

WARM_UP_STEPS, TRACED_STEPS = 6, 3


PROFILE_FILES = ("profile.json", "trace.json", "profile.png")


NO_SECTIONS_NOTICE = (
    "a compiled step, a step in a CUDA graph, and a step whose frozen roles run elsewhere have no sections: the "
    "sections are those of the same step run eagerly with all roles in it"
)


NO_KERNELS_NOTICE = (
    "torch's profiler recorded no GPU kernels, so kernels and device time are missing; set KINETO_LOG_LEVEL=1 in the "
    "environment to see the reason"
)


def profile(recipe: Recipe, *, stage: str | None = None, steps: int = 20, out: Path | None = None) -> dict[str, Any]:
    """Measures the steps of a stage and writes `profile.json`, `trace.json` and `profile.png`.

    Args:
        stage: name of the stage; None: the last stage that trains.
        steps: number of steps. They are timed as a whole first, then section by section.
        out: output folder; None: `RUNS/RECIPE/profile`.

    Returns:
        The content of profile.json, with an additional entry `files`: file name -> path.

    Raises:
        UserError: an argument is wrong, the folder is not writable, or the stage cannot be opened.
    """
    if steps < 4:
        raise ConfigError(f"kdbench profile: --steps must be at least 4, got {steps}")
    folder = out or Path(recipe.runs) / recipe.name / "profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}). Choose another with --out DIR.") from None
    with open_stage(recipe, stage) as opened_stage:
        measurement = _measure(opened_stage, steps, folder)
        result = _profile_entries(opened_stage, measurement, steps)
    write_json(folder / "profile.json", result)
    write_atomic(folder / "trace.json", json.dumps(measurement.chrome_trace).encode())
    write_atomic(folder / "profile.png", draw_profile(result).png)
    return {**result, "files": {name: str(folder / name) for name in PROFILE_FILES}}


@dataclass
class _Measurement:
    """Measured times and counts of the steps of a stage.

    Attributes:
        step_times: times of steps as the recipe runs them, in seconds.
        section_times: section -> times in eager steps in which all roles run.
        counts: section -> number of operations and number of FLOPs in the eager step.
        trace: trace of torch's profiler.
        chrome_trace: content of trace.json.
        peak_memory: peak memory of the step as the recipe runs it, in bytes.
        moved_roles: frozen role -> how it runs, for the roles that do not run in the step.
    """

    step_times: engine.StepTimes
    section_times: engine.StepTimes
    counts: engine.StepCounts
    trace: engine.StepProfile
    chrome_trace: dict[str, Any]
    peak_memory: dict[str, Any]
    moved_roles: dict[str, str]


def _measure(opened_stage: OpenStage, steps: int, folder: Path) -> _Measurement:
    """Measures the step as the recipe runs it, then the sections of the same step in eager mode."""
    runner, notes = opened_stage.runner, opened_stage.notices.texts
    notes[:] = opened_stage.missing_weights  # notices about the steps below follow
    device = runner.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    windows = _endless_windows(opened_stage.frozen_forward.feed)
    for _ in range(_warm_up_steps(runner, steps)):
        engine.run_step(runner, windows)
    moved_roles = {name: mode for name, mode in opened_stage.frozen_forward.modes.items() if mode != "inline"}
    has_sections = _is_eager(runner) and not moved_roles
    step_times = None if has_sections else engine.time_steps(runner, windows, steps)
    trace, profiler = engine.profile_steps(runner, windows, TRACED_STEPS, mark_sections=has_sections)
    if trace.kernels == 0:
        notes.append(NO_KERNELS_NOTICE)
    chrome_trace = _export_trace(profiler, folder)
    peak_memory = _peak_memory(device)  # before the eager step, which may need more
    eager_runner = runner
    if not has_sections:
        notes += [*filter(None, [opened_stage.frozen_forward.describe()]), NO_SECTIONS_NOTICE]
        windows = opened_stage.feed.windows(0)
        eager_runner = _eager_runner(opened_stage)
        for _ in range(WARM_UP_STEPS):
            engine.run_step(eager_runner, windows)
    section_times = engine.time_sections(eager_runner, windows, steps)
    counts = engine.count_step(eager_runner, windows)
    if eager_runner is not runner:  # time in the backward of a compiled step cannot be attributed to roles
        eager_trace, _ = engine.profile_steps(eager_runner, windows, TRACED_STEPS, mark_sections=True)
        trace = replace(trace, backward_fractions=eager_trace.backward_fractions)
    return _Measurement(
        step_times or section_times, section_times, counts, trace, chrome_trace, peak_memory, moved_roles
    )


def _eager_runner(opened_stage: OpenStage) -> Runner:
    runner = opened_stage.runner
    recipe = replace(opened_stage.recipe, compile=False)
    steps_per_epoch = runner.progress.steps_per_epoch
    return Runner(runner.plan, recipe, runner.network, runner.device, steps_per_epoch=steps_per_epoch)


def _profile_entries(opened_stage: OpenStage, measurement: _Measurement, steps: int) -> dict[str, Any]:
    """Returns the content of profile.json."""
    runner, recipe = opened_stage.runner, opened_stage.recipe
    step_times, trace, counts = measurement.step_times, measurement.trace, measurement.counts
    mean_seconds = statistics.mean(step_times.step_seconds)
    peak = device_peak(runner.device, runner.stage.precision)
    flops = sum(counts.flops.values())
    # Roles whose outputs come from the teacher cache are counted but not executed.
    cached = [name for name, mode in measurement.moved_roles.items() if mode == "cache"]
    executed = flops - sum(counts.flops.get(f"forward {name}", 0) for name in cached)
    section_seconds = measurement.section_times.section_seconds
    return {
        "recipe": recipe.name,
        "overrides": list(recipe.overrides),
        "stage": runner.stage.name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": describe_device(runner.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdbench": kdbench.__version__,
        "precision": runner.stage.precision,
        "compile": recipe.compile,
        "frozen_forward": dict(opened_stage.frozen_forward.modes),
        "steps": steps,
        "samples_per_step": step_times.samples / len(step_times.step_seconds),
        "step": _quantiles_ms(step_times.step_seconds),
        "samples_per_second": round(step_times.samples / sum(step_times.step_seconds), 1),
        # The eager step: times of its sections, and times of steps in which no sections are recorded.
        "eager_step": {
            "sections_ms": _ms(sum(section_seconds.values())),
            "step": _quantiles_ms(measurement.section_times.step_seconds),
        },
        "sections": _section_rows(section_seconds, counts, trace.backward_fractions, peak.flops),
        "operations": sum(counts.operations.values()),
        "flops": flops,
        "kernels": trace.kernels,
        "copies": trace.copies,
        "busy_ms": _ms(trace.busy_seconds),
        "idle_ms": _ms(max(0.0, mean_seconds - trace.busy_seconds)),
        "flops_per_second": executed / mean_seconds,
        "peak": {"flops_per_second": peak.flops, "source": peak.source},
        "mfu": None if peak.flops is None else executed / mean_seconds / peak.flops,
        "peak_memory": measurement.peak_memory,
        "slowest_operations": [
            {"operation": name, "ms": _ms(seconds), "calls": calls} for name, seconds, calls in trace.slowest_operations
        ],
        "notes": opened_stage.notices.texts,
    }


def _warm_up_steps(runner: Runner, steps: int) -> int:
    """Returns the number of warm-up steps, which are not timed.

    A CUDA graph is recorded again for the first step that logs, which takes as long as hundreds of replays. The
    warm-up includes that step if a timed step logs.
    """
    log_every = runner.stage.log_every
    logs = log_every <= WARM_UP_STEPS + steps + TRACED_STEPS
    uses_graph = runner.recipe.uses_cuda_graph(runner.device.type)
    return max(WARM_UP_STEPS, log_every) if uses_graph and logs else WARM_UP_STEPS


def _endless_windows(feed: BatchFeed) -> Iterator[list[MicroBatch]]:
    """Yields a stage's batches. After the stage's last batch, it starts again with the first."""
    while True:
        yield from feed.windows(0)


def _is_eager(runner: Runner) -> bool:
    """Returns whether a step is neither compiled nor a CUDA graph."""
    return not runner.eager.compiled and runner.strategy is runner.eager


def _export_trace(profiler: Any, folder: Path) -> dict[str, Any]:
    """Returns the profiler's Chrome trace, to which the sections of the steps are added as a row."""
    file = folder / "trace.json"
    with translate_disk_errors(file):
        profiler.export_chrome_trace(str(file))
    return engine.add_section_row(json.loads(file.read_text(encoding="utf-8")))


def _section_rows(
    seconds: Mapping[str, float],
    counts: engine.StepCounts,
    backward_fractions: Mapping[str, float],
    peak_flops: float | None,
) -> list[dict[str, Any]]:
    """Returns one row per section: time, fraction of the step, operations, FLOPs, fraction of the device's peak."""
    total = sum(seconds.values())
    rows = []
    for section, duration in seconds.items():
        flops = counts.flops.get(section, 0)
        row: dict[str, Any] = {"section": section, "ms": _ms(duration), "fraction": round(duration / total, 4)}
        row |= {"operations": counts.operations.get(section, 0), "flops": flops}
        row["of_peak"] = None if peak_flops is None or not flops else round(flops / duration / peak_flops, 4)
        if section == "backward":
            row["through"] = {
                forward.removeprefix("forward "): _ms(fraction * duration)
                for forward, fraction in backward_fractions.items()
            }
        rows.append(row)
    return rows


def _quantiles_ms(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4)
    mean = _ms(statistics.mean(seconds))
    return {"median_ms": _ms(middle), "q1_ms": _ms(low), "q3_ms": _ms(high), "mean_ms": mean}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def _peak_memory(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "tensors on the GPU, data included"}
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": resident, "of": "the whole process, Python and libraries included"}


def draw_profile(result: Mapping[str, Any]) -> Picture:
    """Draws three bars: the fractions of all sections in a step's time, operations and FLOPs."""
    step_ms, sections = result["eager_step"]["sections_ms"], result["sections"]
    rows = [
        (f"time\n{step_ms:,.{1 if step_ms < 100 else 0}f} ms", [section["ms"] for section in sections]),
        (f"operations\n{result['operations']:,}", [section["operations"] for section in sections]),
        (f"FLOPs\n{with_unit_prefix(result['flops'])}", [section["flops"] for section in sections]),
    ]
    title = f"{result['recipe']}, stage {result['stage']}: one step on {result['device']}"
    return draw_bars(title, [section["section"] for section in sections], rows)
