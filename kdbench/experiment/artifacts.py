"""Plans, builds and reads artifacts: datasets, subsets, tensors and models that one stage builds for later stages.

An artifact is a file `stages/STAGE.NAME.pt` in the run folder (see `ArtifactFile`). It is a function of the recipe
and its seed alone, so an intact file of the same run is never built again.
"""

from __future__ import annotations

import hashlib
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
from kdbench.data.datasets.artifact import ArtifactFiles, expected_spec
from kdbench.data.describe import describe_sources
from kdbench.data.loading.batch import Batch
from kdbench.data.loading.source import Source
from kdbench.data.sampling.split import amount_to_count
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.build_terms import TermBuilder
from kdbench.engine.network.roles import input_addresses
from kdbench.engine.plan.meta import META
from kdbench.engine.plan.plan import StagePlan, plan_stage
from kdbench.engine.plan.requirements import check_artifact
from kdbench.engine.state import checkpoint
from kdbench.engine.state.run_state import ArtifactFile
from kdbench.engine.state.weight_loader import WeightsOrigin
from kdbench.engine.state.weights import read_checkpoint, state_hash
from kdbench.engine.train.runner import Runner
from kdbench.errors import CheckpointError, ConfigError, UserError
from kdbench.files import to_strict_json, translate_disk_errors
from kdbench.randomness import derive
from kdbench.registry import ARTIFACTS
from kdbench.run_folder import RunFolder


@dataclass(frozen=True)
class DescribedStage:
    """A stage together with descriptions of its data sources.

    Attributes:
        stage: the stage, in which existing model artifacts are replaced by their models.
        specs: source -> description of its samples. A dataset artifact that does not exist yet has its expected
            description.
    """

    stage: StageConfig
    specs: Mapping[str, SourceSpec]


def find_artifact_files(recipe: Recipe, folder: RunFolder) -> dict[str, Path]:
    """Returns `STAGE.NAME` -> path for all artifacts that a run has built so far."""
    paths = {
        f"{stage.name}.{name}": folder.artifact(stage.name, name) for stage in recipe.stages for name in stage.artifacts
    }
    return {name: path for name, path in paths.items() if path.exists()}


def describe_stages(recipe: Recipe, artifact_files: ArtifactFiles | None = None) -> list[DescribedStage]:
    """Describes the sources of every stage, in order.

    A dataset artifact that is not built yet has its expected description.

    Raises:
        ConfigError: a source does not fit its dataset.
        DataError: a dataset or an artifact file cannot be read.
    """
    artifact_files = artifact_files or {}
    expected_specs: dict[str, SourceSpec] = {}
    described_stages = []
    for stage in recipe.stages:
        specs = describe_sources(
            stage.data,
            stage.validation,
            recipe.data_root,
            artifact_files=artifact_files,
            artifact_specs=expected_specs,
        )
        for name, artifact in stage.artifacts.items():
            if ARTIFACTS.entry(artifact.part.type).facts.get("produces") == "dataset":
                source_spec = specs.get(artifact.source or "")
                expected_specs[f"{stage.name}.{name}"] = expected_spec(artifact.part.type, source_spec, specs["eval"])
        described_stages.append(DescribedStage(_resolve_models(stage, artifact_files), specs))
    return described_stages


def plan_stages(
    recipe: Recipe,
    described_stages: list[DescribedStage] | None = None,
    *,
    artifact_files: ArtifactFiles | None = None,
    world_size: int = 1,
    earlier_plans: list[StagePlan] | None = None,
) -> list[StagePlan]:
    """Returns the plan of every stage. A meta tensor of equal shape replaces a tensor artifact that is not built yet.

    Args:
        described_stages: return value of `describe_stages`; None: this function calls `describe_stages`.
        artifact_files: `STAGE.NAME` -> path of the artifacts that exist.
        world_size: number of processes.
        earlier_plans: plans of the same run that were made before some artifacts existed. The plan of an unchanged
            stage is reused.

    Raises:
        ConfigError: a stage or an artifact has a mistake that would make the first step or the artifact builder fail.
    """
    artifact_files = artifact_files or {}
    tensors: dict[str, Tensor] = {}
    plans: list[StagePlan] = []
    if described_stages is None:
        described_stages = describe_stages(recipe, artifact_files)
    for described in described_stages:
        stage = described.stage
        tensors |= artifact_tensors(stage, artifact_files)
        plan = _matching_plan(described, [*plans, *(earlier_plans or [])])
        if plan is None:
            plan = plan_stage(stage, described.specs, recipe, world_size=world_size, artifacts=tensors)
        for name, artifact in stage.artifacts.items():
            shape = _check_artifact(artifact, plan, recipe, tensors)
            if shape is not None:
                tensors.setdefault(f"{stage.name}.{name}", torch.empty(shape, device=META))
        plans.append(plan)
    return plans


def _matching_plan(described: DescribedStage, plans: list[StagePlan]) -> StagePlan | None:
    """Returns a plan for a stage by adapting the plan of an equal stage, or None if no stage is equal.

    For example, an earlier round of a loop is an equal stage.
    """
    if next(artifact_operands(described.stage), None) is not None:
        return None
    inputs = _plan_inputs(described.stage)
    for plan in plans:
        if plan.specs == described.specs and _plan_inputs(plan.stage) == inputs:
            roles = {name: replace(role, config=described.stage.roles[name]) for name, role in plan.roles.items()}
            return replace(plan, stage=described.stage, specs=described.specs, roles=roles)
    return None


def _plan_inputs(stage: StageConfig) -> StageConfig:
    """Returns a copy of a stage without the entries that do not change its plan.

    These entries are names, origins of weights, datasets and subsets.
    """
    roles = {name: replace(role, weights=None) for name, role in stage.roles.items()}
    no_dataset = PartConfig(type="")
    data = {
        name: replace(source, dataset=no_dataset, artifact=None, subset=None, label_fraction=None)
        for name, source in stage.data.items()
    }
    return replace(
        stage, name="", roles=roles, data=data, artifacts={name: a.part for name, a in stage.artifacts.items()}
    )  # type: ignore[arg-type]


def reads_artifacts(stage: StageConfig) -> bool:
    """Returns whether the plan of a stage depends on artifacts of earlier stages."""
    for source in stage.data.values():
        subsets = source.subset if isinstance(source.subset, tuple) else (source.subset,)
        if source.artifact or any(isinstance(item, str) for item in (*subsets, source.label_fraction)):
            return True
    return any(role.artifact for role in stage.roles.values()) or next(artifact_operands(stage), None) is not None


def artifact_tensors(stage: StageConfig, artifact_files: ArtifactFiles) -> dict[str, Tensor]:
    """Returns `STAGE.NAME` -> tensor for all existing tensor artifacts that the terms of a stage read."""
    names = {f"{operand.role}.{operand.path}" for operand in artifact_operands(stage)}
    return {
        name: read_artifact(artifact_files[name], kind="tensor").content["value"]
        for name in sorted(names)
        if name in artifact_files
    }


def read_artifact(path: Path, *, kind: str | None = None, identity: str | None = None) -> ArtifactFile:
    """Reads an artifact file and returns its checked content.

    Args:
        kind: expected kind of artifact; None: any kind.
        identity: identity of the run that must have built the artifact; None: any run.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or of another run.
    """
    artifact = ArtifactFile.from_tree(read_checkpoint(path), path, identity=identity)
    if kind is not None and artifact.kind != kind:
        raise CheckpointError(f"{path} is an artifact of kind {artifact.kind!r}; expected {kind!r}")
    return artifact


def _resolve_models(stage: StageConfig, artifact_files: ArtifactFiles) -> StageConfig:
    """Returns a copy of the stage in which each existing model artifact is replaced by the model that it contains."""
    roles: dict[str, RoleConfig] = {}
    for name, role in stage.roles.items():
        if role.artifact is not None and role.artifact in artifact_files and role.model is not None:
            model = read_artifact(artifact_files[role.artifact], kind="model").content
            role = replace(
                role, model=PartConfig(type=model["type"], params=model["params"], location=role.model.location)
            )
        roles[name] = role
    return replace(stage, roles=roles)


def _artifact_builder(artifact: ArtifactConfig) -> ArtifactBuilder:
    return ARTIFACTS.build(artifact.part.type, artifact.part.params, artifact.part.location)


def _check_artifact(
    artifact: ArtifactConfig, plan: StagePlan, recipe: Recipe, tensors: Mapping[str, Tensor]
) -> tuple[int, ...] | None:
    """Runs the checks of an artifact builder and returns the shape of a tensor artifact (None for other kinds).

    Raises:
        ConfigError: the artifact cannot be built from its source and operands.
    """
    source = artifact.source or "train"
    _check_fields(artifact, plan, source)
    check_artifact(artifact, plan.specs)
    context = _dry_run_context(artifact, plan, recipe, source, tensors)
    try:
        builder = _artifact_builder(artifact)
        builder.check(context)
        is_tensor = ARTIFACTS.entry(artifact.part.type).facts.get("produces") == "tensor"
        return builder.output_shape(context) if is_tensor else None
    except ValueError as error:
        raise ConfigError(f"{artifact.location}: {artifact.part.type} {error}") from None
    except ConfigError as error:
        message, location = str(error), str(artifact.location)
        raise ConfigError(message if message.startswith(location) else f"{location}: {message}") from None


def _check_fields(artifact: ArtifactConfig, plan: StagePlan, source: str) -> None:
    """Raises ConfigError if a network reads a field that the artifact's source does not have.

    Only the networks that compute operands of the artifact builder are checked.
    """
    fields = plan.specs[source].fields
    for role in _operand_roles(artifact, plan.stage):
        for address in input_addresses(role):
            field = address.split(".", 1)[1] if ":" not in address else None
            if field is not None and field not in fields and "image" not in fields:
                raise ConfigError(
                    f"{artifact.location}: artifact {artifact.name!r} reads source {source!r}, which has no field "
                    f"{field!r} for role {role.name!r}; it has {', '.join(sorted(fields))}"
                )


def _dry_run_context(
    artifact: ArtifactConfig, plan: StagePlan, recipe: Recipe, source: str, tensors: Mapping[str, Tensor]
) -> ArtifactContext:
    spec, evaluation = plan.specs[source], plan.specs.get("eval", plan.specs[source])
    builder = TermBuilder(plan.stage, plan.resolved_stage, recipe.seed, META, tensors)
    fraction = plan.stage.data[source].label_fraction
    labelled_samples = None
    if isinstance(fraction, float | int) and spec.samples is not None:
        labelled_samples = amount_to_count(spec.samples, fraction)
    return ArtifactContext(
        classes=tuple(str(number) for number in range(evaluation.classes or 0)),
        samples=spec.samples,
        population=spec.population if spec.population is not None else spec.samples,
        labelled_samples=labelled_samples,
        shapes={name: tuple(builder.operand_shape(operand)) for name, operand in artifact.part.operands.items()},
        injected=_injected_parameters(plan),
    )


def _injected_parameters(plan: StagePlan) -> Mapping[str, Any]:
    return plan.resolved_stage.facts[plan.stage.export].injected


def _operand_roles(artifact: ArtifactConfig, stage: StageConfig) -> list[RoleConfig]:
    """Returns the roles (networks) that must run to compute the operands of an artifact builder, sorted by name."""
    names = (leaf.role for operand in artifact.part.operands.values() for leaf in operand.feature_operands())
    return [stage.roles[name] for name in sorted(upstream_closure(names, stage.roles))]


def build_artifacts(
    recipe: Recipe,
    runner: Runner,
    sources: Mapping[str, Source],
    folder: RunFolder,
    origins: Mapping[str, WeightsOrigin],
    identity: str,
) -> dict[str, Mapping[str, Any]]:
    """Builds all artifacts of a stage for which the run folder has no intact file of this run.

    Args:
        runner: the stage's runner, after its last step.
        sources: name -> source of the stage, with all samples (not sharded).
        origins: role -> origin of its initial weights.
        identity: the run's identity.

    Returns:
        `STAGE.NAME` -> provenance of the artifact, for the manifest.
    """
    stage = runner.stage
    provenance: dict[str, Mapping[str, Any]] = {}
    for name, artifact in stage.artifacts.items():
        path = folder.artifact(stage.name, name)
        file = _read_intact_artifact(path, identity)
        if file is None:
            content = _build_content(recipe, runner, sources, folder, artifact, identity)
            file = _artifact_file(runner, sources, artifact, origins, content, identity)
            with translate_disk_errors(path):
                path.parent.mkdir(exist_ok=True)
            checkpoint.save(path, file)
        provenance[f"{stage.name}.{name}"] = file.provenance
    return provenance


def _read_intact_artifact(path: Path, identity: str) -> ArtifactFile | None:
    try:
        return read_artifact(path, identity=identity) if path.exists() else None
    except CheckpointError:  # damaged, or of another run: it is built again
        return None


def _build_content(
    recipe: Recipe,
    runner: Runner,
    sources: Mapping[str, Source],
    folder: RunFolder,
    artifact: ArtifactConfig,
    identity: str,
) -> dict[str, Any]:
    """Runs an artifact builder over its source and returns the artifact's content."""
    stage, resolved_stage, network = runner.stage, runner.plan.resolved_stage, runner.network
    source = sources[artifact.source or "train"]
    names = {*sources, *resolved_stage.sources.values()}

    def make_batches(epoch: int | None) -> BatchIterator:
        batches = source.evaluation_batches(stage.eval_batch_size) if epoch is None else source.batches(epoch)
        for batch in batches:
            with runner.autocast():
                fields = Batch(_SourceFields(batch.fields))
                # The owner string seeds random numbers of the forward; it must not change.
                operands = network.observe(dict.fromkeys(names, fields), f"make.{artifact.name}")
            yield {
                **batch.fields,
                **{name: value.float() if value.is_floating_point() else value for name, value in operands.items()},
            }

    previous = None
    if artifact.previous is not None:
        previous = read_artifact(folder.artifact(*artifact.previous.rsplit(".", 1)), identity=identity).content
    outputs = SampleOutputs(
        source=source,
        # The stream keys must not change: they determine every random number of the builder.
        seed=derive(recipe.seed, "split", stage.name, "make", artifact.name),
        device=runner.device,
        context=ArtifactContext(
            classes=tuple(sources.get("eval", source).classes),
            samples=source.num_samples,
            population=source.population,
            injected=_injected_parameters(runner.plan),
        ),
        previous=previous,
        modules={name: network.role(name).model for name in resolved_stage.order},
        operands=artifact.part.operands,
        make_batches=make_batches,
    )
    try:
        return _artifact_builder(artifact)(outputs)
    except UserError as error:
        raise type(error)(f"{artifact.location}: {error}") from None


class _SourceFields(dict[str, Tensor]):
    """Gives roles access to the fields of one source.

    A view that the source does not have is replaced by its field `image`.
    """

    def __missing__(self, field: str) -> Tensor:
        if field == "image" or "image" not in self:
            raise KeyError(field)
        return self["image"]


def _artifact_file(
    runner: Runner,
    sources: Mapping[str, Source],
    artifact: ArtifactConfig,
    origins: Mapping[str, WeightsOrigin],
    content: dict[str, Any],
    identity: str,
) -> ArtifactFile:
    """Returns an artifact file: the artifact's content with kind, checksum and provenance."""
    summary = content.pop("summary", {})
    kind = ARTIFACTS.entry(artifact.part.type).facts["produces"]
    checksum = content_hash({**content, "kind": kind})
    source = sources[artifact.source or "train"]
    roles = {}
    for role in _operand_roles(artifact, runner.stage):
        origin = origins.get(role.name)
        if role.mode == "frozen" and origin is not None:
            roles[role.name] = origin.sha256  # as loaded: the model that runs may have folded BatchNorm
        else:
            roles[role.name] = state_hash(runner.network.role(role.name).model)
    provenance = to_strict_json(
        {
            "kind": kind,
            "stage": runner.stage.name,
            "builder": artifact.part.type,
            "parameters": dict(artifact.part.params),
            "operands": {name: str(operand) for name, operand in artifact.part.operands.items()},
            "source": {"name": source.name, "samples": source.num_samples, "checksum": source.checksum},
            "roles": roles,
            "previous": artifact.previous,
            "summary": summary,
            "checksum": checksum,
        }
    )
    return ArtifactFile(identity=identity, kind=kind, checksum=checksum, provenance=provenance, content=content)


def content_hash(content: Any) -> str:
    """Returns a short hash of nested plain values and tensors: names, dtypes, shapes and bytes."""
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
