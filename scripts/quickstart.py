"""Distils a small network on scikit-learn's handwritten digits over five seeds and prints the table of the README.

Twenty short runs in one process, so that torch is imported once. All of them are ordinary runs of shipped recipes:
what each row is made of can be repeated with `kdbench train` (the commands stand below the table).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kdbench.config.load import load_recipe
from kdbench.errors import UserError
from kdbench.experiment.run import run
from kdbench.files import write_json
from kdbench.report.console import ConsoleReporter
from kdbench.report.summary import score
from kdbench.report.tables import RunGroup, SeedTable, aggregate

THREADS = 1
"""Networks of this size gain nothing by more, and lose much when the machine is busy."""


@dataclass(frozen=True)
class Kind:
    """A row of the table: a recipe with overrides, run once per seed."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join(["kdbench train", self.recipe, *self.overrides])


# Weight 0 leaves the teacher out of the training, to the last bit like `baseline=true`; agreement is measured all the same.
ALONE = "terms.kd.weight=0"
KINDS = (
    Kind("teacher", "digits/teacher"),
    Kind("student, 50 labels", "digits/kd", (ALONE,)),
    Kind("student, all labels", "digits/kd", (ALONE, "label_fraction=null")),
    Kind("student, distilled", "digits/kd"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs' folders go (default: runs)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 1 to N (default: 5)")
    parser.add_argument("--fresh", action="store_true", help="train anew what was trained before")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    began = time.monotonic()
    print("Four kinds of networks on 901 training images of handwritten digits; test accuracy in %, seed by seed:")
    rows = [train(kind, given.seeds, given.runs, fresh=given.fresh) for kind in KINDS]
    show(rows, given.seeds, Path(given.runs), time.monotonic() - began)
    return 0


def train(kind: Kind, seeds: int, runs: str, *, fresh: bool = False) -> RunGroup:
    """Runs one kind over the seeds; a finished run costs nothing."""
    print(f"  {kind.label:<21}", end="", flush=True)
    folders = []
    for seed in range(1, seeds + 1):
        # Seed 1's teacher is the one that all students of digits/kd learn from: it is there before they begin.
        settings = [f"seed={seed}", f"runs={runs}", "device=cpu", *(["fresh=true"] if fresh else [])]
        outcome = run(load_recipe(kind.recipe, [*kind.overrides, *settings]), console=ConsoleReporter(quiet=True))
        folders.append(outcome.folder.path)
        print(f"  {score(outcome.summary, 'student', 'test', 'top1'):.1f}", end="", flush=True)
    print(flush=True)
    return RunGroup(kind.label, folders)


def show(rows: Sequence[RunGroup], seeds: int, runs: Path, seconds: float) -> None:
    """Prints the table and keeps it beside the runs."""
    report = aggregate(rows)
    Console(highlight=False).print(compact(report))
    print(
        f"Mean ± deviation over {seeds} seeds, last epoch, on 896 test images that had no part in training or choices."
    )
    print("All labels: 811; the other 90 training images are for validation, on which every choice was made.")
    print(f"The students learn from, and are compared with, the teacher of seed 1. Times: CPU, {THREADS} thread.")
    print(f"\nThe same by hand, seed 1 (kdbench is in .venv/bin; OMP_NUM_THREADS={THREADS} gives the same bits):")
    for kind in KINDS:
        print(f"  {kind.command:<64} # {kind.label}")
    table = runs / "quickstart"
    table.mkdir(parents=True, exist_ok=True)
    (table / "table.md").write_text(report.markdown(), encoding="utf-8")
    write_json(table / "table.json", report.json())
    print(f"\nRuns: {runs}/digits/ (one folder each). Table: {table}/table.md, with all values in table.json.")
    print(f"Curves: .venv/bin/tensorboard --logdir {runs}")
    print(f"Done in {seconds:.0f} s.")


def compact(report: SeedTable) -> Table:
    """The table in 80 columns: every row is over the same seeds, and FLOPs are left to table.md."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    titles = ("", "test\naccuracy, %", "agreement with\nteacher, %", "parameters", "1 image\ntakes")
    for title in titles:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for line in report.rows:
        table.add_row(
            line.label,
            str(line.top1),
            str(line.agreement or ""),
            f"{line.parameters:,}".replace(",", " "),
            f"{line.latency_ms:.2f} ms",
        )
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nquickstart: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        sys.exit(130)
