"""A table over seeds: one row per kind of run, with mean and deviation over its folders."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdbench.errors import UserError
from kdbench.files import read_json
from kdbench.report.summary import compact_number, score
from kdbench.run_folder import RunFolder

COLUMN_TITLES = ("", "seeds", "test accuracy, %", "agreement with teacher, %", "parameters", "FLOPs", "1 image takes")


@dataclass(frozen=True)
class RunGroup:
    """What one row is made of.

    label: its name in the table. folders: finished runs, one per seed. role: whose numbers. which: `last` or `best`.
    """

    label: str
    folders: Sequence[Path | str]
    role: str = "student"
    epoch: str = "last"


@dataclass(frozen=True)
class MeanAndDeviation:
    """Mean and sample deviation (n - 1) of several values; the deviation of one value is not known."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


@dataclass(frozen=True)
class SeedTableRow:
    """One aggregated row. `seeds` counts different results' sources: a teacher that all runs share counts once."""

    label: str
    seeds: int
    top1: MeanAndDeviation | None
    agreement: MeanAndDeviation | None
    parameters: int | None
    flops: float | None
    latency_ms: float | None
    folders: tuple[str, ...]


@dataclass(frozen=True)
class SeedTable:
    """The table, for a terminal, for a README and for a program."""

    rows: tuple[SeedTableRow, ...]

    def table(self) -> Table:
        """For rich."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in COLUMN_TITLES:
            table.add_column(title, justify="left" if not title else "right")
        for line in self.rows:
            table.add_row(*_row_cells(line))
        return table

    def markdown(self) -> str:
        """For a README."""
        rows = [COLUMN_TITLES, ("---", *("---:",) * (len(COLUMN_TITLES) - 1)), *(_row_cells(line) for line in self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    def json(self) -> list[dict[str, Any]]:
        """For `write_json`: every value of every seed besides mean and deviation."""
        return [
            {
                "label": line.label,
                "seeds": line.seeds,
                "top1": _deviation_json(line.top1),
                "agreement": _deviation_json(line.agreement),
                "parameters": line.parameters,
                "flops": line.flops,
                "latency_ms": line.latency_ms,
                "folders": list(line.folders),
            }
            for line in self.rows
        ]


def aggregate(rows: Iterable[RunGroup]) -> SeedTable:
    """Reads the summaries of finished runs and puts one line together for each row.

    Raises:
        UserError: a folder holds no finished run.
    """
    return SeedTable(tuple(_aggregate_group(row) for row in rows))


def _aggregate_group(row: RunGroup) -> SeedTableRow:
    summaries = [_read_summary(Path(folder)) for folder in row.folders]
    if not summaries:
        raise UserError(f"no runs for the row {row.label!r}.")
    facts = [summary.get("models", {}).get(row.role, {}) for summary in summaries]
    marks = [fact.get("weights_sha256") for fact in facts]
    shared = row.role not in summaries[0]["last"].get("metrics", {}) and None not in marks
    keep = [i for i, mark in enumerate(marks) if mark not in marks[:i]] if shared else list(range(len(summaries)))
    kept = [summaries[i] for i in keep]
    times = [fact["latency_ms"]["batch_1"] for fact in facts if (fact.get("latency_ms") or {}).get("batch_1")]
    return SeedTableRow(
        label=row.label,
        seeds=len(kept),
        top1=_metric_over_seeds(kept, row, "top1"),
        agreement=_metric_over_seeds(kept, row, "agreement"),
        parameters=facts[0].get("parameters"),
        flops=facts[0].get("flops"),
        latency_ms=min(times) if times else None,
        folders=tuple(str(folder) for folder in row.folders),
    )


def _metric_over_seeds(summaries: Sequence[Mapping[str, Any]], row: RunGroup, metric: str) -> MeanAndDeviation | None:
    values = [score(summary, row.role, "test", metric, row.epoch) for summary in summaries]
    known = tuple(value for value in values if value is not None)
    return MeanAndDeviation(known) if len(known) == len(summaries) else None


def _read_summary(path: Path) -> Mapping[str, Any]:
    folder = RunFolder(path)
    if not path.is_dir() or folder.status() != "finished":
        raise UserError(f"{path} holds no finished run; run its recipe again and it goes on where it stopped.")
    return read_json(folder.summary)


def _row_cells(line: SeedTableRow) -> tuple[str, ...]:
    return (
        line.label,
        str(line.seeds),
        str(line.top1) if line.top1 else "",
        str(line.agreement) if line.agreement else "",
        f"{line.parameters:,}".replace(",", " ") if line.parameters is not None else "",
        compact_number(line.flops),
        f"{line.latency_ms:.2f} ms" if line.latency_ms is not None else "",
    )


def _deviation_json(spread: MeanAndDeviation | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"mean": spread.mean, "deviation": spread.deviation, "values": list(spread.values)}
