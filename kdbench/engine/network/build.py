"""From the words of a stage to its modules: models, adapters, terms, and the network that wires them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdbench.config.schedules import Schedule, build_schedule
from kdbench.config.schema import (
    EdgeConfig,
    OperandConfig,
    PartConfig,
    PartWithOperands,
    RoleConfig,
    StageConfig,
    TermConfig,
)
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import find_module
from kdbench.engine.network.network import Network
from kdbench.engine.network.operands import OperandReader, operand_feature, operand_source
from kdbench.engine.network.resolved_stage import ResolvedStage, SampleFacts, architecture
from kdbench.engine.network.roles import Role
from kdbench.engine.network.terms import TermEdge, TermGroup, WiredPart
from kdbench.errors import ConfigError, Location
from kdbench.models.weight_transform import effective_state_dict
from kdbench.randomness import seeded
from kdbench.registry import (
    ADAPTERS,
    COMBINERS,
    MODELS,
    ROUTERS,
    SAMPLE_WEIGHTS,
    TERMS,
    WEIGHT_TRANSFORMS,
    Entry,
    Registry,
)


def build_model(config: RoleConfig, roles: Mapping[str, RoleConfig], facts: SampleFacts, seed: int) -> nn.Module:
    """Builds a role's model with the initial weights that (seed, role) give it, on the current default device."""
    named = architecture(config, roles)
    root = config
    while root.model is None and root.source_role is not None:
        root = roles[root.source_role]
    with seeded(seed, "init", root.name, *([root.init_index] if root.init_index else [])):
        return _built(MODELS, named.type, named.params, named.location, **facts.injected)


def reused_module(config: RoleConfig, model: nn.Module) -> nn.Module:
    """The network of a role that is the `reuse` as another, or the part of it that the role is."""
    return model if config.module_path is None else find_module(model, config.module_path, config.location)[1]


def apply_weight_transforms(config: RoleConfig, model: nn.Module) -> nn.Module:
    """Puts what the recipe does to a role's weights in every forward in place; returns the model itself."""
    for named in config.transforms:
        with _placed(named.location):
            _built(WEIGHT_TRANSFORMS, named.type, named.params, named.location).apply(model)
    return model


def exported_state(config: RoleConfig, model: nn.Module) -> dict[str, Tensor]:
    """The weights that the forward really uses, under the names of the plain model."""
    return effective_state_dict(model) if config.transforms else model.state_dict()


@contextlib.contextmanager
def _placed(place: Location) -> Iterator[None]:
    """Tells what a part cannot do to this model with its place in the recipe."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _built(registry: Registry, name: str, params: Mapping[str, Any], place: Location, **injected: Any) -> Any:
    """Builds a part; what its constructor refuses is told with the place in the recipe."""
    try:
        return registry.build(name, params, place, **injected)
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if told.startswith(str(place)) else f"{place}: {told}") from None


def _moving_value(value: Any, device: torch.device, moving: list[tuple[Tensor, Schedule]]) -> Any:
    """Turns a schedule into a 0-dim tensor that the runner moves; anything else stays as it is."""
    if not isinstance(value, PartConfig):
        return value
    schedule = build_schedule(value)
    tensor = torch.tensor(float(schedule(0.0, 1.0)), device=device)
    moving.append((tensor, schedule))
    return tensor


@dataclass(frozen=True)
class BuildContext:
    """What terms and readers are built from."""

    stage: StageConfig
    layout: ResolvedStage
    seed: int
    device: torch.device
    artifacts: Mapping[str, Tensor]

    def shape(self, operand: OperandConfig) -> Size:
        """Of one sample of an operand; of what has no rows, the whole shape."""
        if operand.kind == "combined":
            return self.shape(operand.parts[0])
        if operand.kind == "field":
            return Size(self.layout.fields[operand.role][operand.path])
        if operand.kind == "term":
            return Size((len(self.stage.terms[operand.role].edges),))
        if operand.kind == "artifact":
            return self.tensor(operand).shape
        return Size(self.layout.shapes[operand.role, operand_feature(operand)])

    def batched(self, operand: OperandConfig) -> Size:
        """The same with a batch of two rows, where there are rows."""
        shape = self.shape(operand)
        return shape if operand.kind == "artifact" or operand.is_state else Size((2, *shape))

    def tensor(self, operand: OperandConfig) -> Tensor:
        return self.artifacts[f"{operand.role}.{operand.path}"].to(self.device)

    def reader(self, operand: OperandConfig, adapter: nn.Module | None, *key: str) -> OperandReader:
        """What reads an operand; `key` names the stream of a combiner's initial weights."""
        if operand.combiner is None:
            made = self.tensor(operand) if operand.kind == "artifact" else None
            return OperandReader(operand, adapter, artifact=made)
        part = operand.combiner
        shapes = {name: tuple(self.shape(own)) for name, own in part.operands.items()}
        with seeded(self.seed, "term", *key, "combiner"):
            combiner = _built(COMBINERS, part.type, part.params, part.location, parts=len(operand.parts), shapes=shapes)
        parts = [self.independent_reader(own, *key, f"part{i}") for i, own in enumerate(operand.parts)]
        named = {name: self.independent_reader(own, *key, name) for name, own in part.operands.items()}
        return OperandReader(operand, adapter, combiner=combiner, parts=parts, named=named)

    def independent_reader(self, operand: OperandConfig, *key: str) -> OperandReader:
        """Reads an operand that is compared with no other; an adapter, where it has one, keeps its shape."""
        adapter = self.adapter(operand, None, operand, *key) if operand.adapter is not None else None
        return self.reader(operand, adapter, *key)

    def adapter(self, operand: OperandConfig, default: str | None, other: OperandConfig, *key: str) -> nn.Module | None:
        """The adapter that makes an operand fit another one, or None."""
        adapter = operand.adapter or (PartConfig(type=default) if default else None)
        if adapter is None or adapter.type in ("none", "identity"):
            return None
        place = adapter.location if adapter.location != Location() else operand.location
        source, target = tuple(self.shape(operand)), tuple(self.shape(other))
        with seeded(self.seed, "term", *key, "adapter"):
            try:
                return _built(ADAPTERS, adapter.type, adapter.params, place, source=source, target=target)
            except ValueError as error:
                raise ConfigError(f"{place}: adapter {adapter.type!r} of term {key[0]!r}: {error}") from None

    def adapted(self, operand: OperandConfig, adapter: nn.Module | None, target: OperandConfig | None) -> Size:
        """The batched shape of an operand after its adapter, which makes it the shape of its target."""
        if adapter is None:
            return self.batched(operand)
        if isinstance(getattr(adapter, "shape", None), tuple):  # an adapter that decides by itself
            return Size((2, *adapter.shape))  # type: ignore[misc]
        return self.batched(target) if target is not None else self.batched(operand)


def build_term(config: TermConfig, setting: BuildContext, gives: frozenset[str]) -> TermGroup:
    """Builds one entry of `terms`: an instance and readers for each edge, sized by the features' shapes.

    Args:
        gives: which of its outputs later terms read.

    Raises:
        ConfigError: operands that the term cannot compare, or parameters that it refuses.
    """
    entry = TERMS.entry(config.type)
    moving: list[tuple[Tensor, Schedule]] = []
    weight = _moving_value(config.weight, setting.device, moving)
    params = {key: _moving_value(value, setting.device, moving) for key, value in config.params.items()}
    edges = []
    for number, edge in enumerate(config.edges):
        edges.append(_build_edge(config, entry, edge, number, params, setting))
    weigh = route = None
    if config.sample_weight is not None:
        weigh = _build_routed(config.sample_weight, SAMPLE_WEIGHTS, config, setting, "weigh", moving)
    if config.route is not None:
        route = _build_routed(config.route, ROUTERS, config, setting, "route", moving)
    return TermGroup(config, entry, edges, weight, moving, weigh, route, gives).to(setting.device)


def _build_edge(
    config: TermConfig, entry: Entry, edge: EdgeConfig, number: int, params: Mapping[str, Any], setting: BuildContext
) -> TermEdge:
    key = (config.name, str(number))
    default = entry.facts.get("adapter")
    student_adapter = teacher_adapter = None
    if edge.teacher is not None:
        student_adapter = setting.adapter(edge.student, default, edge.teacher, config.name, f"{number}.student")
        if edge.teacher.adapter is not None:
            teacher_adapter = setting.adapter(edge.teacher, None, edge.student, config.name, f"{number}.teacher")
    elif edge.student.adapter is not None:
        student_adapter = setting.adapter(edge.student, None, edge.student, config.name, f"{number}.student")
    seen = {"student": setting.adapted(edge.student, student_adapter, edge.teacher)}
    if edge.teacher is not None:
        seen["teacher"] = setting.adapted(edge.teacher, teacher_adapter, edge.student)
    seen |= {name: setting.batched(operand) for name, operand in config.operands.items()}
    source = operand_source(edge.student, setting.layout.sources, setting.stage.terms)
    if source is None:
        source = setting.layout.sources[setting.stage.export]
    facts = setting.layout.facts.get(edge.student.role, setting.layout.facts[setting.stage.export]).injected
    facts["samples"] = setting.layout.samples.get(source, 0)
    facts["shapes"] = {name: tuple(shape[1:]) for name, shape in seen.items()}
    with seeded(setting.seed, "term", config.name, number):
        term = _built(TERMS, config.type, params, config.location, **facts)
    try:
        term.check_shapes(**seen)
    except ValueError as error:
        operands = f"{edge.student}" + (f" with {edge.teacher}" if edge.teacher else "")
        raise ConfigError(f"{config.location}: term {config.name!r} ({config.type}) {error} ({operands})") from None
    student = setting.reader(edge.student, student_adapter, *key, "student")
    teacher = None if edge.teacher is None else setting.reader(edge.teacher, teacher_adapter, *key, "teacher")
    named = {name: setting.independent_reader(operand, *key, name) for name, operand in config.operands.items()}
    return TermEdge(edge, term, student, teacher, named, source)


def _build_routed(
    part: PartWithOperands,
    registry: Registry,
    config: TermConfig,
    setting: BuildContext,
    what: str,
    moving: list[tuple[Tensor, Schedule]],
) -> WiredPart:
    shapes = {name: tuple(setting.shape(operand)) for name, operand in part.operands.items()}
    shapes["student"] = tuple(setting.shape(config.edges[0].student))
    if config.edges[0].teacher is not None:
        shapes["teacher"] = tuple(setting.shape(config.edges[0].teacher))
    params = {key: _moving_value(value, setting.device, moving) for key, value in part.params.items()}
    facts = {**setting.layout.facts[setting.stage.export].injected, "edges": len(config.edges), "shapes": shapes}
    with seeded(setting.seed, "term", config.name, what):
        built = _built(registry, part.type, params, part.location, **facts)
    named = {name: setting.independent_reader(operand, config.name, what, name) for name, operand in part.operands.items()}
    return WiredPart(built, registry.entry(part.type), named)


def build_network(
    stage: StageConfig,
    layout: ResolvedStage,
    *,
    seed: int,
    device: torch.device,
    world: World = World(),  # noqa: B008
    models: Mapping[str, nn.Module] | None = None,
    prepare: Callable[[RoleConfig, nn.Module], nn.Module] | None = None,
    artifacts: Mapping[str, Tensor] | None = None,
) -> Network:
    """Builds the whole stage on a device.

    Args:
        models: models that exist already, by role; the others are built from the seed.
        prepare: called with each role's config and model before it is hooked: loads weights, folds, changes formats.
        made: the tensors that earlier stages made, by `STAGE.NAME`.
    """
    roles: dict[str, Role] = {}
    for name in layout.order:
        config = stage.roles[name]
        overwritten = layout.overwritten.get(name, frozenset())
        if config.mode == "reuse":
            root = roles[config.source_role or ""]
            roles[name] = Role(config, reused_module(config, root.model), layout.features[name], overwritten, root)
            continue
        model = (models or {}).get(name)
        if model is None:
            model = build_model(config, stage.roles, layout.facts[name], seed)
        if prepare is not None:
            model = prepare(config, model)
        if models is None or name not in models:
            model = apply_weight_transforms(config, model)
        roles[name] = Role(config, model, layout.features[name], overwritten).to(device)
    setting = BuildContext(stage, layout, seed, device, artifacts or {})
    wanted = [
        operand for name in layout.terms for operand in stage.terms[name].read_operands() if operand.kind == "term"
    ]
    terms = {}
    for name in layout.terms:
        gives = frozenset(operand.path for operand in wanted if operand.role == name)
        terms[name] = build_term(stage.terms[name], setting, gives)
    observers = {
        owner: {name: setting.independent_reader(operand, owner, name).to(device) for name, operand in part.operands.items()}
        for owner, part in stage.observers().items()
    }
    return Network(roles, terms, layout.sources, world, observers)
