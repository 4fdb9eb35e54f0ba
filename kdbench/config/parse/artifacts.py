"""Parses the key `artifacts` of a stage, and checks how later stages use each artifact."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kdbench.config.error_list import ErrorList
from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.loops import UnrolledStage
from kdbench.config.parse.operands import OperandParser, artifact_hint
from kdbench.config.parse.parts import read_part
from kdbench.config.schema import (
    ArtifactConfig,
    OperandConfig,
    PartConfig,
    PartWithOperands,
    RoleConfig,
    SourceConfig,
    StageConfig,
    declared_keys,
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
    """Parses all artifacts of a stage. A null entry removes an artifact that another layer of the recipe defines.

    Args:
        top: reader of the stage's keys.
        roles, sources: roles (networks) and sources of the stage, by name.
        export: name of the exported role. An operand that names no role belongs to this role.
        unrolled: the stage with the names of all earlier artifacts.
    """
    parser = OperandParser(context, list(roles), list(sources), (), unrolled.artifact_names)
    artifacts = {}
    for name, value in top.read_mapping("artifacts", "soft: {type: soft_labels, teacher: teacher}").items():
        if value is None:
            continue
        key = top.subkey(f"artifacts.{name}")
        if not _NAME.fullmatch(str(name)):
            context.error(key, f"{name!r} cannot be the name of an artifact; use letters, digits, `_` and `-`.")
            continue
        data = {"type": value} if isinstance(value, str) else value
        keys = declared_keys(ArtifactConfig)
        reader = KeyReader(context, data, key, f"artifact {name!r}", keys, parameters=True)
        source = _read_source(reader, sources)
        part = _read_builder(parser, reader, export)
        if part is not None:
            previous = unrolled.artifact_names.get(f"{unrolled.base_name}.{name}")
            artifacts[name] = ArtifactConfig(
                name=name, part=part, source=source, previous=previous, location=context.location(key)
            )
    return artifacts


def _read_source(reader: KeyReader, sources: Mapping[str, SourceConfig]) -> str | None:
    source = reader.read("source")
    if source is None:
        if "train" not in sources and "source train" not in reader.context.invalid:
            hint = suggest("train", sources)
            reader.error(
                "", f"the key `source` is missing: the source from whose samples the artifact is computed.{hint}"
            )
        return "train"
    if source not in sources and f"source {source}" not in reader.context.invalid:
        reader.error("source", f"no source {source!r}.{suggest(source, sources)}")
    return source


def _read_builder(parser: OperandParser, reader: KeyReader, export: str | None) -> PartWithOperands | None:
    """Parses an artifact builder with its parameters and operands.

    Three keyword arguments of the builder's `register` decorator contain the name of a key with a special syntax:
    `selector` (a selector, whose operands are added to the operands of the artifact), `candidates` (a mapping of
    names to models) and `operand_list` (an operand that may be a list).
    """
    kind = reader.get_raw("type")
    entry = ARTIFACTS.entries.get(kind) if isinstance(kind, str) else None
    facts = entry.facts if entry is not None else {}
    selector_key, candidates_key, list_key = (facts.get(name) for name in ("selector", "candidates", "operand_list"))
    data, more_operands = reader.data, []
    if list_key and isinstance(data.get(list_key), list) and data[list_key]:
        # The first operand keeps its name; the others become NAME_1, NAME_2, ...
        data, more_operands = {**data, list_key: data[list_key][0]}, data[list_key][1:]
    reserved = ("source", *([selector_key] if selector_key else []))
    part = parser.read_part_with_operands(ARTIFACTS, data, reader.key, export, reserved=reserved)
    if part is None:
        return None
    params, operands = dict(part.params), dict(part.operands)
    for index, item in enumerate(more_operands, 1):
        parsed = parser.read_operand(item, export, reader.subkey(f"{list_key}.{index}"))
        if parsed is not None:
            operands[f"{list_key}_{index}"] = parsed.operand
    if selector_key:
        selector = _read_selector(parser, reader, selector_key, export)
        if selector is None:
            return None
        params[selector_key] = {"type": selector.type, **selector.params}
        operands |= selector.operands
    if candidates_key:
        params[candidates_key] = _read_candidates(reader, candidates_key, params.get(candidates_key))
    return replace(part, params=params, operands=operands)


def _read_selector(parser: OperandParser, reader: KeyReader, name: str, export: str | None) -> PartWithOperands | None:
    value = reader.data.get(name)
    if value is None:
        reader.error(
            "", f"artifact {reader.get_raw('type')!r} needs the key `{name}`, a name of `kdbench list selectors`."
        )
        return None
    return parser.read_part_with_operands(SELECTORS, value, reader.subkey(name), export)


def _read_candidates(reader: KeyReader, name: str, value: Any) -> dict[str, dict[str, Any]]:
    candidates = {}
    for candidate, model in value.items() if isinstance(value, Mapping) else ():
        part = read_part(reader.context, MODELS, model, reader.subkey(f"{name}.{candidate}"), MODELS.injected)
        if part is not None:
            candidates[candidate] = {"type": part.type, **part.params}
    if not candidates:
        reader.error(name, "the mapping of candidates is empty; write one or more names with their models.")
    return candidates


def link_artifacts(errors: ErrorList, stages: list[StageConfig], unrolled: list[UnrolledStage]) -> list[StageConfig]:
    """Resolves artifacts that select models, and reports each artifact that has another kind than its reader expects.

    Returns:
        The stages. If an artifact selects the model of a role, then `model` of the role is the first candidate.
    """
    artifacts: dict[str, ArtifactConfig] = {}
    linked = []
    for stage, origin in zip(stages, unrolled, strict=True):
        roles = {name: _link_model(errors, role, origin, artifacts) for name, role in stage.roles.items()}
        for name, expected_kind, location in _artifact_reads(stage):
            kind = _kind_of(artifacts[name]) if name in artifacts else expected_kind
            if kind != expected_kind:
                errors.add(location, f"artifact {name!r} is a {kind}, but a {expected_kind} is expected.")
        linked.append(replace(stage, roles=roles))
        artifacts |= {f"{stage.name}.{name}": artifact for name, artifact in stage.artifacts.items()}
    return linked


def _kind_of(artifact: ArtifactConfig) -> str:
    return ARTIFACTS.entry(artifact.part.type).facts["produces"]


def _link_model(
    errors: ErrorList, role: RoleConfig, unrolled: UnrolledStage, artifacts: Mapping[str, ArtifactConfig]
) -> RoleConfig:
    """Returns a role whose `model` is the first candidate of the artifact that selects the model of the role.

    A role without such an artifact is returned unchanged.
    """
    if role.artifact is None:
        return role
    full_name = unrolled.artifact_names.get(role.artifact)
    if full_name is None:
        hint = artifact_hint(role.artifact, unrolled.artifact_names)
        errors.add(
            role.location,
            f"no earlier stage produces the artifact {role.artifact!r}, the model of role {role.name!r}.{hint}",
        )
        return role
    artifact = artifacts.get(full_name)
    if artifact is None:  # its own error is reported already
        return role
    if _kind_of(artifact) != "model":
        message = f"artifact {full_name!r} is a {_kind_of(artifact)}, but role {role.name!r} needs a model."
        errors.add(role.location, message)
        return role
    facts = ARTIFACTS.entry(artifact.part.type).facts
    candidates = artifact.part.params.get(facts.get("candidates", ""), {})
    params: dict[str, Any] = dict(next(iter(candidates.values()), {}))
    if not params:
        return role
    model = PartConfig(type=params.pop("type"), params=params, location=artifact.location)
    return replace(role, artifact=full_name, model=model)


def _artifact_reads(stage: StageConfig) -> Iterator[tuple[str, str, Location]]:
    """Yields name, expected kind and location of each artifact that a source or an operand of a stage reads."""
    for source in stage.data.values():
        if source.artifact is not None:
            yield source.artifact, "dataset", source.location
        for option, value in (("subset", source.subset), ("label_fraction", source.label_fraction)):
            if isinstance(value, str):
                yield value, "subset", source.locations.get(option, source.location)
    for operand in artifact_operands(stage):
        yield f"{operand.role}.{operand.path}", "tensor", operand.location


def artifact_operands(stage: StageConfig) -> Iterator[OperandConfig]:
    """Yields the operands of a stage that are artifacts."""
    return (operand for operand in stage.read_operands() if operand.kind == "artifact")
