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
from kdbench.engine.build import (
    Layout,
    SampleFacts,
    build_model,
    build_network,
    role_order,
    shared_module,
    transform,
    wanted_features,
)
from kdbench.engine.features import Feature, find_module, model_output, module_state
from kdbench.engine.needs import check_needs, in_step, sizes_in_words
from kdbench.engine.network import Network
from kdbench.engine.readers import Batch, feature_of
from kdbench.engine.roles import input_feature, inputs_of, root_of, upstream_role
from kdbench.engine.shard import sharded_roles
from kdbench.engine.trace import ModuleCall, trace
from kdbench.errors import ConfigError
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
    sharded: tuple[str, ...] = ()
    """The roles whose weights lie in parts, where there are several processes."""

    @property
    def train_source(self) -> str:
        """The source whose length is an epoch: the one that the exported role's input comes from."""
        return self.layout.sources[self.stage.export]

    def input_shape(self, role: str) -> tuple[int, ...]:
        """Shape of one sample of what a role sees."""
        return self.input_shapes(role)[0]

    def input_shapes(self, role: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of one sample of everything that a role sees."""
        return tuple(self._shape(address) for address in inputs_of(self.stage.roles[role]))

    def _shape(self, address: str) -> tuple[int, ...]:
        if ":" in address:
            return self.layout.shapes[input_feature(address)]
        source, field_name = address.split(".", 1)
        return self.specs[source].fields[field_name][0]


def all_updates(stage: StageConfig, terms: tuple[str, ...]) -> tuple[UpdateConfig, ...]:
    """The stage's updates; without any, one of all trainable roles by all terms."""
    if stage.updates:
        kept = [replace(u, terms=tuple(t for t in u.terms if t in terms)) for u in stage.updates]
        return tuple(update for update in kept if update.terms)
    learning = tuple(name for name, role in stage.roles.items() if role.mode == "trainable")
    return (UpdateConfig(models=learning, terms=terms),) if terms else ()


def moved_roles(update: UpdateConfig, stage: StageConfig) -> tuple[str, ...]:
    """The roles whose own parameters an update moves."""
    return tuple(dict.fromkeys(root_of(name, stage.roles) for name in update.models))


def plan_stage(
    stage: StageConfig,
    specs: Mapping[str, SourceSpec],
    recipe: Recipe,
    *,
    world_size: int = 1,
    made: Mapping[str, Tensor] | None = None,
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
    tensors = {name: tensor.to(META) for name, tensor in (made or {}).items()}
    terms = tuple(name for name, term in stage.terms.items() if term.weight != 0)
    order = role_order(stage.roles)
    sources = {name: _root_source(name, stage, specs) for name in order}
    features = wanted_features(stage, terms, order)
    fields = {name: {key: shape for key, (shape, _) in spec.fields.items()} for name, spec in specs.items()}
    totals = {name: spec.population or spec.samples or ROWS for name, spec in specs.items()}
    wanted = {name: tuple(found) for name, found in features.items()}
    layout = Layout(order, wanted, terms, sources, {}, fields=fields, samples=totals)
    check_needs(stage, terms, sources, specs, world_size)
    if stage.accumulate > 1:
        _refuse_coupled_accumulation(stage, terms)
    _refuse_parted_selection(stage, world_size)
    if not terms and stage.terms and (stage.epochs or stage.steps):
        zero = next(iter(stage.terms.values()))
        raise ConfigError(f"{zero.place}: nothing to update: every term has weight 0")

    layout, models, calls, flops, device = _survey(
        stage, layout, specs, recipe.seed, stage.name == recipe.stages[-1].name
    )
    tensors = {name: tensor if device == META else torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    network = build_network(stage, layout, seed=recipe.seed, device=device, models=models, made=tensors)
    updates, saved = _rehearse(network, stage, layout, specs, device)
    _check_unequal_batches(network, stage, layout, specs, device, world_size)
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
    batch = max((spec_batch(stage, source) for source in layout.step_sources(stage)), default=1)
    memory = _memory(models, network, saved * batch // ROWS)
    notes = _notes(stage, specs, terms, layout.unmeasured)
    sharded = sharded_roles(recipe, stage, layout.features, models)
    return StagePlan(stage, layout, specs, roles, updates, adapters, owned, memory, notes, sharded)


def spec_batch(stage: StageConfig, source: str) -> int:
    return stage.data[source].batch_size


def _root_source(name: str, stage: StageConfig, specs: Mapping[str, SourceSpec]) -> str:
    """The source that a role's first input comes from; every field on the way must be there."""
    config = stage.roles[name]
    for address in inputs_of(config):
        if ":" not in address:
            _check_field(address, specs, config)
    while (upstream := upstream_role(config)) is not None:
        config = stage.roles[upstream]
    return config.input.split(".", 1)[0]


def _check_field(address: str, specs: Mapping[str, SourceSpec], config: RoleConfig) -> None:
    source, name = address.split(".", 1)
    if name not in specs[source].fields:
        known = ", ".join(sorted(specs[source].fields))
        raise ConfigError(f"{config.place}: source {source!r} has no field {name!r}. Its fields: {known}")


def _sample_facts(source: str, seen: tuple[int, ...], specs: Mapping[str, SourceSpec]) -> SampleFacts:
    """Classes and shapes for a role; where its own source has no classes or images, those of the evaluation source."""
    own, evaluation = specs[source], specs.get("eval", specs[source])
    spec = own if own.classes is not None else evaluation
    image = (evaluation.fields.get("image") or own.fields.get("image") or ((), ""))[0]
    return SampleFacts(spec.classes, tuple(seen), tuple(image) or None)


def _refuse_coupled_accumulation(stage: StageConfig, terms: tuple[str, ...]) -> None:
    for name in terms:
        config = stage.terms[name]
        if TERMS.entry(config.type).facts.get("space") == "batch":
            raise ConfigError(
                f"{config.place}: term {name!r} ({config.type}) couples the rows of a batch, so `accumulate: "
                f"{stage.accumulate}` would give another loss than the whole batch. Use a larger batch_size, or "
                "several processes."
            )


def _refuse_parted_selection(stage: StageConfig, world_size: int) -> None:
    """Which rows are the best is a question to the whole batch."""
    for update in stage.updates:
        if update.select is not None and (stage.accumulate > 1 or world_size > 1):
            parts = f"accumulate: {stage.accumulate}" if stage.accumulate > 1 else f"{world_size} processes"
            raise ConfigError(
                f"{update.select.place}: {update.select.type} chooses among the rows of the whole batch, which {parts} "
                "would part. Use a larger batch_size in one process."
            )


def _survey(
    stage: StageConfig, layout: Layout, specs: Mapping[str, SourceSpec], seed: int, last: bool
) -> tuple[Layout, dict[str, nn.Module], dict[str, list[ModuleCall]], dict[str, int], torch.device]:
    """Builds all models on meta (where one cannot live there, all on the CPU), and runs each once in eval mode."""
    for device in (META, torch.device("cpu")):
        survey = _Survey(stage, layout, specs, seed, device)
        try:
            for name in layout.order:
                survey.add(name)
        except _CannotBuild as error:
            if device != META:
                raise error.reason from None
            continue
        found = replace(layout, facts=survey.facts, shapes=survey.shapes, overwritten=survey.overwritten)
        return replace(found, unmeasured=survey.unmeasured(last)), survey.models, survey.calls, survey.flops, device
    raise AssertionError("unreachable")


class _CannotBuild(Exception):
    """A model cannot be built on this device."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Survey:
    """The models of a stage, one after the other: what each is built from, and what its features look like."""

    def __init__(
        self, stage: StageConfig, layout: Layout, specs: Mapping[str, SourceSpec], seed: int, device: torch.device
    ) -> None:
        self.stage, self.layout, self.specs, self.seed, self.device = stage, layout, specs, seed, device
        self.facts: dict[str, SampleFacts] = {}
        self.models: dict[str, nn.Module] = {}
        self.calls: dict[str, list[ModuleCall]] = {}
        self.flops: dict[str, int] = {}
        self.values: dict[tuple[str, Feature], Tensor] = {}
        self.shapes: dict[tuple[str, Feature], tuple[int, ...]] = {}
        self.overwritten: dict[str, frozenset[Feature]] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}

    def unmeasured(self, last: bool) -> frozenset[str]:
        """The roles that cannot be evaluated, because they do not give a value for each class.

        Raises:
            ConfigError: the result of the recipe is one of them.
        """
        spec, stage = self.specs.get("eval"), self.stage
        if spec is None or spec.classes is None:
            return frozenset()
        shapes = self.outputs.items()
        found = frozenset(name for name, shape in shapes if len(shape) != 1 or shape[0] < spec.classes)
        for name in (stage.export, *stage.evaluate):
            if name in found and (last or name in stage.evaluate):
                raise ConfigError(
                    f"{stage.roles[name].place}: role {name!r} gives {list(self.outputs[name])} per sample, but what "
                    f"is evaluated has to give a value for each of the {spec.classes} classes of source 'eval'. Name "
                    f"another role in `{'export' if name == stage.export else 'evaluate'}`."
                )
        return found

    def add(self, name: str) -> None:
        """Builds a role on what the roles before it give, and runs it."""
        stage, config = self.stage, self.stage.roles[name]
        inputs = [self._value(address) for address in inputs_of(config)]
        source = self.layout.sources[name]
        self.facts[name] = _sample_facts(source, tuple(inputs[0].shape[1:]), self.specs)
        model = self.models[name] = self._model(name).eval()
        for feature in self.layout.features[name]:
            if not feature.is_output:
                find_module(model, feature.path, _operand_place(stage, name, feature) or config.place)
        counter = FlopCounterMode(display=False)
        seen = " and ".join(str(list(value.shape[1:])) for value in inputs)
        with _in_words(f"{config.place}: role {name!r} cannot take an input of shape {seen}"):
            with torch.no_grad():
                self.calls[name] = trace(model, *inputs)
            with counter, torch.no_grad():
                output = model(*inputs)
        self.flops[name] = counter.get_total_flops() // ROWS
        self.outputs[name] = tuple(model_output(output).shape[1:])
        spoiled = set()
        for feature in self.layout.features[name]:
            tensor = model_output(output, feature.path) if feature.is_output else None
            if tensor is None:
                tensor, overwritten = self._inner(name, feature)
                spoiled |= {feature} if overwritten else set()
            self.shapes[name, feature] = tuple(tensor.shape[1:])
            self.values[name, feature] = tensor
        self.overwritten[name] = frozenset(spoiled)
        for operand in stage.reads(self.layout.terms):
            if operand.kind == "role" and operand.role == name and operand.is_state:
                try:
                    self.shapes[name, feature_of(operand)] = tuple(module_state(model, feature_of(operand)).shape)
                except ConfigError as error:
                    raise ConfigError(f"{operand.place}: {operand}: {error}") from None

    def _model(self, name: str) -> nn.Module:
        config = self.stage.roles[name]
        if config.mode == "same":
            return shared_module(config, self.models[config.of or ""])
        try:
            with self.device:
                return transform(config, build_model(config, self.stage.roles, self.facts[name], self.seed))
        except (NotImplementedError, RuntimeError) as error:
            raise _CannotBuild(error) from error

    def _value(self, address: str) -> Tensor:
        if ":" in address:
            return self.values[input_feature(address)]
        source, name = address.split(".", 1)
        return _field(self.specs[source], name, ROWS, self.device)

    def _inner(self, name: str, feature: Feature) -> tuple[Tensor, bool]:
        """A tensor like the feature, and whether something overwrites it later in the forward."""
        path = find_module(self.models[name], feature.path)[0]
        found = [c for c in self.calls[name] if c.path == path and c.call == feature.call]
        signal = (found[0].input if feature.side == "in" else found[0].output) if found else None
        if signal is None:
            times = sum(1 for c in self.calls[name] if c.path == path)
            place = _operand_place(self.stage, name, feature) or self.stage.roles[name].place
            raise ConfigError(
                f"{place}: {feature} of role {name!r} never comes: module {path!r} is called {times} time(s) in a "
                "forward"
            )
        return torch.zeros(signal.shape, dtype=signal.dtype, device=self.device), signal.overwritten


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
    for operand in stage.reads():
        if operand.kind == "role" and operand.role == role and operand.path == feature.path:
            return f"{operand.place}"
    return None


def _rehearse(
    network: Network, stage: StageConfig, layout: Layout, specs: Mapping[str, SourceSpec], device: torch.device
) -> tuple[tuple[UpdatePlan, ...], int]:
    """One step without optimiser: which parameters get a gradient, and how many bytes are kept for the backward."""
    network.train()
    rows = dict.fromkeys(layout.step_sources(stage), ROWS)
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
        where = update.place if str(update.place) else stage.terms[update.terms[0]].place
        models, what = ", ".join(update.models) or "any model", ", ".join(update.terms)
        if not total.requires_grad:
            said = f"no term of {what} reaches a parameter of {models} that trains"
            raise ConfigError(f"{where}: nothing to update: {said}")
        most = max(most, sum(saved.values()))
        total.backward()
        owned = {
            f"{role}.{n}": p
            for role in moved_roles(update, stage)
            for n, p in network.role(role).model.named_parameters()
        }
        owned |= {f"terms.{t}.{n}": p for t in update.terms for n, p in network.term(t).named_parameters()}
        learning = {n: p for n, p in owned.items() if p.requires_grad}
        reached = tuple(n for n, p in learning.items() if p.grad is not None)
        if all(_is_adapters(name) for name in reached):
            raise ConfigError(f"{where}: nothing to update: {what} reaches no parameter of {models}; {_ADAPTER_ALONE}")
        _refuse_unreached(stage, update, reached, where)
        updates.append(UpdatePlan(update, reached, tuple(n for n in learning if n not in reached)))
        for name in update.terms if len(update.terms) > 1 else ():
            _refuse_adapter_alone(network, stage.terms[name], batch, update, learning)
    network.zero_grad(set_to_none=True)
    return tuple(updates), most


_ADAPTER_ALONE = "only an adapter on a detached operand would learn, and nothing would be taught"


def _is_adapters(parameter: str) -> bool:
    return parameter.startswith("terms.") and ".adapter." in parameter


def _refuse_unreached(stage: StageConfig, update: UpdateConfig, reached: tuple[str, ...], where: Any) -> None:
    """A role that an update of the recipe names must be moved by it; without `updates`, some may stand still."""
    moved = {name.split(".", 1)[0] for name in reached}
    missing = [name for name in moved_roles(update, stage) if name not in moved]
    if stage.updates and missing and len(missing) < len(moved_roles(update, stage)):
        said = f"no term of {', '.join(update.terms)} reaches a parameter of {', '.join(missing)} that trains"
        raise ConfigError(f"{where}: nothing to update: {said}; leave it out of this update's `models`")


def _refuse_adapter_alone(
    network: Network, config: TermConfig, batch: Batch, update: UpdateConfig, learning: Mapping[str, nn.Parameter]
) -> None:
    """A term among others that would train its own adapter and nothing else."""
    own = {n for n in learning if n.startswith(f"terms.{config.name}.")}
    if not any(map(_is_adapters, own)) or any(operand.kind == "term" for operand in config.reads()):
        return
    network.zero_grad(set_to_none=True)
    network(batch, {config.name: 1}, [config.name], update.models, 1.0)[0].backward()
    if all(_is_adapters(n) for n, p in learning.items() if p.grad is not None):
        said = f"term {config.name!r} reaches no parameter of {', '.join(update.models)}; {_ADAPTER_ALONE}"
        raise ConfigError(f"{config.place}: {said}")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def forward_in_words(network: Network, stage: StageConfig, batch: Batch, update: UpdateConfig, why: str = "") -> Tensor:
    """One forward whose failures are told as the recipe's faults, naming the term where one is at fault.

    Args:
        why: what is peculiar to this batch.
    """
    counts = {name: 1 for name in update.terms}
    why = f": {why}" if why else ""
    with _in_words(f"{stage.name}: the models cannot run on this data{why}"):
        network.run_roles(batch, update.terms, update.models)
    for number, name in enumerate(update.terms):
        config = stage.terms[name]
        with _in_words(f"{config.place}: term {name!r} ({config.type}) cannot work on its operands{why}"):
            alone = not any(operand.kind == "term" for operand in config.reads())
            network(batch, counts, [name] if alone else update.terms[: number + 1], update.models, 1.0)
    return network(batch, counts, update.terms, update.models, 1.0)[0]


def _check_unequal_batches(
    network: Network,
    stage: StageConfig,
    layout: Layout,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
    world_size: int,
) -> None:
    """What is compared row by row must come in batches of equal size; where these are not, it fails here in words."""
    read = layout.step_sources(stage)
    rows: dict[str, int] = {}
    for source in read:
        alike = (other for other in rows if in_step(stage, source, other, specs, world_size))
        rows[source] = rows.get(next(alike, ""), ROWS + len(rows))
    if len(set(rows.values())) < 2:
        return
    what = f"batches differ in size ({sizes_in_words(stage, read, specs, world_size)})"
    for update in all_updates(stage, layout.terms):
        forward_in_words(network, stage, meta_batch(specs, rows, device), update, what)


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
    for source in layout.step_sources(stage):
        size = stage.data[source].batch_size * world_size
        samples = specs[source].samples
        rest = 0 if samples is None else samples % size
        if size > apart and not 0 < rest <= apart:
            continue
        rows = {name: (1 if name == source else ROWS) for name in layout.step_sources(stage)}
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


def _notes(
    stage: StageConfig, specs: Mapping[str, SourceSpec], terms: tuple[str, ...], unmeasured: frozenset[str]
) -> tuple[str, ...]:
    notes = [f"data {name}: {spec.problem}" for name, spec in specs.items() if spec.problem]
    if stage.export in unmeasured:
        notes.append(f"{stage.export} gives no value for each class, so this stage is not evaluated")
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
