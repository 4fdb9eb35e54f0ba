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
    """Builds a role's model on the current default device, with initial weights that depend on `seed`.

    The initial weights also depend on the name of the role (and on `init_index`, if the recipe sets it), but not on
    other roles.
    """
    part = architecture(config, roles)
    root = config
    while root.model is None and root.source_role is not None:
        root = roles[root.source_role]
    # The key of this stream must not change: it determines the initial weights.
    with seeded(seed, "init", root.name, *([root.init_index] if root.init_index else [])):
        return build_part(MODELS, part.type, part.params, part.location, **facts.injected)


def reused_module(config: RoleConfig, model: nn.Module) -> nn.Module:
    """Returns the module that a role with `reuse:` shares with another role.

    Args:
        config: configuration of the role with `reuse:`.
        model: model of the other role. `reuse: ROLE` shares the whole model, `reuse: ROLE:PATH` one of its modules.
    """
    return model if config.module_path is None else find_module(model, config.module_path, config.location)[1]


def apply_weight_transforms(config: RoleConfig, model: nn.Module) -> nn.Module:
    """Adds a role's weight transforms (quantisation, pruning, ...) to its model and returns the same model.

    The transforms run in every forward pass.
    """
    for part in config.transforms:
        with _errors_located(part.location):
            build_part(WEIGHT_TRANSFORMS, part.type, part.params, part.location).apply(model)
    return model


def exported_state(config: RoleConfig, model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict of a role's weights after weight transforms, as the forward pass uses them.

    The keys are the parameter names of the model without transforms.
    """
    return effective_state_dict(model) if config.transforms else model.state_dict()


@contextlib.contextmanager
def _errors_located(location: Location) -> Iterator[None]:
    """Context manager: converts a ValueError to a ConfigError with a location in the recipe."""
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
    """Builds the network of a stage (all its roles and terms) on a device.

    Args:
        resolved: the stage with the order of its roles, its features and their shapes.
        models: role -> existing model. The model of any other role is built from the seed.
        prepare: function of a role's config and model that returns the model, called before hooks are registered. It
            loads weights, folds BatchNorm, and changes memory formats.
        artifacts: `STAGE.NAME` -> tensor artifact of an earlier stage.
        timer: timer that receives the ends of the sections `student`, `teacher` and `terms`; None: no timing.
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
