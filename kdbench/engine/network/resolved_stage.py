"""A resolved stage: a stage of a recipe with the results of shape inference (order of roles, features, shapes)."""

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
"""Shape of one sample of every extracted feature."""


@dataclass(frozen=True)
class SampleFacts:
    """Number of classes and shapes of one sample, which are passed to the constructor of a role's model.

    Attributes:
        classes: number of classes, or None if it is unknown.
        input: shape of one sample of the role's first input.
        image: shape of an image of the evaluation source.
    """

    classes: int | None
    input: tuple[int, ...] | None
    image: tuple[int, ...] | None = None

    @property
    def injected(self) -> dict[str, Any]:
        """Returns argument name -> value for the constructor of a model: `num_classes`, `in_channels`, ..."""
        facts: dict[str, Any] = {}
        if self.classes is not None:
            facts["num_classes"] = self.classes
        if self.input is not None:
            facts["input_shape"] = self.input
        if self.image is not None:
            facts["image_shape"] = self.image
        image = self.input if self.input is not None and len(self.input) == 3 else self.image
        if image is not None and len(image) == 3:
            facts |= {"in_channels": image[0], "image_size": image[1]}
        return facts


@dataclass(frozen=True)
class ResolvedStage:
    """The results of shape inference on a stage. They are sufficient to build the stage's network.

    Attributes:
        order: names of the roles. Each role comes after the roles whose outputs it reads.
        features: role -> features to extract.
        terms: names of the terms, without the terms whose weight is constantly 0.
        sources: role -> name of the source from which its input comes.
        facts: role -> constructor arguments of its model.
        shapes: (role, feature) -> shape of one sample.
        overwritten: role -> features that a later in-place operation overwrites.
        fields: source -> field -> shape of one sample.
        samples: source -> number of samples in its whole split.
        unmeasured: roles that cannot be evaluated, because they do not output one value per class of the evaluation
            source.
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
        """Returns the names of the sources that a step reads, for inputs of roles and for fields that terms read."""
        addresses = (address for name in self.order for address in input_addresses(stage.roles[name]))
        operands = stage.read_operands(self.terms, include_artifacts=False)
        sources = list(self.sources.values())
        sources += [address.split(".", 1)[0] for address in addresses if ":" not in address]
        sources += [operand.role for operand in operands if operand.kind == "field"]
        return tuple(dict.fromkeys(sources))


def architecture(config: RoleConfig, roles: Mapping[str, RoleConfig]) -> PartConfig:
    """Returns the configuration of a role's model.

    A moving average, a snapshot, or a role with `reuse` has the model of the role that it copies or reuses.

    Raises:
        ConfigError: neither the role nor the role that it copies or reuses has a model.
    """
    visited = {config.name}
    while config.model is None:
        if config.source_role is None or config.source_role not in roles or config.source_role in visited:
            raise ConfigError(f"{config.location}: role {config.name!r} has no model, and neither has its source role")
        config = roles[config.source_role]
        visited.add(config.name)
    return config.model


def role_order(roles: Mapping[str, RoleConfig]) -> tuple[str, ...]:
    """Returns the names of roles, each after the roles that it needs.

    A role needs the roles whose outputs it reads, and the role that it reuses.

    Raises:
        ConfigError: the inputs form a cycle or name an unknown role.
    """
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in order:
            return
        if name in path:
            raise ConfigError(f"{roles[name].location}: the inputs of {' -> '.join((*path, name))} form a cycle")
        required = [*roles[name].upstream_roles]
        source_role = roles[name].source_role
        if roles[name].mode == "reuse" and source_role is not None:
            required.append(source_role)
        for role in required:
            if role not in roles:
                raise ConfigError(
                    f"{roles[name].location}: role {name!r} needs {role!r}, which is not a role of this stage"
                )
            visit(role, (*path, name))
        order.append(name)

    for name in roles:
        visit(name, ())
    return tuple(order)


def required_features(stage: StageConfig, terms: tuple[str, ...], order: tuple[str, ...]) -> dict[str, list[Feature]]:
    """Returns role -> features to extract, that is, all features that terms, selectors, builders and roles read."""
    required: dict[str, list[Feature]] = {name: [] for name in order}
    for operand in stage.read_operands(terms):
        if operand.kind == "role" and not operand.is_state:
            required[operand.role].append(operand_feature(operand))
    for name in order:
        for address in input_addresses(stage.roles[name]):
            if ":" in address:
                role, feature = parse_role_input(address)
                required[role].append(feature)
    return {name: list(dict.fromkeys(features)) for name, features in required.items()}
