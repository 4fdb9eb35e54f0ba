"""`kdbench evaluate`: a finished run's roles, measured again from what lies in its folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdbench.errors import UserError


def evaluate_run(folder: str, *, device: str | None = None, data_root: str | None = None) -> int:
    """Measures the roles of a run from its last checkpoint, and says where that differs from its summary."""
    from kdbench.experiment.reopened import reevaluate
    from kdbench.files import read_json
    from kdbench.run_folder import RunFolder

    run_folder = RunFolder(Path(folder))
    if not run_folder.is_run:
        raise UserError(f"{folder} is no run's folder (it has no manifest.json of kdbench).")
    if not run_folder.last.exists():
        raise UserError(f"{folder} holds no checkpoint yet; the run has not come that far.")
    scores = reevaluate(run_folder, device=device, data_root=data_root)
    told = read_json(run_folder.summary) if run_folder.summary.exists() else {}
    before = {**told.get("frozen", {}), **told.get("last", {}).get("metrics", {})}
    table = Table(title=f"{folder}, measured again", title_justify="left", box=None, pad_edge=False)
    for heading in ("role", "split", "metric", "now", "in the summary"):
        table.add_column(heading, justify="right" if heading in ("now", "in the summary") else "left")
    for role, splits in scores.items():
        for split, metrics in splits.items():
            for metric, value in metrics.items():
                old = before.get(role, {}).get(split, {}).get(metric)
                table.add_row(role, split, metric, f"{value:.4f}", "" if old is None else f"{float(old):.4f}")
    Console().print(table)
    return 0
