"""Parses the keys `optimizer` and `scheduler` of a stage or an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.parts import check_parameters, read_part, read_schedule
from kdbench.config.schema import OptimizerConfig, PartConfig
from kdbench.config.schema.updates import OPTIMIZER_GROUP_KEYS, SCHEDULER_KEYS
from kdbench.registry import OPTIMIZERS


def read_optimizer(context: ParseContext, value: Any, key: str) -> OptimizerConfig:
    """Parses an optimizer: `SGD`, or `{type: SGD, lr: 0.1, groups: [{type: norm, weight_decay: 0}]}`."""
    if isinstance(value, str):
        value = {"type": value}
    part = read_part(context, OPTIMIZERS, value, key, ("params",), reserved=("groups",))
    if part is None:
        return OptimizerConfig(location=context.location(key))
    groups = value.get("groups") or []
    if not isinstance(groups, list):
        context.error(f"{key}.groups", f"must be a list such as `- {{type: norm, weight_decay: 0}}`, got {groups!r}.")
        groups = []
    for index, group in enumerate(groups):
        _check_group(context, part.type, group, f"{key}.groups.{index}")
    groups = tuple(group for group in groups if isinstance(group, Mapping))
    return OptimizerConfig(type=part.type, params=part.params, groups=groups, location=context.location(key))


def _check_group(context: ParseContext, optimizer: str, group: Any, key: str) -> None:
    if not isinstance(group, Mapping) or not set(OPTIMIZER_GROUP_KEYS) & set(group):
        context.error(
            key,
            f"a group must be a mapping with `path` or `type`, which select parameters of the networks, got {group!r}.",
        )
        return
    reader = KeyReader(context, group, key, "an optimizer group", OPTIMIZER_GROUP_KEYS, parameters=True)
    for name in OPTIMIZER_GROUP_KEYS:
        reader.read(name)
    # A group need not repeat the parameters that the optimizer requires.
    required = tuple(OPTIMIZERS.entry(optimizer).parameters)
    check_parameters(context, OPTIMIZERS, optimizer, reader.parameters(), key, required)


def read_scheduler(context: ParseContext, value: Any, key: str) -> PartConfig | None:
    """Parses `scheduler`: the schedule by which learning rates are multiplied, with an optional `warmup`."""
    if value is None:
        return None
    if isinstance(value, str):
        value = {"type": value}
    if isinstance(value, Mapping) and "type" not in value and "warmup" in value:
        value = {"type": "constant", **value}
    schedule = read_schedule(context, value, key, reserved=("warmup",))
    if schedule is None:
        return None
    warmup = KeyReader(context, value, key, "the scheduler", SCHEDULER_KEYS, parameters=True).read("warmup")
    if warmup is None:
        return schedule
    return PartConfig(type=schedule.type, params={**schedule.params, "warmup": warmup}, location=schedule.location)
