"""`optimizer:` and `scheduler:` of a stage or an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.parse.keys import POSITIVE, ParseContext
from kdbench.config.parse.parts import check_parameters, read_part, read_schedule
from kdbench.config.schema import OptimizerConfig, PartConfig
from kdbench.registry import OPTIMIZERS, type_mismatch


def read_optimizer(context: ParseContext, value: Any, key: str) -> OptimizerConfig:
    """Reads `SGD`, or `{type: SGD, lr: 0.1, groups: [{type: norm, weight_decay: 0}]}`."""
    if isinstance(value, str):
        value = {"type": value}
    read = read_part(context, OPTIMIZERS, value, key, ("params",), reserved=("groups",))
    if read is None:
        return OptimizerConfig(location=context.location(key))
    groups = value.get("groups") or []
    if not isinstance(groups, list):
        context.error(f"{key}.groups", f"must be a list such as `- {{type: norm, weight_decay: 0}}`, got {groups!r}.")
        groups = []
    for position, group in enumerate(groups):
        group_key = f"{key}.groups.{position}"
        if not isinstance(group, Mapping) or not ({"path", "type"} & set(group)):
            context.error(group_key, "a group is a mapping with `path` or `type`, to say which parameters it holds.")
            continue
        for name in ("path", "type"):
            if name in group and not isinstance(group[name], str):
                context.error(f"{group_key}.{name}", f"must be text, got {group[name]!r}.")
        own = {name: item for name, item in group.items() if name not in ("path", "type")}
        check_parameters(context, OPTIMIZERS, read.type, own, group_key, group_key, _all(read.type))
    groups = tuple(group for group in groups if isinstance(group, Mapping))
    return OptimizerConfig(type=read.type, params=read.params, groups=groups, location=context.location(key))


def _all(kind: str) -> tuple[str, ...]:
    """A group repeats no parameter that the optimiser has already."""
    return tuple(OPTIMIZERS.entry(kind).parameters)


def read_scheduler(context: ParseContext, value: Any, key: str) -> PartConfig | None:
    """Reads the factor on the learning rate: a schedule, with an optional `warmup` beside it."""
    if value is None:
        return None
    if isinstance(value, str):
        value = {"type": value}
    if isinstance(value, Mapping) and "type" not in value and "warmup" in value:
        value = {"type": "constant", **value}
    read = read_schedule(context, value, key, reserved=("warmup",))
    if read is None:
        return None
    warmup = value.get("warmup")
    if warmup is None:
        return read
    if type_mismatch("float", warmup) or not POSITIVE[0](warmup):
        context.error(
            f"{key}.warmup", f"must be a number of epochs (or of steps with `by: step`) above 0, got {warmup!r}."
        )
        return read
    return PartConfig(type=read.type, params={**read.params, "warmup": warmup}, location=read.location)
