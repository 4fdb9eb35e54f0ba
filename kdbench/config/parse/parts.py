"""Reads registered parts (`NAME` or `{type: NAME, ...}`) and schedules, checked against the registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.schema import PartConfig
from kdbench.config.schema.keys import POSITIVE
from kdbench.config.schema.updates import CHAIN_PART_KEYS
from kdbench.errors import ConfigError, suggest
from kdbench.registry import REQUIRED, SCHEDULES, Entry, Registry, type_mismatch


def read_part(
    context: ParseContext,
    registry: Registry,
    value: Any,
    key: str,
    injected: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> PartConfig | None:
    """Reads `NAME` or `{type: NAME, ...parameters}`; checks name and parameters against the registry.

    Args:
        injected: parameters that the engine sets if the recipe does not.
        reserved: keys of the mapping that are not parameters of the part.

    Returns:
        None after an error.
    """
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        context.error(key, f"{_with_article(registry)} is a name or {{type: NAME, ...}}, got {value!r}.")
        return None
    kind = value.get("type")
    if not isinstance(kind, str):
        problem = "needs a `type`" if kind is None else f"`type` must be text, got {kind!r}"
        names = ", ".join(sorted(registry.entries or registry.names())[:12])
        context.error(key, f"{_with_article(registry)} {problem}, one of: {names}.")
        return None
    params = {name: item for name, item in value.items() if name != "type" and name not in reserved}
    checked = check_parameters(context, registry, kind, params, key, injected, ("type", *reserved))
    return None if checked is None else PartConfig(type=kind, params=checked, location=context.location(key))


def _with_article(registry: Registry) -> str:
    return f"{'an' if registry.kind[0] in 'aeiou' else 'a'} {registry.kind}"


def check_parameters(
    context: ParseContext,
    registry: Registry,
    kind: str,
    params: Mapping[str, Any],
    key: str,
    injected: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Checks the parameters of one part; a schedule in place of a schedulable number becomes a PartConfig.

    Args:
        kind: name of the part.
        injected: parameters that the engine sets if the recipe does not.
        reserved: other keys of the mapping, for the hint at an unknown parameter.

    Returns:
        None if there is no such part.
    """
    # `kd` in place of `{type: kd}` has no location of its own for `type`.
    type_key = f"{key}.type" if f"{key}.type" in context.locations else key
    try:
        entry = registry.entry(kind, context.location(type_key))
    except ConfigError as error:
        context.errors.add("", str(error))
        return None
    hidden = entry.facts.get("injected", ())
    checked = {}
    for name, value in params.items():
        if name in entry.parameters and name not in hidden:
            checked[name] = _check_parameter(context, registry, entry, name, value, f"{key}.{name}")
            continue
        candidates = [parameter for parameter in entry.parameters if parameter not in hidden]
        message = f"has no parameter {name!r}.{suggest(name, [*candidates, *reserved])} Write {entry.signature()}."
        context.error(f"{key}.{name}", f"{registry.kind} {kind!r} {message}")
    names = {*params, *injected, *hidden}
    missing = [p.name for p in entry.parameters.values() if p.default is REQUIRED and p.name not in names]
    if missing:
        context.error(key, f"{registry.kind} {kind!r} needs {', '.join(missing)}. Write {entry.signature()}.")
    return checked


def _check_parameter(context: ParseContext, registry: Registry, entry: Entry, name: str, value: Any, key: str) -> Any:
    """Checks one parameter; returns its value, or the schedule in place of it."""
    parameter = entry.parameters[name]
    is_schedule = isinstance(value, Mapping) and "type" in value
    if parameter.schedulable and is_schedule:
        return read_schedule(context, value, key)
    expected_type = type_mismatch(parameter.annotation, value)
    subject = f"{registry.kind} {entry.name!r}: {name}"
    if expected_type and is_schedule and value["type"] in SCHEDULES.entries:
        context.error(key, f"{subject} cannot be a schedule; it must be {expected_type}.")
    elif expected_type:
        context.error(key, f"{subject} must be {expected_type}, got {value!r}.")
    return value


def read_schedule(context: ParseContext, value: Any, key: str, reserved: Sequence[str] = ()) -> PartConfig | None:
    """Reads a schedule and the parts of a chain: a name, or `{type: linear, start: 0, end: 1, over: 20}`."""
    part = read_part(context, SCHEDULES, value, key, reserved=reserved)
    if part is None:
        return None
    params = dict(part.params)
    for name in ("over", "gamma"):
        number = params.get(name)
        if isinstance(number, int | float) and not POSITIVE.holds(number):
            context.error(f"{key}.{name}", f"must be {POSITIVE.text}, got {number!r}.")
    milestones = params.get("milestones")
    if isinstance(milestones, list) and milestones != sorted(milestones, key=lambda m: (isinstance(m, str), m)):
        context.error(f"{key}.milestones", f"must be in ascending order, got {milestones!r}.")
    if part.type == "chain" and isinstance(params.get("parts"), list):
        last = len(params["parts"]) - 1
        params["parts"] = [
            _read_chain_part(context, item, f"{key}.parts.{index}", is_last=index == last)
            for index, item in enumerate(params["parts"])
        ]
    return PartConfig(type=part.type, params=params, location=part.location)


def _read_chain_part(context: ParseContext, value: Any, key: str, is_last: bool) -> dict[str, Any]:
    """Reads one part of a chain; returns its schedule's parameters with `type` and `length`."""
    if isinstance(value, Mapping) and "by" in value:
        context.error(f"{key}.by", "belongs to the chain, not to one of its parts.")
    data = value if isinstance(value, Mapping) else {}
    length = KeyReader(context, data, key, "a part of a chain", CHAIN_PART_KEYS, parameters=True).read("length")
    if length is None and data.get("length") is None and not is_last:
        context.error(key, "every part of a chain except the last needs a `length`.")
    schedule = read_schedule(context, value, key, reserved=("length", "by"))
    if schedule is None:
        return {}
    return {"type": schedule.type, **schedule.params, **({} if length is None else {"length": length})}
