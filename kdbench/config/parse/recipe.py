"""From composed plain data to a Recipe: every key, name, type and reference is checked, and all faults are told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.config.compose.hydra import Composed
from kdbench.config.compose.shorthand import contract
from kdbench.config.parse.artifacts import check_made
from kdbench.config.parse.baseline import without_teachers
from kdbench.config.parse.keys import AT_LEAST_ONE, NOT_NEGATIVE, PERCENT, POSITIVE, Context, Fields, Test
from kdbench.config.parse.loops import LENGTH, Unrolled, unroll
from kdbench.config.parse.stages import read_stage
from kdbench.config.schema import Notes, Published, Recipe, StageConfig
from kdbench.config.yaml_reader import leaves
from kdbench.errors import nearest

DEVICE: Test = (
    lambda text: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text) is not None,
    "auto, cpu, mps, cuda or cuda:N",
)


def validate(composed: Composed, base: Path, seen: tuple[str, ...] = ()) -> Recipe:
    """Checks a composed recipe and spells it out.

    Args:
        base: the folder of the recipe's file; paths of other recipes begin there.
        seen: the files of the recipe and of those that need it, to find a recipe that needs its own result.

    Raises:
        ConfigError: with every fault, one line each.
    """
    context = Context(composed.places)
    for key, value in leaves(composed.data):
        if value == "???":
            context.fault(key, f"has no value yet; give it on the command line: `{key}=...`.")
    context.faults.raise_any(composed.file)
    top = Fields(context, composed.data, "", "the recipe")
    vars_ = top.raw("vars", {})
    if not isinstance(vars_, Mapping):
        top.fault("vars", f"must be a mapping of free values, got {vars_!r}.")
    stages_value = top.raw("stages")
    twin = top.take("baseline", "bool", False)
    options: dict[str, Any] = {
        "title": top.take("title", "str", ""),
        "paper": top.take("paper", "str", ""),
        "methods": top.texts("methods"),
        "notes": _notes(context, top),
        "seed": top.take("seed", "int", 1),
        "device": top.take("device", "str", "auto", DEVICE),
        "compile": top.take("compile", "bool | Literal['max', 'cuda_graph']", False),
        "frozen_forward": top.take("frozen_forward", "Literal['auto', 'inline', 'prefetch', 'cache']", "auto"),
        "frozen_batch_size": top.take("frozen_batch_size", "int", 1024, AT_LEAST_ONE),
        "channels_last": top.take("channels_last", "bool"),
        "shard": _shard(top),
        "workers": top.take("workers", "int", 0, NOT_NEGATIVE),
        "data_root": top.take("data_root", "str", "data"),
        "runs": top.take("runs", "str", "runs"),
        "out": top.take("out", "str"),
        "fresh": top.take("fresh", "bool", False),
        "tensorboard": top.take("tensorboard", "bool", True),
        "keep_epochs": tuple(sorted(top.take("keep_epochs", "list[int]", []))),
    }
    published_value = top.raw("published")
    shared = {key: value for key, value in composed.data.items() if key not in top.known}
    own_keys = set(top.known)
    inner = Context(context.places, context.faults, tuple(own_keys))
    unrolled = unroll(inner, stages_value, shared, own_keys)
    stages = _read_stages(inner, unrolled, base, seen)
    _check_lengths(context, unrolled)
    _check_shard(context, options["shard"], stages)
    _check_export(context, stages)
    published = _published(context, top, published_value, composed, stages)
    context.faults.raise_any(composed.file)
    recipe = Recipe(
        name=composed.name,
        file=composed.file,
        stages=tuple(stages),
        resolved=contract(composed.data),
        locations=composed.places,
        path=composed.path,
        group_choices=composed.choices,
        overrides=composed.overrides,
        baseline=twin,
        published=published,
        **options,
    )
    return without_teachers(recipe) if twin else recipe


def _notes(context: Context, top: Fields) -> Notes | None:
    """Reads `notes: {basis: code, source: [...], differs: [...], scaled_down: [...]}`."""
    value = top.raw("notes")
    if value is None:
        return None
    if isinstance(value, str):  # TODO(renovation): remove when all recipes have structured notes
        return Notes(basis="text", differs=(value,))
    fields = Fields(context, value, "notes", "notes")
    basis = fields.take("basis", "Literal['code', 'text', 'abstract']")
    lists = {name: fields.texts(name) for name in ("source", "differs", "scaled_down")}
    fields.done()
    if basis is None:
        fields.fault("", "needs `basis`: code, text or abstract.")
        return None
    return Notes(basis=basis, **lists)


def _shard(top: Fields) -> bool | tuple[str, ...]:
    """Which roles lie in parts where there are several processes: none, all that can, or those named."""
    value = top.raw("shard", False)
    return value if isinstance(value, bool) else top.texts("shard")


def _check_shard(context: Context, shard: bool | tuple[str, ...], stages: list[StageConfig]) -> None:
    roles = {name for stage in stages for name in stage.roles}
    for name in () if isinstance(shard, bool) else shard:
        if name not in roles:
            context.fault("shard", f"no role {name!r}.{nearest(name, roles)}")


def _check_export(context: Context, stages: list[StageConfig]) -> None:
    """The result of a recipe that trains something must be something that moved in one of its stages."""
    roles = [role for stage in stages for role in stage.roles.values()]
    moved = {role.name for role in roles if role.mode != "frozen"}
    trained = sorted({role.name for role in roles if role.mode == "trainable"})
    name = stages[-1].export if stages else None
    if trained and any(role.name == name for role in roles) and name not in moved:
        context.fault("export", f"{name!r} is frozen in every stage, while {', '.join(trained)} trains.")


def _read_stages(context: Context, unrolled: list[Unrolled], base: Path, seen: tuple[str, ...]) -> list[StageConfig]:
    stages = []
    for stage in unrolled:
        own = Context(stage.places, context.faults, context.also_known)
        stages.append(read_stage(own, stage, base, seen))
    stages = check_made(context.faults, stages, unrolled)
    _check_stage_weights(context, stages, unrolled)
    return stages


def _check_lengths(context: Context, unrolled: list[Unrolled]) -> None:
    """An override of `epochs` that every stage hides would vanish without a word."""
    for key in LENGTH:
        place = context.places.get(key)
        hidden = all(any(length in stage.fragment for length in LENGTH) for stage in unrolled)
        if place is not None and place.override and unrolled and unrolled[0].key and hidden:
            context.fault(key, f"has no effect: every stage sets its own; write {unrolled[0].key}.{key}=...")


def _check_stage_weights(context: Context, stages: list[StageConfig], unrolled: list[Unrolled]) -> None:
    """Weights of an earlier stage must be of roles that it has; a frozen role cannot do without any."""
    earlier: dict[str, StageConfig] = {}
    for stage, own in zip(stages, unrolled, strict=True):
        for role in stage.roles.values():
            source = earlier.get(role.weights.stage or "") if role.weights is not None else None
            if role.weights is not None and source is not None:
                for wanted in role.weights.role or (role.name,):
                    if wanted not in source.roles:
                        said = f"stage {source.name!r} has no role {wanted!r}.{nearest(wanted, source.roles)}"
                        context.faults.add(role.weights.location, said)
            if role.name in own.unset and role.mode == "frozen":
                said = f"no earlier stage holds role {role.name!r}, which is frozen: say its `initial:` weights."
                context.faults.add(own.unset[role.name], said)
        earlier[stage.name] = stage


def _published(
    context: Context, top: Fields, value: Any, composed: Composed, stages: list[StageConfig]
) -> Published | None:
    """Reads the published figure: one number, or one for each pair or each student's model."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"top1": value}
    fields = Fields(context, value, "published", "published")
    top1 = fields.take("top1", "float", None, PERCENT)
    by_pair = fields.take("pairs", "dict", {})
    by_model = fields.take("models", "dict", {})
    for kind, figures in (("pairs", by_pair), ("models", by_model)):
        for name, figure in figures.items():
            if not isinstance(figure, int | float) or isinstance(figure, bool) or not PERCENT[0](figure):
                fields.fault(f"{kind}.{name}", f"must be {PERCENT[1]}, got {figure!r}.")
                return None
    source = fields.take("source", "str", "")
    epoch = fields.take("epoch", "Literal['last', 'best', 'unstated']", "unstated")
    tolerance = fields.take("tolerance", "float", None, POSITIVE)
    fields.done()
    if top1 is None and not by_pair and not by_model:
        fields.fault("", "needs `top1`, or figures by `pairs` or `models`.")
    if top1 is None:
        top1 = by_pair.get(composed.choices.get("pair", ""))
    if top1 is None and stages:
        exported = stages[-1].roles.get(stages[-1].export)
        if exported is not None and exported.model is not None:
            top1 = by_model.get(exported.model.type)
    return None if top1 is None else Published(top1=top1, source=source, epoch=epoch, tolerance=tolerance)
