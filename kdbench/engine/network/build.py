"""Builds the modules of a stage: models, roles, terms, and the network that connects them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from kdbench.config.schema import RoleConfig, StageConfig
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build_terms import TermBuilder, build_part
from kdbench.engine.network.features import find_module
from kdbench.engine.network.network import Network
from kdbench.engine.network.resolved_stage import ResolvedStage, SampleFacts, architecture
from kdbench.engine.network.roles import Role
from kdbench.engine.timer import SectionTimer
from kdbench.errors import ConfigError, Location
from kdbench.models.weight_transform import effective_state_dict
from kdbench.randomness import seeded
from kdbench.registry import MODELS, WEIGHT_TRANSFORMS


def build_model(config: RoleConfig, roles: Mapping[str, RoleConfig], facts: SampleFacts, seed: int) -> nn.Module:
    """Builds a role's model on the current default device; (seed, role) determine its initial weights."""
    part = architecture(config, roles)
    root = config
    while root.model is None and root.source_role is not None:
        root = roles[root.source_role]
    # The key of this stream must not change: it determines the initial weights.
    with seeded(seed, "init", root.name, *([root.init_index] if root.init_index else [])):
        return build_part(MODELS, part.type, part.params, part.location, **facts.injected)


def reused_module(config: RoleConfig, model: nn.Module) -> nn.Module:
    """Returns the network that a role with `reuse:` shares, or the module of it that `reuse: ROLE:PATH` names."""
    return model if config.module_path is None else find_module(model, config.module_path, config.location)[1]


def apply_weight_transforms(config: RoleConfig, model: nn.Module) -> nn.Module:
    """Installs a role's weight transforms, which run in every forward; returns the model itself."""
    for part in config.transforms:
        with _errors_located(part.location):
            build_part(WEIGHT_TRANSFORMS, part.type, part.params, part.location).apply(model)
    return model


def exported_state(config: RoleConfig, model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights as the forward uses them, under the names of the plain model."""
    return effective_state_dict(model) if config.transforms else model.state_dict()


@contextlib.contextmanager
def _errors_located(location: Location) -> Iterator[None]:
    """Turns a ValueError of a weight transform into a ConfigError with its location in the recipe."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{location}: {error}") from None


def build_network(
    stage: StageConfig,
    resolved: ResolvedStage,
    *,
    seed: int,
    device: torch.device,
    world: World = World(),  # noqa: B008
    models: Mapping[str, nn.Module] | None = None,
    prepare: Callable[[RoleConfig, nn.Module], nn.Module] | None = None,
    artifacts: Mapping[str, Tensor] | None = None,
    timer: SectionTimer | None = None,
) -> Network:
    """Builds the whole stage on a device.

    Args:
        models: existing models, by role; the others are built from the seed.
        prepare: called with each role's config and model before hooks are registered: loads weights, folds BatchNorm,
            changes memory formats.
        artifacts: tensors of earlier stages, by `STAGE.NAME`.
        timer: of the network's sections; None for no timing.
    """
    models = models or {}
    roles: dict[str, Role] = {}
    for name in resolved.order:
        config = stage.roles[name]
        features, overwritten = resolved.features[name], resolved.overwritten.get(name, frozenset())
        if config.mode == "reuse":
            root = roles[config.source_role or ""]
            # A reused network keeps its hooks, transforms and weights: nothing is prepared twice.
            roles[name] = Role(config, reused_module(config, root.model), features, overwritten, root)
            continue
        model = models.get(name)
        if model is None:
            model = build_model(config, stage.roles, resolved.facts[name], seed)
        if prepare is not None:
            model = prepare(config, model)
        if name not in models:
            model = apply_weight_transforms(config, model)
        roles[name] = Role(config, model, features, overwritten).to(device)
    # Terms come after all roles: their adapters are sized by features of any role.
    builder = TermBuilder(stage, resolved, seed, device, artifacts or {})
    term_operands = [
        operand for name in resolved.terms for operand in stage.terms[name].read_operands() if operand.kind == "term"
    ]
    terms = {}
    for name in resolved.terms:
        outputs_read = frozenset(operand.path for operand in term_operands if operand.role == name)
        terms[name] = builder.build_term(stage.terms[name], outputs_read)
    observers = {
        owner: {name: builder.reader(operand, owner, name).to(device) for name, operand in part.operands.items()}
        for owner, part in stage.observers().items()
    }
    return Network(roles, terms, resolved.sources, world, observers, timer)
