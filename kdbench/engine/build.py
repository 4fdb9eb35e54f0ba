"""From the words of a stage to its modules: models, adapters, terms, and the network that wires them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdbench.config.schedules import Schedule, build_schedule
from kdbench.config.schema import Named, Operand, RoleConfig, StageConfig, TermConfig
from kdbench.engine.distributed import World
from kdbench.engine.features import Feature
from kdbench.engine.network import Network, Role, TermEdge, TermGroup, feature_of, input_address, upstream_role
from kdbench.errors import ConfigError, Place
from kdbench.randomness import seeded
from kdbench.registry import ADAPTERS, MODELS, TERMS, Entry, Registry

Shapes = Mapping[tuple[str, Feature], tuple[int, ...]]
"""Per-sample shape of every captured feature."""


@dataclass(frozen=True)
class SampleFacts:
    """What the models must know of the data: classes, and the shape of an image."""

    classes: int | None
    image: tuple[int, ...] | None

    @property
    def injected(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self.classes is not None:
            facts["num_classes"] = self.classes
        if self.image is not None and len(self.image) == 3:
            facts |= {"in_channels": self.image[0], "image_size": self.image[1]}
        return facts


@dataclass(frozen=True)
class Layout:
    """What the plan found out about a stage, enough to build it for real.

    order: roles, each after the one that it sees. features: what to capture in each role. terms: the names of the terms
    that count (those of constant weight 0 are left out). sources: the source at the root of each role's input.
    """

    order: tuple[str, ...]
    features: Mapping[str, tuple[Feature, ...]]
    terms: tuple[str, ...]
    sources: Mapping[str, str]
    facts: Mapping[str, SampleFacts]
    shapes: Shapes = field(default_factory=dict)
    overwritten: Mapping[str, frozenset[Feature]] = field(default_factory=dict)


def architecture(config: RoleConfig, roles: Mapping[str, RoleConfig]) -> Named:
    """The model that a role is built as; one that follows another role is built as that one."""
    seen = {config.name}
    while config.model is None:
        if config.of is None or config.of not in roles or config.of in seen:
            raise ConfigError(f"{config.place}: role {config.name!r} has no model and follows none that has one")
        config = roles[config.of]
        seen.add(config.name)
    return config.model


def build_model(config: RoleConfig, roles: Mapping[str, RoleConfig], facts: SampleFacts, seed: int) -> nn.Module:
    """Builds a role's model with the initial weights that (seed, role) give it, on the current default device."""
    named = architecture(config, roles)
    root = config
    while root.model is None and root.of is not None:
        root = roles[root.of]
    with seeded(seed, "init", root.name):
        return _built(MODELS, named.type, named.params, named.place, **facts.injected)


def _built(registry: Registry, name: str, params: Mapping[str, Any], place: Place, **injected: Any) -> Any:
    """Builds a part; what its constructor refuses is told with the place in the recipe."""
    try:
        return registry.build(name, params, place, **injected)
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if told.startswith(str(place)) else f"{place}: {told}") from None


def _moving_value(value: Any, device: torch.device, moving: list[tuple[Tensor, Schedule]]) -> Any:
    """Turns a schedule into a 0-dim tensor that the runner moves; anything else stays as it is."""
    if not isinstance(value, Named):
        return value
    schedule = build_schedule(value)
    tensor = torch.tensor(float(schedule(0.0, 1.0)), device=device)
    moving.append((tensor, schedule))
    return tensor


def _build_adapter(
    operand: Operand, default: str | None, own: Size, other: Size, name: str, seed: int, key: str
) -> nn.Module | None:
    adapter = operand.adapter or (Named(type=default) if default else None)
    if adapter is None or adapter.type in ("none", "identity"):
        return None
    place = adapter.place if adapter.place != Place() else operand.place
    with seeded(seed, "term", name, key, "adapter"):
        try:
            return _built(ADAPTERS, adapter.type, adapter.params, place, source=tuple(own), target=tuple(other))
        except ValueError as error:
            raise ConfigError(f"{place}: adapter {adapter.type!r} of term {name!r}: {error}") from None


def build_term(
    config: TermConfig, entry: Entry, shapes: Shapes, facts: SampleFacts, seed: int, device: torch.device
) -> TermGroup:
    """Builds one entry of `terms`: an instance and adapters for each edge, sized by the features' shapes.

    Raises:
        ConfigError: operands that the term cannot compare, or parameters that it refuses.
    """
    moving: list[tuple[Tensor, Schedule]] = []
    weight = _moving_value(config.weight, device, moving)
    params = {key: _moving_value(value, device, moving) for key, value in config.params.items()}
    default = entry.facts.get("adapter")
    edges = []
    for number, edge in enumerate(config.edges):
        student = Size(shapes[edge.student.role, feature_of(edge.student)])
        teacher = None
        adapter = teacher_adapter = None
        if edge.teacher is not None:
            teacher = Size(shapes[edge.teacher.role, feature_of(edge.teacher)])
            adapter = _build_adapter(edge.student, default, student, teacher, config.name, seed, f"{number}.student")
            if edge.teacher.adapter is not None:
                teacher_adapter = _build_adapter(
                    edge.teacher, None, teacher, student, config.name, seed, f"{number}.teacher"
                )
        with seeded(seed, "term", config.name, number):
            term = _built(TERMS, config.type, params, config.place, **facts.injected)
        seen: dict[str, Size] = {"student": Size((2, *(teacher if adapter and teacher is not None else student)))}
        if teacher is not None:
            seen["teacher"] = Size((2, *(student if teacher_adapter else teacher)))
        try:
            term.check_shapes(**seen)
        except ValueError as error:
            operands = f"{edge.student}" + (f" with {edge.teacher}" if edge.teacher else "")
            raise ConfigError(f"{config.place}: term {config.name!r} ({config.type}) {error} ({operands})") from None
        edges.append(TermEdge(edge, term, adapter, teacher_adapter))
    return TermGroup(config, entry, edges, weight, moving).to(device)


def build_network(
    stage: StageConfig,
    layout: Layout,
    *,
    seed: int,
    device: torch.device,
    world: World = World(),  # noqa: B008
    models: Mapping[str, nn.Module] | None = None,
    prepare: Callable[[RoleConfig, nn.Module], nn.Module] | None = None,
) -> Network:
    """Builds the whole stage on a device.

    Args:
        models: models that exist already, by role; the others are built from the seed.
        prepare: called with each role's config and model before it is hooked: loads weights, folds, changes formats.
    """
    roles = {}
    for name in layout.order:
        config = stage.roles[name]
        model = (models or {}).get(name)
        if model is None:
            model = build_model(config, stage.roles, layout.facts[name], seed)
        if prepare is not None:
            model = prepare(config, model)
        overwritten = layout.overwritten.get(name, frozenset())
        roles[name] = Role(config, model, layout.features[name], overwritten).to(device)
    terms = {}
    for name in layout.terms:
        config = stage.terms[name]
        facts = layout.facts[config.edges[0].student.role]
        terms[name] = build_term(config, TERMS.entry(config.type), layout.shapes, facts, seed, device)
    return Network(roles, terms, layout.sources, world)


def role_order(roles: Mapping[str, RoleConfig]) -> tuple[str, ...]:
    """Roles in an order in which each stands after the one whose output it sees.

    Raises:
        ConfigError: the inputs form a cycle or name an unknown role.
    """
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in path:
            raise ConfigError(f"{roles[name].place}: the inputs of {' -> '.join((*path, name))} form a cycle")
        upstream = upstream_role(roles[name])
        if upstream is not None:
            if upstream not in roles:
                raise ConfigError(f"{roles[name].place}: role {name!r} sees {upstream!r}, which is no role")
            visit(upstream, (*path, name))
        done.append(name)

    for name in roles:
        visit(name, ())
    return tuple(done)


def wanted_features(stage: StageConfig, terms: tuple[str, ...], order: tuple[str, ...]) -> dict[str, list[Feature]]:
    """What to capture in each role: the operands of the terms, and what other roles see."""
    wanted: dict[str, list[Feature]] = {name: [] for name in order}
    for name in terms:
        for edge in stage.terms[name].edges:
            for operand in (edge.student, edge.teacher):
                if operand is not None:
                    wanted[operand.role].append(feature_of(operand))
    for name in order:
        if upstream_role(stage.roles[name]) is not None:
            role, feature = input_address(stage.roles[name])
            wanted[role].append(feature)
    return {name: list(dict.fromkeys(features)) for name, features in wanted.items()}
