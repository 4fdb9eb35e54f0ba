"""A stage with everything that shape inference adds: order of roles, features, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.schema import PartConfig, RoleConfig, StageConfig
from kdbench.engine.network.features import Feature
from kdbench.engine.network.operands import operand_feature
from kdbench.engine.network.roles import input_addresses, parse_role_input
from kdbench.errors import ConfigError

Shapes = Mapping[tuple[str, Feature], tuple[int, ...]]
"""Per-sample shape of every captured feature."""


@dataclass(frozen=True)
class SampleFacts:
    """What the models must know of the data: classes, what the role sees, and the shape of an image.

    input: of one sample of the role's first input. image: of the images that evaluation shows.
    """

    classes: int | None
    input: tuple[int, ...] | None
    image: tuple[int, ...] | None = None

    @property
    def injected(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self.classes is not None:
            facts["num_classes"] = self.classes
        if self.input is not None:
            facts["input_shape"] = self.input
        if self.image is not None:
            facts["image_shape"] = self.image
        seen = self.input if self.input is not None and len(self.input) == 3 else self.image
        if seen is not None and len(seen) == 3:
            facts |= {"in_channels": seen[0], "image_size": seen[1]}
        return facts


@dataclass(frozen=True)
class ResolvedStage:
    """What the plan found out about a stage, enough to build it for real.

    order: roles, each after those that it sees. features: what to capture in each role. terms: the names of the terms
    that count (those of constant weight 0 are left out). sources: the source at the root of each role's input.
    fields: of each source, the shape of one sample of each field. samples: how many each source's split has in all.
    unmeasured: the roles that do not give a value for each class of the evaluation source.
    """

    order: tuple[str, ...]
    features: Mapping[str, tuple[Feature, ...]]
    terms: tuple[str, ...]
    sources: Mapping[str, str]
    facts: Mapping[str, SampleFacts]
    shapes: Shapes = field(default_factory=dict)
    overwritten: Mapping[str, frozenset[Feature]] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    unmeasured: frozenset[str] = frozenset()

    def step_sources(self, stage: StageConfig) -> tuple[str, ...]:
        """The sources that a step reads: those of the roles, and those whose fields a term reads."""
        found = list(self.sources.values())
        found += [a.split(".", 1)[0] for name in self.order for a in input_addresses(stage.roles[name]) if ":" not in a]
        found += [
            operand.role
            for operand in stage.read_operands(self.terms, include_artifacts=False)
            if operand.kind == "field"
        ]
        return tuple(dict.fromkeys(found))


def architecture(config: RoleConfig, roles: Mapping[str, RoleConfig]) -> PartConfig:
    """The model that a role is built as; one that follows another role is built as that one."""
    seen = {config.name}
    while config.model is None:
        if config.source_role is None or config.source_role not in roles or config.source_role in seen:
            raise ConfigError(f"{config.location}: role {config.name!r} has no model and follows none that has one")
        config = roles[config.source_role]
        seen.add(config.name)
    return config.model


def role_order(roles: Mapping[str, RoleConfig]) -> tuple[str, ...]:
    """Roles in an order in which each stands after those whose output it sees, and whose network it is.

    Raises:
        ConfigError: the inputs form a cycle or name an unknown role.
    """
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in path:
            raise ConfigError(f"{roles[name].location}: the inputs of {' -> '.join((*path, name))} form a cycle")
        before = [*roles[name].upstream_roles]
        if roles[name].mode == "reuse" and roles[name].source_role is not None:
            before.append(roles[name].source_role or "")
        for other in before:
            if other not in roles:
                raise ConfigError(f"{roles[name].location}: role {name!r} needs {other!r}, which is no role")
            visit(other, (*path, name))
        done.append(name)

    for name in roles:
        visit(name, ())
    return tuple(done)


def required_features(stage: StageConfig, terms: tuple[str, ...], order: tuple[str, ...]) -> dict[str, list[Feature]]:
    """What to capture in each role: what terms, selectors and makers read, and what other roles see."""
    wanted: dict[str, list[Feature]] = {name: [] for name in order}
    for operand in stage.read_operands(terms):
        if operand.kind == "role" and not operand.is_state:
            wanted[operand.role].append(operand_feature(operand))
    for name in order:
        for address in input_addresses(stage.roles[name]):
            if ":" in address:
                role, feature = parse_role_input(address)
                wanted[role].append(feature)
    return {name: list(dict.fromkeys(features)) for name, features in wanted.items()}
