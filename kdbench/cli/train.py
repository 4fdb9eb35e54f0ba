"""Trains one recipe for `kdbench train`, and prints the results of runs and sweeps."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from kdbench.cli.jobs import JobRecord
from kdbench.config.schema import Recipe
from kdbench.report.summary import print_summary
from kdbench.report.tables import RunGroup, aggregate

if TYPE_CHECKING:
    from kdbench.experiment.run import Outcome


def train_recipe(recipe: Recipe) -> Outcome:
    """Trains a recipe and prints the summary of the run. If the run is already finished, only prints its summary."""
    _import_engine()
    _retain_freed_memory()
    from kdbench.experiment.run import run as run_experiment  # imports torch

    outcome = run_experiment(recipe)
    print_outcome(outcome)
    return outcome


def print_outcome(outcome: Outcome) -> None:
    """Prints the summary and the folder of a run, in the main process only."""
    if outcome.is_main:
        if outcome.already_finished:
            print(f"The run in {outcome.folder} is finished; its summary follows. To train it again, add fresh=true.")
        print_summary(outcome.summary)
        print(f"Everything is in {outcome.folder}")


def _import_engine() -> None:
    """Imports torch and the engine with garbage collection disabled, and excludes their objects from later collections.

    The import creates half a million objects, none of them garbage. Garbage collections would take a quarter of the
    import time, and each later full collection would search these objects for 0.2 s.
    """
    if "torch._dynamo" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        importlib.import_module("kdbench.experiment.run")
        importlib.import_module("torch._dynamo")  # the first optimizer imports it
        gc.freeze()
    finally:
        gc.enable()


def _retain_freed_memory() -> None:
    """Configures glibc's malloc to keep freed blocks for the next training step.

    Does nothing if an environment variable `MALLOC_...` is set.

    By default malloc returns blocks of several megabytes, such as feature maps on a CPU, to the system as soon as
    they are freed. In the next step the system then has to clear and map new pages at their first access.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no such function
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt(trim_threshold, 1 << 30)
    if not mallopt(mmap_threshold, 1 << 30):  # older versions accept at most half of a thread's heap
        mallopt(mmap_threshold, 1 << 25)


def print_jobs(jobs: Sequence[JobRecord]) -> None:
    """Prints the results of a multirun as one table.

    Jobs that differ only in their seed share a row with the mean and the standard deviation.

    Args:
        jobs: records of all jobs of the multirun.
    """
    jobs_by_label: dict[str, list[JobRecord]] = {}
    for job in jobs:
        jobs_by_label.setdefault(job.label, []).append(job)
    names = _short_labels(list(jobs_by_label))
    rows: list[RunGroup] = []
    failed_labels: list[str] = []
    for label, group in jobs_by_label.items():
        finished = [job for job in group if job.folder is not None]
        if not finished:
            failed_labels.append(names[label])
            continue
        count = f" ({len(finished)} of {len(group)} finished)" if len(finished) < len(group) else ""
        folders = [job.folder for job in finished if job.folder is not None]
        rows.append(RunGroup(names[label] + count, folders, role=finished[0].role))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print()
    console.print(aggregate(rows).table())
    print("The table contains the test accuracy of the last epoch, as mean and standard deviation over the seeds.")
    for label in failed_labels:
        print(f"{label}: no job finished.")


def _short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Returns label of a job (its overrides) -> short label, without the overrides that all labels have in common."""
    overrides = {label: label.split() for label in labels}
    common = set.intersection(*map(set, overrides.values())) if len(labels) > 1 else set()
    return {
        label: " ".join(text for text in texts if text not in common) or "all jobs"
        for label, texts in overrides.items()
    }
