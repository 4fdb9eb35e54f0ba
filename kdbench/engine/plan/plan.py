"""Everything that can be known before training: shapes, sizes, costs, who moves by what. Nothing is computed.

The plan rehearses a stage on the meta device, where tensors have shapes but no memory: one forward gives the features
their shapes, the adapters their sizes, and one backward shows which parameters the terms reach. What fails here would
have failed in the first step; it fails in words, before any data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    """What `check` says of a role.

    flops: of one sample's forward, as far as a step runs it (a multiply-add is two). whole_flops: of all of it, as it
    is evaluated and exported.
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
    """A stage that has been rehearsed."""

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
    """The roles whose weights lie in parts, where there are several processes."""

    @property
    def train_source(self) -> str:
        """The source whose length is an epoch: the one that the exported role's input comes from."""
        return self.resolved_stage.sources[self.stage.export]

    def input_shape(self, role: str) -> tuple[int, ...]:
        """Shape of one sample of what a role sees."""
        return self.input_shapes(role)[0]

    def input_shapes(self, role: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of one sample of everything that a role sees."""
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
    """Rehearses one stage.

    Args:
        stage: what the recipe says.
        specs: the fields, classes and sizes of its sources.
        recipe: for the seed and the settings that stages share.
        world_size: how many processes share a batch.
        made: the tensors that earlier stages make, by `STAGE.NAME`, or stand-ins of their shapes.

    Raises:
        ConfigError: anything that the first step would have failed at.
    """
    tensors = {name: tensor.to(META) for name, tensor in (artifacts or {}).items()}
    terms = tuple(name for name, term in stage.terms.items() if term.weight != 0)
    order = role_order(stage.roles)
    sources = {name: _root_source(name, stage, specs) for name in order}
    features = required_features(stage, terms, order)
    fields = {name: {key: shape for key, (shape, _) in spec.fields.items()} for name, spec in specs.items()}
    totals = {name: spec.population or spec.samples or DRY_RUN_ROWS for name, spec in specs.items()}
    wanted = {name: tuple(found) for name, found in features.items()}
    layout = ResolvedStage(order, wanted, terms, sources, {}, fields=fields, samples=totals)
    check_requirements(stage, terms, sources, specs, world_size)
    if stage.accumulate > 1:
        _refuse_coupled_accumulation(stage, terms)
    _refuse_parted_selection(stage, world_size)
    if not terms and stage.terms and (stage.epochs or stage.steps):
        zero = next(iter(stage.terms.values()))
        raise ConfigError(f"{zero.location}: nothing to update: every term has weight 0")

    found = infer_shapes(stage, layout, specs, recipe.seed)
    layout, models, device = found.resolve(is_last_stage=stage.name == recipe.stages[-1].name), found.models, found.device
    tensors = {name: tensor if device == META else torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    network = build_network(stage, layout, seed=recipe.seed, device=device, models=models, artifacts=tensors)
    updates, saved = dry_run_step(network, stage, layout, specs, device)
    check_unequal_batches(network, stage, layout, specs, device, world_size)
    check_last_batch(network, stage, layout, specs, device, world_size)

    roles = {name: _role_plan(stage.roles[name], layout, found) for name in order}
    adapters = {
        name: tuple(_adapter_words(edge) for edge in network.term(name).edges if getattr(edge, "adapter", None))
        for name in layout.terms
    }
    owned = {name: sum(p.numel() for p in network.term(name).parameters()) for name in layout.terms}
    batch = max((stage.data[source].batch_size for source in layout.step_sources(stage)), default=1)
    memory = _memory(models, network, saved * batch // DRY_RUN_ROWS)
    notes = _notes(stage, specs, terms, layout.unmeasured)
    if recipe.uses_compiler and any(planned.inner_parameters for planned in updates):
        notes += (
            "compile: an update with `inner_step` runs as it is: the compiler takes no gradient through a gradient",
        )
    sharded = sharded_roles(recipe, stage, layout.features, models)
    return StagePlan(stage, layout, specs, roles, updates, adapters, owned, memory, notes, sharded)


def _root_source(name: str, stage: StageConfig, specs: Mapping[str, SourceSpec]) -> str:
    """The source that a role's first input comes from; every field on the way must be there."""
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
        known = ", ".join(sorted(specs[source].fields))
        raise ConfigError(f"{config.location}: source {source!r} has no field {name!r}. Its fields: {known}")


def _refuse_coupled_accumulation(stage: StageConfig, terms: tuple[str, ...]) -> None:
    for name in terms:
        config = stage.terms[name]
        if TERMS.entry(config.type).facts.get("space") == "batch":
            raise ConfigError(
                f"{config.location}: term {name!r} ({config.type}) couples the rows of a batch, so `accumulate: "
                f"{stage.accumulate}` would give another loss than the whole batch. Use a larger batch_size, or "
                "several processes."
            )


def _refuse_parted_selection(stage: StageConfig, world_size: int) -> None:
    """Which rows are the best is a question to the whole batch."""
    for update in stage.updates:
        if update.select is not None and (stage.accumulate > 1 or world_size > 1):
            parts = f"accumulate: {stage.accumulate}" if stage.accumulate > 1 else f"{world_size} processes"
            raise ConfigError(
                f"{update.select.location}: {update.select.type} chooses among the rows of the whole batch, which {parts} "
                "would part. Use a larger batch_size in one process."
            )


def _role_plan(config: RoleConfig, layout: ResolvedStage, found: ShapeInference) -> RolePlan:
    name = config.name
    model, features = found.models[name], layout.features[name]
    inner = [feature for feature in features if not feature.is_output]
    stops = bool(inner) and len(inner) == len(features)
    return RolePlan(
        config,
        (config.model.type if config.model else f"as {config.source_role}") or "",
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=found.flops[name],
        full_forward_flops=found.full_forward_flops[name],
        features={feature: layout.shapes[name, feature] for feature in features},
        stop_module=_last_feature(found.calls[name], inner) if stops else None,
        overwritten_features=layout.overwritten.get(name, frozenset()),
    )


def _last_feature(calls: list[ModuleCall], features: list[Feature]) -> str | None:
    """The wanted module that is called last: the model runs no further."""
    wanted = {feature.path for feature in features}
    last = [call.path for call in calls if call.path in wanted]
    return last[-1] if last else None


def _adapter_words(edge: Any) -> str:
    count = sum(p.numel() for p in edge.adapter.parameters())
    return f"{type(edge.adapter).__name__} on {edge.edge.student} ({count:,} parameters)"


def _memory(models: Mapping[str, nn.Module], network: Network, activations: int) -> int:
    """Bytes: weights of everything; gradient and momentum of what trains; what the forward keeps for the backward."""
    weights = sum(p.numel() * 4 for p in network.parameters()) + sum(b.numel() * 4 for b in network.buffers())
    learning = sum(p.numel() * 8 for p in network.parameters() if p.requires_grad)
    return weights + learning + activations


def _notes(
    stage: StageConfig, specs: Mapping[str, SourceSpec], terms: tuple[str, ...], unmeasured: frozenset[str]
) -> tuple[str, ...]:
    notes = [f"data {name}: {spec.problem}" for name, spec in specs.items() if spec.problem]
    if stage.export in unmeasured:
        notes.append(f"{stage.export} gives no value for each class, so this stage is not evaluated")
    notes += [f"term {name} has weight 0 and costs nothing" for name in stage.terms if name not in terms]
    return tuple(dict.fromkeys(notes))
