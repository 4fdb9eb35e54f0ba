"""What stages make for later ones: rehearsed before anything runs, made at a stage's end, read at the next one's begin.

A made thing is a file `stages/STAGE.NAME.pt` in the run's folder: the maker's content as `kdbench.artifacts.base.Maker`
says, with `kind`, `checksum` and `provenance` beside it. It is a function of the recipe and its seed alone, so a file
that is there is as good as new.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, BatchIterator, SampleOutputs
from kdbench.config.parse.artifacts import artifact_operands
from kdbench.config.parse.roles import upstream_closure
from kdbench.config.schema import ArtifactConfig, PartConfig, Recipe, RoleConfig, StageConfig
from kdbench.data.datasets.artifact import expected_spec
from kdbench.data.describe import describe_sources
from kdbench.data.loading.source import Source
from kdbench.data.sampling.split import amount_to_count
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.build import BuildContext
from kdbench.engine.network.roles import input_addresses
from kdbench.engine.plan.meta import META
from kdbench.engine.plan.plan import StagePlan, plan_stage
from kdbench.engine.plan.requirements import check_artifact
from kdbench.engine.state.weight_loader import WeightsOrigin
from kdbench.engine.state.weights import read_checkpoint, state_hash
from kdbench.engine.train.runner import Runner
from kdbench.errors import CheckpointError, ConfigError, UserError
from kdbench.files import to_strict_json, write_atomic
from kdbench.randomness import derive
from kdbench.registry import ARTIFACTS
from kdbench.run_folder import RunFolder

ArtifactFiles = Mapping[str, Path]
"""`STAGE.NAME` -> the file of what that stage made."""


@dataclass(frozen=True)
class DescribedStage:
    """A stage as it is known by now: with the models that were chosen, and stand-ins for what is still to be made."""

    stage: StageConfig
    specs: Mapping[str, SourceSpec]


def find_artifact_files(recipe: Recipe, folder: RunFolder) -> dict[str, Path]:
    """Everything that the stages of a run have made so far."""
    places = {
        f"{stage.name}.{name}": folder.artifact(stage.name, name) for stage in recipe.stages for name in stage.artifacts
    }
    return {name: path for name, path in places.items() if path.exists()}


def describe_stages(recipe: Recipe, artifact_files: ArtifactFiles | None = None) -> list[DescribedStage]:
    """Describes the data of every stage, in order: what a stage will make stands in where it is not there yet."""
    artifact_files = artifact_files or {}
    like: dict[str, SourceSpec] = {}
    found = []
    for stage in recipe.stages:
        specs = describe_sources(stage.data, stage.validation, recipe.data_root, artifact_files=artifact_files, artifact_specs=like)
        for name, make in stage.artifacts.items():
            if ARTIFACTS.entry(make.part.type).facts.get("produces") == "dataset":
                like[f"{stage.name}.{name}"] = expected_spec(make.part.type, specs.get(make.source or ""), specs["eval"])
        found.append(DescribedStage(_resolve_models(stage, artifact_files), specs))
    return found


def plan_stages(
    recipe: Recipe,
    described_stages: list[DescribedStage] | None = None,
    *,
    artifact_files: ArtifactFiles | None = None,
    world_size: int = 1,
    earlier_plans: list[StagePlan] | None = None,
) -> list[StagePlan]:
    """Plans every stage; the tensors that are still to be made have their shapes.

    Args:
        before: plans from when less had been made; what did not change is not rehearsed again.

    Raises:
        ConfigError: anything that the first step of a stage, or what it makes, would have failed at.
    """
    tensors: dict[str, Tensor] = {}
    plans: list[StagePlan] = []
    for one in described_stages if described_stages is not None else describe_stages(recipe, artifact_files):
        tensors |= artifact_tensors(one.stage, artifact_files or {})
        plan = _matching_plan(one, [*plans, *(earlier_plans or [])])
        if plan is None:
            plan = plan_stage(one.stage, one.specs, recipe, world_size=world_size, artifacts=tensors)
        for name, make in one.stage.artifacts.items():
            shape = _check_artifact(make, plan, recipe, tensors)
            if shape is not None:
                tensors.setdefault(f"{one.stage.name}.{name}", torch.empty(shape, device=META))
        plans.append(plan)
    return plans


def _matching_plan(described: DescribedStage, plans: list[StagePlan]) -> StagePlan | None:
    """The plan of a stage that is rehearsed just as this one is, such as that of an earlier round; None without one."""
    if next(artifact_operands(described.stage), None) is not None:
        return None
    wanted = _plan_inputs(described.stage)
    for plan in plans:
        if plan.specs == described.specs and _plan_inputs(plan.stage) == wanted:
            roles = {name: replace(role, config=described.stage.roles[name]) for name, role in plan.roles.items()}
            return replace(plan, stage=described.stage, specs=described.specs, roles=roles)
    return None


def _plan_inputs(stage: StageConfig) -> StageConfig:
    """A stage without what no rehearsal depends on: its name, where weights come from, which samples there are."""
    roles = {name: replace(role, weights=None) for name, role in stage.roles.items()}
    own = PartConfig(type="")
    data = {n: replace(s, dataset=own, artifact=None, subset=None, label_fraction=None) for n, s in stage.data.items()}
    return replace(
        stage, name="", roles=roles, data=data, artifacts={name: m.part for name, m in stage.artifacts.items()}
    )  # type: ignore[arg-type]


def reads_artifacts(stage: StageConfig) -> bool:
    """Whether what earlier stages make changes how a stage is planned."""
    data = False
    for source in stage.data.values():
        chosen = source.subset if isinstance(source.subset, tuple) else (source.subset,)
        data = data or bool(source.artifact) or any(isinstance(text, str) for text in (*chosen, source.label_fraction))
    return data or any(role.artifact for role in stage.roles.values()) or next(artifact_operands(stage), None) is not None


def artifact_tensors(stage: StageConfig, artifact_files: ArtifactFiles) -> dict[str, Tensor]:
    """The tensors that a stage reads, those that are there."""
    names = {f"{operand.role}.{operand.path}" for operand in artifact_operands(stage)}
    return {name: read_artifact(artifact_files[name])["value"] for name in sorted(names) if name in artifact_files}


def read_artifact(path: Path) -> dict[str, Any]:
    """Reads what a stage made.

    Raises:
        CheckpointError: the file is gone or damaged.
    """
    return read_checkpoint(path)


def _resolve_models(stage: StageConfig, artifact_files: ArtifactFiles) -> StageConfig:
    """The stage with the models that an earlier one chose, where it has chosen."""
    roles: dict[str, RoleConfig] = {}
    for name, role in stage.roles.items():
        if role.artifact is not None and role.artifact in artifact_files and role.model is not None:
            chosen = read_artifact(artifact_files[role.artifact])
            role = replace(
                role, model=PartConfig(type=chosen["type"], params=chosen["params"], location=role.model.location)
            )
        roles[name] = role
    return replace(stage, roles=roles)


def _artifact_builder(artifact: ArtifactConfig) -> ArtifactBuilder:
    return ARTIFACTS.build(artifact.part.type, artifact.part.params, artifact.part.location)


def _check_artifact(
    artifact: ArtifactConfig, plan: StagePlan, recipe: Recipe, tensors: Mapping[str, Tensor]
) -> tuple[int, ...] | None:
    """Checks what can be checked of a maker before it runs; returns the shape of the tensor that it will make."""
    stage, source = plan.stage, artifact.source or "train"
    spec, evaluation = plan.specs[source], plan.specs.get("eval", plan.specs[source])
    for role in _operand_roles(artifact, stage):
        for address in input_addresses(role):
            field = address.split(".", 1)[1] if ":" not in address else None
            if field is not None and field not in spec.fields and "image" not in spec.fields:
                raise ConfigError(
                    f"{artifact.location}: {artifact.name!r} is made over source {source!r}, which has no field {field!r} for "
                    f"role {role.name!r} to see; it has {', '.join(sorted(spec.fields))}"
                )
    check_artifact(artifact, plan.specs)
    setting = BuildContext(stage, plan.resolved_stage, recipe.seed, META, tensors)
    kept = stage.data[source].label_fraction
    known = isinstance(kept, float | int) and spec.samples is not None
    facts = ArtifactContext(
        classes=tuple(str(number) for number in range(evaluation.classes or 0)),
        samples=spec.samples,
        population=spec.population if spec.population is not None else spec.samples,
        labelled_samples=amount_to_count(spec.samples, kept) if known else None,  # type: ignore[arg-type]
        shapes={name: tuple(setting.shape(operand)) for name, operand in artifact.part.operands.items()},
        injected=_injected_parameters(plan),
    )
    try:
        maker = _artifact_builder(artifact)
        maker.check(facts)
        entry = ARTIFACTS.entry(artifact.part.type)
        return maker.shape(facts) if entry.facts.get("produces") == "tensor" else None
    except ValueError as error:
        raise ConfigError(f"{artifact.location}: {artifact.part.type} {error}") from None
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if told.startswith(str(artifact.location)) else f"{artifact.location}: {told}") from None


def _injected_parameters(plan: StagePlan) -> Mapping[str, Any]:
    return plan.resolved_stage.facts[plan.stage.export].injected


def _operand_roles(artifact: ArtifactConfig, stage: StageConfig) -> list[RoleConfig]:
    """The roles that run so that a maker's operands can be read, by name."""
    named = (leaf.role for operand in artifact.part.operands.values() for leaf in operand.feature_operands())
    return [stage.roles[name] for name in sorted(upstream_closure(named, stage.roles))]


def build_artifacts(
    recipe: Recipe,
    runner: Runner,
    plan: StagePlan,
    sources: Mapping[str, Source],
    folder: RunFolder,
    origins: Mapping[str, WeightsOrigin],
) -> dict[str, dict[str, Any]]:
    """Makes everything that a stage makes and that is not there yet.

    Args:
        runner: of the stage, after its last step.
        sources: of the stage, whole (not one rank's part).
        origins: where the roles' weights came from.

    Returns:
        `STAGE.NAME` -> its provenance, for the manifest.
    """
    stage, told = plan.stage, {}
    for name, make in stage.artifacts.items():
        path = folder.artifact(stage.name, name)
        found = _read_intact_artifact(path)
        if found is None:
            content = _build_content(recipe, runner, plan, sources, folder, make)
            provenance = _provenance(plan, runner, sources, make, origins, content)
            path.parent.mkdir(exist_ok=True)
            file = io.BytesIO()
            torch.save({**content, "provenance": provenance}, file)
            write_atomic(path, file.getvalue())
        else:
            provenance = found["provenance"]
        told[f"{stage.name}.{name}"] = provenance
    return told


def _read_intact_artifact(path: Path) -> Mapping[str, Any] | None:
    try:
        return read_artifact(path) if path.exists() else None
    except CheckpointError:  # damaged since: it is made again
        return None


def _build_content(
    recipe: Recipe,
    runner: Runner,
    plan: StagePlan,
    sources: Mapping[str, Source],
    folder: RunFolder,
    artifact: ArtifactConfig,
) -> dict[str, Any]:
    stage, network = plan.stage, runner.network
    source = sources[artifact.source or "train"]
    names = {*sources} | {role_source for role_source in plan.resolved_stage.sources.values()}

    def batches(epoch: int | None) -> BatchIterator:
        rows = source.evaluation_batches(stage.eval_batch_size) if epoch is None else source.batches(epoch)
        for row in rows:
            with runner.autocast():
                seen = network.observe(dict.fromkeys(names, _SourceBatch(row)), f"make.{artifact.name}")
            yield {
                **row,
                **{name: value.float() if value.is_floating_point() else value for name, value in seen.items()},
            }

    evaluation = sources.get("eval", source)
    pool = SampleOutputs(
        source=source,
        seed=derive(recipe.seed, "split", stage.name, "make", artifact.name),
        device=runner.device,
        context=ArtifactContext(
            classes=tuple(evaluation.classes),
            samples=source.num_samples,
            population=source.population,
            injected=_injected_parameters(plan),
        ),
        previous=None if artifact.previous is None else read_artifact(folder.artifact(*artifact.previous.rsplit(".", 1))),
        modules={name: network.role(name).model for name in plan.resolved_stage.order},
        operands=artifact.part.operands,
        make_batches=batches,
    )
    try:
        return _artifact_builder(artifact)(pool)
    except UserError as error:
        raise type(error)(f"{artifact.location}: {error}") from None


class _SourceBatch(dict[str, Tensor]):
    """The fields of one source, for roles that see another: a view that it does not offer is its image."""

    def __missing__(self, field: str) -> Tensor:
        return self["image"] if field != "image" and "image" in self else self._raise_missing_field(field)

    def _raise_missing_field(self, field: str) -> Tensor:
        raise KeyError(field)


def _provenance(
    plan: StagePlan,
    runner: Runner,
    sources: Mapping[str, Source],
    artifact: ArtifactConfig,
    origins: Mapping[str, WeightsOrigin],
    content: dict[str, Any],
) -> dict[str, Any]:
    """Where a made thing comes from; takes `told` out of the content, and puts what it is into it."""
    told = content.pop("summary", {})
    content["kind"] = ARTIFACTS.entry(artifact.part.type).facts.get("produces")
    content["checksum"] = content_hash(content)
    source = sources[artifact.source or "train"]
    roles = {}
    for role in _operand_roles(artifact, plan.stage):
        origin = origins.get(role.name)
        if role.mode == "frozen" and origin is not None:
            roles[role.name] = origin.sha256  # as it was loaded: what runs may have its BatchNorm folded
        else:
            roles[role.name] = state_hash(runner.network.role(role.name).model)
    return to_strict_json(
        {
            "kind": content["kind"],
            "stage": plan.stage.name,
            "maker": artifact.part.type,
            "parameters": dict(artifact.part.params),
            "operands": {name: str(operand) for name, operand in artifact.part.operands.items()},
            "source": {"name": source.name, "samples": source.num_samples, "checksum": source.checksum},
            "roles": roles,
            "previous": artifact.previous,
            "summary": told,
            "checksum": content["checksum"],
        }
    )


def content_hash(content: Any) -> str:
    """A short hash of plain values and tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in _leaves(content, ""):
        if isinstance(value, Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            digest.update(f"{key} {json.dumps(to_strict_json(value))}".encode())
    return digest.hexdigest()[:16]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from _leaves(value[name], f"{key}.{name}")
    else:
        yield key, value
