"""`kdbench train`: one run, and what it prints at its end."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdbench.config.schema import Recipe

if TYPE_CHECKING:
    from kdbench.experiment.run import Outcome


def train_recipe(recipe: Recipe) -> Outcome:
    """Trains a recipe to its end; a finished one only prints its summary again."""
    _import_engine()
    _retain_freed_memory()
    from kdbench.experiment.run import run as run_experiment

    outcome = run_experiment(recipe)
    print_outcome(outcome)
    return outcome


def print_outcome(outcome: Outcome) -> None:
    """Prints how a run ended."""
    from kdbench.report.summary import print_summary

    if outcome.is_main:
        if outcome.already_finished:
            print(f"{outcome.folder} is finished; this is its summary (fresh=true trains anew).")
        print_summary(outcome.summary)
        print(f"Everything is in {outcome.folder}")


def _import_engine() -> None:
    """Imports what every training needs while the garbage collector rests.

    Torch's modules are half a million objects without any garbage. To search them over and over while they come takes a
    quarter of the time of their import; and they are left out of all later searches, which saves 0.2 s each.
    """
    if "torch._dynamo" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        importlib.import_module("kdbench.experiment.run")
        importlib.import_module("torch._dynamo")  # the first optimiser that is built imports it
        gc.freeze()
    finally:
        gc.enable()


def _retain_freed_memory() -> None:
    """Lets glibc's malloc keep what a step frees for the next step, where nobody has set it up otherwise.

    By itself it gives blocks of some megabytes, such as feature maps on a CPU, back to the system as soon as they are
    free; the next step then gets them as fresh pages, each of which the system has to clear and to map at first touch.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no such function
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt(trim_threshold, 1 << 30)
    if not mallopt(mmap_threshold, 1 << 30):  # older ones take no more than half of a thread's heap
        mallopt(mmap_threshold, 1 << 25)


def print_jobs(jobs: Sequence[Mapping[str, str]]) -> None:
    """Prints the jobs of a multirun as one table: mean and deviation over the seeds of otherwise equal jobs.

    Args:
        jobs: of each job its `label` (the overrides less the seed) and, where it finished, the run's `folder` and the
            exported `role`.
    """
    from rich.console import Console

    from kdbench.report.tables import RunGroup, aggregate

    by_label: dict[str, list[Mapping[str, str]]] = {}
    for job in jobs:
        by_label.setdefault(job["label"], []).append(job)
    rows, missing = [], []
    for label, group in by_label.items():
        done = [job for job in group if "folder" in job]
        lost = len(group) - len(done)
        if done:
            name = (label or "all jobs") + (f" ({len(done)} of {len(group)} finished)" if lost else "")
            rows.append(RunGroup(name, [job["folder"] for job in done], role=done[0]["role"]))
        else:
            missing.append(label or "all jobs")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print()
    console.print(aggregate(rows).table())
    print("Test accuracy of the last epoch; mean and deviation over seeds.")
    for label in missing:
        print(f"{label}: no job finished.")
