"""Converts a composed recipe (a mapping) to a Recipe, and checks every key, name, type and reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.config.compose.hydra import ComposedRecipe
from kdbench.config.compose.shorthand import contract
from kdbench.config.parse.artifacts import link_artifacts
from kdbench.config.parse.baseline import remove_teachers
from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.loops import LENGTH_KEYS, UnrolledStage, unroll_stages
from kdbench.config.parse.stages import TOP_LEVEL_KEYS, read_stage
from kdbench.config.schema import Notes, Published, Recipe, StageConfig, declared_keys
from kdbench.config.yaml_reader import iterate_scalars
from kdbench.errors import suggest


def parse_recipe(composed: ComposedRecipe, folder: Path, ancestors: tuple[str, ...] = ()) -> Recipe:
    """Parses and checks a composed recipe.

    Args:
        composed: recipe after its group files and overrides were merged.
        folder: folder of the recipe's file. Paths of other recipes are relative to this folder.
        ancestors: files of this recipe and of all recipes that take weights from this recipe, to detect cycles.

    Raises:
        ConfigError: the recipe has mistakes. The message has one line per mistake.
    """
    context = ParseContext(composed.locations)
    for key, value in iterate_scalars(composed.data):
        if value == "???":
            context.error(key, f"a value is required; set it on the command line: `{key}=VALUE`.")
    context.errors.raise_any(composed.file)
    # Unknown keys are reported where the stages are read.
    top = KeyReader(context, composed.data, "", "the recipe", TOP_LEVEL_KEYS, parameters=True)
    top.read_mapping("vars", "layer: layer3")
    fields = top.read_plain_fields(Recipe)
    unrolled = _unroll(context, top)
    stages = _read_stages(context, unrolled, folder, ancestors)
    _check_length_overrides(context, unrolled)
    _check_sharded_roles(context, fields["shard"], stages)
    _check_export(context, stages)
    fields |= {
        "name": composed.name,
        "file": composed.file,
        "stages": tuple(stages),
        "resolved": contract(composed.data),
        "locations": composed.locations,
        "path": composed.path,
        "group_choices": composed.group_choices,
        "overrides": composed.overrides,
        "notes": _read_notes(top),
        "published": _read_published(top, composed, stages),
        "keep_epochs": tuple(sorted(fields["keep_epochs"])),
    }
    context.errors.raise_any(composed.file)
    recipe = Recipe(**fields)
    return remove_teachers(recipe) if recipe.baseline else recipe


def _unroll(context: ParseContext, top: KeyReader) -> list[UnrolledStage]:
    recipe_keys = declared_keys(Recipe)
    shared = {name: value for name, value in top.data.items() if name not in recipe_keys}
    return unroll_stages(context, top.get_raw("stages"), shared)


def _read_notes(top: KeyReader) -> Notes | None:
    """Parses `notes: {basis: code, source: [...], differs: [...], scaled_down: [...]}`."""
    value = top.get_raw("notes")
    if value is None:
        return None
    return KeyReader(top.context, value, "notes", "notes", declared_keys(Notes)).read_config(Notes)


def _read_stages(
    context: ParseContext, unrolled: list[UnrolledStage], folder: Path, ancestors: tuple[str, ...]
) -> list[StageConfig]:
    stages = [read_stage(ParseContext(stage.locations, context.errors), stage, folder, ancestors) for stage in unrolled]
    stages = link_artifacts(context.errors, stages, unrolled)
    _check_stage_weights(context, stages, unrolled)
    return stages


def _check_sharded_roles(context: ParseContext, shard: bool | tuple[str, ...], stages: list[StageConfig]) -> None:
    roles = {name for stage in stages for name in stage.roles}
    for name in () if isinstance(shard, bool) else shard:
        if name not in roles:
            context.error("shard", f"no role {name!r}.{suggest(name, roles)}")


def _check_export(context: ParseContext, stages: list[StageConfig]) -> None:
    """Reports an exported role that is frozen in all stages, if the recipe trains other roles."""
    roles = [role for stage in stages for role in stage.roles.values()]
    not_frozen = {role.name for role in roles if role.mode != "frozen"}
    trained = sorted({role.name for role in roles if role.mode == "trainable"})
    export = stages[-1].export if stages else None
    if trained and any(role.name == export for role in roles) and export not in not_frozen:
        context.error(
            "export", f"role {export!r} is frozen in every stage; export a trained role: {' or '.join(trained)}."
        )


def _check_length_overrides(context: ParseContext, unrolled: list[UnrolledStage]) -> None:
    """Reports an override of `epochs` or `steps` that has no effect, because every stage sets its own length."""
    for key in LENGTH_KEYS:
        location = context.locations.get(key)
        is_hidden = all(any(length in stage.fragment for length in LENGTH_KEYS) for stage in unrolled)
        if location is not None and location.override and unrolled and unrolled[0].key and is_hidden:
            context.error(
                key, f"has no effect, because every stage sets its own length; write {unrolled[0].key}.{key}=N."
            )


def _check_stage_weights(context: ParseContext, stages: list[StageConfig], unrolled: list[UnrolledStage]) -> None:
    """Reports weights of a role that does not exist in the named stage, and frozen roles without weights."""
    earlier: dict[str, StageConfig] = {}
    for stage, origin in zip(stages, unrolled, strict=True):
        for role in stage.roles.values():
            source = earlier.get(role.weights.stage or "") if role.weights is not None else None
            if role.weights is not None and source is not None:
                for name in role.weights.role or (role.name,):
                    if name not in source.roles:
                        message = f"stage {source.name!r} has no role {name!r}.{suggest(name, source.roles)}"
                        context.errors.add(role.weights.location, message)
            if role.name in origin.roles_without_weights and role.mode == "frozen":
                message = f"no earlier stage has the frozen role {role.name!r}; add `initial:` with other weights."
                context.errors.add(origin.roles_without_weights[role.name], message)
        earlier[stage.name] = stage


def _read_published(top: KeyReader, composed: ComposedRecipe, stages: list[StageConfig]) -> Published | None:
    """Parses `published`: one accuracy, one for each pair of networks, or one for each model of the exported role."""
    value: Any = top.get_raw("published")
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"top1": value}
    reader = KeyReader(top.context, value, "published", "published", declared_keys(Published))
    top1, by_pair, by_model = (reader.read(name) for name in ("top1", "pairs", "models"))
    if not any(reader.has(name) for name in ("top1", "pairs", "models")):
        reader.error("", "one of the keys `top1`, `pairs` and `models` is required.")
    if top1 is None:
        top1 = by_pair.get(composed.group_choices.get("pair", ""))
    if top1 is None and stages:
        exported = stages[-1].roles.get(stages[-1].export)
        if exported is not None and exported.model is not None:
            top1 = by_model.get(exported.model.type)
    fields: Mapping[str, Any] = reader.read_plain_fields(Published)
    return None if top1 is None else Published(top1=top1, **fields)
