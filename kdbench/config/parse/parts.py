"""Parses registered parts (`NAME` or `{type: NAME, ...}`) and schedules, and checks them against the registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.schema import PartConfig
from kdbench.config.schema.keys import POSITIVE
from kdbench.config.schema.updates import CHAIN_PART_KEYS
from kdbench.errors import ConfigError, did_you_mean
from kdbench.registry import SCHEDULES, Entry, Registry, type_mismatch


def read_part(
    context: ParseContext,
    registry: Registry,
    value: Any,
    key: str,
    injected: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> PartConfig | None:
    """Parses a part `NAME` or `{type: NAME, ...}`, and checks its name and parameters against a registry.

    Args:
        key: dotted key of the part.
        injected: parameters that the engine sets if the recipe does not.
        reserved: keys of the mapping that are not parameters of the part.
    """
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        context.error(key, invalid_part_message(registry, value))
        return None
    kind = value["type"]
    params = {name: item for name, item in value.items() if name != "type" and name not in reserved}
    checked = check_parameters(context, registry, kind, params, key, injected, ("type", *reserved))
    return None if checked is None else PartConfig(type=kind, params=checked, location=context.location(key))


def invalid_part_message(registry: Registry, value: Any) -> str:
    """Returns the error message for a value that is neither a name nor a mapping with the key `type`."""
    article = "an" if registry.kind[0] in "aeiou" else "a"
    return f"{article} {registry.kind} must be a name or {{type: NAME, ...}}, got {value!r}. {registry.listing}"


def check_parameters(
    context: ParseContext,
    registry: Registry,
    kind: str,
    params: Mapping[str, Any],
    key: str,
    injected: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Checks the parameters of a part and returns them. A schedule in place of a number becomes a PartConfig.

    Args:
        kind: name of the part.
        key: dotted key of the part.
        injected: parameters that the engine sets if the recipe does not.
        reserved: further keys of the mapping, which an error message may suggest for a misspelt parameter.

    Returns:
        Parameter -> checked value, or None if there is no such part.
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
        hint = did_you_mean(name, [*candidates, *reserved])
        message = f"{registry.kind} {kind!r} has no parameter {name!r}.{hint} {entry.describe_parameters()}"
        context.error(f"{key}.{name}", message)
    missing = entry.describe_missing({*params, *injected, *hidden})
    if missing:
        context.error(key, f"{registry.kind} {kind!r} {missing}")
    return checked


def _check_parameter(context: ParseContext, registry: Registry, entry: Entry, name: str, value: Any, key: str) -> Any:
    """Checks one parameter of a part. Returns its value, or the config of its schedule."""
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
    """Parses a schedule: a name, or a mapping such as `{type: linear, start: 0, end: 1, over: 20}`."""
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
    """Parses one schedule of a chain. Returns its parameters together with `type` and `length`."""
    if isinstance(value, Mapping) and "by" in value:
        context.error(f"{key}.by", "`by` is a parameter of the chain, not of a schedule in the chain.")
    data = value if isinstance(value, Mapping) else {}
    length = KeyReader(context, data, key, "a schedule of a chain", CHAIN_PART_KEYS, parameters=True).read("length")
    if length is None and data.get("length") is None and not is_last:
        context.error(key, "every schedule of a chain except the last needs the key `length`.")
    schedule = read_schedule(context, value, key, reserved=("length", "by"))
    if schedule is None:
        return {}
    return {"type": schedule.type, **schedule.params, **({} if length is None else {"length": length})}
