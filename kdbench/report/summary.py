"""Builds and prints summary.json: scores of the last and best epoch, models, comparison with the published score."""

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
        recipe: the recipe, which has the name, the seed, the published score, and what `baseline` removed.
        last: the last evaluation, with `stage`, `epoch`, `step` and `metrics` (scores of every trained role).
        best: the evaluation of the best epoch with the same entries, `selected_on` (the split) and `by` (the metric,
            `top1` if absent); None: there was no evaluation.
        frozen: scores of the frozen roles, evaluated once before training.
        models: role -> `parameters`, `flops`, `latency_ms` (see `measure_latency`) and `weights_sha256`, each
            optional.
        wall_seconds: training time over all sessions.
        identity: identity of the run.
        export: name of the role whose accuracy is the result.
        device: description of the device.
    """
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "title": recipe.title,
        "seed": recipe.seed,
        "baseline": recipe.baseline,
        "baseline_removed": list(recipe.baseline_removed),
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
        summary["best"] = {**best, "by": by, "description": selection_text(best.get("selected_on", "test"), by)}
    if recipe.published is not None:
        summary["published"] = compare_with_published(recipe.published, summary)
    return summary


def selection_text(split: str, by: str = "top1") -> str:
    """Returns a sentence about the split that selected the best epoch, and whether its test score is biased by that."""
    name = METRIC_LABELS.get(by, by).removesuffix(" %")
    if split == "test":
        bias = "so its test score is optimistic; the last epoch is the result"
        return f"selected by {name} on the test split itself, {bias}"
    return f"selected by {name} on the {split} split, which was held out of training; test was not used"


def score(summary: Mapping[str, Any], role: str, split: str, metric: str, epoch: str = "last") -> float | None:
    """Returns a score from a summary, or None if it was not measured. `epoch` is `last` or `best`."""
    trained = (summary.get(epoch) or {}).get("metrics", {})
    value = trained.get(role, summary.get("frozen", {}).get(role, {})).get(split, {}).get(metric)
    return None if value is None else float(value)


def headline_accuracy(summary: Mapping[str, Any]) -> float | None:
    """Returns the top-1 accuracy of the exported role after the last epoch.

    The accuracy is measured on the validation split, or on the test split if there is no validation split.
    """
    scores = (score(summary, summary["export"], split, "top1") for split in ("validation", "test"))
    return next((value for value in scores if value is not None), None)


def compare_with_published(published: Published, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Compares the run with the published top-1, in percentage points.

    A published score of the last epoch, or without a stated epoch, is compared with the run's last epoch. A published
    score of the best epoch is compared with the run's best epoch if the test split selected it, otherwise with the
    last epoch.
    """
    best_on_test = (summary.get("best") or {}).get("selected_on") == "test"
    epoch = "best" if published.epoch == "best" and best_on_test else "last"
    top1 = score(summary, summary.get("export", "student"), "test", "top1", epoch)
    result: dict[str, Any] = {
        "top1": published.top1,
        "source": published.source,
        "epoch": published.epoch,
        "tolerance": published.tolerance,
        "compared": epoch,
        "measured": top1,
        "difference": None,
        "within": None,
    }
    if top1 is None:
        return {**result, "description": "Not compared: this run has no top-1 on the test split."}
    difference = round(top1 - published.top1, 4)
    within = None if published.tolerance is None else abs(difference) <= published.tolerance
    source = f" ({published.source})" if published.source else ""
    scores = f"{epoch} epoch {top1:.2f}% on test, published {published.top1:.2f}%{source}"
    sentences = [f"{scores}: {difference:+.2f} points"]
    if published.tolerance is not None and within:
        sentences.append(f", within the recipe's tolerance of ±{published.tolerance:g}.")
    elif published.tolerance is not None:
        sentences.append(f", outside the recipe's tolerance of ±{published.tolerance:g}.")
    else:
        sentences.append("; the recipe states no tolerance.")
    if published.epoch == "best":
        sentences.append(
            " Both are the best epoch selected on test, which biases both upwards."
            if epoch == "best"
            else " The published score is the best epoch on test, which biases it upwards against a last epoch."
        )
    elif published.epoch == "unstated":
        sentences.append(" The paper does not state whether its score is of the last or the best epoch.")
    sentences.append(" One seed: the deviation over seeds is not known.")
    return {**result, "difference": difference, "within": within, "description": "".join(sentences)}


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a run's summary: a table of scores, a table of models, and the comparison with the published score."""
    out = console or StdoutConsole(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 120)  # a pipe has no width; the default of 80 would wrap the table
    best = summary.get("best")
    out.print(Text(f"{summary['recipe']} · seed {summary['seed']}", style="bold"))
    if summary.get("baseline"):
        out.print(Text(f"baseline without teacher: {'; '.join(summary['baseline_removed'])}"), soft_wrap=True)
    scores = _scores_table(summary)
    width = out.width
    needed = out.measure(scores, options=out.options.update(width=1000)).maximum
    out.width = max(width, needed)  # a narrow terminal wraps the lines; every score stays visible
    out.print(scores)
    out.width = width
    if summary.get("models"):
        out.print(_models_table(summary))
    lines = []
    if best:
        lines.append(f"best: epoch {best['epoch']}, {best['description']}.")
    if summary.get("published"):
        lines.append(f"compared: {summary['published']['description']}")
    lines.append(f"trained for {duration_text(summary['wall_seconds'])} {_device_text(summary)}".rstrip())
    for line in lines:
        out.print(Text(line), soft_wrap=not out.is_terminal)


def _device_text(summary: Mapping[str, Any]) -> str:
    return f"on {summary['device']}" if summary.get("device") else ""


def _scores_table(summary: Mapping[str, Any]) -> Table:
    """Builds the table with one row per split and metric, and one column per role and epoch."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for epoch in ("last", "best"):
        entry: Mapping[str, Any] = summary.get(epoch) or {}
        for role, splits in entry.get("metrics", {}).items():
            columns.append((f"{role}\n{epoch}\nepoch {entry.get('epoch', 0)}", splits))
    columns += [(f"{role}\nfrozen", splits) for role, splits in summary.get("frozen", {}).items()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)  # a truncated number would read as another one
    for split in SPLIT_ORDER:
        names = [name for name in METRIC_LABELS if any(name in splits.get(split, {}) for _, splits in columns)]
        for position, name in enumerate(names):
            cells = [_score_cell(name, splits.get(split, {}).get(name)) for _, splits in columns]
            table.add_row(split if position == 0 else "", METRIC_LABELS[name], *cells, end_section=name == names[-1])
    return table


def _models_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("model", "parameters", "FLOPs", "latency, 1 image", "latency, 64 images"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for role, entry in summary["models"].items():
        latencies = entry.get("latency_ms") or {}
        table.add_row(
            f"{role} ({entry['model']})" if entry.get("model") else role,
            f"{entry['parameters']:,}".replace(",", " ") if entry.get("parameters") is not None else "",
            compact_number(entry.get("flops")),
            *(f"{latencies[key]:.2f} ms" if key in latencies else "" for key in ("batch_1", "batch_64")),
        )
    return table


def compact_number(value: float | None) -> str:
    """Formats a number with a unit suffix, such as 1.23M or 45.6G. Returns an empty string for None."""
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
