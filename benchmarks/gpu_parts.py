"""The measurements of gpu.py: what each part does, and what had been predicted for it on one H200 (NOTES.md)."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Training, quartiles, synchronise
from torch import nn

from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.engine.device import precision_settings
from kdbench.experiment.profile import profile
from kdbench.experiment.run import run
from kdbench.registry import DATASETS, MODELS
from kdbench.report.console import ConsoleReporter
from kdbench.speed.profiling.peaks import device_peak

RECIPE = """
dataset: {dataset}
batch_size: {batch}
augment: [{{type: crop, padding: 4}}, flip]
teacher: {{model: {teacher}}}
student: {{model: {student}}}
terms:
  ce: {{type: cross_entropy, weight: 0.1}}
  kd: {{type: kd, temperature: 4, weight: 0.9}}
optimizer: {{type: SGD, lr: 0.05, momentum: 0.9, weight_decay: 5.0e-4}}
scheduler: {{type: step, milestones: [150, 180, 210], gamma: 0.1}}
epochs: 240
"""
HEADLINE, CONCURRENT_PAIR = ("resnet32x4", "resnet8x4"), ("resnet56", "resnet20")
EPOCHS = 240
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BEST = ("precision=bf16", "compile=true")
"""The settings that the goals are about."""


class PartSkipped(Exception):
    """A part that cannot be measured here, and why."""


@dataclass(frozen=True)
class PartContext:
    """args: of gpu.py. folder: where results and what runs leave lie."""

    args: argparse.Namespace
    folder: Path

    @property
    def quick(self) -> bool:
        return self.args.quick

    @property
    def device(self) -> str:
        return self.args.device

    @property
    def batch(self) -> int:
        return 4 if self.quick else 64

    def images(self) -> str:
        """The dataset, as a recipe has it; random images of the same number where there is no CIFAR-100."""
        if self.quick:
            return "{type: synthetic, shape: [3, 16, 16], classes: 4, samples: 16}"
        return "cifar100" if self.args.data else "{type: synthetic, shape: [3, 32, 32], classes: 100, samples: 50000}"

    def settings(self) -> list[str]:
        data = [f"data_root={self.args.data.resolve()}"] if self.args.data else []
        return [f"device={self.device}", f"runs={self.folder / 'runs'}", "tensorboard=false", *data]

    def file(self, pair: tuple[str, str] = HEADLINE) -> Path:
        teacher, student = ("resnet8x4", "resnet8x4") if self.quick else pair
        text = RECIPE.format(dataset=self.images(), batch=self.batch, teacher=teacher, student=student)
        file = self.folder / "recipes" / f"{pair[0]}_{pair[1]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def recipe(self, *overrides: str, pair: tuple[str, str] = HEADLINE) -> Recipe:
        if self.quick:  # compiling for a CPU takes minutes, and is no matter of this benchmark
            overrides = tuple(word for word in overrides if word not in ("compile=true", "compile=max"))
        return load_recipe(str(self.file(pair)), [*self.settings(), *overrides])


@dataclass(frozen=True)
class BenchmarkPart:
    """One part. minutes: about how long it takes on a GPU. resumes: whether a part that was cut off goes on later."""

    what: str
    measure: Callable[[PartContext], dict[str, Any]]
    minutes: float
    predicted: Mapping[str, Any] = field(default_factory=dict)
    resumes: bool = False


# Kernels and networks alone


def kernels(context: PartContext) -> dict[str, Any]:
    """Microseconds of each of 200 tiny kernels that depend on one another: launched one by one, and replayed."""
    count, rounds = 200, 3 if context.quick else 50
    value = torch.zeros(64, device=context.device)

    def chain() -> None:
        for _ in range(count):
            value.add_(1)

    found: dict[str, Any] = {"kernels": count, "eager_us": _us_each(chain, count, rounds, context)}
    if torch.device(context.device).type != "cuda":
        return {**found, "replay_us": None, "why": "no graphs on this device"}
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return {**found, "replay_us": _us_each(graph.replay, count, rounds, context)}


def _us_each(work: Callable[[], object], count: int, rounds: int, context: PartContext) -> dict[str, float]:
    times = []
    for _ in range(rounds + 3):
        synchronise(context.device)
        start = time.perf_counter()
        work()
        synchronise(context.device)
        times.append(1e6 * (time.perf_counter() - start) / count)
    return quartiles(times[3:], 3)


def teacher(context: PartContext) -> dict[str, Any]:
    """Images per second of the headline teacher in eval, at the student's batch and at that of a look-ahead."""
    size, sizes = (16, (2, 4)) if context.quick else (32, (64, 1024))
    name = "resnet8x4" if context.quick else HEADLINE[0]
    found: dict[str, Any] = {}
    for precision in ("float32", "bf16") if context.quick else ("float32", "tf32", "bf16"):
        model = MODELS.build(name, {}, num_classes=100).to(context.device, memory_format=torch.channels_last).eval()
        limit = device_peak(torch.device(context.device), precision)
        for batch in sizes:
            images = torch.randn(batch, 3, size, size, device=context.device)
            images = images.to(memory_format=torch.channels_last)
            rate = _forward_rate(model, images, precision, 3 if context.quick else 30, context)
            found[f"{precision}, batch {batch}"] = {"images_per_second": rate}
        found[f"{precision}, peak"] = {"flops": limit.flops, "source": limit.source}
    return found


def _forward_rate(
    model: nn.Module, images: torch.Tensor, precision: str, rounds: int, context: PartContext
) -> dict[str, float]:
    rates = []
    dtype = AUTOCAST.get(precision, torch.bfloat16)
    kind = torch.device(context.device).type
    with precision_settings(precision), torch.no_grad(), torch.autocast(kind, dtype, enabled=precision in AUTOCAST):
        for _ in range(rounds + 3):
            synchronise(context.device)
            start = time.perf_counter()
            for _ in range(10):
                model(images)
            synchronise(context.device)
            rates.append(10 * len(images) / (time.perf_counter() - start))
    return quartiles(rates[3:], 1)


# The step


def step(*overrides: str) -> Callable[[PartContext], dict[str, Any]]:
    """The headline pair's step, by `kdbench profile`: time, kernels, busy share, MFU, memory."""

    def measure(context: PartContext) -> dict[str, Any]:
        folder = context.folder / "profiles" / _plain(*overrides)
        steps = 4 if context.quick else 300
        found = profile(context.recipe(*overrides), steps=steps, out=folder)
        del found["files"]
        return {"overrides": list(overrides), "profile": {**found, "overrides": list(overrides)}}

    return measure


def _plain(*words: str) -> str:
    """Words as a folder's name."""
    return "_".join(words).replace("=", "-").replace("/", "-")


class StepTimer(ConsoleReporter):
    """Notes the time after every `every` steps, when the device has come so far."""

    def __init__(self, device: str, every: int) -> None:
        super().__init__(quiet=True)
        self.device, self.every = device, every
        self.times: list[float] = []
        self.notices: list[str] = []

    def progress(self, done: int, phase: str = "") -> None:
        if not phase and done % self.every == 0:
            synchronise(self.device)
            self.times.append(time.perf_counter())

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def spans(self, skip: int) -> list[float]:
        """Seconds between two notes, without the first `skip` spans: compiling, recording, starting."""
        spans = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return spans[min(skip, max(len(spans) - 2, 0)) :]


def pace(context: PartContext, *overrides: str, pair: tuple[str, str] = HEADLINE, steps: int = 600) -> dict[str, Any]:
    """Images per second of a whole run as `kdbench train` does it, in blocks of steps."""
    every, steps = (1, 6) if context.quick else (50, steps)
    folder = context.folder / "runs" / _plain("pace", *overrides)
    view = StepTimer(context.device, every)
    recipe = context.recipe(*overrides, f"steps={steps}", "epochs=null", "fresh=true", f"out={folder}", pair=pair)
    run(recipe, console=view)
    rates = [every * context.batch / seconds for seconds in view.spans(3)]
    return {"overrides": list(overrides), "images_per_second": quartiles(rates, 1), "said": view.notices}


def frozen(mode: str) -> Callable[[PartContext], dict[str, Any]]:
    """The same with the teacher in the step, ahead of it, or from a table."""

    def measure(context: PartContext) -> dict[str, Any]:
        if "frozen_forward" not in Recipe.__dataclass_fields__:
            raise PartSkipped("this version of kdbench has no key frozen_forward")
        return pace(context, *BEST, f"frozen_forward={mode}", steps=1600)

    return measure


# Peers


def peer(name: str) -> Callable[[PartContext], dict[str, Any]]:
    """300 steps of a peer with its own code and loader, and kdbench's best on the same machine right after."""

    def measure(context: PartContext) -> dict[str, Any]:
        train = {"torchdistill": _torchdistill, "mdistiller": _mdistiller}[name](context)
        every, steps = (1, 6) if context.quick else (25, 300)
        view = StepTimer(context.device, every)
        done = 0

        class Over(BaseException):
            pass

        def tick() -> None:
            nonlocal done
            done += 1
            view.progress(done)
            if done > steps:
                raise Over

        with contextlib.suppress(Over):
            train(tick)
        theirs = quartiles([every * context.batch / seconds for seconds in view.spans(2)], 1)
        own = pace(context, *BEST)
        ratio = own["images_per_second"]["median"] / theirs["median"]
        return {name: {"images_per_second": theirs}, "kdbench": own, "kdbench_over": round(ratio, 2)}

    return measure


def _networks(context: PartContext) -> tuple[nn.Module, nn.Module]:
    names = ("resnet8x4", "resnet8x4") if context.quick else HEADLINE
    first, second = (MODELS.build(name, {}, num_classes=4 if context.quick else 100) for name in names)
    return first, second


def _torchdistill(context: PartContext) -> Training:
    if context.args.torchdistill is None:
        raise PartSkipped("--torchdistill FOLDER was not given")
    sys.path.append(str(context.args.torchdistill))
    from step import torchdistill

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    if context.args.data and not context.quick:
        split = DATASETS.build("cifar100", {}, split="train", data_root=str(context.args.data)).load()
        images, labels = split.images, split.labels
    else:
        count, classes = (16, 4) if context.quick else (50_000, 100)
        images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(classes, (count,))
    models = _networks(context)
    workers = 0 if context.quick else context.args.workers
    return torchdistill(*models, images, labels, context.device, workers, fixed=False, own=True, batch=context.batch)


def _mdistiller(context: PartContext) -> Training:
    """mdistiller's loop (its trainer's `train_iter` under its loader and tqdm), as tools/train.py sets it up."""
    args = context.args
    if args.mdistiller is None:
        raise PartSkipped("--mdistiller FOLDER (a checkout of megvii-research/mdistiller) was not given")
    if args.data is None or torch.device(context.device).type != "cuda":
        raise PartSkipped("mdistiller needs --data with CIFAR-100, and a GPU")
    sys.path.insert(0, str(args.mdistiller))
    from mdistiller.dataset import cifar100, get_dataset  # pyright: ignore[reportMissingImports]
    from mdistiller.distillers import distiller_dict  # pyright: ignore[reportMissingImports]
    from mdistiller.engine import trainer_dict  # pyright: ignore[reportMissingImports]
    from mdistiller.engine.cfg import CFG  # pyright: ignore[reportMissingImports]
    from mdistiller.engine.utils import AverageMeter, log_msg  # pyright: ignore[reportMissingImports]
    from mdistiller.models import cifar_model_dict  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

    CFG.merge_from_file(str(args.mdistiller / "configs" / "cifar100" / "kd" / "res32x4_res8x4.yaml"))
    CFG.LOG.WANDB, CFG.LOG.PREFIX = False, str(context.folder / "mdistiller")
    cifar100.get_data_folder = lambda: str(_cifar_folder(args.data))
    torch.backends.cudnn.benchmark = True
    loader, validation, _, classes = get_dataset(CFG)
    networks = (
        cifar_model_dict[name][0](num_classes=classes) for name in (CFG.DISTILLER.STUDENT, CFG.DISTILLER.TEACHER)
    )
    distiller = torch.nn.DataParallel(distiller_dict[CFG.DISTILLER.TYPE](*networks, CFG).cuda())
    trainer = trainer_dict[CFG.SOLVER.TRAINER]("kd", distiller, loader, validation, CFG)

    def train(tick: Callable[[], None]) -> None:
        distiller.train()
        while True:
            meters = {n: AverageMeter() for n in ("training_time", "data_time", "losses", "top1", "top5")}
            bar = tqdm(range(len(loader)))
            for data in loader:
                bar.set_description(log_msg(trainer.train_iter(data, 1, meters), "TRAIN"))
                bar.update()
                tick()
            bar.close()

    return train


def _cifar_folder(data: Path) -> Path:
    """The folder in which torchvision's CIFAR-100 finds `cifar-100-python`."""
    return next((path.parent for path in data.rglob("cifar-100-python")), data)


# Gangs, epochs, accuracy, teachers


def concurrent_runs(context: PartContext) -> dict[str, Any]:
    """Four students in one process against one alone: how much longer the wall takes."""
    if importlib.util.find_spec("kdbench.cli.concurrent_launcher") is None:
        raise PartSkipped("this version of kdbench has no launcher gang")
    seeds, steps = ("1,2", 8) if context.quick else ("1,2,3,4", 1200)
    best = BEST[:1] if context.quick else BEST
    common = [f"steps={steps}", "epochs=null", "fresh=true", f"log_every={max(steps // 12, 1)}", *best]
    alone = _sweep(context, "alone", [*common, "seed=1"])
    together = _sweep(context, "gang", [*common, f"seed={seeds}", "hydra/launcher=concurrent"])
    one = statistics.median(alone["rates"])
    each = statistics.median(together["rates"])
    return {
        "members": len(seeds.split(",")),
        "alone_images_per_second": round(one, 1),
        "each_member_images_per_second": round(each, 1),
        "wall_of_the_gang_over_one": round(one / each, 3),
        "seconds": {"alone": alone["seconds"], "gang": together["seconds"]},
    }


def _sweep(context: PartContext, name: str, words: list[str]) -> dict[str, Any]:
    """Runs `kdbench train -m` in a process of its own; the rates of every log line but each run's first two."""
    runs = context.folder / "runs" / f"sweep_{name}"
    settings = [word for word in context.settings() if not word.startswith("runs=")]
    given = [str(context.file(CONCURRENT_PAIR)), *settings, f"runs={runs}", *words, f"hydra.sweep.dir={runs / 'sweep'}"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "kdbench", "train", *given, "-m"], capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode:
        raise RuntimeError(f"kdbench train -m {' '.join(words)}: {done.stderr.strip()[-600:]}")
    rates = []
    for file in sorted(runs.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rates += [line["images_per_s"] for line in lines if "images_per_s" in line][2:]
    return {"rates": rates, "seconds": seconds}


def epochs(context: PartContext) -> dict[str, Any]:
    """Whole epochs of the headline pair with evaluation and checkpoint; 240 of them projected, with the spread."""
    count, first = 8, 5  # the last, smaller batch is recorded in the fourth epoch
    starts: dict[int, float] = {}
    folder = context.folder / "runs" / "epochs"
    recipe = context.recipe(*BEST, f"epochs={count + 1}", "scheduler=null", "fresh=true", f"out={folder}")
    per_epoch = -(-(16 if context.quick else 50_000) // context.batch)

    class Epochs(ConsoleReporter):
        def progress(self, done: int, phase: str = "") -> None:
            if not phase and done % per_epoch == 1:  # the first step of an epoch: all before it is over
                synchronise(context.device)
                starts[done // per_epoch] = time.perf_counter()

    run(recipe, console=Epochs(quiet=True))
    spans = [starts[n + 1] - starts[n] for n in range(first, count)]
    mean, spread = statistics.mean(spans), statistics.stdev(spans)
    return {
        "overrides": list(BEST),
        "epoch_seconds": [round(span, 4) for span in spans],
        "projected_minutes": round(EPOCHS * mean / 60, 3),
        "spread_minutes": round(EPOCHS * spread / 60, 3),
        "images_per_second": round(per_epoch * context.batch / mean, 1),
    }


def accuracy(seed: int, *overrides: str) -> Callable[[PartContext], dict[str, Any]]:
    """30 epochs of cifar100/kd with the learning rate's steps drawn in; another call goes on where one was cut off."""

    def measure(context: PartContext) -> dict[str, Any]:
        if context.quick:
            recipe = context.recipe("epochs=2", "scheduler=null", f"seed={seed}", *overrides)
        else:
            _need_data(context)
            shorter = ["epochs=30", "scheduler.milestones=[19,23,27]", f"seed={seed}", *overrides]
            recipe = load_recipe("cifar100/kd", [*context.settings(), *shorter])
        summary = run(recipe, console=ConsoleReporter(quiet=True)).summary
        return {
            "overrides": [f"seed={seed}", *overrides],
            "top1": summary["last"]["metrics"]["student"]["test"]["top1"],
        }

    return measure


def compare_accuracy(context: PartContext) -> dict[str, Any]:
    """Whether bf16, captured, stays within the deviation over seeds of float32, eager."""
    found: dict[str, list[float]] = {}
    for name, part in PARTS.items():
        if name.startswith("accuracy "):
            file = context.folder / f"{file_name(name)}.json"
            if not file.exists() or "top1" not in (told := json.loads(file.read_text(encoding="utf-8"))["measured"]):
                raise PartSkipped(f"the part {name!r} has not been measured ({part.what})")
            found.setdefault(name.rsplit(" ", 1)[0], []).append(told["top1"])
    rows = {
        name: {"mean": statistics.mean(v), "deviation": statistics.stdev(v), "top1": v} for name, v in found.items()
    }
    plain, fast = rows["accuracy float32 eager"], rows["accuracy bf16 compiled"]
    difference = fast["mean"] - plain["mean"]
    return {**rows, "difference": difference, "within_deviation": abs(difference) <= plain["deviation"]}


def train_teacher(model: str) -> Callable[[PartContext], dict[str, Any]]:
    """The run that recipes ask for as their teacher: the same identity, compiled; goes on where it was cut off."""

    def measure(context: PartContext) -> dict[str, Any]:
        if context.quick:
            recipe = context.recipe("epochs=1", "scheduler=null", "seed=9")
        else:
            _need_data(context)
            recipe = load_recipe("cifar100/teacher", [*context.settings(), f"student.model={model}", "compile=true"])
        start = time.perf_counter()
        outcome = run(recipe, console=ConsoleReporter(quiet=True))
        top1 = outcome.summary["last"]["metrics"]["student"]["test"]["top1"]
        return {"model": model, "top1": top1, "seconds_of_this_call": round(time.perf_counter() - start, 1)}

    return measure


def _need_data(context: PartContext) -> None:
    if context.args.data is None:
        raise PartSkipped("--data FOLDER with CIFAR-100 was not given; accuracies need it")


def file_name(part: str) -> str:
    return part.replace(" ", "_").replace(",", "")


UNFUSED, FUSED = 234, 169
SEEDS = (1, 2, 3)
PARTS: dict[str, BenchmarkPart] = {
    "kernels": BenchmarkPart(
        "microseconds per kernel, eager and replayed", kernels, 1, {"eager_us": [8, 10], "replay_us": [2.5, 4]}
    ),
    "teacher forward": BenchmarkPart("resnet32x4 in eval, images per second", teacher, 1, {"share_of_peak": 0.4}),
    "step eager float32": BenchmarkPart("the step", step("precision=float32"), 1.5, {"kernels": UNFUSED, "step_ms": [1.9, 2.3]}),
    "step eager bf16": BenchmarkPart("the step", step("precision=bf16"), 1.5, {"kernels": UNFUSED}),
    "step captured tf32": BenchmarkPart("the step", step("precision=tf32", "compile=cuda_graph"), 1.5, {"kernels": UNFUSED}),
    "step captured bf16": BenchmarkPart(
        "the step", step("precision=bf16", "compile=cuda_graph"), 1.5, {"kernels": UNFUSED, "step_ms": [0.6, 0.95]}
    ),
    "step compiled bf16": BenchmarkPart(
        "the step", step("precision=bf16", "compile=true"), 4, {"kernels": FUSED, "step_ms": [0.43, 0.68], "mfu": 0.25}
    ),
    "step max bf16": BenchmarkPart("the step", step("precision=bf16", "compile=max"), 8, {"kernels": FUSED}),
    "torchdistill": BenchmarkPart("300 steps against torchdistill", peer("torchdistill"), 4, {"kdbench_over": [3, 5]}),
    "mdistiller": BenchmarkPart("300 steps against mdistiller", peer("mdistiller"), 4, {"kdbench_over": [4, 8]}),
    "frozen inline": BenchmarkPart("the teacher in the step", frozen("inline"), 3, {"minutes_of_240_epochs": [3.1, 3.5]}),
    "frozen ahead": BenchmarkPart("the teacher ahead", frozen("ahead"), 3, {"teacher_seconds_per_epoch": 0.41}),
    "frozen table": BenchmarkPart("the teacher from a table", frozen("table"), 4, {"minutes_of_240_epochs": [1.3, 1.7]}),
    "gang": BenchmarkPart("four resnet20 in a gang", concurrent_runs, 6, {"wall_of_the_gang_over_one": [1.3, 2.0]}),
    "epochs": BenchmarkPart("measured epochs and the projection", epochs, 4, {"projected_minutes": [3.1, 3.5], "goal": 5}),
    "teacher resnet32x4": BenchmarkPart("the headline teacher", train_teacher("resnet32x4"), 8.5, resumes=True),
    **{
        f"accuracy float32 eager {seed}": BenchmarkPart(
            "30 epochs, float32 as it stands", accuracy(seed, "precision=float32"), 8, resumes=True
        )
        for seed in SEEDS
    },
    **{
        f"accuracy bf16 compiled {seed}": BenchmarkPart(
            "30 epochs, bf16 compiled and captured", accuracy(seed, *BEST), 4, resumes=True
        )
        for seed in SEEDS
    },
    "compare accuracies": BenchmarkPart("bf16 against float32", compare_accuracy, 0.2, {"within_deviation": True}),
    **{
        f"teacher {model}": BenchmarkPart("a pair's teacher", train_teacher(model), 8.5, resumes=True)
        for model in ("resnet56", "resnet110", "wrn_40_2", "vgg13", "resnet50")
    },
}
"""In the order in which they are worth a GPU's time. Predictions are those of NOTES.md, for one H200."""
