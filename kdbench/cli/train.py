"""`kdbench train`: one run, and what it prints at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdbench.config.schema import Recipe

if TYPE_CHECKING:
    from kdbench.results.experiment import Outcome


def run(recipe: Recipe) -> Outcome:
    """Trains a recipe to its end; a finished one only prints its summary again."""
    from kdbench.results.experiment import run as run_experiment
    from kdbench.results.summary import print_summary

    outcome = run_experiment(recipe)
    if outcome.is_main:
        if outcome.repeated:
            print(f"{outcome.folder} is finished; this is its summary (fresh=true trains anew).")
        print_summary(outcome.summary)
        print(f"Everything is in {outcome.folder}")
    return outcome


def print_jobs(jobs: Sequence[Mapping[str, str]]) -> None:
    """Prints the jobs of a multirun as one table: mean and deviation over the seeds of otherwise equal jobs.

    Args:
        jobs: of each finished job the run's `folder`, the exported `role`, and `label`: its overrides less the seed.
    """
    from rich.console import Console

    from kdbench.results.report import Row, aggregate

    folders: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        folders.setdefault((job["label"], job["role"]), []).append(job["folder"])
    rows = [Row(label or "all jobs", found, role=role) for (label, role), found in folders.items()]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print()
    console.print(aggregate(rows).table())
    print("Test accuracy of the last epoch; mean and deviation over seeds.")
