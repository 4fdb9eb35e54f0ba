"""From composed plain data to a Recipe: every key, name, type and reference is checked, and all faults are told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.config.compose.hydra import ComposedRecipe
from kdbench.config.compose.shorthand import contract
from kdbench.config.parse.artifacts import link_artifacts
from kdbench.config.parse.baseline import remove_teachers
from kdbench.config.parse.keys import AT_LEAST_ONE, NOT_NEGATIVE, PERCENTAGE, POSITIVE, Check, KeyReader, ParseContext
from kdbench.config.parse.loops import LENGTH_KEYS, UnrolledStage, unroll_stages
from kdbench.config.parse.stages import read_stage
from kdbench.config.schema import Notes, Published, Recipe, StageConfig
from kdbench.config.yaml_reader import iterate_scalars
from kdbench.errors import suggest

DEVICE: Check = (
    lambda text: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text) is not None,
    "auto, cpu, mps, cuda or cuda:N",
)


def parse_recipe(composed: ComposedRecipe, base: Path, seen: tuple[str, ...] = ()) -> Recipe:
    """Checks a composed recipe and spells it out.

    Args:
        base: the folder of the recipe's file; paths of other recipes begin there.
        seen: the files of the recipe and of those that need it, to find a recipe that needs its own result.

    Raises:
        ConfigError: with every fault, one line each.
    """
    context = ParseContext(composed.locations)
    for key, value in iterate_scalars(composed.data):
        if value == "???":
            context.error(key, f"has no value yet; give it on the command line: `{key}=...`.")
    context.errors.raise_any(composed.file)
    top = KeyReader(context, composed.data, "", "the recipe")
    vars_ = top.get_raw("vars", {})
    if not isinstance(vars_, Mapping):
        top.error("vars", f"must be a mapping of free values, got {vars_!r}.")
    stages_value = top.get_raw("stages")
    twin = top.read("baseline", "bool", False)
    options: dict[str, Any] = {
        "title": top.read("title", "str", ""),
        "paper": top.read("paper", "str", ""),
        "methods": top.read_strings("methods"),
        "notes": _notes(context, top),
        "seed": top.read("seed", "int", 1),
        "device": top.read("device", "str", "auto", DEVICE),
        "compile": top.read("compile", "bool | Literal['max', 'cuda_graph']", False),
        "frozen_forward": top.read("frozen_forward", "Literal['auto', 'inline', 'prefetch', 'cache']", "auto"),
        "frozen_batch_size": top.read("frozen_batch_size", "int", 1024, AT_LEAST_ONE),
        "channels_last": top.read("channels_last", "bool"),
        "shard": _shard(top),
        "workers": top.read("workers", "int", 0, NOT_NEGATIVE),
        "data_root": top.read("data_root", "str", "data"),
        "runs": top.read("runs", "str", "runs"),
        "out": top.read("out", "str"),
        "fresh": top.read("fresh", "bool", False),
        "tensorboard": top.read("tensorboard", "bool", True),
        "keep_epochs": tuple(sorted(top.read("keep_epochs", "list[int]", []))),
    }
    published_value = top.get_raw("published")
    shared = {key: value for key, value in composed.data.items() if key not in top.known}
    own_keys = set(top.known)
    inner = ParseContext(context.locations, context.errors, tuple(own_keys))
    unrolled = unroll_stages(inner, stages_value, shared, own_keys)
    stages = _read_stages(inner, unrolled, base, seen)
    _check_lengths(context, unrolled)
    _check_shard(context, options["shard"], stages)
    _check_export(context, stages)
    published = _published(context, top, published_value, composed, stages)
    context.errors.raise_any(composed.file)
    recipe = Recipe(
        name=composed.name,
        file=composed.file,
        stages=tuple(stages),
        resolved=contract(composed.data),
        locations=composed.locations,
        path=composed.path,
        group_choices=composed.group_choices,
        overrides=composed.overrides,
        baseline=twin,
        published=published,
        **options,
    )
    return remove_teachers(recipe) if twin else recipe


def _notes(context: ParseContext, top: KeyReader) -> Notes | None:
    """Reads `notes: {basis: code, source: [...], differs: [...], scaled_down: [...]}`."""
    value = top.get_raw("notes")
    if value is None:
        return None
    if isinstance(value, str):  # TODO(renovation): remove when all recipes have structured notes
        return Notes(basis="text", differs=(value,))
    fields = KeyReader(context, value, "notes", "notes")
    basis = fields.read("basis", "Literal['code', 'text', 'abstract']")
    lists = {name: fields.read_strings(name) for name in ("source", "differs", "scaled_down")}
    fields.finish()
    if basis is None:
        fields.error("", "needs `basis`: code, text or abstract.")
        return None
    return Notes(basis=basis, **lists)


def _shard(top: KeyReader) -> bool | tuple[str, ...]:
    """Which roles lie in parts where there are several processes: none, all that can, or those named."""
    value = top.get_raw("shard", False)
    return value if isinstance(value, bool) else top.read_strings("shard")


def _check_shard(context: ParseContext, shard: bool | tuple[str, ...], stages: list[StageConfig]) -> None:
    roles = {name for stage in stages for name in stage.roles}
    for name in () if isinstance(shard, bool) else shard:
        if name not in roles:
            context.error("shard", f"no role {name!r}.{suggest(name, roles)}")


def _check_export(context: ParseContext, stages: list[StageConfig]) -> None:
    """The result of a recipe that trains something must be something that moved in one of its stages."""
    roles = [role for stage in stages for role in stage.roles.values()]
    moved = {role.name for role in roles if role.mode != "frozen"}
    trained = sorted({role.name for role in roles if role.mode == "trainable"})
    name = stages[-1].export if stages else None
    if trained and any(role.name == name for role in roles) and name not in moved:
        context.error("export", f"{name!r} is frozen in every stage, while {', '.join(trained)} trains.")


def _read_stages(context: ParseContext, unrolled: list[UnrolledStage], base: Path, seen: tuple[str, ...]) -> list[StageConfig]:
    stages = []
    for stage in unrolled:
        own = ParseContext(stage.locations, context.errors, context.also_known)
        stages.append(read_stage(own, stage, base, seen))
    stages = link_artifacts(context.errors, stages, unrolled)
    _check_stage_weights(context, stages, unrolled)
    return stages


def _check_lengths(context: ParseContext, unrolled: list[UnrolledStage]) -> None:
    """An override of `epochs` that every stage hides would vanish without a word."""
    for key in LENGTH_KEYS:
        place = context.locations.get(key)
        hidden = all(any(length in stage.fragment for length in LENGTH_KEYS) for stage in unrolled)
        if place is not None and place.override and unrolled and unrolled[0].key and hidden:
            context.error(key, f"has no effect: every stage sets its own; write {unrolled[0].key}.{key}=...")


def _check_stage_weights(context: ParseContext, stages: list[StageConfig], unrolled: list[UnrolledStage]) -> None:
    """Weights of an earlier stage must be of roles that it has; a frozen role cannot do without any."""
    earlier: dict[str, StageConfig] = {}
    for stage, own in zip(stages, unrolled, strict=True):
        for role in stage.roles.values():
            source = earlier.get(role.weights.stage or "") if role.weights is not None else None
            if role.weights is not None and source is not None:
                for wanted in role.weights.role or (role.name,):
                    if wanted not in source.roles:
                        said = f"stage {source.name!r} has no role {wanted!r}.{suggest(wanted, source.roles)}"
                        context.errors.add(role.weights.location, said)
            if role.name in own.roles_without_weights and role.mode == "frozen":
                said = f"no earlier stage holds role {role.name!r}, which is frozen: say its `initial:` weights."
                context.errors.add(own.roles_without_weights[role.name], said)
        earlier[stage.name] = stage


def _published(
    context: ParseContext, top: KeyReader, value: Any, composed: ComposedRecipe, stages: list[StageConfig]
) -> Published | None:
    """Reads the published figure: one number, or one for each pair or each student's model."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"top1": value}
    fields = KeyReader(context, value, "published", "published")
    top1 = fields.read("top1", "float", None, PERCENTAGE)
    by_pair = fields.read("pairs", "dict", {})
    by_model = fields.read("models", "dict", {})
    for kind, figures in (("pairs", by_pair), ("models", by_model)):
        for name, figure in figures.items():
            if not isinstance(figure, int | float) or isinstance(figure, bool) or not PERCENTAGE[0](figure):
                fields.error(f"{kind}.{name}", f"must be {PERCENTAGE[1]}, got {figure!r}.")
                return None
    source = fields.read("source", "str", "")
    epoch = fields.read("epoch", "Literal['last', 'best', 'unstated']", "unstated")
    tolerance = fields.read("tolerance", "float", None, POSITIVE)
    fields.finish()
    if top1 is None and not by_pair and not by_model:
        fields.error("", "needs `top1`, or figures by `pairs` or `models`.")
    if top1 is None:
        top1 = by_pair.get(composed.group_choices.get("pair", ""))
    if top1 is None and stages:
        exported = stages[-1].roles.get(stages[-1].export)
        if exported is not None and exported.model is not None:
            top1 = by_model.get(exported.model.type)
    return None if top1 is None else Published(top1=top1, source=source, epoch=epoch, tolerance=tolerance)
