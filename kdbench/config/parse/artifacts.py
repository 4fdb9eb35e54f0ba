"""The entries of `artifacts:`, what a stage makes at its end, and whether what a stage reads was made and is of its kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kdbench.config.error_list import ErrorList
from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.loops import UnrolledStage
from kdbench.config.parse.operands import OperandParser
from kdbench.config.parse.parts import read_part
from kdbench.config.schema import (
    ArtifactConfig,
    OperandConfig,
    PartConfig,
    PartWithOperands,
    RoleConfig,
    SourceConfig,
    StageConfig,
)
from kdbench.errors import Location, suggest
from kdbench.registry import ARTIFACTS, MODELS, SELECTORS

_NAME = re.compile(r"[\w-]+")


def read_artifacts(
    context: ParseContext,
    top: KeyReader,
    roles: Mapping[str, RoleConfig],
    sources: Mapping[str, SourceConfig],
    export: str | None,
    unrolled: UnrolledStage,
) -> dict[str, ArtifactConfig]:
    """Reads everything that a stage makes; a null entry removes one."""
    value = top.get_raw("artifacts", {})
    if not isinstance(value, Mapping):
        top.error("artifacts", f"must be a mapping such as `soft: {{type: outputs, value: teacher}}`, got {value!r}.")
        return {}
    addresses = OperandParser(context, list(roles), list(sources), (), unrolled.artifact_names)
    makes = {}
    for name, entry in value.items():
        if entry is None:
            continue
        key = top.subkey(f"artifacts.{name}")
        if not _NAME.fullmatch(str(name)):
            context.error(key, f"{name!r} cannot be the name of what is made; use letters, digits, `_` and `-`.")
            continue
        fields = KeyReader(context, {"type": entry} if isinstance(entry, str) else entry, key, f"make {name!r}")
        source = _source(fields, sources)
        part = _maker(addresses, fields, export)
        if part is not None:
            previous = unrolled.artifact_names.get(f"{unrolled.base_name}.{name}")
            makes[name] = ArtifactConfig(
                name=name, part=part, source=source, previous=previous, location=context.location(key)
            )
    return makes


def _source(fields: KeyReader, sources: Mapping[str, SourceConfig]) -> str | None:
    given = fields.read("source", "str")
    if given is None:
        if "train" not in sources:
            fields.error("", f"say over which samples it is made: `source: NAME`.{suggest('train', sources)}")
        return "train"
    if given not in sources:
        fields.error("source", f"no source {given!r}.{suggest(given, sources)}")
    return given


def _maker(addresses: OperandParser, fields: KeyReader, export: str | None) -> PartWithOperands | None:
    """The maker with its parameters and operands; those of its selector stand beside its own."""
    context, key = addresses.context, fields.key
    kind = fields.data.get("type")
    entry = ARTIFACTS.entries.get(kind) if isinstance(kind, str) else None
    chooser = entry.facts.get("selector") if entry is not None else None
    listed = entry.facts.get("candidates") if entry is not None else None
    several = entry.facts.get("operand_list") if entry is not None else None
    data, more = fields.data, []
    if several and isinstance(data.get(several), list) and data[several]:
        data, more = {**data, several: data[several][0]}, data[several][1:]
    reserved = ("source", *([chooser] if chooser else []))
    part = addresses.read_part_with_operands(ARTIFACTS, data, key, export, reserved=reserved)
    if part is None:
        return None
    params, operands = dict(part.params), dict(part.operands)
    for number, item in enumerate(more, 1):
        read = addresses.read_operand(item, export, f"{key}.{several}.{number}")
        if read is not None:
            operands[f"{several}_{number}"] = read.operand
    if chooser:
        by = fields.data.get(chooser)
        if by is None:
            context.error(key, f"maker {kind!r} needs `{chooser}`, one of `kdbench list selectors`.")
            return None
        selector = addresses.read_part_with_operands(SELECTORS, by, f"{key}.{chooser}", export)
        if selector is None:
            return None
        params[chooser] = {"type": selector.type, **selector.params}
        operands |= selector.operands
    if listed:
        models = params.get(listed)
        params[listed] = {}
        for name, model in models.items() if isinstance(models, Mapping) else ():
            read = read_part(context, MODELS, model, f"{key}.{listed}.{name}", MODELS.injected)
            if read is not None:
                params[listed][name] = {"type": read.type, **read.params}
        if not params[listed]:
            context.error(f"{key}.{listed}", "there is no candidate; write a mapping of names to models.")
    return replace(part, params=params, operands=operands)


def link_artifacts(faults: ErrorList, stages: list[StageConfig], unrolled: list[UnrolledStage]) -> list[StageConfig]:
    """Finds the model that stands in for a chosen one, and finds fault with what is read as something that it is not.

    Returns:
        The stages, each role's `made` by its full name.
    """
    kinds: dict[str, ArtifactConfig] = {}
    checked = []
    for stage, own in zip(stages, unrolled, strict=True):
        roles = {name: _role(faults, role, own, kinds) for name, role in stage.roles.items()}
        for name, wanted, place in _reads(stage):
            made = kinds.get(name)
            found = ARTIFACTS.entry(made.part.type).facts.get("produces") if made is not None else wanted
            if found != wanted:
                faults.add(place, f"{name!r} is a {found}, but a {wanted} is read here.")
        checked.append(replace(stage, roles=roles))
        kinds |= {f"{stage.name}.{name}": make for name, make in stage.artifacts.items()}
    return checked


def _role(faults: ErrorList, role: RoleConfig, unrolled: UnrolledStage, kinds: Mapping[str, ArtifactConfig]) -> RoleConfig:
    if role.artifact is None:
        return role
    full = unrolled.artifact_names.get(role.artifact)
    if full is None:
        hint = suggest(role.artifact, unrolled.artifact_names) if unrolled.artifact_names else " No earlier stage makes anything."
        faults.add(role.location, f"no earlier stage makes {role.artifact!r}, the model of role {role.name!r}.{hint}")
        return role
    make = kinds.get(full)
    if make is None:  # it is at fault itself
        return role
    entry = ARTIFACTS.entry(make.part.type)
    if entry.facts.get("produces") != "model":
        faults.add(role.location, f"{full!r} is a {entry.facts.get('makes')}, but role {role.name!r} needs a model.")
        return role
    candidates = make.part.params.get(entry.facts.get("candidates", ""), {})
    first: dict[str, Any] = dict(next(iter(candidates.values()), {}))
    if not first:
        return role
    return replace(role, artifact=full, model=PartConfig(type=first.pop("type"), params=first, location=make.location))


def _reads(stage: StageConfig) -> Iterator[tuple[str, str, Location]]:
    """What a stage reads of what others made: its name, the kind that it must be, and where that was written."""
    for source in stage.data.values():
        if source.artifact is not None:
            yield source.artifact, "dataset", source.location
        for option, value in (("subset", source.subset), ("labels", source.label_fraction)):
            if isinstance(value, str):
                yield value, "subset", source.locations.get(option, source.location)
    for operand in artifact_operands(stage):
        yield f"{operand.role}.{operand.path}", "tensor", operand.location


def artifact_operands(stage: StageConfig) -> Iterator[OperandConfig]:
    """The operands of a stage's terms, updates and makers that are tensors which an earlier stage made."""
    return (operand for operand in stage.read_operands() if operand.kind == "artifact")
