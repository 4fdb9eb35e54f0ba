"""Reads `updates:`: which roles move by which terms, in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdbench.config.parse.keys import AT_LEAST_ONE, POSITIVE, SHARE_OR_COUNT, Context, Fields
from kdbench.config.parse.operands import Addresses
from kdbench.config.parse.optimizers import read_optimizer
from kdbench.config.parse.parts import schedule
from kdbench.config.schema import InnerStepConfig, PartConfig, PartWithOperands, RoleConfig, TermConfig, UpdateConfig
from kdbench.errors import nearest
from kdbench.registry import SELECTORS


def read_updates(
    context: Context,
    top: Fields,
    roles: Mapping[str, RoleConfig],
    terms: Mapping[str, TermConfig],
    sources: Collection[str] = (),
) -> tuple[UpdateConfig, ...]:
    """Reads the ordered moves within a step; a list within the list is a group that moves together."""
    value = top.raw("updates", [])
    if not isinstance(value, list):
        top.fault("updates", f"must be a list such as `- {{models: [student], terms: [kd]}}`, got {value!r}.")
        return ()
    updates: list[UpdateConfig] = []
    for position, item in enumerate(value):
        key = top.path(f"updates.{position}")
        if not isinstance(item, list):
            updates.append(_update(context, item, key, roles, terms, sources, None))
            continue
        group = [_update(context, one, f"{key}.{i}", roles, terms, sources, position) for i, one in enumerate(item)]
        _check_together(context, key, group, roles)
        updates += group
    return tuple(updates)


def _update(
    context: Context,
    item: Any,
    key: str,
    roles: Mapping[str, RoleConfig],
    terms: Mapping[str, TermConfig],
    sources: Collection[str],
    together: int | None,
) -> UpdateConfig:
    fields = Fields(context, item, key, "an update")
    models, names = _moves(fields, roles, terms, "an update")
    optimizer = None
    if fields.raw("optimizer") is not None:
        optimizer = read_optimizer(context, fields.data["optimizer"], fields.path("optimizer"))
    repeat = fields.take("repeat", "int", 1, AT_LEAST_ONE)
    if together is not None and repeat > 1:
        fields.fault(
            "repeat", "updates that move together cannot be repeated apart; repeat belongs to a single update."
        )
    select, keep = _selection(context, fields, roles, sources)
    after = _virtual(context, fields, roles, terms)
    fields.done()
    return UpdateConfig(
        models=models,
        terms=names,
        repeat=repeat,
        optimizer=optimizer,
        group=together,
        select=select,
        keep=keep,
        inner_step=after,
        location=fields.place(),
    )


def _moves(
    fields: Fields, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig], what: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads `models` and `terms`: who moves by what."""
    models, names = fields.texts("models"), fields.texts("terms")
    if not names:
        fields.fault("", f"{what} needs `terms`, a list of names.")
    if not models:
        fields.fault("", f"{what} needs `models`, a list of names.")
    for name in models:
        if name not in roles:
            fields.fault("models", f"no role {name!r}.{nearest(name, roles)}")
        elif roles[name].mode != "trainable":
            fields.fault("models", f"role {name!r} is {roles[name].mode}; {what} moves trainable roles only.")
    for side, listed in (("models", models), ("terms", names)):
        for name in sorted({name for name in listed if listed.count(name) > 1}):
            fields.fault(side, f"{name!r} is listed twice.")
    for name in names:
        if name not in terms:
            fields.fault("terms", f"no term {name!r}.{nearest(name, terms)}")
            continue
        for operand in terms[name].read_operands():
            if operand.kind == "term" and operand.role not in names[: names.index(name)]:
                said = f"term {name!r} reads {operand}, which this update does not compute before it"
                fields.fault("terms", f"{said}; list {operand.role!r} first.")
    return models, names


def _virtual(
    context: Context, fields: Fields, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
) -> InnerStepConfig | None:
    value = fields.raw("inner_step")
    if value is None:
        return None
    own = Fields(context, value, fields.path("inner_step"), "inner_step")
    models, names = _moves(own, roles, terms, "a virtual step")
    lr: float | PartConfig | None = None
    if isinstance(own.raw("lr"), Mapping):
        lr = schedule(context, own.data["lr"], own.path("lr"))
    else:
        lr = own.take("lr", "float", None, POSITIVE)
    own.done()
    if fields.data.get("select") is not None:
        fields.fault("select", "cannot stand beside `inner_step`: both steps are of the whole batch.")
    return InnerStepConfig(models=models, terms=names, lr=lr, location=own.place())


def _selection(
    context: Context, fields: Fields, roles: Mapping[str, RoleConfig], sources: Collection[str]
) -> tuple[PartWithOperands | None, float | int | None]:
    value = fields.raw("select")
    if value is None:
        return None, None
    key = fields.path("select")
    own = Fields(context, value, key, "select")
    keep = own.take("keep", "float", None, SHARE_OR_COUNT)
    if keep is None or keep == 1:
        own.fault("keep", "say how many rows stay: `keep: 16`, or a share below 1.")
    addresses = Addresses(context, list(roles), sources)
    student = "student" if "student" in roles else None
    return addresses.part(SELECTORS, value, key, student, reserved=("keep",)), keep


def _check_together(context: Context, key: str, group: list[UpdateConfig], roles: Mapping[str, RoleConfig]) -> None:
    """A parameter that two updates move at once has no defined new value."""
    if len(group) < 2:
        context.fault(key, "a group of updates that move together needs two or more.")
    seen: dict[str, str] = {}
    for update in group:
        for kind, names in (("model", update.models), ("term", update.terms)):
            for name in names:
                if name in seen and seen[name] == kind:
                    said = f"{kind} {name!r} stands in two updates of one group, which have no order"
                    context.fault(key, f"{said}: list the updates one after the other, or merge them.")
                seen[name] = kind
