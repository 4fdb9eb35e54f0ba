"""Tables over seeds: one row per group of runs, with the mean and the deviation of each score over the runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdbench.errors import UserError
from kdbench.report.summary import compact_number, score
from kdbench.run_folder import RunFolder, read_summary

COLUMN_TITLES = (
    "",
    "seeds",
    "test accuracy, %",
    "agreement with teacher, %",
    "parameters",
    "FLOPs",
    "latency, 1 image",
)


@dataclass(frozen=True)
class RunGroup:
    """A group of finished runs that forms one row of the table.

    Attributes:
        label: name of the row.
        folders: folders of the runs, one per seed.
        role: name of the role whose scores are shown.
        epoch: `last` or `best`.
    """

    label: str
    folders: Sequence[Path | str]
    role: str = "student"
    epoch: str = "last"


@dataclass(frozen=True)
class MeanAndDeviation:
    """Mean and sample standard deviation (n - 1) of several values. The deviation of a single value is None."""

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
    """One row of a table over seeds.

    `seeds` is the number of different results: a teacher that all runs share counts once.
    """

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
    """A table over seeds that can be formatted for a terminal, as Markdown and as JSON."""

    rows: tuple[SeedTableRow, ...]

    def table(self) -> Table:
        """Returns a rich table for a terminal."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in COLUMN_TITLES:
            table.add_column(title, justify="left" if not title else "right")
        for row in self.rows:
            table.add_row(*_row_cells(row))
        return table

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        alignment = ("---", *("---:",) * (len(COLUMN_TITLES) - 1))
        lines = [COLUMN_TITLES, alignment, *(_row_cells(row) for row in self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"

    def json(self) -> list[dict[str, Any]]:
        """Returns the table as plain data for `write_json`, with the value of every seed."""
        return [
            {
                "label": row.label,
                "seeds": row.seeds,
                "top1": _deviation_json(row.top1),
                "agreement": _deviation_json(row.agreement),
                "parameters": row.parameters,
                "flops": row.flops,
                "latency_ms": row.latency_ms,
                "folders": list(row.folders),
            }
            for row in self.rows
        ]


def aggregate(groups: Iterable[RunGroup]) -> SeedTable:
    """Reads the summaries of finished runs and aggregates each group into one row.

    Raises:
        UserError: a folder has no finished run.
    """
    return SeedTable(tuple(_aggregate_group(group) for group in groups))


def _aggregate_group(group: RunGroup) -> SeedTableRow:
    summaries = [_read_summary(Path(folder)) for folder in group.folders]
    if not summaries:
        raise UserError(f"no runs for the row {group.label!r}.")
    models = [summary.get("models", {}).get(group.role, {}) for summary in summaries]
    hashes = [model.get("weights_sha256") for model in models]
    # A frozen role may be the same network in several runs; equal weights count once.
    is_frozen = group.role not in summaries[0]["last"].get("metrics", {}) and None not in hashes
    distinct = [
        summary
        for number, (summary, weights_hash) in enumerate(zip(summaries, hashes, strict=True))
        if not is_frozen or weights_hash not in hashes[:number]
    ]
    latencies = [model["latency_ms"]["batch_1"] for model in models if (model.get("latency_ms") or {}).get("batch_1")]
    return SeedTableRow(
        label=group.label,
        seeds=len(distinct),
        top1=_metric_over_seeds(distinct, group, "top1"),
        agreement=_metric_over_seeds(distinct, group, "agreement"),
        parameters=models[0].get("parameters"),
        flops=models[0].get("flops"),
        latency_ms=min(latencies) if latencies else None,
        folders=tuple(str(folder) for folder in group.folders),
    )


def _metric_over_seeds(summaries: Sequence[Mapping[str, Any]], group: RunGroup, metric: str) -> MeanAndDeviation | None:
    """Returns mean and deviation of a score over runs, or None if a run does not have this score."""
    scores = [score(summary, group.role, "test", metric, group.epoch) for summary in summaries]
    values = tuple(value for value in scores if value is not None)
    return MeanAndDeviation(values) if len(values) == len(summaries) else None


def _read_summary(path: Path) -> Mapping[str, Any]:
    folder = RunFolder(path)
    if not path.is_dir() or folder.status() != "finished":
        raise UserError(f"{path} has no finished run. Run its recipe again: it continues from its last checkpoint.")
    return read_summary(folder.summary)


def _row_cells(row: SeedTableRow) -> tuple[str, ...]:
    return (
        row.label,
        str(row.seeds),
        str(row.top1) if row.top1 else "",
        str(row.agreement) if row.agreement else "",
        f"{row.parameters:,}".replace(",", " ") if row.parameters is not None else "",
        compact_number(row.flops),
        f"{row.latency_ms:.2f} ms" if row.latency_ms is not None else "",
    )


def _deviation_json(values: MeanAndDeviation | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {"mean": values.mean, "deviation": values.deviation, "values": list(values.values)}
