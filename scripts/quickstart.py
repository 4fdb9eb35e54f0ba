"""Distils a small network on scikit-learn's handwritten digits over five seeds and prints the table of the README.

Twenty short runs share one process, so that torch is imported once. The runs are ordinary runs of shipped recipes.
The commands below the table repeat these runs with `kdbench train`.
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
"""Number of threads of torch. More threads do not speed up networks of this size, and are slower on a busy machine."""


@dataclass(frozen=True)
class Kind:
    """A row of the table: a recipe with overrides, which is trained once per seed."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join(["kdbench train", self.recipe, *self.overrides])


# A term of weight 0 trains the student without teacher, to the last bit like `baseline=true`, but keeps the teacher
# for the metric `agreement`.
WITHOUT_TEACHER = "terms.kd.weight=0"
KINDS = (
    Kind("teacher", "digits/teacher"),
    Kind("student, 50 labels", "digits/kd", (WITHOUT_TEACHER,)),
    Kind("student, all labels", "digits/kd", (WITHOUT_TEACHER, "label_fraction=null")),
    Kind("student, distilled", "digits/kd"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all networks of the table, prints the table, and returns the exit code."""
    description = "Distils a small network on handwritten digits."
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=description)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of the runs (default: runs)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 1 to N (default: 5)")
    parser.add_argument("--fresh", action="store_true", help="train finished runs again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    start = time.monotonic()
    print("Four kinds of networks on 901 training images of handwritten digits; test accuracy in %, one per seed:")
    rows = [train(kind, options.seeds, options.runs, fresh=options.fresh) for kind in KINDS]
    show(rows, options.seeds, Path(options.runs), time.monotonic() - start)
    return 0


def train(kind: Kind, seeds: int, runs: str, *, fresh: bool = False) -> RunGroup:
    """Trains one row of the table over all seeds and prints each accuracy. A finished run is not repeated."""
    print(f"  {kind.label:<21}", end="", flush=True)
    folders = []
    for seed in range(1, seeds + 1):
        # All students of digits/kd learn from the teacher of seed 1, which the first row trains.
        settings = [f"seed={seed}", f"runs={runs}", "device=cpu", *(["fresh=true"] if fresh else [])]
        outcome = run(load_recipe(kind.recipe, [*kind.overrides, *settings]), console=ConsoleReporter(quiet=True))
        folders.append(outcome.folder.path)
        print(f"  {score(outcome.summary, 'student', 'test', 'top1'):.1f}", end="", flush=True)
    print(flush=True)
    return RunGroup(kind.label, folders)


def show(rows: Sequence[RunGroup], seeds: int, runs: Path, seconds: float) -> None:
    """Prints the table with an explanation, and writes the table to the folder `quickstart` beside the runs."""
    report = aggregate(rows)
    Console(highlight=False).print(compact(report))
    print(f"Mean ± deviation over {seeds} seeds, last epoch, on 896 test images that no training or choice used.")
    print("All labels: 811 images; the remaining 90 training images are the validation set of every choice.")
    print(f"The teacher of all students, also for agreement, is that of seed 1. Times: CPU, {THREADS} thread.")
    print(f"\nThe same runs by hand, seed 1 (kdbench is in .venv/bin; OMP_NUM_THREADS={THREADS} gives equal bits):")
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
    """Returns a table that fits into 80 columns. The number of seeds and the FLOPs are only in table.md."""
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
        print("\nquickstart: interrupted. Repeat the command to continue.", file=sys.stderr)
        sys.exit(130)
