"""`kdbench check`: plans every stage of a recipe without training, and prints diagrams, tables and estimates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kdbench.cli.descriptions import (
    dataset_text,
    describe_stage,
    mode_text,
    model_text,
    part_text,
    shape_text,
    source_options_text,
    value_text,
)
from kdbench.cli.diagram import draw_stage, stage_sequence
from kdbench.cli.methods import BASES
from kdbench.config.load import dump_recipe
from kdbench.config.schema import PartConfig, Recipe, StageConfig
from kdbench.registry import TERMS

if TYPE_CHECKING:
    from kdbench.engine.plan.plan import RolePlan, StagePlan

PIPE_WIDTH = 160
"""Width in characters of the tables that `kdbench check` writes into a pipe or a file.

(rich's default of 80 would wrap the cells.)
"""

NUMBER_HEADINGS = ("samples", "classes", "batch size", "parameters", "trainable", "FLOPs")
"""Headings of the columns that contain numbers. These columns are aligned to the right."""


@dataclass(frozen=True)
class Section:
    """A table that `kdbench check` prints: title, column headings, and rows of cells."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def check_recipe(recipe: Recipe, *, brief: bool = False) -> int:
    """Plans every stage of a recipe and prints the result. Returns the exit code, 0.

    Args:
        brief: whether to print only one line, as `kdbench check --all` does for each recipe.

    Raises:
        ConfigError: the recipe has a mistake that would make training fail before or in its first step.
    """
    # Imported here because they import torch, which `kdbench --help` and errors in a recipe must not.
    from kdbench.engine.device import describe_device, resolve_device
    from kdbench.experiment.artifacts import plan_stages

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    device = resolve_device(recipe.device)
    plans = plan_stages(recipe)
    if brief:
        notes = [note for plan in plans for note in plan.notes]
        console.print(Text(f"{recipe.name}: ok" + (f" ({notes[0]})" if notes else "")), soft_wrap=True)
        return 0
    _print_header(console, recipe, describe_device(device))
    printed_stages: dict[str, str] = {}
    for number, plan in enumerate(plans):
        twin = _equal_stage(plan, printed_stages)
        if twin is not None:
            console.print(Text(f"stage {plan.stage.name}: equal to {twin}, in a later round of the loop\n"))
            continue
        _print_stage(console, plan, recipe.stages[number + 1 :], title=len(plans) > 1)
    if recipe.published:
        figure = recipe.published
        details = f"epoch: {figure.epoch}; source: {figure.source}"
        console.print(Text(f"published score: {figure.top1} % top-1 ({details})\n"))
    _print_recipe(console, recipe)
    return 0


def _print_header(console: Console, recipe: Recipe, device: str) -> None:
    title = f": {recipe.title}" if recipe.title else ""
    console.print(Text.assemble((recipe.name, "bold"), title), soft_wrap=True)
    lines = [("paper", recipe.paper), ("file", recipe.file), ("device", device)]
    lines += [("baseline", text) for text in recipe.baseline_removed]
    if recipe.notes is not None:
        lines.append(("basis", BASES[recipe.notes.basis]))
        lines += [("source", text) for text in recipe.notes.source]
        lines += [("differs", text) for text in recipe.notes.differs]
        lines += [("scaled down", text) for text in recipe.notes.scaled_down]
    if len(recipe.stages) > 1:
        lines.append(("stages", stage_sequence(recipe.stages)))
    for label, text in lines:
        if text:
            _print_sentence(console, f"{label}: {text}")
    console.print()


def _print_sentence(console: Console, text: str, indent: int = 0) -> None:
    """Prints a sentence. On a terminal the sentence is wrapped to the width; in a pipe or a file it is one line."""
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent + text), soft_wrap=True)


def _equal_stage(plan: StagePlan, printed_stages: dict[str, str]) -> str | None:
    """Returns the name of an earlier stage whose printed text is equal except for the round number of a loop, or None.

    Args:
        plan: plan of the stage.
        printed_stages: printed text -> name of the stage. If there is no equal stage, the text of this stage is added.
    """
    rows = [line for section in stage_sections(plan) for row in section.rows for line in row]
    lines = [plan.stage.name, *describe_stage(plan), *draw_stage(plan), *rows]
    text = re.sub(r"@\d+", "@", "\n".join(lines))
    earlier = printed_stages.get(text)
    printed_stages.setdefault(text, plan.stage.name)
    return earlier


def _print_stage(console: Console, plan: StagePlan, later: Sequence[StageConfig], *, title: bool) -> None:
    if title:
        console.print(Text(f"stage {plan.stage.name}", style="bold underline"))
    for line in draw_stage(plan, later):
        console.print(Text(line), soft_wrap=True)
    console.print()
    for section in stage_sections(plan):
        if section.rows:
            console.print(_table(section))
            console.print()
    console.print(Text("details", style="bold"))
    for sentence in describe_stage(plan):
        _print_sentence(console, sentence, indent=2)
    console.print()


def stage_sections(plan: StagePlan) -> list[Section]:
    """Returns the tables of a stage: data, roles (networks), terms (losses) and features.

    There is a table of features only if the stage reads an intermediate feature, not only outputs of models.
    """
    sections = [_sources_section(plan), _roles_section(plan), _terms_section(plan)]
    if any(not feature.is_output for role in plan.roles.values() for feature in role.features):
        sections.append(_features_section(plan))
    return sections


def _table(section: Section) -> Table:
    """Converts a section to a rich table. Columns without any text are left out."""
    table = Table(
        title=section.title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    columns = [number for number in range(len(section.headings)) if any(row[number] for row in section.rows)]
    for number in columns:
        heading = section.headings[number]
        is_number = heading in NUMBER_HEADINGS
        # On a narrow terminal, names and numbers stay whole and the other columns wrap.
        no_wrap = is_number or number == 0
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold", no_wrap=no_wrap)
    for row in section.rows:
        table.add_row(*(Text(row[number]) for number in columns))
    return table


def _sources_section(plan: StagePlan) -> Section:
    rows = []
    for name, spec in plan.specs.items():
        config = plan.stage.data[name]
        is_stepped = name in plan.resolved_stage.step_sources(plan.stage)
        rows.append(
            (
                name,
                dataset_text(config, has_split=bool(spec.classes)),
                "not counted yet" if spec.samples is None else f"{spec.samples:,}",
                str(spec.classes or ""),
                ", ".join(f"{field} {shape_text(shape)}" for field, (shape, _) in spec.fields.items() if shape),
                str(config.batch_size) if is_stepped else "",
                source_options_text(config),
            )
        )
    return Section("data", ("source", "dataset", "samples", "classes", "fields", "batch size", "options"), tuple(rows))


def _roles_section(plan: StagePlan) -> Section:
    rows = []
    for name, role in plan.roles.items():
        stop = f" (forward stops after {role.stop_module})" if role.stop_module else ""
        rows.append(
            (
                name,
                role.model,
                role.config.input,
                mode_text(role.config) + stop,
                f"{role.parameters:,}",
                f"{role.trainable_parameters:,}",
                _count_cell(role.flops),
                _weights_cell(role),
            )
        )
    headings = ("role", "model", "input", "mode", "parameters", "trainable", "FLOPs", "weights")
    return Section("roles (FLOPs of one sample)", headings, tuple(rows))


def _terms_section(plan: StagePlan) -> Section:
    rows: list[tuple[str, ...]] = []
    for name, config in plan.stage.terms.items():
        entry = TERMS.entry(config.type)
        space, target = str(entry.facts.get("space", "row")), "labels" if "label" in entry.inputs else "-"
        params = part_text(PartConfig(type="", params=config.params))[1:-1]
        adapters = plan.adapters.get(name, ())
        for number, edge in enumerate(config.edges):
            common = (name, config.type, space, value_text(config.weight)) if number == 0 else ("",) * 4
            operands = (str(edge.student), str(edge.teacher) if edge.teacher else target)
            adapter = adapters[number] if number < len(adapters) else ""
            rows.append((*common, *operands, params if number == 0 else "", adapter))
    headings = ("term", "type", "space", "weight", "student", "teacher", "parameters", "adapter")
    return Section("terms", headings, tuple(rows))


def _features_section(plan: StagePlan) -> Section:
    rows = []
    for name, role in plan.roles.items():
        for feature, shape in role.features.items():
            is_copied = feature in role.overwritten_features
            note = "copied, because a later layer overwrites the feature in place" if is_copied else ""
            rows.append((name, str(feature), shape_text(shape), note))
    return Section("features", ("role", "path", "shape of one sample", "note"), tuple(rows))


def _weights_cell(role: RolePlan) -> str:
    config, weights = role.config, role.config.weights
    if config.artifact is not None:
        return config.artifact
    if config.source_role is not None:
        return f"of {config.source_role}"
    if weights is None:
        return "random" if role.parameters else "none"
    if weights.recipe:
        return weights.recipe + (f" ({model_text(weights.model)})" if weights.model else "")
    return f"stage {weights.stage}" if weights.stage else str(weights.path)


def _count_cell(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _print_recipe(console: Console, recipe: Recipe) -> None:
    """Prints the recipe as YAML, after merging group files and overrides."""
    console.print(Text("complete recipe, after merging group files and overrides", style="bold"))
    text = dump_recipe(recipe)
    if console.is_terminal:
        # The terminal's own colours: rich's default theme is unreadable on a light background.
        console.print(Syntax(text, "yaml", theme="ansi_dark", background_color="default"))
    else:
        console.print(Text(text), soft_wrap=True)
