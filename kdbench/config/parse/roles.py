"""The networks of a recipe: `models:`, and `teacher:` and `student:`, which are short for two of its entries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdbench.config.parse.keys import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, KeyReader, ParseContext
from kdbench.config.parse.parts import read_part
from kdbench.config.paths import find_recipe
from kdbench.config.schema import PartConfig, RoleConfig, SourceConfig, WeightsConfig
from kdbench.config.yaml_reader import iterate_scalars, read_yaml
from kdbench.errors import ConfigError, suggest
from kdbench.registry import DATASETS, METRICS, MODELS, WEIGHT_TRANSFORMS

_NAME = re.compile(r"[A-Za-z_][\w-]*")


_DERIVED_MODES = ("ema", "snapshot", "reuse")


_NO_NAMES = ("others", "logits", "term", "artifact")


def read_roles(context: ParseContext, top: KeyReader, base: Path, seen: tuple[str, ...]) -> dict[str, RoleConfig]:
    """Reads every role; a null entry removes one.

    Args:
        top: the stage's keys.
        base: the folder of the recipe, where paths of other recipes begin.
        seen: the files of the recipes that lead here, for a recipe that would need itself.
    """
    written: dict[str, tuple[str, Any]] = {}
    models = top.get_raw("models", {})
    if not isinstance(models, Mapping):
        top.error("models", f"must be a mapping of role names to models, got {models!r}.")
        models = {}
    for name, data in models.items():
        if data is not None:
            written[name] = (top.subkey(f"models.{name}"), data)
    for name in ("teacher", "student"):
        data = top.get_raw(name)
        if data is None or models.get(name, data) is None:  # `models: {student: null}` in a round removes `student:`
            continue
        if name in written:
            where = context.location(written[name][0])
            top.error(name, f"role {name!r} is given twice: here and as models.{name} ({where}); keep one of them.")
        written[name] = (top.subkey(name), data)
    roles = {}
    for name, (key, data) in written.items():
        if not _NAME.fullmatch(name) or name in _NO_NAMES:
            context.error(key, f"{name!r} cannot be a role's name; use letters, digits, `_` and `-`.")
            continue
        roles[name] = _role(context, name, key, data, base, seen)
    if not roles:
        context.error("", "the recipe names no network; write `student: {model: NAME}`.")
    _check_followers(context, roles)
    return roles


def _role(context: ParseContext, name: str, key: str, data: Any, base: Path, seen: tuple[str, ...]) -> RoleConfig:
    fields = KeyReader(context, data, key, f"role {name!r}")
    model_value = fields.get_raw("model")
    model, made = None, None
    if isinstance(model_value, Mapping) and isinstance(model_value.get("artifact"), str):
        made = model_value["artifact"]
        rest = {k: v for k, v in model_value.items() if k != "artifact"}
        model = read_part(context, MODELS, rest, fields.subkey("model"), MODELS.injected) if rest else None
    elif model_value is not None:
        model = read_part(context, MODELS, model_value, fields.subkey("model"), MODELS.injected)
    mode, of = _mode(fields, name)
    if model_value is None and mode not in _DERIVED_MODES:
        fault = f"role {name!r} needs a `model`, one of `kdbench list models`."
        if isinstance(meant := fields.get_raw("type"), str):
            fault = f"the network of role {name!r} stands under `model`: write `{name}: {{model: {{type: {meant}}}}}`."
        context.error(key, fault)
    if model_value is not None and mode == "reuse":
        fields.error("model", f"role {name!r} is the very network of {of!r}; it has no model of its own.")
    of, _, part = (of or "").partition(":")
    every, every_steps = _every(fields)
    inputs = fields.read_strings("input")
    role = RoleConfig(
        name=name,
        model=model,
        weights=read_weights(context, fields, base, seen),
        input=inputs[0] if inputs else "",
        extra_inputs=inputs[1:],
        mode=mode,
        source_role=of or None,
        module_path=part or None,
        decay=fields.read("decay", "float", 0.999, FRACTION),
        every_epochs=every,
        every_steps=every_steps,
        init_index=fields.read("init_index", "int", 0, NOT_NEGATIVE),
        artifact=made,
        transforms=_transforms(context, fields),
        freeze=fields.read_strings("freeze"),
        require=_required(fields),
        location=context.location(key),
    )
    if fields.has("decay") and mode != "ema":
        fields.error("decay", "belongs to a role with `ema: ROLE`.")
    if fields.has("init_index") and mode in _DERIVED_MODES:
        fields.error("init_index", f"has no effect: the weights of role {name!r} are those of {of!r}.")
    if fields.has("every") and mode != "snapshot":
        fields.error("every", "belongs to a role with `snapshot: ROLE`.")
    if mode == "reuse" and role.weights is not None:
        fields.error("weights", f"role {name!r} is the very network of {of!r}; its weights are those.")
    if part and mode != "reuse":
        fields.error(mode, f"a part of a role can only be shared: `reuse: {of}:{part}`.")
    if role.transforms and mode != "trainable":
        fields.error("transform", f"belongs to a role that trains; role {name!r} is {mode}.")
    if fields.has("freeze") and mode != "trainable":
        fields.error("freeze", f"has no effect: nothing of role {name!r} trains.")
    fields.finish()
    return role


def _required(fields: KeyReader) -> dict[str, float]:
    """Reads `require: {top1: 95}`: the values of metrics that a frozen role must reach."""
    required = fields.read("require", "dict", {})
    for name, value in required.items():
        key = f"require.{name}"
        if name.partition("/")[0] not in METRICS.entries:
            fields.error(key, f"no metric {name!r}.{suggest(name, METRICS.entries)}")
        elif not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            fields.error(key, f"must be a number, got {value!r}.")
    return dict(required)


def _every(fields: KeyReader) -> tuple[int, int]:
    """How often a snapshot is renewed: `every: 5` epochs, or `every: {steps: 100}`."""
    if isinstance(fields.data.get("every"), Mapping):
        own = KeyReader(fields.context, fields.get_raw("every"), fields.subkey("every"), "every")
        steps = own.read("steps", "int", 0, AT_LEAST_ONE)
        own.finish()
        return 0, steps
    return fields.read("every", "int", 0, NOT_NEGATIVE), 0


def _transforms(context: ParseContext, fields: KeyReader) -> tuple[PartConfig, ...]:
    value = fields.get_raw("transform", [])
    listed = isinstance(value, list)
    found = [
        read_part(context, WEIGHT_TRANSFORMS, item, fields.subkey(f"transform.{i}" if listed else "transform"))
        for i, item in enumerate(value if listed else [value])
    ]
    return tuple(item for item in found if item is not None)


def _mode(fields: KeyReader, name: str) -> tuple[Any, str | None]:
    frozen = fields.read("frozen", "bool")
    trainable = fields.read("trainable", "bool")
    followed = {mode: fields.read(mode, "str") for mode in _DERIVED_MODES}
    chosen = [mode for mode, of in followed.items() if of is not None]
    if len(chosen) > 1 or (chosen and (frozen is not None or trainable is not None)):
        fields.error("", "`frozen`, `trainable`, `ema`, `snapshot` and `reuse` exclude each other; give one of them.")
    if frozen is not None and trainable is not None and frozen == trainable:
        fields.error("trainable", f"contradicts `frozen: {str(frozen).lower()}`.")
    if chosen:
        return chosen[0], followed[chosen[0]]
    if frozen is None:
        frozen = not trainable if trainable is not None else name == "teacher"
    return ("frozen" if frozen else "trainable"), None


def _check_followers(context: ParseContext, roles: Mapping[str, RoleConfig]) -> None:
    for role in roles.values():
        if role.source_role is None:
            continue
        key = f"{role.location.key}.{role.mode}"
        if role.source_role not in roles:
            context.error(
                key, f"no role {role.source_role!r} to follow.{suggest(role.source_role, set(roles) - {role.name})}"
            )
            continue
        chain, current = [role.name], role
        while current.source_role is not None and current.source_role in roles:
            chain.append(current.source_role)
            current = roles[current.source_role]
            if current.name in chain[:-1]:
                context.error(key, f"roles follow each other in a circle: {' -> '.join(chain)}.")
                break


def read_weights(context: ParseContext, fields: KeyReader, base: Path, seen: tuple[str, ...]) -> WeightsConfig | None:
    """Reads the `weights` of a role: from a recipe, an earlier stage (by its full name), or a file."""
    value = fields.get_raw("weights")
    if value is None:
        return None
    own = KeyReader(context, value, fields.subkey("weights"), "weights")
    given = [kind for kind in ("recipe", "stage", "path") if own.has(kind)]
    recipe, stage, path = (own.read(kind, "str") for kind in ("recipe", "stage", "path"))
    if len(given) != 1:
        got = f", got {' and '.join(given)}" if given else ""
        own.error("", f"weights need exactly one of `recipe`, `stage` and `path`{got}.")
    model = own.get_raw("model")
    if model is not None:
        read_part(context, MODELS, model, own.subkey("model"), MODELS.injected)
    rename = own.read("rename", "dict", {})
    if not all(isinstance(new, str) for new in rename.values()):
        own.error("rename", f"must map text to text, got {rename!r}.")
        rename = {}
    role = own.read_strings("role")
    if len(set(role)) < len(role):
        own.error("role", f"a role is listed twice: {', '.join(role)}.")
    weights = WeightsConfig(
        recipe=_recipe(own, recipe, base, seen),
        model=model,
        epoch=own.read("epoch", "int", None, NOT_NEGATIVE),
        stage=stage,
        role=role,
        path=path,
        key=own.read("key", "str"),
        strip=own.read("strip", "str"),
        rename=rename,
        strict=own.read("strict", "bool", True),
        location=own.location(),
    )
    for name, kind in {"model": "recipe", "epoch": "recipe", "key": "path", "initial": "stage"}.items():
        own.get_raw(name)
        if own.has(name) and given and kind not in given:
            own.error(name, f"belongs to `{kind}:`, not to `{given[0]}:`.")
    own.finish()
    return weights if len(given) == 1 else None


def _recipe(own: KeyReader, recipe: str | None, base: Path, seen: tuple[str, ...]) -> str | None:
    """The shipped name, or the full path of the user's recipe."""
    if recipe is None:
        return None
    try:
        name, path = find_recipe(recipe, base, own.location("recipe"))
    except ConfigError as error:
        own.context.errors.add("", str(error))
        return recipe
    if _leads_to(path, seen):
        own.error("recipe", f"the recipe would need its own result first: {recipe!r}.")
    return name if recipe == name else str(path)


def _leads_to(path: Path, seen: tuple[str, ...]) -> bool:
    """Whether a recipe, or one that it takes weights from, is among those being read."""
    waiting, visited = [path], set()
    while waiting:
        current = waiting.pop()
        if str(current.resolve()) in seen:
            return True
        if current in visited:
            continue
        visited.add(current)
        # A mistake in another recipe is told when that recipe is loaded.
        with suppress(ConfigError):
            needed = [
                v
                for key, v in iterate_scalars(read_yaml(current).data)
                if key.endswith(("weights.recipe", "weights.first.recipe"))
            ]
            waiting += [find_recipe(str(name), current.parent)[1] for name in needed]
    return False


def resolve_inputs(
    context: ParseContext, roles: Mapping[str, RoleConfig], data: Mapping[str, SourceConfig]
) -> dict[str, RoleConfig]:
    """Spells out what each role sees, and finds fault with sources, fields and roles that do not exist."""
    bound = {}
    for name, role in roles.items():
        first = _input(context, role, role.input, roles, data)
        bound[name] = replace(
            role, input=first, extra_inputs=tuple(_input(context, role, i, roles, data) for i in role.extra_inputs)
        )
    for name in bound:
        circle = _circle(name, bound)
        if circle is not None:
            said = " -> ".join(circle)
            context.error(_input_key(bound[name]), f"roles see each other's outputs in a circle: {said}.")
    return bound


def _circle(name: str, roles: Mapping[str, RoleConfig]) -> tuple[str, ...] | None:
    """The way along inputs that leads from a role back to itself, or None."""
    waiting: list[tuple[str, ...]] = [(name,)]
    visited: set[str] = set()
    while waiting:
        chain = waiting.pop()
        role = roles[chain[-1]]
        for upstream in (i.split(":", 1)[0] for i in (role.input, *role.extra_inputs) if ":" in i):
            if upstream == name:
                return (*chain, upstream)
            if upstream not in visited:
                visited.add(upstream)
                waiting.append((*chain, upstream))
    return None


def _input_key(role: RoleConfig) -> str:
    return f"{role.location.key}.input"


def _input(
    context: ParseContext,
    role: RoleConfig,
    given: str,
    roles: Mapping[str, RoleConfig],
    data: Mapping[str, SourceConfig],
) -> str:
    key = _input_key(role)
    fallback = "train.image"
    if not given:
        if "train" not in data:
            known = ", ".join(data) or "none"
            said = f"role {role.name!r} needs an `input`: there is no source `train` (sources: {known})."
            context.error(role.location.key, said)
        return fallback
    if ":" in given:
        upstream, _, path = given.partition(":")
        if upstream not in roles:
            context.error(key, f"no role {upstream!r} to read from.{suggest(upstream, set(roles) - {role.name})}")
            return fallback
        return f"{upstream}:{path or 'logits'}"
    source, _, name = given.rpartition(".")
    source = source or "train"
    if source not in data:
        context.error(key, f"no source {source!r}; write SOURCE.FIELD or ROLE:PATH.{suggest(source, data)}")
        return fallback
    fields = input_fields(data[source])
    if name not in fields and data[source].artifact is None:
        context.error(key, f"source {source!r} has no field {name!r}.{suggest(name, fields)}")
        return fallback
    return f"{source}.{name}"


def input_fields(source: SourceConfig) -> set[str]:
    """The fields that a model can see: views and labels, or what a dataset without images declares (`fields`)."""
    entry = DATASETS.entries.get(source.dataset.type)
    declared = entry.facts.get("fields") if entry is not None else None
    return {*declared, "index"} if declared else {*source.views, "label", "index"}


def upstream_closure(names: Iterable[str], roles: Mapping[str, RoleConfig], *, include_source_roles: bool = False) -> set[str]:
    """These roles and all those whose outputs they see, directly or not.

    Args:
        followed: those too of which one is an average, a copy or the very network.
    """
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        role = roles.get(waiting.pop())
        if role is None or role.name in found:
            continue
        found.add(role.name)
        waiting += role.upstream_roles
        if include_source_roles and role.source_role is not None:
            waiting.append(role.source_role)
    return found
