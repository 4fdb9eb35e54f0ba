"""The plan of a stage, made before training: shapes, costs, and the parameters that each update trains.

The stage runs on the meta device, where tensors have shapes but no memory. One forward pass gives the shapes of
features, which determine the sizes of adapters. One backward pass finds the parameters that the terms reach. So an
error of the first training step is found before any data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdbench.config.schema import Recipe, RoleConfig, StageConfig
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.distributed.sharding import sharded_roles
from kdbench.engine.network.build import build_network
from kdbench.engine.network.features import Feature
from kdbench.engine.network.network import Network
from kdbench.engine.network.resolved_stage import ResolvedStage, required_features, role_order
from kdbench.engine.network.roles import input_addresses, parse_role_input, upstream_role
from kdbench.engine.plan.dry_run import UpdatePlan, check_last_batch, check_unequal_batches, dry_run_step
from kdbench.engine.plan.meta import DRY_RUN_ROWS, META
from kdbench.engine.plan.requirements import check_requirements
from kdbench.engine.plan.shapes import ShapeInference, infer_shapes
from kdbench.engine.plan.trace import ModuleCall
from kdbench.errors import ConfigError
from kdbench.registry import TERMS


@dataclass(frozen=True)
class RolePlan:
    """Shapes and costs of one role.

    Attributes:
        model: registered name of the model, or `as ROLE` for a role that copies or reuses another role's model.
        parameters, trainable_parameters: number of elements of all parameters, and of the trainable parameters.
        flops: FLOPs per sample of the forward pass in a step, which ends at the last feature that is read. A
            multiply-add counts as two.
        full_forward_flops: FLOPs per sample of the full forward pass, as in evaluation.
        features: feature -> shape of one sample.
        stop_module: path of the last module that a step runs; None if a step runs all modules.
        overwritten_features: features that a later in-place operation overwrites. The feature extractor clones them.
    """

    config: RoleConfig
    model: str
    parameters: int
    trainable_parameters: int
    flops: int
    full_forward_flops: int
    features: Mapping[Feature, tuple[int, ...]]
    stop_module: str | None
    overwritten_features: frozenset[Feature]


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage: its shapes, updates and costs.

    Attributes:
        stage: the stage's configuration.
        resolved_stage: the stage with the order of its roles, their features and all shapes. The network is built
            from it.
        specs: source -> specification of its fields and sizes.
        roles: role -> plan of the role, in the order in which a step runs the roles.
        updates: plans of the updates, in the order of a step.
        adapters: term -> descriptions of its adapters.
        term_parameters: term -> number of the term's own parameters, adapters included.
        memory_bytes: estimated memory of one step for weights, gradients, momentum and saved activations.
        notes: sentences for the user.
        sharded_roles: roles whose weights are sharded if there are several processes.
    """

    stage: StageConfig
    resolved_stage: ResolvedStage
    specs: Mapping[str, SourceSpec]
    roles: Mapping[str, RolePlan]
    updates: tuple[UpdatePlan, ...]
    adapters: Mapping[str, tuple[str, ...]]
    term_parameters: Mapping[str, int]
    memory_bytes: int
    notes: tuple[str, ...] = field(default_factory=tuple)
    sharded_roles: tuple[str, ...] = ()

    @property
    def train_source(self) -> str:
        """The name of the source from which the exported role's input comes. Its length defines an epoch."""
        return self.resolved_stage.sources[self.stage.export]

    def input_shape(self, role: str) -> tuple[int, ...]:
        """Returns the shape of one sample of a role's first input."""
        return self.input_shapes(role)[0]

    def input_shapes(self, role: str) -> tuple[tuple[int, ...], ...]:
        """Returns one shape for each input of a role: the shape of one sample."""
        return tuple(self._shape(address) for address in input_addresses(self.stage.roles[role]))

    def _shape(self, address: str) -> tuple[int, ...]:
        if ":" in address:
            return self.resolved_stage.shapes[parse_role_input(address)]
        source, field_name = address.split(".", 1)
        return self.specs[source].fields[field_name][0]


def plan_stage(
    stage: StageConfig,
    specs: Mapping[str, SourceSpec],
    recipe: Recipe,
    *,
    world_size: int = 1,
    artifacts: Mapping[str, Tensor] | None = None,
) -> StagePlan:
    """Plans one stage: checks its requirements, infers shapes, and runs a step on the meta device.

    Args:
        stage: the stage's configuration.
        specs: source -> specification of its fields, classes and sizes.
        recipe: the recipe, which has the seed and the settings that stages share.
        world_size: number of processes that share a batch.
        artifacts: `STAGE.NAME` -> tensor artifact of an earlier stage, or a placeholder tensor of the same shape.

    Raises:
        ConfigError: the stage has a mistake that would make its first step fail.
    """
    resolved_stage = _resolve_without_shapes(stage, specs)
    terms = resolved_stage.terms
    check_requirements(stage, terms, resolved_stage.sources, specs, world_size)
    _check_accumulation(stage, terms)
    _check_selection(stage, world_size)
    if not terms and stage.terms and (stage.epochs or stage.steps):
        location = next(iter(stage.terms.values())).location
        raise ConfigError(f"{location}: nothing to update: every term has weight 0")

    inference = infer_shapes(stage, resolved_stage, specs, recipe.seed)
    resolved_stage = inference.resolve(is_last_stage=stage.name == recipe.stages[-1].name)
    models, device = inference.models, inference.device
    tensors = {
        name: tensor.to(META) if device == META else torch.zeros(tensor.shape)
        for name, tensor in (artifacts or {}).items()
    }
    # The network takes the inferred models, so the dry run needs no second build of them.
    network = build_network(stage, resolved_stage, seed=recipe.seed, device=device, models=models, artifacts=tensors)
    updates, saved_bytes = dry_run_step(network, stage, resolved_stage, specs, device)
    check_unequal_batches(network, stage, resolved_stage, specs, device, world_size)
    check_last_batch(network, stage, resolved_stage, specs, device, world_size)

    sources = resolved_stage.step_sources(stage)
    batch_size = max((stage.data[source].batch_size for source in sources), default=1)
    return StagePlan(
        stage,
        resolved_stage,
        specs,
        {name: _plan_role(stage.roles[name], resolved_stage, inference) for name in resolved_stage.order},
        updates,
        adapters={name: _describe_adapters(network, name) for name in terms},
        term_parameters={name: sum(p.numel() for p in network.term(name).parameters()) for name in terms},
        # The dry run saved activations for DRY_RUN_ROWS rows.
        memory_bytes=_estimate_memory(network, saved_bytes * batch_size // DRY_RUN_ROWS),
        notes=_notes(stage, specs, resolved_stage, recipe, updates),
        sharded_roles=sharded_roles(recipe, stage, resolved_stage.features, models),
    )


def _resolve_without_shapes(stage: StageConfig, specs: Mapping[str, SourceSpec]) -> ResolvedStage:
    terms = tuple(name for name, term in stage.terms.items() if term.weight != 0)
    order = role_order(stage.roles)
    sources = {name: _root_source(name, stage, specs) for name in order}
    features = {name: tuple(features) for name, features in required_features(stage, terms, order).items()}
    fields = {name: {key: shape for key, (shape, _) in spec.fields.items()} for name, spec in specs.items()}
    # Some parts are sized by the number of samples; any number serves while it is unknown.
    samples = {name: spec.population or spec.samples or DRY_RUN_ROWS for name, spec in specs.items()}
    return ResolvedStage(order, features, terms, sources, {}, fields=fields, samples=samples)


def _root_source(name: str, stage: StageConfig, specs: Mapping[str, SourceSpec]) -> str:
    """Returns the name of the source from which a role's first input comes, directly or through other roles.

    Raises:
        ConfigError: the role reads a field that its source does not have.
    """
    config = stage.roles[name]
    for address in input_addresses(config):
        if ":" not in address:
            _check_field(address, specs, config)
    while (upstream := upstream_role(config)) is not None:
        config = stage.roles[upstream]
    return config.input.split(".", 1)[0]


def _check_field(address: str, specs: Mapping[str, SourceSpec], config: RoleConfig) -> None:
    source, name = address.split(".", 1)
    if name not in specs[source].fields:
        names = ", ".join(sorted(specs[source].fields))
        raise ConfigError(f"{config.location}: source {source!r} has no field {name!r}. Its fields: {names}")


def _check_accumulation(stage: StageConfig, terms: tuple[str, ...]) -> None:
    """Raises a ConfigError if a term compares rows of a batch with each other while `accumulate` splits the batch."""
    if stage.accumulate == 1:
        return
    for name in terms:
        config = stage.terms[name]
        if TERMS.entry(config.type).facts.get("space") == "batch":
            raise ConfigError(
                f"{config.location}: term {name!r} ({config.type}) couples the rows of a batch, so `accumulate: "
                f"{stage.accumulate}` would give another loss than the full batch. Use a larger batch_size, or "
                "several processes."
            )


def _check_selection(stage: StageConfig, world_size: int) -> None:
    """Raises a ConfigError if a selector would not receive the whole batch. A selector ranks all rows of a batch."""
    for update in stage.updates:
        if update.select is not None and (stage.accumulate > 1 or world_size > 1):
            cause = f"accumulate: {stage.accumulate}" if stage.accumulate > 1 else f"{world_size} processes"
            raise ConfigError(
                f"{update.select.location}: {update.select.type} selects from the rows of the full batch, but {cause} "
                "would split the batch. Use a larger batch_size in one process."
            )


def _plan_role(config: RoleConfig, resolved_stage: ResolvedStage, inference: ShapeInference) -> RolePlan:
    name = config.name
    model, features = inference.models[name], resolved_stage.features[name]
    inner_features = [feature for feature in features if not feature.is_output]
    stops_early = bool(inner_features) and len(inner_features) == len(features)
    return RolePlan(
        config,
        (config.model.type if config.model else f"as {config.source_role}") or "",
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=inference.flops[name],
        full_forward_flops=inference.full_forward_flops[name],
        features={feature: resolved_stage.shapes[name, feature] for feature in features},
        stop_module=_last_called(inference.calls[name], inner_features) if stops_early else None,
        overwritten_features=resolved_stage.overwritten.get(name, frozenset()),
    )


def _last_called(calls: list[ModuleCall], features: list[Feature]) -> str | None:
    """Returns the path of the module that the forward pass calls last, among the modules of the given features."""
    paths = {feature.path for feature in features}
    return next((call.path for call in reversed(calls) if call.path in paths), None)


def _describe_adapters(network: Network, term: str) -> tuple[str, ...]:
    edges: list[Any] = [edge for edge in network.term(term).edges if getattr(edge, "adapter", None)]
    descriptions = []
    for edge in edges:
        count = sum(p.numel() for p in edge.adapter.parameters())
        descriptions.append(f"{type(edge.adapter).__name__} on {edge.config.student} ({count:,} parameters)")
    return tuple(descriptions)


def _estimate_memory(network: Network, activations: int) -> int:
    """Returns the estimated bytes of a training step.

    The sum contains float32 weights and buffers, gradients and momentum of trainable parameters, and activations.
    """
    weights = sum(p.numel() * 4 for p in network.parameters()) + sum(b.numel() * 4 for b in network.buffers())
    optimizer = sum(p.numel() * 8 for p in network.parameters() if p.requires_grad)
    return weights + optimizer + activations


def _notes(
    stage: StageConfig,
    specs: Mapping[str, SourceSpec],
    resolved_stage: ResolvedStage,
    recipe: Recipe,
    updates: tuple[UpdatePlan, ...],
) -> tuple[str, ...]:
    notes = [f"data {name}: {spec.problem}" for name, spec in specs.items() if spec.problem]
    if stage.export in resolved_stage.unmeasured:
        notes.append(f"{stage.export} does not return a value for each class, so this stage is not evaluated")
    notes += [f"term {name} has weight 0 and is skipped" for name in stage.terms if name not in resolved_stage.terms]
    notes = list(dict.fromkeys(notes))
    if recipe.uses_compiler and any(update.inner_parameters for update in updates):
        notes.append(
            "compile: an update with `inner_step` is not compiled, because the compiler does not support second "
            "derivatives"
        )
    return tuple(notes)
