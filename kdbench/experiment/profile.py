"""`kdbench profile`: a recipe's step measured whole and in parts, as JSON, a Chrome trace and a picture."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kdbench
from kdbench.config.schema import Recipe
from kdbench.engine.device import describe_device
from kdbench.engine.network.operands import Batch
from kdbench.engine.train.loop import BatchFeed
from kdbench.engine.train.runner import Runner
from kdbench.errors import ConfigError, UserError
from kdbench.experiment.reopened import OpenStage, open_stage
from kdbench.files import translate_disk_errors, write_atomic, write_json
from kdbench.report.console import with_unit_prefix
from kdbench.report.figures import Picture, draw_bars
from kdbench.speed.profiling import profiler as engine
from kdbench.speed.profiling.peaks import device_peak

WARM_UP, TRACED = 6, 3


PROFILE_FILES = ("profile.json", "trace.json", "profile.png")


NO_PARTS_NOTICE = (
    "a compiled or captured step has no parts, nor has one whose frozen networks run elsewhere: they are those of the "
    "same step, run as it stands with all in it"
)


NO_KERNELS_NOTICE = (
    "torch's profiler saw nothing that ran on the GPU, so kernels and the device's time are missing; with "
    "KINETO_LOG_LEVEL=1 in the environment it says why"
)


def profile(recipe: Recipe, *, stage: str | None = None, steps: int = 20, out: Path | None = None) -> dict[str, Any]:
    """Measures a stage's steps and writes `profile.json`, `trace.json` and `profile.png`.

    Args:
        stage: its name; None: the last that trains.
        steps: timed whole, and as many taken apart.
        out: folder of the files; None: `RUNS/RECIPE/profile`.

    Returns:
        The content of profile.json, with `files` beside it: name -> path.

    Raises:
        UserError: bad input, in words.
    """
    if steps < 4:
        raise ConfigError(f"kdbench profile: --steps must be at least 4, got {steps}")
    folder = out or Path(recipe.runs) / recipe.name / "profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}). Choose another with --out DIR.") from None
    with open_stage(recipe, stage) as found:
        result, chrome = _measure(found, steps, folder)
    write_json(folder / "profile.json", result)
    write_atomic(folder / "trace.json", json.dumps(chrome).encode())
    write_atomic(folder / "profile.png", draw_profile(result).png)
    return {**result, "files": {name: str(folder / name) for name in PROFILE_FILES}}


def _measure(open_stage: OpenStage, steps: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    runner, notes = open_stage.runner, list(open_stage.missing_weights)
    device, precision = runner.device, runner.stage.precision
    runner.say = notes.append
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    windows = _endless_windows(open_stage.frozen_forward.feed)
    for _ in range(_warm_up_steps(runner, steps)):
        engine.run_step(runner, windows)
    elsewhere = {name: mode for name, mode in open_stage.frozen_forward.modes.items() if mode != "inline"}
    stands = _is_eager(runner) and not elsewhere
    asked = None if stands else engine.time_steps(runner, windows, steps)
    seen, profiler = engine.profile_steps(runner, windows, TRACED, mark_sections=stands)
    if seen.kernels == 0:
        notes.append(NO_KERNELS_NOTICE)
    chrome = _export_trace(profiler, folder)
    memory = _peak_memory(device)
    plain = runner
    if not stands:
        notes += [*filter(None, [open_stage.frozen_forward.describe()]), NO_PARTS_NOTICE]
        windows = open_stage.feed.windows(0)
        without = replace(open_stage.recipe, compile=False)
        plain = Runner(runner.plan, without, runner.network, device, steps_per_epoch=runner.steps_per_epoch)
        for _ in range(WARM_UP):
            engine.run_step(plain, windows)
    timed = engine.time_sections(plain, windows, steps)
    counted = engine.count_step(plain, windows)
    if plain is not runner:
        apart, _ = engine.profile_steps(plain, windows, TRACED, mark_sections=True)
        seen = replace(seen, backward_fractions=apart.backward_fractions)
    whole = asked or timed
    second = statistics.mean(whole.step_seconds)
    limit = device_peak(device, precision)
    read = sum(counted.flops.get(f"forward {name}", 0) for name, mode in elsewhere.items() if mode == "cache")
    flops = sum(counted.flops.values())
    executed = flops - read
    machine = {"device": describe_device(device), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "kdbench": kdbench.__version__}
    result = {
        "recipe": open_stage.recipe.name,
        "overrides": list(open_stage.recipe.overrides),
        "stage": runner.stage.name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        **machine,
        "precision": precision,
        "compile": open_stage.recipe.compile,
        "frozen_forward": dict(open_stage.frozen_forward.modes),
        "steps": steps,
        "samples_per_step": whole.samples / len(whole.step_seconds),
        "step": _quantiles_ms(whole.step_seconds),
        "samples_per_second": round(whole.samples / sum(whole.step_seconds), 1),
        "parts_of_a_step": {"taken_apart_ms": _ms(sum(timed.section_seconds.values())), "whole": _quantiles_ms(timed.step_seconds)},
        "parts": _part_rows(timed.section_seconds, counted, seen.backward_fractions, limit.flops),
        "operations": sum(counted.operations.values()),
        "flops": flops,
        "kernels": seen.kernels,
        "copies": seen.copies,
        "busy_ms": _ms(seen.busy_seconds),
        "idle_ms": _ms(max(0.0, second - seen.busy_seconds)),
        "flops_per_second": executed / second,
        "peak": {"flops_per_second": limit.flops, "source": limit.source},
        "mfu": None if limit.flops is None else executed / second / limit.flops,
        "peak_memory": memory,
        "slowest_operations": [
            {"operation": name, "ms": _ms(seconds), "calls": calls} for name, seconds, calls in seen.slowest_operations
        ],
        "notes": notes,
    }
    return result, chrome


def _warm_up_steps(runner: Runner, steps: int) -> int:
    """How many steps come before the first that is timed.

    A captured step is recorded anew for the first that is logged, which takes as long as hundreds of replays: it comes
    before, unless no timed step is logged.
    """
    logged = runner.stage.log_every
    timed = runner.recipe.uses_cuda_graph(runner.device.type) and logged <= WARM_UP + steps + TRACED
    return max(WARM_UP, logged) if timed else WARM_UP


def _endless_windows(windows: BatchFeed) -> Iterator[list[Batch]]:
    """A stage's batches, from the begin again where it is shorter than what is measured."""
    while True:
        yield from windows.windows(0)


def _is_eager(runner: Runner) -> bool:
    """Whether a step runs as it is written: neither compiled, nor recorded and replayed."""
    taken_over = runner.perform != runner.execute or runner.differentiate != runner.compute_gradients
    return not runner.compiling and not taken_over


def _export_trace(profiler: Any, folder: Path) -> dict[str, Any]:
    """The profiler's Chrome trace, with the parts of the steps as a row of their own."""
    file = folder / "trace.json"
    with translate_disk_errors(file):
        profiler.export_chrome_trace(str(file))
    return engine.add_section_row(json.loads(file.read_text(encoding="utf-8")))


def _part_rows(
    seconds: Mapping[str, float], counted: engine.StepCounts, backward: Mapping[str, float], limit: float | None
) -> list[dict[str, Any]]:
    total = sum(seconds.values())
    rows = []
    for part, spent in seconds.items():
        flops = counted.flops.get(part, 0)
        row: dict[str, Any] = {"part": part, "ms": _ms(spent), "share": round(spent / total, 4)}
        row |= {"operations": counted.operations.get(part, 0), "flops": flops}
        row["of_peak"] = None if limit is None or not flops else round(flops / spent / limit, 4)
        if part == "backward":
            row["through"] = {whose.removeprefix("forward "): _ms(share * spent) for whose, share in backward.items()}
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
    """Draws the parts as shares of a step's time, operations and FLOPs, one bar each."""
    step, parts = result["parts_of_a_step"]["taken_apart_ms"], result["parts"]
    rows = [
        (f"time\n{step:,.{1 if step < 100 else 0}f} ms", [part["ms"] for part in parts]),
        (f"operations\n{result['operations']:,}", [part["operations"] for part in parts]),
        (f"FLOPs\n{with_unit_prefix(result['flops'])}", [part["flops"] for part in parts]),
    ]
    title = f"{result['recipe']}, stage {result['stage']}: one step on {result['device']}"
    return draw_bars(title, [part["part"] for part in parts], rows)
