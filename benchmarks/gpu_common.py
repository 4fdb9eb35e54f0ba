"""Shared code of the GPU benchmark: its context, the recipe of the headline pair, and the speed of a complete run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import quartiles, synchronize

from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.experiment.run import run
from kdbench.report.console import ConsoleReporter

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
HEADLINE_PAIR, CONCURRENT_PAIR = ("resnet32x4", "resnet8x4"), ("resnet56", "resnet20")
EPOCHS = 240
FASTEST = ("precision=bf16", "compile=true")
"""Overrides of the settings for which NOTES.md has goals."""


class PartSkipped(Exception):
    """Raised if a part of the benchmark cannot be measured on this machine. The message is the reason."""


@dataclass(frozen=True)
class PartContext:
    """Arguments and folder for the measurement of one part of the benchmark.

    Attributes:
        args: arguments of gpu.py.
        folder: folder of the results and of the runs.
    """

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

    def dataset(self) -> str:
        """Returns the dataset of the recipes: CIFAR-100, or without `--data` as many random images."""
        if self.quick:
            return "{type: synthetic, shape: [3, 16, 16], classes: 4, samples: 16}"
        return "cifar100" if self.args.data else "{type: synthetic, shape: [3, 32, 32], classes: 100, samples: 50000}"

    def settings(self) -> list[str]:
        """Returns the overrides that all recipes have in common."""
        data = [f"data_root={self.args.data.resolve()}"] if self.args.data else []
        return [f"device={self.device}", f"runs={self.folder / 'runs'}", "tensorboard=false", *data]

    def recipe_file(self, pair: tuple[str, str] = HEADLINE_PAIR) -> Path:
        """Writes the recipe of a (teacher, student) pair and returns the path of the file."""
        teacher, student = ("resnet8x4", "resnet8x4") if self.quick else pair
        text = RECIPE.format(dataset=self.dataset(), batch=self.batch, teacher=teacher, student=student)
        file = self.folder / "recipes" / f"{pair[0]}_{pair[1]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def recipe(self, *overrides: str, pair: tuple[str, str] = HEADLINE_PAIR) -> Recipe:
        """Loads the recipe of a (teacher, student) pair with overrides."""
        if self.quick:  # compiling for a CPU takes minutes
            overrides = tuple(override for override in overrides if override not in ("compile=true", "compile=max"))
        return load_recipe(str(self.recipe_file(pair)), [*self.settings(), *overrides])


@dataclass(frozen=True)
class BenchmarkPart:
    """One part of the benchmark.

    Attributes:
        what: description of the measurement.
        measure: function that measures the part and returns the entry `measured` of its JSON file.
        minutes: approximate duration on a GPU.
        predicted: predictions in NOTES.md for one H200 GPU.
        resumes: whether an interrupted part resumes from a checkpoint in the next call.
    """

    what: str
    measure: Callable[[PartContext], dict[str, Any]]
    minutes: float
    predicted: Mapping[str, Any] = field(default_factory=dict)
    resumes: bool = False


class StepTimer(ConsoleReporter):
    """Console that records the time after every `every` steps, when the device has completed the steps."""

    def __init__(self, device: str, every: int) -> None:
        super().__init__(quiet=True)
        self.device, self.every = device, every
        self.times: list[float] = []
        self.notices: list[str] = []

    def progress(self, steps_done: int, phase: str = "") -> None:
        if not phase and steps_done % self.every == 0:
            synchronize(self.device)
            self.times.append(time.perf_counter())

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def intervals(self, skip: int) -> list[float]:
        """Returns the seconds between consecutive records, without the first `skip` intervals.

        These first intervals contain the compilation and the recording of CUDA graphs.
        """
        intervals = [end - start for start, end in zip(self.times, self.times[1:], strict=False)]
        return intervals[min(skip, max(len(intervals) - 2, 0)) :]


def run_speed(
    context: PartContext, *overrides: str, pair: tuple[str, str] = HEADLINE_PAIR, steps: int = 600
) -> dict[str, Any]:
    """Measures the images per second of a complete run of `kdbench train`, in blocks of 50 steps."""
    every, steps = (1, 6) if context.quick else (50, steps)
    folder = context.folder / "runs" / folder_name("speed", *overrides)
    timer = StepTimer(context.device, every)
    recipe = context.recipe(*overrides, f"steps={steps}", "epochs=null", "fresh=true", f"out={folder}", pair=pair)
    run(recipe, console=timer)
    speeds = [every * context.batch / seconds for seconds in timer.intervals(3)]
    return {"overrides": list(overrides), "images_per_second": quartiles(speeds, 1), "notices": timer.notices}


def folder_name(*overrides: str) -> str:
    """Converts overrides to a folder name."""
    return "_".join(overrides).replace("=", "-").replace("/", "-")


def file_name(part: str) -> str:
    """Converts the name of a part to the name of its result file, without suffix."""
    return part.replace(" ", "_").replace(",", "")
