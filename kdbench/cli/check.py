"""`kdbench check`: everything but training, in seconds: who sees what, who teaches whom, what it costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kdbench.cli.descriptions import describe_stage, shape_text, value_text
from kdbench.cli.diagram import draw_stage, stage_sequence
from kdbench.config.schema import PartConfig, Recipe, RoleConfig, StageConfig
from kdbench.registry import TERMS

if TYPE_CHECKING:
    from kdbench.engine.plan.plan import StagePlan


def check_recipe(recipe: Recipe, *, brief: bool = False) -> int:
    """Plans every stage and prints what would happen; `brief` prints one line (`check --all`).

    Raises:
        ConfigError: anything that training would have failed at before its first step.
    """
    from kdbench.engine.device import describe_device, resolve_device
    from kdbench.experiment.artifacts import plan_stages

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width; 80 would fold the tables
    device = resolve_device(recipe.device)
    plans = plan_stages(recipe)
    if brief:
        notes = [note for plan in plans for note in plan.notes]
        console.print(Text(f"{recipe.name}: good" + (f" ({notes[0]})" if notes else "")), soft_wrap=True)
        return 0
    console.print(Text(recipe.name, style="bold"), Text(recipe.title))
    if recipe.paper:
        console.print(Text(f"paper: {recipe.paper}"))
    console.print(Text(f"file: {recipe.file}"), Text(f"device: {describe_device(device)}"), sep="\n")
    for text in recipe.baseline_removed:
        console.print(Text(f"twin: {text}"))
    if recipe.notes is not None:
        notes = recipe.notes
        console.print(
            Text(f"basis: {notes.basis} ({'; '.join(notes.source)})" if notes.source else f"basis: {notes.basis}")
        )
        for label, items in (("differs", notes.differs), ("scaled down", notes.scaled_down)):
            for item in items:
                console.print(Text(f"{label}: {item}"))
    if len(plans) > 1:
        console.print(Text(f"\ncourse: {stage_sequence(recipe.stages)}", style="bold"))
    told: dict[str, str] = {}
    for number, plan in enumerate(plans):
        later = recipe.stages[number + 1 :]
        same = _identical_stage(plan, told)
        if same is not None:
            console.print(Text(f"stage {plan.stage.name}: as {same}, in a later round\n"))
            continue
        _print_stage(console, plan, later, several=len(plans) > 1)
    if recipe.published:
        figure = recipe.published
        console.print(Text(f"\npublished: {figure.top1} % top-1, {figure.source} (epoch: {figure.epoch})"))
    _print_recipe(console, recipe)
    return 0


def _identical_stage(plan: StagePlan, told: dict[str, str]) -> str | None:
    """The name of a stage that was told already and says the same, the numbers of rounds aside."""
    rows = [*describe_stage(plan), *draw_stage(plan), *(_weights_cell(role) for role in plan.stage.roles.values())]
    text = re.sub(r"@\d+", "@", "\n".join([plan.stage.name, *rows]))
    before = told.get(text)
    told.setdefault(text, plan.stage.name)
    return before


def _print_stage(console: Console, plan: StagePlan, later: Sequence[StageConfig], *, several: bool) -> None:
    stage = plan.stage
    console.print()
    if several:
        console.print(Text(f"stage {stage.name}", style="bold underline"))
    for line in draw_stage(plan, later):
        console.print(Text(line), soft_wrap=True)
    console.print()
    console.print(_roles_table(plan))
    console.print()
    console.print(_terms_table(plan))
    console.print()
    if any(not feature.is_output for role in plan.roles.values() for feature in role.features):
        console.print(_features_table(plan))
        console.print()
    console.print(Text("in words", style="bold"))
    for sentence in describe_stage(plan):
        if console.is_terminal:
            console.print(Padding(Text(sentence), (0, 0, 0, 2)))
        else:
            console.print(Text(f"  {sentence}"), soft_wrap=True)
    console.print()


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _roles_table(plan: StagePlan) -> Table:
    numbers = ("parameters", "trainable", "FLOPs/sample")
    table = _table("roles", "role", "model", "sees", "lives", *numbers, "weights", right=numbers)
    for name, role in plan.roles.items():
        config = role.config
        lives = config.mode if config.source_role is None else f"{config.mode} of {config.source_role}"
        stops = f" (runs as far as {role.stop_module})" if role.stop_module else ""
        table.add_row(
            name,
            role.model,
            config.input,
            lives + stops,
            f"{role.parameters:,}",
            f"{role.trainable_parameters:,}",
            _number_cell(role.flops),
            _weights_cell(config),
        )
    return table


def _terms_table(plan: StagePlan) -> Table:
    table = _table("terms", "term", "type", "space", "weight", "student", "teacher", "parameters", "adapter")
    for name in plan.stage.terms:
        config = plan.stage.terms[name]
        space = TERMS.entry(config.type).facts.get("space", "row")
        for number, edge in enumerate(config.edges):
            first = number == 0
            adapters = plan.adapters.get(name, ())
            table.add_row(
                name if first else "",
                config.type if first else "",
                str(space) if first else "",
                value_text(config.weight) if first else "",
                str(edge.student),
                str(edge.teacher) if edge.teacher else "-",
                ", ".join(f"{k} {value_text(v)}" for k, v in config.params.items()) if first else "",
                adapters[number] if number < len(adapters) else "",
            )
    return table


def _features_table(plan: StagePlan) -> Table:
    table = _table("features that the terms read", "role", "path", "shape of one sample", "note")
    for name, role in plan.roles.items():
        for feature, shape in role.features.items():
            note = "cloned: overwritten in place later in the forward" if feature in role.overwritten_features else ""
            table.add_row(name, str(feature), shape_text(shape), note)
    return table


def _weights_cell(config: RoleConfig) -> str:
    weights = config.weights
    if weights is None:
        return "from the seed" if config.source_role is None else f"of {config.source_role}"
    if weights.recipe:
        model = weights.model.type if isinstance(weights.model, PartConfig) else weights.model
        return f"recipe {weights.recipe}" + (f" ({model})" if model else "")
    return f"stage {weights.stage}" if weights.stage else str(weights.path)


def _number_cell(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _print_recipe(console: Console, recipe: Recipe) -> None:
    from kdbench.config.load import dump_recipe

    console.print(Text("\nthe recipe, composed", style="bold"))
    text = dump_recipe(recipe)
    if console.is_terminal:
        # The terminal's own colours: rich's default theme cannot be read on a light ground.
        console.print(Syntax(text, "yaml", theme="ansi_dark", background_color="default"))
    else:
        console.print(Text(text), soft_wrap=True)
