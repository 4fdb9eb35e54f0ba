"""Everything that can be known before training: shapes, sizes, costs, who moves by what. Nothing is computed.

The plan rehearses a stage on the meta device, where tensors have shapes but no memory: one forward gives the features
their shapes, the adapters their sizes, and one backward shows which parameters the terms reach. What fails here would
have failed in the first step; it fails in words, before any data is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdbench.config.schema import Recipe, RoleConfig, StageConfig, TermConfig, UpdateConfig
from kdbench.data.base import SourceSpec
from kdbench.engine.build import Layout, SampleFacts, build_model, build_network, role_order, wanted_features
from kdbench.engine.features import Feature, find_module, model_output
from kdbench.engine.network import Batch, Network, input_address, upstream_role
from kdbench.engine.trace import ModuleCall, trace
from kdbench.errors import ConfigError, nearest
from kdbench.registry import TERMS

META = torch.device("meta")
ROWS = 2  # of the rehearsal's batch: BatchNorm refuses one


@dataclass(frozen=True)
class RolePlan:
    """What `check` says of a role. FLOPs are of one sample's forward (a multiply-add is two), as far as it runs."""

    config: RoleConfig
    model: str
    parameters: int
    trainable: int
    flops: int
    features: Mapping[Feature, tuple[int, ...]]
    stops_after: str | None
    overwritten: frozenset[Feature]


@dataclass(frozen=True)
class UpdatePlan:
    """One move: these models (and the terms' own parameters) by these terms."""

    config: UpdateConfig
    parameters: tuple[str, ...]
    unreached: tuple[str, ...]


@dataclass(frozen=True)
class StagePlan:
    """A stage that has been rehearsed."""

    stage: StageConfig
    layout: Layout
    specs: Mapping[str, SourceSpec]
    roles: Mapping[str, RolePlan]
    updates: tuple[UpdatePlan, ...]
    adapters: Mapping[str, tuple[str, ...]]
    term_parameters: Mapping[str, int]
    memory_bytes: int
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def train_source(self) -> str:
        """The source whose length is an epoch: the one that the exported role's input comes from."""
        return self.layout.sources[self.stage.export]

    def input_shape(self, role: str) -> tuple[int, ...]:
        """Shape of one sample of what a role sees."""
        config = self.stage.roles[role]
        if upstream_role(config) is not None:
            return self.layout.shapes[input_address(config)]
        source, field_name = config.input.split(".", 1)
        return self.specs[source].fields[field_name][0]


def all_updates(stage: StageConfig, terms: tuple[str, ...]) -> tuple[UpdateConfig, ...]:
    """The stage's updates; without any, one of all trainable roles by all terms."""
    if stage.updates:
        kept = [replace(u, terms=tuple(t for t in u.terms if t in terms)) for u in stage.updates]
        return tuple(update for update in kept if update.terms)
    learning = tuple(name for name, role in stage.roles.items() if role.mode == "trainable")
    return (UpdateConfig(models=learning, terms=terms),) if terms else ()


def plan_stage(
    stage: StageConfig, specs: Mapping[str, SourceSpec], recipe: Recipe, *, world_size: int = 1
) -> StagePlan:
    """Rehearses one stage.

    Args:
        stage: what the recipe says.
        specs: the fields, classes and sizes of its sources.
        recipe: for the seed and the settings that stages share.
        world_size: how many processes share a batch.

    Raises:
        ConfigError: anything that the first step would have failed at.
    """
    terms = tuple(name for name, term in stage.terms.items() if term.weight != 0)
    order = role_order(stage.roles)
    sources = {name: _root_source(name, stage, specs) for name in order}
    facts = {name: _sample_facts(name, sources[name], stage, specs) for name in order}
    features = wanted_features(stage, terms, order)
    layout = Layout(order, {n: tuple(f) for n, f in features.items()}, terms, sources, facts)
    for name in terms:
        _check_reads(stage.terms[name], sources, specs)
    if stage.accumulate > 1:
        _refuse_coupled_accumulation(stage, terms)
    if not terms and stage.terms and (stage.epochs or stage.steps):
        zero = next(iter(stage.terms.values()))
        raise ConfigError(f"{zero.place}: nothing to update: every term has weight 0")

    device = META
    models, calls, device = _build_models(stage, layout, recipe.seed)
    layout, flops = _with_shapes(stage, layout, models, calls, specs, device)
    network = build_network(stage, layout, seed=recipe.seed, device=device, models=models)
    updates, saved = _rehearse(network, stage, layout, specs, device)
    _check_last_batch(network, stage, layout, specs, device, world_size)

    roles = {}
    for name in order:
        model, config = models[name], stage.roles[name]
        count = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        inner = [f for f in layout.features[name] if not f.is_output]
        stops = bool(inner) and len(inner) == len(layout.features[name])
        label = (config.model.type if config.model else f"as {config.of}") or ""
        shapes = {f: layout.shapes[name, f] for f in layout.features[name]}
        last = _last_feature(calls[name], inner) if stops else None
        roles[name] = RolePlan(
            config, label, count, trainable, flops[name], shapes, last, layout.overwritten.get(name, frozenset())
        )
    adapters = {
        name: tuple(_adapter_words(edge) for edge in network.term(name).edges if getattr(edge, "adapter", None))
        for name in layout.terms
    }
    owned = {name: sum(p.numel() for p in network.term(name).parameters()) for name in layout.terms}
    batch = max((spec_batch(stage, source) for source in set(sources.values())), default=1)
    memory = _memory(models, network, saved * batch // ROWS)
    return StagePlan(stage, layout, specs, roles, updates, adapters, owned, memory, _notes(stage, specs, terms))


def spec_batch(stage: StageConfig, source: str) -> int:
    return stage.data[source].batch_size


def _root_source(name: str, stage: StageConfig, specs: Mapping[str, SourceSpec]) -> str:
    config = stage.roles[name]
    while (upstream := upstream_role(config)) is not None:
        config = stage.roles[upstream]
    source, field_name = config.input.split(".", 1)
    if field_name not in specs[source].fields:
        known = ", ".join(sorted(specs[source].fields))
        raise ConfigError(f"{config.place}: source {source!r} has no field {field_name!r}. Its fields: {known}")
    return source


def _sample_facts(name: str, source: str, stage: StageConfig, specs: Mapping[str, SourceSpec]) -> SampleFacts:
    """Classes and image shape for a role; a role fed by noise or by another role takes the evaluation source's."""
    own, evaluation = specs[source], specs.get("eval", specs[source])
    spec = own if own.classes is not None else evaluation
    field_name = stage.roles[name].input.split(".", 1)[1] if upstream_role(stage.roles[name]) is None else "image"
    shape = (own.fields.get(field_name) or evaluation.fields.get("image") or ((), ""))[0]
    return SampleFacts(spec.classes, tuple(shape) or None)


def _check_reads(config: TermConfig, sources: Mapping[str, str], specs: Mapping[str, SourceSpec]) -> None:
    """What a term reads besides its operands must be fields of the source that its student sees."""
    entry = TERMS.entry(config.type)
    what = f"term {config.name!r} ({config.type})"
    for edge in config.edges:
        source = sources[edge.student.role]
        fields = specs[source].fields
        own = {"student", "teacher", "mask", "weight", *entry.optional_inputs}
        for name in (name for name in entry.inputs if name not in own and name not in fields):
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{config.place}: {what} reads {name!r}, which source {source!r} has not; it has {known}")
        if config.where is not None and fields.get(config.where, ((), ""))[1] != "bool":
            masks = [name for name, (_, dtype) in fields.items() if dtype == "bool"]
            hint = nearest(config.where, masks) if masks else " It has none."
            raise ConfigError(f"{config.place}: {what}: source {source!r} has no mask {config.where!r}.{hint}")
        if edge.teacher is None or entry.facts.get("space") in ("batch", "model"):
            continue
        other = sources[edge.teacher.role]
        if other != source:
            raise ConfigError(
                f"{config.place}: {what} compares row by row, but {edge.student} sees source {source!r} and "
                f"{edge.teacher} sees {other!r}"
            )


def _refuse_coupled_accumulation(stage: StageConfig, terms: tuple[str, ...]) -> None:
    for name in terms:
        config = stage.terms[name]
        if TERMS.entry(config.type).facts.get("space") == "batch":
            raise ConfigError(
                f"{config.place}: term {name!r} ({config.type}) couples the rows of a batch, so `accumulate: "
                f"{stage.accumulate}` would give another loss than the whole batch. Use a larger batch_size, or "
                "several processes."
            )


def _build_models(
    stage: StageConfig, layout: Layout, seed: int
) -> tuple[dict[str, nn.Module], dict[str, list[ModuleCall]], torch.device]:
    """Builds all models on meta; where one cannot live there, all on the CPU."""
    for device in (META, torch.device("cpu")):
        try:
            with device:
                models = {n: build_model(stage.roles[n], stage.roles, layout.facts[n], seed) for n in layout.order}
            return models, {}, device
        except (NotImplementedError, RuntimeError):
            if device != META:
                raise
    raise AssertionError("unreachable")


def _with_shapes(
    stage: StageConfig,
    layout: Layout,
    models: Mapping[str, nn.Module],
    calls: dict[str, list[ModuleCall]],
    specs: Mapping[str, SourceSpec],
    device: torch.device,
) -> tuple[Layout, dict[str, int]]:
    """Runs each model once in eval mode: shapes of the features, which are overwritten, and the cost."""
    shapes: dict[tuple[str, Feature], tuple[int, ...]] = {}
    overwritten: dict[str, frozenset[Feature]] = {}
    flops: dict[str, int] = {}
    values: dict[tuple[str, Feature], Tensor] = {}
    for name in layout.order:
        config, model = stage.roles[name], models[name].eval()
        value = _role_value(config, values, specs, device)
        for feature in layout.features[name]:
            if not feature.is_output:
                find_module(model, feature.path, _operand_place(stage, name, feature) or config.place)
        counter = FlopCounterMode(display=False)
        with _in_words(f"{config.place}: role {name!r} cannot take an input of shape {list(value.shape[1:])}"):
            with torch.no_grad():
                calls[name] = trace(model, value)
            with counter, torch.no_grad():
                output = model(value)
        flops[name] = counter.get_total_flops() // ROWS
        spoiled = set()
        for feature in layout.features[name]:
            if feature.is_output:
                tensor = model_output(output, feature.path)
                shapes[name, feature] = tuple(tensor.shape[1:])
                values[name, feature] = tensor
                continue
            path = find_module(model, feature.path)[0]
            found = [c for c in calls[name] if c.path == path and c.call == feature.call]
            signal = (found[0].input if feature.side == "in" else found[0].output) if found else None
            if signal is None:
                times = sum(1 for c in calls[name] if c.path == path)
                raise ConfigError(
                    f"{_operand_place(stage, name, feature) or config.place}: {feature} of role {name!r} never comes: "
                    f"module {path!r} is called {times} time(s) in a forward"
                )
            shapes[name, feature] = tuple(signal.shape[1:])
            values[name, feature] = torch.zeros(signal.shape, dtype=signal.dtype, device=device)
            if signal.overwritten:
                spoiled.add(feature)
        overwritten[name] = frozenset(spoiled)
    return replace(layout, shapes=shapes, overwritten=overwritten), flops


def _role_value(
    config: RoleConfig,
    values: Mapping[tuple[str, Feature], Tensor],
    specs: Mapping[str, SourceSpec],
    device: torch.device,
) -> Tensor:
    if upstream_role(config) is not None:
        return values[input_address(config)]
    source, field_name = config.input.split(".", 1)
    return _field(specs[source], field_name, ROWS, device)


def _field(spec: SourceSpec, name: str, rows: int, device: torch.device) -> Tensor:
    shape, dtype = spec.fields[name]
    return torch.zeros((rows, *shape), dtype=getattr(torch, dtype), device=device)


def meta_batch(specs: Mapping[str, SourceSpec], rows: Mapping[str, int], device: torch.device = META) -> Batch:
    """A batch of the right shapes and types, with nothing in it."""
    return {
        source: {name: _field(spec, name, rows.get(source, ROWS), device) for name in spec.fields}
        for source, spec in specs.items()
        if source in rows
    }


def _operand_place(stage: StageConfig, role: str, feature: Feature) -> Any:
    for term in stage.terms.values():
        for edge in term.edges:
            for operand in (edge.student, edge.teacher):
                if operand and operand.role == role and operand.path == feature.path:
                    return f"{operand.place}"
    return None


def _rehearse(
    network: Network, stage: StageConfig, layout: Layout, specs: Mapping[str, SourceSpec], device: torch.device
) -> tuple[tuple[UpdatePlan, ...], int]:
    """One step without optimiser: which parameters get a gradient, and how many bytes are kept for the backward."""
    network.train()
    rows = dict.fromkeys(set(layout.sources.values()), ROWS)
    batch = meta_batch(specs, rows, device)
    updates = []
    most = 0
    own = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}  # storage -> its bytes: two operations that keep the same tensor keep it once

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    for update in all_updates(stage, layout.terms):
        network.zero_grad(set_to_none=True)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = forward_in_words(network, stage, batch, update)
        if not total.requires_grad:
            models, what = ", ".join(update.models) or "any model", ", ".join(update.terms)
            raise ConfigError(
                f"{update.place}: nothing to update: no term of {what} reaches a parameter of {models} that trains"
            )
        most = max(most, sum(saved.values()))
        total.backward()
        owned = {f"{role}.{n}": p for role in update.models for n, p in network.role(role).model.named_parameters()}
        owned |= {f"terms.{t}.{n}": p for t in update.terms for n, p in network.term(t).named_parameters()}
        learning = {n: p for n, p in owned.items() if p.requires_grad}
        reached = tuple(n for n, p in learning.items() if p.grad is not None)
        updates.append(UpdatePlan(update, reached, tuple(n for n in learning if n not in reached)))
    network.zero_grad(set_to_none=True)
    return tuple(updates), most


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def forward_in_words(network: Network, stage: StageConfig, batch: Batch, update: UpdateConfig) -> Tensor:
    """One forward whose failures are told as the recipe's faults, naming the term where one is at fault."""
    counts = {name: 1 for name in update.terms}
    with _in_words(f"{stage.name}: the models cannot run on this data"):
        network.run_roles(batch, update.terms, update.models)
    for name in update.terms:
        config = stage.terms[name]
        with _in_words(f"{config.place}: term {name!r} ({config.type}) cannot work on its operands"):
            network(batch, counts, [name], update.models, 1.0)
    return network(batch, counts, update.terms, update.models, 1.0)[0]


def _check_last_batch(
    network: Network,
    stage: StageConfig,
    layout: Layout,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
    world_size: int,
) -> None:
    """A batch of one row, as it may come at the end of an epoch, must not stop the run after hours."""
    apart = 1 if stage.sync_batchnorm else world_size  # how many share a batch, each with its own statistics
    for source in set(layout.sources.values()):
        size = stage.data[source].batch_size * world_size
        samples = specs[source].samples
        rest = 0 if samples is None else samples % size
        if size > apart and not 0 < rest <= apart:
            continue
        rows = {name: (1 if name == source else ROWS) for name in set(layout.sources.values())}
        for update in all_updates(stage, layout.terms):
            try:
                network(
                    meta_batch(specs, rows, device), dict.fromkeys(update.terms, 1), update.terms, update.models, 1.0
                )
            except ValueError as error:
                why = f"batch_size {size // world_size}" if size <= apart else f"{samples} samples in batches of {size}"
                place = stage.data[source].places.get("batch_size", stage.data[source].place)
                raise ConfigError(
                    f"{place}: {why} leaves a batch of one row, which BatchNorm cannot normalise "
                    f"({error}). Choose another batch_size."
                ) from None


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


def _notes(stage: StageConfig, specs: Mapping[str, SourceSpec], terms: tuple[str, ...]) -> tuple[str, ...]:
    notes = [f"data {name}: {spec.problem}" for name, spec in specs.items() if spec.problem]
    notes += [f"term {name} has weight 0 and costs nothing" for name in stage.terms if name not in terms]
    return tuple(dict.fromkeys(notes))


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Turns the failure of a model or a term on the rehearsal's shapes into the recipe's fault."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = " Nothing in a training step may read a tensor's value on the host." if "meta" in reason else ""
        raise ConfigError(f"{what}: {type(error).__name__}: {reason}{hint}") from error
