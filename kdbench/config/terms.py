"""The entries of `terms:` and `updates:`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdbench.config.fields import AT_LEAST_ONE, POSITIVE, SHARE_OR_COUNT, Context, Fields, parameters, schedule
from kdbench.config.operands import Addresses, OperandReader
from kdbench.config.optimizers import read_optimizer
from kdbench.config.schema import Named, Part, RoleConfig, TermConfig, UpdateConfig, VirtualConfig
from kdbench.errors import nearest
from kdbench.registry import ROUTERS, SELECTORS, TERMS, WEIGHERS, Entry, type_fault

RESERVED = ("type", "weight", "student", "teacher", "where", "teacher_grad", "weigh", "route")


def read_terms(
    context: Context,
    top: Fields,
    roles: Mapping[str, RoleConfig],
    export: str | None,
    sources: Collection[str] = (),
    made: Mapping[str, str] | None = None,
) -> dict[str, TermConfig]:
    """Reads every term; a null entry removes one that a layer below gave.

    Args:
        export: the role that is the result, where it is known.
        sources: the names of the sources, whose fields a term may read.
        made: what earlier stages make, as written and by its full name.
    """
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
            addresses = Addresses(context, list(roles), sources, list(terms), made or {})
            term = _term(addresses, name, top.path(f"terms.{name}"), entry, student)
            if term is not None:
                terms[name] = term
    return terms


def _term(addresses: Addresses, name: str, key: str, value: Any, student: str | None) -> TermConfig | None:
    context = addresses.context
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
    routing = {name: fields.raw(name) for name in ("weigh", "route")}
    known = TERMS.entries.get(kind)
    declared = [
        name for name in (known.facts.get("operands", ()) if known else ()) if name not in ("student", "teacher")
    ]
    more = {name: fields.raw(name) for name in declared}
    params = parameters(context, TERMS, kind, fields.rest(), key, type_key, beside=(*RESERVED, *declared))
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
    reader = OperandReader(addresses, student, key, entry)
    edges = reader.edges(student_value, teacher_value) if addresses.roles else ()  # no roles: told already
    for label, value in routing.items():
        if value is not None and not _takes_weights(entry):
            fields.fault(label, f"term {kind!r} couples the whole batch and takes no weights, so nothing can weigh it.")
    if routing["route"] is not None and len(edges) == 1:
        fields.fault("route", "a router chooses among edges, but the term has only one: give a list of teachers.")
    elif routing["route"] is not None and edges and len({str(edge.teacher or edge.student) for edge in edges}) == 1:
        only = edges[0].teacher or edges[0].student
        fields.fault("route", f"a router chooses among teachers, but every edge has the same: {only}.")
    own = edges[0].student.role if edges else student
    parts: dict[str, Part | None] = {"weigh": None, "route": None}
    for label, registry in (("weigh", WEIGHERS), ("route", ROUTERS)):
        if routing[label] is not None:
            parts[label] = addresses.part(
                registry, routing[label], f"{key}.{label}", own, given=("student", "teacher", "teachers", "losses")
            )
    return TermConfig(
        name=name,
        type=kind,
        weight=weight,
        edges=edges,
        where=where,
        teacher_grad=teacher_grad,
        params=params,
        operands=addresses.declared(entry, declared, more, key, own),
        **parts,
        place=context.place(key),
    )


def _takes_weights(entry: Entry) -> bool:
    """Whether samples can count differently in a term: the runner weighs what it reduces, the others must take them."""
    space = entry.facts.get("space", "sample")
    return space not in ("batch", "model") or (space == "batch" and "weight" in entry.inputs)


def _weight(context: Context, fields: Fields) -> float | Named:
    value = fields.raw("weight", 1.0)
    if isinstance(value, Mapping):
        return schedule(context, value, fields.path("weight")) or 1.0
    if type_fault("float", value) or value != value or abs(value) == float("inf"):
        fields.fault("weight", f"must be a finite number or a schedule such as {{type: linear, ...}}, got {value!r}.")
        return 1.0
    return value


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
        together=together,
        select=select,
        keep=keep,
        after=after,
        place=fields.place(),
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
        for operand in terms[name].reads():
            if operand.kind == "term" and operand.role not in names[: names.index(name)]:
                said = f"term {name!r} reads {operand}, which this update does not compute before it"
                fields.fault("terms", f"{said}; list {operand.role!r} first.")
    return models, names


def _virtual(
    context: Context, fields: Fields, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
) -> VirtualConfig | None:
    value = fields.raw("after")
    if value is None:
        return None
    own = Fields(context, value, fields.path("after"), "after")
    models, names = _moves(own, roles, terms, "a virtual step")
    lr: float | Named | None = None
    if isinstance(own.raw("lr"), Mapping):
        lr = schedule(context, own.data["lr"], own.path("lr"))
    else:
        lr = own.take("lr", "float", None, POSITIVE)
    own.done()
    if fields.data.get("select") is not None:
        fields.fault("select", "cannot stand beside `after`: both steps are of the whole batch.")
    return VirtualConfig(models=models, terms=names, lr=lr, place=own.place())


def _selection(
    context: Context, fields: Fields, roles: Mapping[str, RoleConfig], sources: Collection[str]
) -> tuple[Part | None, float | int | None]:
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
