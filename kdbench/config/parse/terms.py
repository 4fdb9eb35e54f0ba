"""Parses the key `terms` of a stage: the terms of the loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.operands import EdgeReader, OperandParser
from kdbench.config.parse.parts import check_parameters, read_schedule
from kdbench.config.schema import EdgeConfig, PartConfig, RoleConfig, TermConfig, declared_keys
from kdbench.registry import ROUTERS, SAMPLE_WEIGHTS, TERMS, Entry, type_mismatch

_WEIGHTING = {"sample_weight": SAMPLE_WEIGHTS, "route": ROUTERS}
"""Key of a term -> registry of the part that the key names. The part weights the losses of the term."""


ENGINE_OPERANDS = ("student", "teacher", "teachers", "losses")
"""The operands that the engine passes to a sample weight or a router: operands and losses of the term."""


def read_terms(
    context: ParseContext,
    top: KeyReader,
    roles: Mapping[str, RoleConfig],
    export: str | None,
    sources: Collection[str] = (),
    artifact_names: Mapping[str, str] | None = None,
) -> dict[str, TermConfig]:
    """Parses all terms. A null entry removes a term that another layer of the recipe defines.

    Args:
        top: reader of the stage's keys.
        export: name of the exported role (the network that is the result); None after an error.
        sources: names of the sources whose fields a term may read.
        artifact_names: name of an artifact in the recipe, such as `query.labels` -> full name with the round of
            the loop, such as `query@2.labels`.
    """
    value = top.get_raw("terms")
    if isinstance(value, list):  # only from an override: lists in files are mappings already
        value = {str(item.get("type") if isinstance(item, Mapping) else item): item for item in value}
    if value is not None and not isinstance(value, Mapping):
        top.error("terms", f"must be a mapping such as `kd: {{type: kd, weight: 0.9}}`, got {value!r}.")
        value = None
    trainable = [name for name, role in roles.items() if role.mode == "trainable"]
    student = "student" if "student" in roles else export
    if student is None and len(trainable) == 1:
        student = trainable[0]
    terms: dict[str, TermConfig] = {}
    for name, entry in (value or {}).items():
        if entry is None:
            continue
        parser = OperandParser(context, list(roles), sources, list(terms), artifact_names or {})
        term = _read_term(parser, name, top.subkey(f"terms.{name}"), entry, student)
        if term is not None:
            terms[name] = term
        else:
            context.invalid.add(f"term {name}")
    return terms


def _read_term(
    parser: OperandParser, name: str, key: str, value: Any, default_student: str | None
) -> TermConfig | None:
    context = parser.context
    if isinstance(value, str):
        value = {"type": value}
    reader = KeyReader(context, value, key, f"term {name!r}", declared_keys(TermConfig), parameters=True)
    kind = reader.get_raw("type")
    if not isinstance(kind, str):
        context.error(key, f"term {name!r} needs `type: NAME`. {TERMS.listing}")
        return None
    entry = TERMS.entries.get(kind)
    # Operands that the term's class declares are keys beside its parameters.
    operand_names = [item for item in (entry.facts.get("operands", ()) if entry else ()) if item not in reader.keys]
    params = {item: param for item, param in reader.parameters().items() if item not in operand_names}
    checked = check_parameters(context, TERMS, kind, params, key, reserved=(*reader.keys, *operand_names))
    if checked is None or entry is None:
        return None
    edge_reader = EdgeReader(parser, default_student, key, entry)
    # Without any role the error is reported already.
    edges = edge_reader.edges(reader.get_raw("student"), reader.get_raw("teacher")) if parser.roles else ()
    student = edges[0].student.role if edges else default_student
    fields: dict[str, Any] = {
        **reader.read_plain_fields(TermConfig),
        "name": name,
        "weight": _read_weight(reader),
        "edges": edges,
        "params": checked,
        "operands": parser.read_declared_operands(entry, operand_names, reader.data, key, student),
        "location": context.location(key),
    }
    _check_mask(reader, entry)
    _check_weighting(reader, entry, edges)
    return TermConfig(**fields | _read_weighting(parser, reader, student))


def _read_weighting(parser: OperandParser, reader: KeyReader, student: str | None) -> dict[str, Any]:
    """Parses the sample weight and the router of a term."""
    return {
        name: parser.read_part_with_operands(
            registry, reader.get_raw(name), reader.subkey(name), student, available=ENGINE_OPERANDS
        )
        for name, registry in _WEIGHTING.items()
        if reader.has(name)
    }


def _check_mask(reader: KeyReader, entry: Entry) -> None:
    space = entry.facts.get("space", "row")
    if reader.has("mask") and (space == "model" or (space == "batch" and "mask" not in entry.inputs)):
        reader.error("mask", f"term {entry.name!r} couples all rows of a batch, so `mask` cannot be used.")
    if reader.has("teacher_grad") and reader.read("teacher_grad") and "teacher" not in entry.inputs:
        reader.error("teacher_grad", f"`teacher_grad` has no effect: term {entry.name!r} reads no teacher.")


def _check_weighting(reader: KeyReader, entry: Entry, edges: tuple[EdgeConfig, ...]) -> None:
    for name in _WEIGHTING:
        if reader.has(name) and not _takes_weights(entry):
            reader.error(name, f"term {entry.name!r} couples all rows of a batch, so `{name}` cannot be used.")
    if not reader.has("route"):
        return
    if len(edges) == 1:
        reader.error(
            "route", "a router weights the teachers of a term, but this term has only one; write a list of teachers."
        )
    elif edges and len({str(edge.teacher or edge.student) for edge in edges}) == 1:
        operand = edges[0].teacher or edges[0].student
        reader.error(
            "route", f"a router weights the teachers of a term, but all teachers of this term are equal: {operand}."
        )


def _takes_weights(entry: Entry) -> bool:
    """Returns whether samples can have different weights in a term.

    This is possible if the term has one loss per row, or if its forward has a parameter `weight`.
    """
    space = entry.facts.get("space", "row")
    return space not in ("batch", "model") or (space == "batch" and "weight" in entry.inputs)


def _read_weight(reader: KeyReader) -> float | PartConfig:
    value = reader.get_raw("weight")
    if value is None:
        return 1.0
    if isinstance(value, Mapping):
        return read_schedule(reader.context, value, reader.subkey("weight")) or 1.0
    if type_mismatch("float", value) or value != value or abs(value) == float("inf"):
        reader.error("weight", f"must be a finite number or a schedule such as {{type: linear, ...}}, got {value!r}.")
        return 1.0
    return value
