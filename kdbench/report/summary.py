"""summary.json: what came out of a run, last and best apart, and how it compares with the published figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdbench.config.schema import Published, Recipe
from kdbench.report.console import StdoutConsole, duration_text

Scores: TypeAlias = Mapping[str, Mapping[str, Mapping[str, float]]]
"""role -> split -> metric -> value."""


METRIC_LABELS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "nll": "NLL, nats",
    "ece": "ECE, %",
    "agreement": "agreement, %",
    "teacher_kl": "KL to teacher, nats",
}


SPLIT_ORDER = ("test", "validation", "train")


def build_summary(
    *,
    recipe: Recipe,
    last: Mapping[str, Any],
    best: Mapping[str, Any] | None = None,
    frozen: Scores | None = None,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    wall_seconds: float = 0.0,
    identity: str = "",
    export: str = "student",
    device: str = "",
) -> dict[str, Any]:
    """Returns the content of summary.json.

    Args:
        recipe: for the name, the seed, the published figure and what `twin` dropped.
        last: the last evaluation: `stage`, `epoch`, `step`, `metrics` (Scores of every role that moved).
        best: the same of the best epoch, with `chosen_on` (the split) and `by` (the metric, `top1` if absent); None
            when nothing was evaluated more than once.
        frozen: Scores of the roles that do not move, measured once before training.
        models: by role: `parameters`, `flops`, `latency_ms` (see `latency`), `weights_sha256`; each may be absent.
        wall_seconds: training time over all sessions.
        export: the role whose accuracy is the result.
        device: in words.
    """
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "title": recipe.title,
        "seed": recipe.seed,
        "baseline": recipe.baseline,
        "dropped": list(recipe.baseline_removed),
        "identity": identity,
        "export": export,
        "device": device,
        "last": dict(last),
        "best": None,
        "frozen": frozen or {},
        "models": models or {},
        "published": None,
        "wall_seconds": round(wall_seconds, 2),
    }
    if best is not None:
        by = best.get("by", "top1")
        summary["best"] = {**best, "by": by, "words": selection_text(best.get("chosen_on", "test"), by)}
    if recipe.published is not None:
        summary["published"] = compare_with_published(recipe.published, summary)
    return summary


def selection_text(split: str, by: str = "top1") -> str:
    """Says which split chose the best epoch, and what that makes of its score."""
    name = METRIC_LABELS.get(by, by).removesuffix(" %")
    if split == "test":
        return (
            f"chosen by {name} on the test split itself, so its test score is optimistic; the last epoch is the result"
        )
    return f"chosen by {name} on the {split} split, which was held out of training; test had no part in it"


def score(summary: Mapping[str, Any], role: str, split: str, metric: str, epoch: str = "last") -> float | None:
    """Looks a number up in a summary; None when it was not measured. `which` is `last` or `best`."""
    moved = (summary.get(epoch) or {}).get("metrics", {})
    value = moved.get(role, summary.get("frozen", {}).get(role, {})).get(split, {}).get(metric)
    return None if value is None else float(value)


def headline_accuracy(summary: Mapping[str, Any]) -> float | None:
    """The exported role's top-1 of the last epoch: on the validation part when there is one, else on test."""
    found = (score(summary, summary["export"], split, "top1") for split in ("validation", "test"))
    return next((value for value in found if value is not None), None)


def compare_with_published(published: Published, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Compares with the published top-1, in percent points.

    A figure that was published for the last epoch, or for an unstated one, is compared with the last epoch. One that
    was published for the best epoch is compared with the best on test, when test chose it; else with the last.
    """
    best_on_test = (summary.get("best") or {}).get("chosen_on") == "test"
    which = "best" if published.epoch == "best" and best_on_test else "last"
    own = score(summary, summary.get("export", "student"), "test", "top1", which)
    result: dict[str, Any] = {
        "top1": published.top1,
        "source": published.source,
        "epoch": published.epoch,
        "tolerance": published.tolerance,
        "compared": which,
        "own": own,
        "difference": None,
        "within": None,
    }
    if own is None:
        return {**result, "words": "Not compared: this run has no top-1 on the test split."}
    difference = round(own - published.top1, 4)
    within = None if published.tolerance is None else abs(difference) <= published.tolerance
    source = f" ({published.source})" if published.source else ""
    words = [f"{which} epoch {own:.2f}% on test, published {published.top1:.2f}%{source}: {difference:+.2f} points"]
    if published.tolerance is not None and within:
        words.append(f", within the recipe's band of ±{published.tolerance:g}.")
    elif published.tolerance is not None:
        words.append(f", outside the recipe's band of ±{published.tolerance:g}.")
    else:
        words.append("; the recipe states no band.")
    if published.epoch == "best":
        words.append(
            " Both are the best epoch chosen on test, which flatters both."
            if which == "best"
            else " The published figure is the best epoch on test, which flatters it against a last epoch."
        )
    elif published.epoch == "unstated":
        words.append(" Whether the published figure is of the last or the best epoch is not stated.")
    words.append(" This is one seed: its deviation is not known from one run.")
    return {**result, "difference": difference, "within": within, "words": "".join(words)}


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a summary for a person: a table of scores, one of models, and the comparison in words."""
    out = console or StdoutConsole(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 120)  # a pipe has no width; 80 would wrap the table
    best = summary.get("best")
    out.print(Text(f"{summary['recipe']} · seed {summary['seed']}", style="bold"))
    if summary.get("baseline"):
        out.print(Text(f"the twin without a teacher: {'; '.join(summary['dropped'])}"), soft_wrap=True)
    scores = _scores_table(summary)
    room = out.width
    needed = out.measure(scores, options=out.options.update(width=1000)).maximum
    out.width = max(room, needed)  # a narrow terminal wraps the lines; it loses no figure
    out.print(scores)
    out.width = room
    if summary.get("models"):
        out.print(_models_table(summary))
    lines = []
    if best:
        lines.append(f"best: epoch {best['epoch']}, {best['words']}.")
    if summary.get("published"):
        lines.append(f"compared: {summary['published']['words']}")
    lines.append(f"trained for {duration_text(summary['wall_seconds'])} {_device_text(summary)}".rstrip())
    for line in lines:
        out.print(Text(line), soft_wrap=not out.is_terminal)


def _device_text(summary: Mapping[str, Any]) -> str:
    return f"on {summary['device']}" if summary.get("device") else ""


def _scores_table(summary: Mapping[str, Any]) -> Table:
    """One row per split and metric, one column per role and epoch."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for which in ("last", "best"):
        entry: Mapping[str, Any] = summary.get(which) or {}
        for role, splits in entry.get("metrics", {}).items():
            columns.append((f"{role}\n{which}\nepoch {entry['epoch']}", splits))
    columns += [(f"{role}\nfrozen", splits) for role, splits in summary.get("frozen", {}).items()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)  # a cell that is cut short would be another number
    for split in SPLIT_ORDER:
        names = [name for name in METRIC_LABELS if any(name in splits.get(split, {}) for _, splits in columns)]
        for position, name in enumerate(names):
            cells = [_score_cell(name, splits.get(split, {}).get(name)) for _, splits in columns]
            table.add_row(split if position == 0 else "", METRIC_LABELS[name], *cells, end_section=name == names[-1])
    return table


def _models_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("model", "parameters", "FLOPs", "1 image takes", "64 images take"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for role, facts in summary["models"].items():
        times = facts.get("latency_ms") or {}
        table.add_row(
            f"{role} ({facts['model']})" if facts.get("model") else role,
            f"{facts['parameters']:,}".replace(",", " ") if facts.get("parameters") is not None else "",
            compact_number(facts.get("flops")),
            *(f"{times[key]:.2f} ms" if key in times else "" for key in ("batch_1", "batch_64")),
        )
    return table


def compact_number(value: float | None) -> str:
    """Returns 1.23M, 45.6G, ...; empty for None."""
    if value is None:
        return ""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:g}"


def _score_cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{float(value):.2f}" if METRIC_LABELS[name].endswith("%") else f"{float(value):.4f}"
