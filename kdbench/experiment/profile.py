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
from kdbench.engine.train.loop import Windows
from kdbench.engine.train.runner import Runner
from kdbench.errors import ConfigError, UserError
from kdbench.experiment.reopened import Opened, opened
from kdbench.files import disk_errors_translated, write_atomic, write_json
from kdbench.report.console import sized
from kdbench.report.figures import Picture, bars
from kdbench.speed.profiling import profiler as engine
from kdbench.speed.profiling.peaks import peak

WARM_UP, TRACED = 6, 3


FILES = ("profile.json", "trace.json", "profile.png")


NO_PARTS = (
    "a compiled or captured step has no parts, nor has one whose frozen networks run elsewhere: they are those of the "
    "same step, run as it stands with all in it"
)


NOTHING_SEEN = (
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
    with opened(recipe, stage) as found:
        result, chrome = _measure(found, steps, folder)
    write_json(folder / "profile.json", result)
    write_atomic(folder / "trace.json", json.dumps(chrome).encode())
    write_atomic(folder / "profile.png", picture(result).png)
    return {**result, "files": {name: str(folder / name) for name in FILES}}


def _measure(found: Opened, steps: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    runner, notes = found.runner, list(found.missing)
    device, precision = runner.device, runner.stage.precision
    runner.say = notes.append
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    windows = _endless(found.arrangement.windows)
    for _ in range(_warm_up(runner, steps)):
        engine.take_step(runner, windows)
    elsewhere = {name: mode for name, mode in found.arrangement.modes.items() if mode != "inline"}
    stands = _as_it_stands(runner) and not elsewhere
    asked = None if stands else engine.time_whole(runner, windows, steps)
    seen, profiler = engine.trace(runner, windows, TRACED, apart=stands)
    if seen.kernels == 0:
        notes.append(NOTHING_SEEN)
    chrome = _exported(profiler, folder)
    memory = _peak_memory(device)
    plain = runner
    if not stands:
        notes += [*filter(None, [found.arrangement.words()]), NO_PARTS]
        windows = found.feed.windows(0)
        without = replace(found.recipe, compile=False)
        plain = Runner(runner.plan, without, runner.network, device, steps_per_epoch=runner.steps_per_epoch)
        for _ in range(WARM_UP):
            engine.take_step(plain, windows)
    timed = engine.time_parts(plain, windows, steps)
    counted = engine.count(plain, windows)
    if plain is not runner:
        apart, _ = engine.trace(plain, windows, TRACED, apart=True)
        seen = replace(seen, backward=apart.backward)
    whole = asked or timed
    second = statistics.mean(whole.whole)
    limit = peak(device, precision)
    read = sum(counted.flops.get(f"forward {name}", 0) for name, mode in elsewhere.items() if mode == "cache")
    flops = sum(counted.flops.values())
    executed = flops - read
    machine = {"device": describe_device(device), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "kdbench": kdbench.__version__}
    result = {
        "recipe": found.recipe.name,
        "overrides": list(found.recipe.overrides),
        "stage": runner.stage.name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        **machine,
        "precision": precision,
        "compile": found.recipe.compile,
        "frozen_forward": dict(found.arrangement.modes),
        "steps": steps,
        "samples_per_step": whole.samples / len(whole.whole),
        "step": _milliseconds(whole.whole),
        "samples_per_second": round(whole.samples / sum(whole.whole), 1),
        "parts_of_a_step": {"taken_apart_ms": _ms(sum(timed.parts.values())), "whole": _milliseconds(timed.whole)},
        "parts": _parts(timed.parts, counted, seen.backward, limit.flops),
        "operations": sum(counted.operations.values()),
        "flops": flops,
        "kernels": seen.kernels,
        "copies": seen.copies,
        "busy_ms": _ms(seen.busy),
        "idle_ms": _ms(max(0.0, second - seen.busy)),
        "flops_per_second": executed / second,
        "peak": {"flops_per_second": limit.flops, "source": limit.source},
        "mfu": None if limit.flops is None else executed / second / limit.flops,
        "peak_memory": memory,
        "slowest_operations": [
            {"operation": name, "ms": _ms(seconds), "calls": calls} for name, seconds, calls in seen.slowest
        ],
        "notes": notes,
    }
    return result, chrome


def _warm_up(runner: Runner, steps: int) -> int:
    """How many steps come before the first that is timed.

    A captured step is recorded anew for the first that is logged, which takes as long as hundreds of replays: it comes
    before, unless no timed step is logged.
    """
    logged = runner.stage.log_every
    timed = runner.recipe.uses_cuda_graph(runner.device.type) and logged <= WARM_UP + steps + TRACED
    return max(WARM_UP, logged) if timed else WARM_UP


def _endless(windows: Windows) -> Iterator[list[Batch]]:
    """A stage's batches, from the begin again where it is shorter than what is measured."""
    while True:
        yield from windows.windows(0)


def _as_it_stands(runner: Runner) -> bool:
    """Whether a step runs as it is written: neither compiled, nor recorded and replayed."""
    taken_over = runner.perform != runner.execute or runner.differentiate != runner.gradients_of
    return not runner.compiling and not taken_over


def _exported(profiler: Any, folder: Path) -> dict[str, Any]:
    """The profiler's Chrome trace, with the parts of the steps as a row of their own."""
    file = folder / "trace.json"
    with disk_errors_translated(file):
        profiler.export_chrome_trace(str(file))
    return engine.with_parts(json.loads(file.read_text(encoding="utf-8")))


def _parts(
    seconds: Mapping[str, float], counted: engine.Counted, backward: Mapping[str, float], limit: float | None
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


def _milliseconds(seconds: list[float]) -> dict[str, float]:
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


def picture(result: Mapping[str, Any]) -> Picture:
    """Draws the parts as shares of a step's time, operations and FLOPs, one bar each."""
    step, parts = result["parts_of_a_step"]["taken_apart_ms"], result["parts"]
    rows = [
        (f"time\n{step:,.{1 if step < 100 else 0}f} ms", [part["ms"] for part in parts]),
        (f"operations\n{result['operations']:,}", [part["operations"] for part in parts]),
        (f"FLOPs\n{sized(result['flops'])}", [part["flops"] for part in parts]),
    ]
    title = f"{result['recipe']}, stage {result['stage']}: one step on {result['device']}"
    return bars(title, [part["part"] for part in parts], rows)
