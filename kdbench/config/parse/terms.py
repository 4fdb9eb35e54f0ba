"""The entries of `terms:` and `updates:`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.operands import EdgeReader, OperandParser
from kdbench.config.parse.parts import check_parameters, read_schedule
from kdbench.config.schema import PartConfig, PartWithOperands, RoleConfig, TermConfig
from kdbench.registry import ROUTERS, SAMPLE_WEIGHTS, TERMS, Entry, type_mismatch

RESERVED_KEYS = ("type", "weight", "student", "teacher", "mask", "teacher_grad", "sample_weight", "route")


def read_terms(
    context: ParseContext,
    top: KeyReader,
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
    value = top.get_raw("terms", {})
    if isinstance(value, list):  # an override can still give one
        value = {str(item.get("type") if isinstance(item, Mapping) else item): item for item in value}
    if not isinstance(value, Mapping):
        top.error("terms", f"must be a mapping such as `kd: {{type: kd, weight: 0.9}}`, got {value!r}.")
        value = {}
    trainable = [name for name, role in roles.items() if role.mode == "trainable"]
    student = "student" if "student" in roles else export
    if student is None and len(trainable) == 1:
        student = trainable[0]
    terms = {}
    for name, entry in value.items():
        if entry is not None:
            addresses = OperandParser(context, list(roles), sources, list(terms), made or {})
            term = _term(addresses, name, top.subkey(f"terms.{name}"), entry, student)
            if term is not None:
                terms[name] = term
    return terms


def _term(addresses: OperandParser, name: str, key: str, value: Any, student: str | None) -> TermConfig | None:
    context = addresses.context
    if isinstance(value, str):
        value = {"type": value}
    fields = KeyReader(context, value, key, f"term {name!r}")
    kind = fields.get_raw("type")
    if not isinstance(kind, str):
        said = f"term {name!r} needs a `type`, one of: {', '.join(sorted(TERMS.entries))}."
        context.error(key, said)
        return None
    weight = _weight(context, fields)
    student_value, teacher_value = fields.get_raw("student"), fields.get_raw("teacher")
    where = fields.read("mask", "str")
    teacher_grad = fields.read("teacher_grad", "bool", False)
    type_key = fields.subkey("type") if fields.subkey("type") in context.locations else key
    routing = {name: fields.get_raw(name) for name in ("sample_weight", "route")}
    known = TERMS.entries.get(kind)
    declared = [
        name for name in (known.facts.get("operands", ()) if known else ()) if name not in ("student", "teacher")
    ]
    more = {name: fields.get_raw(name) for name in declared}
    params = check_parameters(context, TERMS, kind, fields.remaining(), key, type_key, beside=(*RESERVED_KEYS, *declared))
    if params is None:
        return None
    entry = TERMS.entry(kind)
    space = entry.facts.get("space", "row")
    if where is not None and (space == "model" or (space == "batch" and "mask" not in entry.inputs)):
        fields.error("mask", f"term {kind!r} couples the whole batch and takes no mask, so `mask` cannot thin it out.")
    if teacher_grad and "teacher" not in entry.inputs:
        fields.error("teacher_grad", f"term {kind!r} reads no teacher.")
    reader = EdgeReader(addresses, student, key, entry)
    edges = reader.edges(student_value, teacher_value) if addresses.roles else ()  # no roles: told already
    for label, value in routing.items():
        if value is not None and not _takes_weights(entry):
            fields.error(label, f"term {kind!r} couples the whole batch and takes no weights, so nothing can weigh it.")
    if routing["route"] is not None and len(edges) == 1:
        fields.error("route", "a router chooses among edges, but the term has only one: give a list of teachers.")
    elif routing["route"] is not None and edges and len({str(edge.teacher or edge.student) for edge in edges}) == 1:
        only = edges[0].teacher or edges[0].student
        fields.error("route", f"a router chooses among teachers, but every edge has the same: {only}.")
    own = edges[0].student.role if edges else student
    parts: dict[str, PartWithOperands | None] = {"sample_weight": None, "route": None}
    for label, registry in (("sample_weight", SAMPLE_WEIGHTS), ("route", ROUTERS)):
        if routing[label] is not None:
            parts[label] = addresses.read_part_with_operands(
                registry, routing[label], f"{key}.{label}", own, given=("student", "teacher", "teachers", "losses")
            )
    return TermConfig(
        name=name,
        type=kind,
        weight=weight,
        edges=edges,
        mask=where,
        teacher_grad=teacher_grad,
        params=params,
        operands=addresses.read_declared_operands(entry, declared, more, key, own),
        **parts,
        location=context.location(key),
    )


def _takes_weights(entry: Entry) -> bool:
    """Whether samples can count differently in a term: the runner weighs what it reduces, the others must take them."""
    space = entry.facts.get("space", "row")
    return space not in ("batch", "model") or (space == "batch" and "weight" in entry.inputs)


def _weight(context: ParseContext, fields: KeyReader) -> float | PartConfig:
    value = fields.get_raw("weight", 1.0)
    if isinstance(value, Mapping):
        return read_schedule(context, value, fields.subkey("weight")) or 1.0
    if type_mismatch("float", value) or value != value or abs(value) == float("inf"):
        fields.error("weight", f"must be a finite number or a schedule such as {{type: linear, ...}}, got {value!r}.")
        return 1.0
    return value
