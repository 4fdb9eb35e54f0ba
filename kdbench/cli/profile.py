"""`kdbench profile`: where a step's time goes, as a table; the files beside it say the rest."""

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
    """Profiles one stage of a recipe and prints what was found."""
    # Before torch: its profiler takes a GPU that is not there for an error, and its marks (USDT) stand above errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from kdbench.experiment.profile import profile

    found = profile(recipe, stage=stage, steps=steps, out=None if out is None else Path(out))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    head = (
        f"{found['recipe']}, stage {found['stage']}: {found['samples_per_step']:.4g} samples a step, {found['device']}"
    )
    console.print(Text(head, style="bold"))
    for note in found["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print()
    console.print(_parts_table(found))
    console.print()
    console.print(_step_table(found))
    console.print()
    for path in found["files"].values():
        console.print(Text(path), soft_wrap=True)
    return 0


def _new_table(*columns: str, left: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def _parts_table(found: Mapping[str, Any]) -> Table:
    table = _new_table("part of a step", "ms", "share", "", "operations", "FLOPs", "of peak", left=("part of a step", ""))
    for part in found["parts"]:
        _add_row(table, part["part"], part["ms"], part["share"], part)
        inner = sorted(part.get("through", {}).items(), key=lambda item: -item[1])
        for whose, ms in inner:
            _add_row(table, f"  through {whose}", ms, ms / part["ms"] * part["share"] if part["ms"] else 0.0, {}, "dim")
    total = found["parts_of_a_step"]["taken_apart_ms"]
    sums = {"operations": found["operations"], "flops": found["flops"]}
    _add_row(table, "together", total, 1.0, sums, "bold")
    return table


def _add_row(table: Table, name: str, ms: float, share: float, part: Mapping[str, Any], style: str = "") -> None:
    of_peak = part.get("of_peak")
    table.add_row(
        Text(name),
        f"{ms:.3f}",
        f"{100 * share:.1f} %",
        Text("█" * round(24 * share), style="cyan") if not style else "",
        f"{part['operations']:,}" if "operations" in part else "",
        with_unit_prefix(part["flops"]) if part.get("flops") else "",
        "" if of_peak is None else f"{100 * of_peak:.1f} %",
        style=style or None,
    )


def _step_table(found: Mapping[str, Any]) -> Table:
    table = _new_table("a step as it runs", "", left=("a step as it runs", ""))
    table.columns[1].justify = "left"
    step, peak, memory = found["step"], found["peak"], found["peak_memory"]
    table.add_row("time", f"{step['median_ms']:.3f} ms, half of them {step['q1_ms']:.3f} to {step['q3_ms']:.3f}")
    table.add_row("samples per second", f"{found['samples_per_second']:,.0f}")
    if found["kernels"] is not None:
        table.add_row("kernels", f"{found['kernels']:,.0f}, and {found['copies']:,.0f} copies and fills")
        table.add_row("device busy", f"{found['busy_ms']:.3f} ms; waits for the host {found['idle_ms']:.3f} ms")
    else:
        table.add_row("inside operations", f"{found['busy_ms']:.3f} ms (with the profiler on)")
        table.add_row("between operations", f"{found['idle_ms']:.3f} ms, the interpreter's")
    table.add_row("FLOPs per second", with_unit_prefix(found["flops_per_second"]))
    told = f"{100 * found['mfu']:.1f} % of {with_unit_prefix(peak['flops_per_second'])}/s, " if found["mfu"] is not None else ""
    table.add_row("share of the peak", f"{told}{peak['source']}")
    table.add_row("peak memory", f"{memory['bytes'] / 2**20:,.0f} MiB, {memory['of']}")
    return table
