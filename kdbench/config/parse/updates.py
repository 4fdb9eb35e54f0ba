"""Reads `updates:`: which roles move by which terms, in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdbench.config.parse.keys import AT_LEAST_ONE, FRACTION_OR_COUNT, POSITIVE, KeyReader, ParseContext
from kdbench.config.parse.operands import OperandParser
from kdbench.config.parse.optimizers import read_optimizer
from kdbench.config.parse.parts import read_schedule
from kdbench.config.schema import InnerStepConfig, PartConfig, PartWithOperands, RoleConfig, TermConfig, UpdateConfig
from kdbench.errors import suggest
from kdbench.registry import SELECTORS


def read_updates(
    context: ParseContext,
    top: KeyReader,
    roles: Mapping[str, RoleConfig],
    terms: Mapping[str, TermConfig],
    sources: Collection[str] = (),
) -> tuple[UpdateConfig, ...]:
    """Reads the ordered moves within a step; a list within the list is a group that moves together."""
    value = top.get_raw("updates", [])
    if not isinstance(value, list):
        top.error("updates", f"must be a list such as `- {{models: [student], terms: [kd]}}`, got {value!r}.")
        return ()
    updates: list[UpdateConfig] = []
    for position, item in enumerate(value):
        key = top.subkey(f"updates.{position}")
        if not isinstance(item, list):
            updates.append(_update(context, item, key, roles, terms, sources, None))
            continue
        group = [_update(context, one, f"{key}.{i}", roles, terms, sources, position) for i, one in enumerate(item)]
        _check_together(context, key, group, roles)
        updates += group
    return tuple(updates)


def _update(
    context: ParseContext,
    item: Any,
    key: str,
    roles: Mapping[str, RoleConfig],
    terms: Mapping[str, TermConfig],
    sources: Collection[str],
    together: int | None,
) -> UpdateConfig:
    fields = KeyReader(context, item, key, "an update")
    models, names = _moves(fields, roles, terms, "an update")
    optimizer = None
    if fields.get_raw("optimizer") is not None:
        optimizer = read_optimizer(context, fields.data["optimizer"], fields.subkey("optimizer"))
    repeat = fields.read("repeat", "int", 1, AT_LEAST_ONE)
    if together is not None and repeat > 1:
        fields.error(
            "repeat", "updates that move together cannot be repeated apart; repeat belongs to a single update."
        )
    select, keep = _selection(context, fields, roles, sources)
    after = _virtual(context, fields, roles, terms)
    fields.finish()
    return UpdateConfig(
        models=models,
        terms=names,
        repeat=repeat,
        optimizer=optimizer,
        group=together,
        select=select,
        keep=keep,
        inner_step=after,
        location=fields.location(),
    )


def _moves(
    fields: KeyReader, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig], what: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads `models` and `terms`: who moves by what."""
    models, names = fields.read_strings("models"), fields.read_strings("terms")
    if not names:
        fields.error("", f"{what} needs `terms`, a list of names.")
    if not models:
        fields.error("", f"{what} needs `models`, a list of names.")
    for name in models:
        if name not in roles:
            fields.error("models", f"no role {name!r}.{suggest(name, roles)}")
        elif roles[name].mode != "trainable":
            fields.error("models", f"role {name!r} is {roles[name].mode}; {what} moves trainable roles only.")
    for side, listed in (("models", models), ("terms", names)):
        for name in sorted({name for name in listed if listed.count(name) > 1}):
            fields.error(side, f"{name!r} is listed twice.")
    for name in names:
        if name not in terms:
            fields.error("terms", f"no term {name!r}.{suggest(name, terms)}")
            continue
        for operand in terms[name].read_operands():
            if operand.kind == "term" and operand.role not in names[: names.index(name)]:
                said = f"term {name!r} reads {operand}, which this update does not compute before it"
                fields.error("terms", f"{said}; list {operand.role!r} first.")
    return models, names


def _virtual(
    context: ParseContext, fields: KeyReader, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
) -> InnerStepConfig | None:
    value = fields.get_raw("inner_step")
    if value is None:
        return None
    own = KeyReader(context, value, fields.subkey("inner_step"), "inner_step")
    models, names = _moves(own, roles, terms, "a virtual step")
    lr: float | PartConfig | None = None
    if isinstance(own.get_raw("lr"), Mapping):
        lr = read_schedule(context, own.data["lr"], own.subkey("lr"))
    else:
        lr = own.read("lr", "float", None, POSITIVE)
    own.finish()
    if fields.data.get("select") is not None:
        fields.error("select", "cannot stand beside `inner_step`: both steps are of the whole batch.")
    return InnerStepConfig(models=models, terms=names, lr=lr, location=own.location())


def _selection(
    context: ParseContext, fields: KeyReader, roles: Mapping[str, RoleConfig], sources: Collection[str]
) -> tuple[PartWithOperands | None, float | int | None]:
    value = fields.get_raw("select")
    if value is None:
        return None, None
    key = fields.subkey("select")
    own = KeyReader(context, value, key, "select")
    keep = own.read("keep", "float", None, FRACTION_OR_COUNT)
    if keep is None or keep == 1:
        own.error("keep", "say how many rows stay: `keep: 16`, or a share below 1.")
    addresses = OperandParser(context, list(roles), sources)
    student = "student" if "student" in roles else None
    return addresses.read_part_with_operands(SELECTORS, value, key, student, reserved=("keep",)), keep


def _check_together(context: ParseContext, key: str, group: list[UpdateConfig], roles: Mapping[str, RoleConfig]) -> None:
    """A parameter that two updates move at once has no defined new value."""
    if len(group) < 2:
        context.error(key, "a group of updates that move together needs two or more.")
    seen: dict[str, str] = {}
    for update in group:
        for kind, names in (("model", update.models), ("term", update.terms)):
            for name in names:
                if name in seen and seen[name] == kind:
                    said = f"{kind} {name!r} stands in two updates of one group, which have no order"
                    context.error(key, f"{said}: list the updates one after the other, or merge them.")
                seen[name] = kind
