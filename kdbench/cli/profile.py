"""`kdbench profile`: measures a recipe's training step; prints the time of each section and the samples per second."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdbench.config.schema import Recipe
from kdbench.report.console import with_unit_prefix


def profile_recipe(recipe: Recipe, *, stage: str | None, steps: int, out: str | None) -> int:
    """Profiles one stage of a recipe and prints the result. Returns the exit code, 0.

    Args:
        stage: name of the stage; None: the last stage that trains.
        steps: number of timed steps.
        out: output folder; None: `runs/RECIPE/profile`.

    Raises:
        ConfigError: the stage does not exist or cannot be profiled.
    """
    # Set before torch is imported: its profiler reports a missing GPU as an error, and a plain mark above errors too.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from kdbench.experiment.profile import profile

    result = profile(recipe, stage=stage, steps=steps, out=None if out is None else Path(out))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    samples = f"{result['samples_per_step']:.4g} samples per step"
    title = f"{result['recipe']}, stage {result['stage']}: {samples}, {result['device']}"
    console.print(Text(title, style="bold"))
    for note in result["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print()
    console.print(_sections_table(result))
    console.print()
    console.print(_step_table(result))
    console.print()
    for path in result["files"].values():
        console.print(Text(path), soft_wrap=True)
    return 0


def _new_table(*columns: str, text_columns: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in text_columns else "right", overflow="fold")
    return table


def _sections_table(result: Mapping[str, Any]) -> Table:
    headings = ("section", "ms", "fraction", "", "operations", "FLOPs", "of peak")
    table = _new_table(*headings, text_columns=("section", ""))
    for section in result["sections"]:
        _add_row(table, section["section"], section["ms"], section["fraction"], section)
        roles = sorted(section.get("through", {}).items(), key=lambda item: -item[1])
        for role, ms in roles:
            fraction = ms / section["ms"] * section["fraction"] if section["ms"] else 0.0
            _add_row(table, f"  through {role}", ms, fraction, {}, "dim")
    sums = {"operations": result["operations"], "flops": result["flops"]}
    _add_row(table, "sum", result["eager_step"]["sections_ms"], 1.0, sums, "bold")
    return table


def _add_row(table: Table, name: str, ms: float, fraction: float, section: Mapping[str, Any], style: str = "") -> None:
    of_peak = section.get("of_peak")
    table.add_row(
        Text(name),
        f"{ms:.3f}",
        f"{100 * fraction:.1f} %",
        Text("█" * round(24 * fraction), style="cyan") if not style else "",
        f"{section['operations']:,}" if "operations" in section else "",
        with_unit_prefix(section["flops"]) if section.get("flops") else "",
        "" if of_peak is None else f"{100 * of_peak:.1f} %",
        style=style or None,
    )


def _step_table(result: Mapping[str, Any]) -> Table:
    table = _new_table("whole step", "", text_columns=("whole step", ""))
    table.columns[1].justify = "left"
    step, peak, memory = result["step"], result["peak"], result["peak_memory"]
    table.add_row("time", f"median {step['median_ms']:.3f} ms, quartiles {step['q1_ms']:.3f} to {step['q3_ms']:.3f}")
    table.add_row("samples per second", f"{result['samples_per_second']:,.0f}")
    if result["kernels"] is not None:
        table.add_row("kernels", f"{result['kernels']:,.0f}, and {result['copies']:,.0f} copies and fills")
        table.add_row("device busy", f"{result['busy_ms']:.3f} ms; idle {result['idle_ms']:.3f} ms")
    else:
        table.add_row("inside operations", f"{result['busy_ms']:.3f} ms (with the profiler on)")
        table.add_row("between operations", f"{result['idle_ms']:.3f} ms (Python)")
    table.add_row("FLOPs per second", with_unit_prefix(result["flops_per_second"]))
    utilization = ""
    if result["mfu"] is not None:
        utilization = f"{100 * result['mfu']:.1f} % of {with_unit_prefix(peak['flops_per_second'])}/s, "
    table.add_row("fraction of the peak", f"{utilization}{peak['source']}")
    table.add_row("peak memory", f"{memory['bytes'] / 2**20:,.0f} MiB, {memory['of']}")
    return table
