"""The parts (measurements) of the GPU benchmark gpu.py, with the predictions in NOTES.md for one H200 GPU."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import quartiles, synchronize
from gpu_common import (
    CONCURRENT_PAIR,
    EPOCHS,
    FASTEST,
    HEADLINE_PAIR,
    BenchmarkPart,
    PartContext,
    PartSkipped,
    file_name,
    folder_name,
    run_speed,
)
from gpu_peers import compare_with_peer
from torch import nn

from kdbench.config.load import load_recipe
from kdbench.engine.device import precision_settings
from kdbench.experiment.profile import profile
from kdbench.experiment.run import run
from kdbench.registry import MODELS
from kdbench.report.console import ConsoleReporter
from kdbench.speed.profiling.peaks import device_peak

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


# Kernels and forward passes


def kernels(context: PartContext) -> dict[str, Any]:
    """Measures the microseconds per kernel of 200 small dependent kernels, launched eagerly and replayed as a graph."""
    count, rounds = 200, 3 if context.quick else 50
    value = torch.zeros(64, device=context.device)

    def chain() -> None:
        for _ in range(count):
            value.add_(1)

    result: dict[str, Any] = {"kernels": count, "eager_us": _microseconds_per_kernel(chain, count, rounds, context)}
    if torch.device(context.device).type != "cuda":
        return {**result, "replay_us": None, "why": "this device has no CUDA graphs"}
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return {**result, "replay_us": _microseconds_per_kernel(graph.replay, count, rounds, context)}


def _microseconds_per_kernel(
    work: Callable[[], object], count: int, rounds: int, context: PartContext
) -> dict[str, float]:
    times = []
    for _ in range(rounds + 3):
        synchronize(context.device)
        start = time.perf_counter()
        work()
        synchronize(context.device)
        times.append(1e6 * (time.perf_counter() - start) / count)
    return quartiles(times[3:], 3)  # the first three rounds warm up


def teacher_forward(context: PartContext) -> dict[str, Any]:
    """Measures the images per second of the resnet32x4 teacher in eval mode.

    The batch sizes are those of training (64) and of prefetching (1024).
    """
    size, batch_sizes = (16, (2, 4)) if context.quick else (32, (64, 1024))
    name = "resnet8x4" if context.quick else HEADLINE_PAIR[0]
    result: dict[str, Any] = {}
    for precision in ("float32", "bf16") if context.quick else ("float32", "tf32", "bf16"):
        model = MODELS.build(name, {}, num_classes=100).to(context.device, memory_format=torch.channels_last).eval()
        peak = device_peak(torch.device(context.device), precision)
        for batch in batch_sizes:
            images = torch.randn(batch, 3, size, size, device=context.device)
            images = images.to(memory_format=torch.channels_last)
            speed = _forward_speed(model, images, precision, 3 if context.quick else 30, context)
            result[f"{precision}, batch {batch}"] = {"images_per_second": speed}
        result[f"{precision}, peak"] = {"flops": peak.flops, "source": peak.source}
    return result


def _forward_speed(
    model: nn.Module, images: torch.Tensor, precision: str, rounds: int, context: PartContext
) -> dict[str, float]:
    speeds = []
    dtype = AUTOCAST.get(precision, torch.bfloat16)
    device_type = torch.device(context.device).type
    autocast = torch.autocast(device_type, dtype, enabled=precision in AUTOCAST)
    with precision_settings(precision), torch.no_grad(), autocast:
        for _ in range(rounds + 3):
            synchronize(context.device)
            start = time.perf_counter()
            for _ in range(10):
                model(images)
            synchronize(context.device)
            speeds.append(10 * len(images) / (time.perf_counter() - start))
    return quartiles(speeds[3:], 1)  # the first three rounds warm up


# Training steps


def profile_step(*overrides: str) -> Callable[[PartContext], dict[str, Any]]:
    """Returns a measurement that profiles the step of resnet32x4 -> resnet8x4: time, kernels, MFU, memory."""

    def measure(context: PartContext) -> dict[str, Any]:
        folder = context.folder / "profiles" / folder_name(*overrides)
        steps = 4 if context.quick else 300
        result = profile(context.recipe(*overrides), steps=steps, out=folder)
        del result["files"]  # paths of this machine
        return {"overrides": list(overrides), "profile": {**result, "overrides": list(overrides)}}

    return measure


def frozen_forward(mode: str) -> Callable[[PartContext], dict[str, Any]]:
    """Returns a measurement of the speed of a run.

    Args:
        mode: when the frozen teacher runs. `inline`: in each step; `prefetch`: before the step, for several batches at
            once; `cache`: never, because its outputs are read from a cache.
    """

    def measure(context: PartContext) -> dict[str, Any]:
        return run_speed(context, *FASTEST, f"frozen_forward={mode}", steps=1600)

    return measure


# Concurrent runs, epochs, accuracy, teachers


def concurrent_runs(context: PartContext) -> dict[str, Any]:
    """Measures the wall time of four students in one process, divided by the wall time of a single student."""
    seeds, steps = ("1,2", 8) if context.quick else ("1,2,3,4", 1200)
    fastest = FASTEST[:1] if context.quick else FASTEST
    overrides = [f"steps={steps}", "epochs=null", "fresh=true", f"log_every={max(steps // 12, 1)}", *fastest]
    single = _sweep(context, "single", [*overrides, "seed=1"])
    concurrent = _sweep(context, "concurrent", [*overrides, f"seed={seeds}", "hydra/launcher=concurrent"])
    single_speed = statistics.median(single["speeds"])
    speed_per_run = statistics.median(concurrent["speeds"])
    return {
        "runs": len(seeds.split(",")),
        "single_images_per_second": round(single_speed, 1),
        "images_per_second_per_run": round(speed_per_run, 1),
        "wall_time_over_single": round(single_speed / speed_per_run, 3),
        "seconds": {"single": single["seconds"], "concurrent": concurrent["seconds"]},
    }


def _sweep(context: PartContext, name: str, overrides: list[str]) -> dict[str, Any]:
    """Runs `kdbench train -m` in a separate process.

    Returns:
        `speeds` (images per second in every log line, except for the first two lines of each run) and `seconds` (the
        duration of the process).
    """
    runs = context.folder / "runs" / f"sweep_{name}"
    settings = [override for override in context.settings() if not override.startswith("runs=")]
    recipe = str(context.recipe_file(CONCURRENT_PAIR))
    arguments = [recipe, *settings, f"runs={runs}", *overrides, f"hydra.sweep.dir={runs / 'sweep'}", "-m"]
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "kdbench", "train", *arguments], capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    if process.returncode:
        raise RuntimeError(f"kdbench train -m {' '.join(overrides)}: {process.stderr.strip()[-600:]}")
    speeds = []
    for file in sorted(runs.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        speeds += [line["images_per_s"] for line in lines if "images_per_s" in line][2:]
    return {"speeds": speeds, "seconds": seconds}


def epochs(context: PartContext) -> dict[str, Any]:
    """Measures epochs of resnet32x4 -> resnet8x4 with evaluation and checkpoint.

    From their mean and deviation, the duration of 240 epochs is estimated.
    """
    count, start_epoch = 8, 5  # the CUDA graph of the last, smaller batch is recorded in the fourth epoch
    start_times: dict[int, float] = {}
    folder = context.folder / "runs" / "epochs"
    recipe = context.recipe(*FASTEST, f"epochs={count + 1}", "scheduler=null", "fresh=true", f"out={folder}")
    steps_per_epoch = -(-(16 if context.quick else 50_000) // context.batch)

    class EpochTimer(ConsoleReporter):
        def progress(self, steps_done: int, phase: str = "") -> None:
            if not phase and steps_done % steps_per_epoch == 1:  # then evaluation and checkpoint are complete
                synchronize(context.device)
                start_times[steps_done // steps_per_epoch] = time.perf_counter()

    run(recipe, console=EpochTimer(quiet=True))
    seconds = [start_times[n + 1] - start_times[n] for n in range(start_epoch, count)]
    mean, deviation = statistics.mean(seconds), statistics.stdev(seconds)
    return {
        "overrides": list(FASTEST),
        "epoch_seconds": [round(value, 4) for value in seconds],
        "projected_minutes": round(EPOCHS * mean / 60, 3),
        "deviation_minutes": round(EPOCHS * deviation / 60, 3),
        "images_per_second": round(steps_per_epoch * context.batch / mean, 1),
    }


def accuracy(seed: int, *overrides: str) -> Callable[[PartContext], dict[str, Any]]:
    """Returns a measurement that trains cifar100/kd for 30 epochs with a shortened schedule.

    An interrupted run is resumed.
    """

    def measure(context: PartContext) -> dict[str, Any]:
        if context.quick:
            recipe = context.recipe("epochs=2", "scheduler=null", f"seed={seed}", *overrides)
        else:
            _require_data(context)
            shortened = ["epochs=30", "scheduler.milestones=[19,23,27]", f"seed={seed}", *overrides]
            recipe = load_recipe("cifar100/kd", [*context.settings(), *shortened])
        summary = run(recipe, console=ConsoleReporter(quiet=True)).summary
        return {
            "overrides": [f"seed={seed}", *overrides],
            "top1": summary["last"]["metrics"]["student"]["test"]["top1"],
        }

    return measure


def compare_accuracies(context: PartContext) -> dict[str, Any]:
    """Compares the mean accuracies of compiled bf16 and eager float32.

    `within_deviation` is True if they differ by at most the deviation of float32 over the seeds.
    """
    top1_by_setting: dict[str, list[float]] = {}
    for name, part in PARTS.items():
        if name.startswith("accuracy "):
            file = context.folder / f"{file_name(name)}.json"
            result = json.loads(file.read_text(encoding="utf-8"))["measured"] if file.exists() else {}
            if "top1" not in result:
                raise PartSkipped(f"the part {name!r} has not been measured yet ({part.what})")
            top1_by_setting.setdefault(name.rsplit(" ", 1)[0], []).append(result["top1"])
    rows = {
        setting: {"mean": statistics.mean(top1), "deviation": statistics.stdev(top1), "top1": top1}
        for setting, top1 in top1_by_setting.items()
    }
    float32, bf16 = rows["accuracy float32 eager"], rows["accuracy bf16 compiled"]
    difference = bf16["mean"] - float32["mean"]
    return {**rows, "difference": difference, "within_deviation": abs(difference) <= float32["deviation"]}


def train_teacher(model: str) -> Callable[[PartContext], dict[str, Any]]:
    """Returns a measurement that trains the teacher of the CIFAR-100 recipes with a compiled step.

    The run has the identity that the recipes expect, so that students can use the weights. An interrupted run is
    resumed.
    """

    def measure(context: PartContext) -> dict[str, Any]:
        if context.quick:
            recipe = context.recipe("epochs=1", "scheduler=null", "seed=9")
        else:
            _require_data(context)
            recipe = load_recipe("cifar100/teacher", [*context.settings(), f"student.model={model}", "compile=true"])
        start = time.perf_counter()
        outcome = run(recipe, console=ConsoleReporter(quiet=True))
        top1 = outcome.summary["last"]["metrics"]["student"]["test"]["top1"]
        return {"model": model, "top1": top1, "seconds_of_this_call": round(time.perf_counter() - start, 1)}

    return measure


def _require_data(context: PartContext) -> None:
    if context.args.data is None:
        raise PartSkipped("--data FOLDER is missing; accuracies need the images of CIFAR-100")


UNFUSED_KERNELS, FUSED_KERNELS = 234, 169
SEEDS = (1, 2, 3)
PARTS: dict[str, BenchmarkPart] = {
    "kernels": BenchmarkPart(
        "microseconds per kernel, eager and replayed", kernels, 1, {"eager_us": [8, 10], "replay_us": [2.5, 4]}
    ),
    "teacher forward": BenchmarkPart(
        "resnet32x4 in eval, images per second", teacher_forward, 1, {"fraction_of_peak": 0.4}
    ),
    "step eager float32": BenchmarkPart(
        "training step",
        profile_step("precision=float32"),
        1.5,
        {"kernels": UNFUSED_KERNELS, "step_ms": [1.9, 2.3]},
    ),
    "step eager bf16": BenchmarkPart(
        "training step", profile_step("precision=bf16"), 1.5, {"kernels": UNFUSED_KERNELS}
    ),
    "step cuda_graph tf32": BenchmarkPart(
        "training step", profile_step("precision=tf32", "compile=cuda_graph"), 1.5, {"kernels": UNFUSED_KERNELS}
    ),
    "step cuda_graph bf16": BenchmarkPart(
        "training step",
        profile_step("precision=bf16", "compile=cuda_graph"),
        1.5,
        {"kernels": UNFUSED_KERNELS, "step_ms": [0.6, 0.95]},
    ),
    "step compiled bf16": BenchmarkPart(
        "training step",
        profile_step("precision=bf16", "compile=true"),
        4,
        {"kernels": FUSED_KERNELS, "step_ms": [0.43, 0.68], "mfu": 0.25},
    ),
    "step max bf16": BenchmarkPart(
        "training step", profile_step("precision=bf16", "compile=max"), 8, {"kernels": FUSED_KERNELS}
    ),
    "torchdistill": BenchmarkPart(
        "300 steps against torchdistill", compare_with_peer("torchdistill"), 4, {"kdbench_over": [3, 5]}
    ),
    "mdistiller": BenchmarkPart(
        "300 steps against mdistiller", compare_with_peer("mdistiller"), 4, {"kdbench_over": [4, 8]}
    ),
    "frozen inline": BenchmarkPart(
        "teacher in each step", frozen_forward("inline"), 3, {"minutes_of_240_epochs": [3.1, 3.5]}
    ),
    "frozen prefetch": BenchmarkPart(
        "teacher on several batches before their steps",
        frozen_forward("prefetch"),
        3,
        {"teacher_seconds_per_epoch": 0.41},
    ),
    "frozen cache": BenchmarkPart(
        "teacher outputs from a cache", frozen_forward("cache"), 4, {"minutes_of_240_epochs": [1.3, 1.7]}
    ),
    "concurrent": BenchmarkPart(
        "four concurrent runs of resnet20", concurrent_runs, 6, {"wall_time_over_single": [1.3, 2.0]}
    ),
    "epochs": BenchmarkPart("epochs and projection to 240", epochs, 4, {"projected_minutes": [3.1, 3.5], "goal": 5}),
    "teacher resnet32x4": BenchmarkPart("headline teacher", train_teacher("resnet32x4"), 8.5, resumes=True),
    **{
        f"accuracy float32 eager {seed}": BenchmarkPart(
            "30 epochs, float32 eager", accuracy(seed, "precision=float32"), 8, resumes=True
        )
        for seed in SEEDS
    },
    **{
        f"accuracy bf16 compiled {seed}": BenchmarkPart(
            "30 epochs, bf16 compiled with CUDA graphs", accuracy(seed, *FASTEST), 4, resumes=True
        )
        for seed in SEEDS
    },
    "compare accuracies": BenchmarkPart("bf16 against float32", compare_accuracies, 0.2, {"within_deviation": True}),
    **{
        f"teacher {model}": BenchmarkPart("teacher of a pair", train_teacher(model), 8.5, resumes=True)
        for model in ("resnet56", "resnet110", "wrn_40_2", "vgg13", "resnet50")
    },
}
"""Parts of the benchmark in descending order of importance, with the predictions in NOTES.md for one H200 GPU."""
