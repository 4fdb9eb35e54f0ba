"""Reads registered parts (`NAME` or `{type: NAME, ...}`) and schedules, checked against the registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdbench.config.parse.keys import POSITIVE, ParseContext
from kdbench.config.schema import PartConfig
from kdbench.errors import ConfigError, suggest
from kdbench.registry import REQUIRED, SCHEDULES, Registry, type_mismatch


def read_part(
    context: ParseContext,
    registry: Registry,
    value: Any,
    key: str,
    injected: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> PartConfig | None:
    """Reads `NAME` or `{type: NAME, ...parameters}` and checks name and parameters against the registry.

    Args:
        injected: parameters that the engine gives when the recipe does not.
        reserved: keys of the mapping that belong to someone else.
    """
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        context.error(key, f"{_a(registry)} is a name or {{type: NAME, ...}}, got {value!r}.")
        return None
    kind = value.get("type")
    if not isinstance(kind, str):
        said = "needs a `type`" if kind is None else f"`type` must be text, got {kind!r}"
        context.error(
            key, f"{_a(registry)} {said}, one of: {', '.join(sorted(registry.entries or registry.names())[:12])}."
        )
        return None
    params = {name: item for name, item in value.items() if name != "type" and name not in reserved}
    type_key = f"{key}.type" if f"{key}.type" in context.locations else key
    checked = check_parameters(context, registry, kind, params, key, type_key, injected, ("type", *reserved))
    return None if checked is None else PartConfig(type=kind, params=checked, location=context.location(key))


def _a(registry: Registry) -> str:
    return f"{'an' if registry.kind[0] in 'aeiou' else 'a'} {registry.kind}"


def check_parameters(
    context: ParseContext,
    registry: Registry,
    kind: str,
    params: Mapping[str, Any],
    key: str,
    type_key: str,
    injected: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Checks the parameters of one part; a schedule given for a schedulable number comes back as a `Named`.

    Args:
        injected: parameters that the engine gives when the recipe does not.
        beside: keys that may stand beside the parameters, for the hint.
    """
    try:
        entry = registry.entry(kind, context.location(type_key))
    except ConfigError as error:
        context.errors.add("", str(error))
        return None
    checked: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{key}.{name}"
        parameter = entry.parameters.get(name)
        if parameter is None or name in entry.facts.get("injected", ()):
            own = {key: p for key, p in entry.parameters.items() if key not in entry.facts.get("injected", ())}
            written = f"{kind}({', '.join(str(p) for p in own.values())})"
            said = f"has no parameter {name!r}.{suggest(name, [*own, *beside])} Write {written}."
            context.error(path, f"{registry.kind} {kind!r} {said}")
            continue
        checked[name] = value
        is_schedule = isinstance(value, Mapping) and "type" in value
        if parameter.schedulable and is_schedule:
            checked[name] = read_schedule(context, value, path)
            continue
        fault = type_mismatch(parameter.annotation, value)
        if fault and is_schedule and value["type"] in SCHEDULES.entries:
            context.error(path, f"{registry.kind} {kind!r}: {name} cannot follow a schedule; it must be {fault}.")
        elif fault:
            context.error(path, f"{registry.kind} {kind!r}: {name} must be {fault}, got {value!r}.")
    given = {*params, *injected, *entry.facts.get("injected", ())}
    missing = [p.name for p in entry.parameters.values() if p.default is REQUIRED and p.name not in given]
    if missing:
        context.error(key, f"{registry.kind} {kind!r} needs {', '.join(missing)}. Write {entry.signature()}.")
    return checked


def read_schedule(context: ParseContext, value: Any, key: str, reserved: Sequence[str] = ()) -> PartConfig | None:
    """Reads a schedule: a name, or `{type: linear, start: 0, end: 1, over: 20}`; the parts of a chain as well."""
    read = read_part(context, SCHEDULES, value, key, reserved=reserved)
    if read is None:
        return None
    params = dict(read.params)
    for name, test in (("over", POSITIVE), ("gamma", POSITIVE)):
        if isinstance(params.get(name), int | float) and not test[0](params[name]):
            context.error(f"{key}.{name}", f"must be {test[1]}, got {params[name]!r}.")
    marks = params.get("milestones")
    if isinstance(marks, list) and marks != sorted(marks, key=lambda m: (isinstance(m, str), m)):
        context.error(f"{key}.milestones", f"must rise, got {marks!r}.")
    if read.type == "chain" and isinstance(params.get("parts"), list):
        params["parts"] = [_part(context, part, f"{key}.parts.{i}", params) for i, part in enumerate(params["parts"])]
    return PartConfig(type=read.type, params=params, location=read.location)


def _part(context: ParseContext, part: Any, key: str, chain: Mapping[str, Any]) -> Any:
    position, count = int(key.rpartition(".")[2]), len(chain["parts"])
    length = part.get("length") if isinstance(part, Mapping) else None
    if length is None and position < count - 1:
        context.error(key, "every part of a chain but the last needs its `length`.")
    elif length is not None and (type_mismatch("float", length) or length <= 0):
        context.error(f"{key}.length", f"must be a number above 0, got {length!r}.")
    if isinstance(part, Mapping) and "by" in part:
        context.error(f"{key}.by", "belongs to the whole chain, not to one part.")
    read = read_schedule(context, part, key, reserved=("length", "by"))
    return {} if read is None else {"type": read.type, **read.params, **({} if length is None else {"length": length})}
