"""`kdbench evaluate`: evaluates the networks of a finished run again, from the checkpoint in the run folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdbench.errors import UserError
from kdbench.run_folder import RunFolder, read_summary


def evaluate_run(folder: str, *, device: str | None = None, data_root: str | None = None) -> int:
    """Evaluates the networks of a run from its last checkpoint. Prints new metrics beside the metrics of the summary.

    Args:
        folder: the run's folder.
        device: device for the evaluation; None: the recipe's device.
        data_root: folder of the datasets; None: the recipe's folder.

    Returns:
        The exit code, 0.

    Raises:
        UserError: the folder is not a run folder, or contains no checkpoint.
    """
    # Imported here because it imports torch, which a mistake on the command line must not wait for.
    from kdbench.experiment.reopened import reevaluate

    run_folder = RunFolder(Path(folder))
    if not run_folder.is_run:
        raise UserError(f"{folder} is not the folder of a run, because it contains no manifest.json of kdbench.")
    if not run_folder.last.exists():
        raise UserError(f"{folder} contains no checkpoint: the run stopped before its first checkpoint.")
    summary = read_summary(run_folder.summary) if run_folder.summary.exists() else {}
    scores = reevaluate(run_folder, device=device, data_root=data_root)
    summary_scores = {**summary.get("frozen", {}), **summary.get("last", {}).get("metrics", {})}
    table = Table(title=f"new evaluation of {folder}", title_justify="left", box=None, pad_edge=False)
    for heading in ("role", "split", "metric", "now", "in the summary"):
        table.add_column(heading, justify="right" if heading in ("now", "in the summary") else "left")
    for role, splits in scores.items():
        for split, metrics in splits.items():
            for metric, value in metrics.items():
                summary_value = summary_scores.get(role, {}).get(split, {}).get(metric)
                summary_text = "" if summary_value is None else f"{float(summary_value):.4f}"
                table.add_row(role, split, metric, f"{value:.4f}", summary_text)
    Console().print(table)
    return 0
