"""Parses the networks of a recipe: `models`, and `teacher` and `student`, shorthands for two entries of `models`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.parts import read_part
from kdbench.config.parse.weights import read_weights
from kdbench.config.schema import PartConfig, RoleConfig, SourceConfig, declared_keys
from kdbench.config.schema.roles import SNAPSHOT_INTERVAL_KEYS
from kdbench.errors import suggest
from kdbench.registry import DATASETS, METRICS, MODELS, WEIGHT_TRANSFORMS

_NAME = re.compile(r"[A-Za-z_][\w-]*")


_DERIVED_MODES = ("ema", "snapshot", "reuse")
"""The keys that derive a role from another role. The key is also the mode of the derived role."""


_MODE_TEXTS = {"ema": "a moving average", "snapshot": "a snapshot", "reuse": "a reused network"}


_RESERVED_NAMES = ("others", "logits", "term", "artifact")


_DEFAULT_INPUT = "train.image"


def read_roles(
    context: ParseContext, top: KeyReader, folder: Path, ancestors: tuple[str, ...]
) -> dict[str, RoleConfig]:
    """Parses all roles (networks) of a stage. A null entry removes a role that another layer of the recipe defines.

    Args:
        top: reader of the stage's keys.
        folder: folder of the recipe. Relative paths of other recipes begin in this folder.
        ancestors: files of this recipe and of all recipes that take weights from this recipe, to detect cycles.
    """
    models = top.read_mapping("models", "a: {model: NAME}")
    entries = {name: (top.subkey(f"models.{name}"), data) for name, data in models.items() if data is not None}
    for name in ("teacher", "student"):
        data = top.get_raw(name)
        # `models: {student: null}` in a stage or round removes the `student` of the top level.
        if data is None or models.get(name, data) is None:
            continue
        if name in entries:
            location = context.location(entries[name][0])
            top.error(name, f"role {name!r} is defined twice, here and at {location}; keep one of the two definitions.")
        entries[name] = (top.subkey(name), data)
    roles = {}
    for name, (key, data) in entries.items():
        if not _NAME.fullmatch(name) or name in _RESERVED_NAMES:
            reserved = ", ".join(_RESERVED_NAMES)
            message = f"{name!r} cannot be the name of a role; use letters, digits, `_` and `-` (reserved: {reserved})."
            context.error(key, message)
            continue
        roles[name] = _read_role(context, name, key, data, folder, ancestors)
    if not roles:
        context.error("", "the recipe has no network; write `student: {model: NAME}`.")
    _check_source_roles(context, roles)
    return roles


def _read_role(
    context: ParseContext, name: str, key: str, data: Any, folder: Path, ancestors: tuple[str, ...]
) -> RoleConfig:
    if isinstance(data, Mapping) and isinstance(data.get("type"), str) and data.get("model") is None:
        context.error(
            key,
            f"the network of role {name!r} belongs under `model`: write `{name}: {{model: {{type: {data['type']}}}}}`.",
        )
        data = {**data, "model": data["type"]}
        del data["type"]
    reader = KeyReader(context, data, key, f"role {name!r}", declared_keys(RoleConfig))
    mode, source = _read_mode(reader, name)
    source_role, _, module_path = (source or "").partition(":")
    model, artifact = _read_model(reader)
    inputs = reader.read("input") or ("",)
    every_epochs, every_steps = _read_interval(reader)
    role = RoleConfig(
        **reader.read_plain_fields(RoleConfig)
        | {
            "name": name,
            "model": model,
            "weights": read_weights(reader, folder, ancestors),
            "input": inputs[0],
            "extra_inputs": inputs[1:],
            "mode": mode,
            "source_role": source_role or None,
            "module_path": module_path or None,
            "every_epochs": every_epochs,
            "every_steps": every_steps,
            "artifact": artifact,
            "transforms": _read_transforms(reader),
            "require": _read_requirements(reader),
            "location": context.location(key),
        }
    )
    _check_mode(reader, role)
    return role


def _read_model(reader: KeyReader) -> tuple[PartConfig | None, str | None]:
    """Parses the key `model`. Returns the model (or None), and the name of the artifact that selects it (or None)."""
    value, key = reader.get_raw("model"), reader.subkey("model")
    if value is None:
        return None, None
    if isinstance(value, Mapping) and isinstance(value.get("artifact"), str):
        params = {name: item for name, item in value.items() if name != "artifact"}
        model = read_part(reader.context, MODELS, params, key, MODELS.injected) if params else None
        return model, value["artifact"]
    return read_part(reader.context, MODELS, value, key, MODELS.injected), None


def _read_mode(reader: KeyReader, name: str) -> tuple[Any, str | None]:
    """Returns the mode of a role, such as "frozen", and the value of `ema`, `snapshot` or `reuse` if it has one."""
    frozen, trainable = reader.read("frozen"), reader.read("trainable")
    sources = {mode: reader.read(mode) for mode in _DERIVED_MODES}
    modes = [mode for mode, source in sources.items() if source is not None]
    if len(modes) > 1 or (modes and (frozen is not None or trainable is not None)):
        reader.error("", "`frozen`, `trainable`, `ema`, `snapshot` and `reuse` exclude each other; keep one of them.")
    if frozen is not None and trainable is not None and frozen == trainable:
        value = str(frozen).lower()
        reader.error("trainable", f"`trainable: {value}` contradicts `frozen: {value}`; keep one of them.")
    if modes:
        return modes[0], sources[modes[0]]
    if frozen is None:
        frozen = not trainable if trainable is not None else name == "teacher"
    return ("frozen" if frozen else "trainable"), None


def _read_interval(reader: KeyReader) -> tuple[int, int]:
    """Parses `every: 5` (an interval in epochs) or `every: {steps: 100}`. Returns a pair (epochs, steps)."""
    value = reader.get_raw("every")
    if not isinstance(value, Mapping):
        return (0 if value is None or not _is_count(reader, "every", value) else value), 0
    inner = KeyReader(reader.context, value, reader.subkey("every"), "every", SNAPSHOT_INTERVAL_KEYS)
    return 0, inner.read("steps")


def _is_count(reader: KeyReader, name: str, value: Any) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        reader.error(name, f"must be a whole number or {{steps: N}}, got {value!r}.")
        return False
    return reader.check_value(name, value)


def _read_transforms(reader: KeyReader) -> tuple[PartConfig, ...]:
    value = reader.get_raw("transform")
    if value is None:
        return ()
    items = (
        [(f"transform.{i}", item) for i, item in enumerate(value)]
        if isinstance(value, list)
        else [("transform", value)]
    )
    parts = [read_part(reader.context, WEIGHT_TRANSFORMS, item, reader.subkey(name)) for name, item in items]
    return tuple(part for part in parts if part is not None)


def _read_requirements(reader: KeyReader) -> dict[str, float]:
    """Parses a mapping of metrics to required values, such as `require: {top1: 95}`, and reports unknown metrics."""
    values = dict(reader.read("require"))
    for name, value in values.items():
        if name.partition("/")[0] not in METRICS.entries:
            reader.error(f"require.{name}", f"no metric {name!r}.{suggest(name, METRICS.entries)}")
        elif not math.isfinite(value):
            reader.error(f"require.{name}", f"must be a finite number, got {value!r}.")
    return values


def _check_mode(reader: KeyReader, role: RoleConfig) -> None:
    """Reports keys of a role that contradict its mode, such as `decay` in a role that is not a moving average."""
    name, source, mode = role.name, role.source_role, role.mode
    if mode not in _DERIVED_MODES and not reader.has("model"):
        reader.error("", f"role {name!r} needs the key `model`, a name of `kdbench list models`.")
    if mode == "reuse":
        for key in ("model", "weights"):
            if reader.has(key):
                reader.error(
                    key, f"role {name!r} reuses the network of role {source!r}, so the key `{key}` is not allowed."
                )
    elif role.module_path:
        path = f"{source}:{role.module_path}"
        reader.error(mode, f"only `reuse` takes a module path: `reuse: {path}`.")
    if reader.has("decay") and mode != "ema":
        reader.error("decay", "`decay` applies only to a role with `ema: ROLE`.")
    if reader.has("every") and mode != "snapshot":
        reader.error("every", "`every` applies only to a role with `snapshot: ROLE`.")
    if reader.has("init_index") and mode in _DERIVED_MODES:
        reader.error(
            "init_index", f"`init_index` has no effect, because role {name!r} has the weights of role {source!r}."
        )
    if role.transforms and mode != "trainable":
        reader.error(
            "transform", f"`transform` applies only to a trainable role, but role {name!r} is {mode_text(role)}."
        )
    if reader.has("freeze") and mode != "trainable":
        reader.error("freeze", f"`freeze` applies only to a trainable role, but role {name!r} is {mode_text(role)}.")


def mode_text(role: RoleConfig) -> str:
    """Returns the mode of a role as text for messages, such as "frozen" or "a moving average"."""
    return _MODE_TEXTS.get(role.mode, role.mode)


def _check_source_roles(context: ParseContext, roles: Mapping[str, RoleConfig]) -> None:
    """Reports derived roles (averages, snapshots, reused networks) that form a cycle or are derived from an unknown
    role."""
    for role in roles.values():
        if role.source_role is None:
            continue
        key = f"{role.location.key}.{role.mode}"
        if role.source_role not in roles:
            hint = suggest(role.source_role, set(roles) - {role.name})
            context.error(key, f"no role {role.source_role!r}.{hint}")
            continue
        chain, current = [role.name], role
        while current.source_role is not None and current.source_role in roles:
            chain.append(current.source_role)
            current = roles[current.source_role]
            if current.name in chain[:-1]:
                context.error(key, f"roles are derived from each other in a cycle: {' -> '.join(chain)}.")
                break


def resolve_inputs(
    context: ParseContext, roles: Mapping[str, RoleConfig], data: Mapping[str, SourceConfig]
) -> dict[str, RoleConfig]:
    """Returns the roles with complete input addresses: `image` becomes `train.image`.

    Reports addresses that do not exist, and roles that read each other's outputs in a cycle.
    """
    resolved = {}
    for name, role in roles.items():
        inputs = [_resolve_input(context, role, text, roles, data) for text in (role.input, *role.extra_inputs)]
        resolved[name] = replace(role, input=inputs[0], extra_inputs=tuple(inputs[1:]))
    for name in resolved:
        cycle = _input_cycle(name, resolved)
        if cycle is not None:
            message = f"roles read each other's outputs in a cycle: {' -> '.join(cycle)}."
            context.error(_input_key(resolved[name]), message)
    return resolved


def _input_cycle(name: str, roles: Mapping[str, RoleConfig]) -> tuple[str, ...] | None:
    """Returns the roles on a cycle through the role `name`, or None if there is no such cycle.

    The cycle begins and ends with `name`. Each role in it reads the output of the next role.
    """
    open_chains: list[tuple[str, ...]] = [(name,)]
    visited: set[str] = set()
    while open_chains:
        chain = open_chains.pop()
        for upstream in roles[chain[-1]].upstream_roles:
            if upstream == name:
                return (*chain, upstream)
            if upstream not in visited:
                visited.add(upstream)
                open_chains.append((*chain, upstream))
    return None


def _input_key(role: RoleConfig) -> str:
    return f"{role.location.key}.input"


def _resolve_input(
    context: ParseContext,
    role: RoleConfig,
    text: str,
    roles: Mapping[str, RoleConfig],
    data: Mapping[str, SourceConfig],
) -> str:
    """Converts an input address to its full form `SOURCE.FIELD` or `ROLE:PATH`. After an error: `train.image`."""
    key = _input_key(role)
    if not text:
        if "train" not in data and "source train" not in context.invalid:
            sources = ", ".join(data) or "none"
            message = (
                f"role {role.name!r} needs the key `input`, because there is no source `train` (sources: {sources})."
            )
            context.error(role.location.key, message)
        return _DEFAULT_INPUT
    if ":" in text:
        upstream, _, path = text.partition(":")
        if upstream not in roles:
            hint = suggest(upstream, set(roles) - {role.name})
            context.error(key, f"the input is an output of role {upstream!r}, which does not exist.{hint}")
            return _DEFAULT_INPUT
        return f"{upstream}:{path or 'logits'}"
    source, _, name = text.rpartition(".")
    source = source or "train"
    if f"source {source}" in context.invalid:
        return _DEFAULT_INPUT
    if source not in data:
        context.error(key, f"no source {source!r}; write SOURCE.FIELD or ROLE:PATH.{suggest(source, data)}")
        return _DEFAULT_INPUT
    fields = input_fields(data[source])
    # The fields of an artifact are known only when it exists.
    if name not in fields and data[source].artifact is None:
        context.error(key, f"source {source!r} has no field {name!r}.{suggest(name, fields)}")
        return _DEFAULT_INPUT
    return f"{source}.{name}"


def input_fields(source: SourceConfig) -> set[str]:
    """Returns the names of the batch fields of a source that can be inputs of a network.

    These are the views, the labels and the indices, unless the dataset declares other `fields`.
    """
    entry = DATASETS.entries.get(source.dataset.type)
    declared = entry.facts.get("fields") if entry is not None else None
    return {*declared, "index"} if declared else {*source.views, "label", "index"}


def upstream_closure(
    names: Iterable[str], roles: Mapping[str, RoleConfig], *, include_source_roles: bool = False
) -> set[str]:
    """Returns the roles in `names` and all roles whose outputs these roles read, directly or through other roles.

    Args:
        names: names of the roles to start from.
        include_source_roles: whether a role that is an average, a snapshot or a reused network also adds the role from
            which it is derived.
    """
    closure: set[str] = set()
    pending = list(names)
    while pending:
        role = roles.get(pending.pop())
        if role is None or role.name in closure:
            continue
        closure.add(role.name)
        pending += role.upstream_roles
        if include_source_roles and role.source_role is not None:
            pending.append(role.source_role)
    return closure
