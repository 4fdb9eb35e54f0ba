"""The entries of `terms:` and `updates:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.fields import AT_LEAST_ONE, Context, Fields, parameters, schedule
from kdbench.config.operands import OperandReader
from kdbench.config.optimizers import read_optimizer
from kdbench.config.schema import Named, RoleConfig, TermConfig, UpdateConfig
from kdbench.errors import nearest
from kdbench.registry import TERMS, type_fault

RESERVED = ("type", "weight", "student", "teacher", "where", "teacher_grad")


def read_terms(
    context: Context, top: Fields, roles: Mapping[str, RoleConfig], export: str | None
) -> dict[str, TermConfig]:
    """Reads every term; a null entry removes one that a layer below gave."""
    value = top.raw("terms", {})
    if isinstance(value, list):  # an override can still give one
        value = {str(item.get("type") if isinstance(item, Mapping) else item): item for item in value}
    if not isinstance(value, Mapping):
        top.fault("terms", f"must be a mapping such as `kd: {{type: kd, weight: 0.9}}`, got {value!r}.")
        value = {}
    trainable = [name for name, role in roles.items() if role.mode == "trainable"]
    student = "student" if "student" in roles else export
    if student is None and len(trainable) == 1:
        student = trainable[0]
    terms = {}
    for name, entry in value.items():
        if entry is not None:
            term = _term(context, name, top.path(f"terms.{name}"), entry, roles, student)
            if term is not None:
                terms[name] = term
    return terms


def _term(
    context: Context, name: str, key: str, value: Any, roles: Mapping[str, RoleConfig], student: str | None
) -> TermConfig | None:
    if isinstance(value, str):
        value = {"type": value}
    fields = Fields(context, value, key, f"term {name!r}")
    kind = fields.raw("type")
    if not isinstance(kind, str):
        said = f"term {name!r} needs a `type`, one of: {', '.join(sorted(TERMS.entries))}."
        context.fault(key, said)
        return None
    weight = _weight(context, fields)
    student_value, teacher_value = fields.raw("student"), fields.raw("teacher")
    where = fields.take("where", "str")
    teacher_grad = fields.take("teacher_grad", "bool", False)
    type_key = fields.path("type") if fields.path("type") in context.places else key
    params = parameters(context, TERMS, kind, fields.rest(), key, type_key, beside=RESERVED)
    if params is None:
        return None
    entry = TERMS.entry(kind)
    space = entry.facts.get("space", "sample")
    if where is not None and (space == "model" or (space == "batch" and "mask" not in entry.inputs)):
        fields.fault(
            "where", f"term {kind!r} couples the whole batch and takes no mask, so `where` cannot thin it out."
        )
    if teacher_grad and "teacher" not in entry.inputs:
        fields.fault("teacher_grad", f"term {kind!r} reads no teacher.")
    reader = OperandReader(context, list(roles), student, key, entry)
    edges = reader.edges(student_value, teacher_value) if roles else ()  # without roles there is a fault already
    return TermConfig(
        name=name,
        type=kind,
        weight=weight,
        edges=edges,
        where=where,
        teacher_grad=teacher_grad,
        params=params,
        place=context.place(key),
    )


def _weight(context: Context, fields: Fields) -> float | Named:
    value = fields.raw("weight", 1.0)
    if isinstance(value, Mapping):
        return schedule(context, value, fields.path("weight")) or 1.0
    if type_fault("float", value) or value != value or abs(value) == float("inf"):
        fields.fault("weight", f"must be a finite number or a schedule such as {{type: linear, ...}}, got {value!r}.")
        return 1.0
    return value


def read_updates(
    context: Context, top: Fields, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
) -> tuple[UpdateConfig, ...]:
    """Reads the ordered moves within a step."""
    value = top.raw("updates", [])
    if not isinstance(value, list):
        top.fault("updates", f"must be a list such as `- {{models: [student], terms: [kd]}}`, got {value!r}.")
        return ()
    updates = []
    for position, item in enumerate(value):
        fields = Fields(context, item, top.path(f"updates.{position}"), "an update")
        models, names = fields.texts("models"), fields.texts("terms")
        for kind, given in (("models", models), ("terms", names)):
            if not given:
                fields.fault("", f"an update needs `{kind}`, a list of names.")
        for name in models:
            if name not in roles:
                fields.fault("models", f"no role {name!r}.{nearest(name, roles)}")
            elif roles[name].mode != "trainable":
                fields.fault("models", f"role {name!r} is {roles[name].mode}; an update moves trainable roles only.")
        for name in names:
            if name not in terms:
                fields.fault("terms", f"no term {name!r}.{nearest(name, terms)}")
        optimizer = None
        if fields.raw("optimizer") is not None:
            optimizer = read_optimizer(context, fields.data["optimizer"], fields.path("optimizer"))
        repeat = fields.take("repeat", "int", 1, AT_LEAST_ONE)
        fields.done()
        updates.append(
            UpdateConfig(models=models, terms=names, repeat=repeat, optimizer=optimizer, place=fields.place())
        )
    return tuple(updates)
