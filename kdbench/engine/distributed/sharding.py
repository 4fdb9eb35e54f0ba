"""Sharded roles (FSDP2): each process stores a shard of a network's weights, gradients and optimizer state.

`shard: [student, teacher]` lists the roles; `shard: true` selects every role that can be sharded. A model with a
sequence of blocks is sharded block by block, any other model as one unit. The weights of a block are gathered for its
forward and again for its backward. Torch, not kdbench's `GradientReducer`, sums the gradients of sharded weights.
Checkpoints contain full tensors, so a run can be resumed or evaluated with or without sharding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdbench.config.schema import Recipe, StageConfig
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import Feature, find_module
from kdbench.engine.network.network import Network
from kdbench.engine.network.roles import Role
from kdbench.errors import ConfigError

CONTAINERS = (nn.Sequential, nn.ModuleList)


def sharded_roles(
    recipe: Recipe, stage: StageConfig, features: Mapping[str, Sequence[Feature]], models: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Returns the names of the roles (networks) of a training stage that the recipe's key `shard` selects.

    Args:
        recipe: recipe with the key `shard`.
        stage: the stage.
        features: role -> features (outputs of submodules) that are extracted from the role.
        models: role -> model of the role, on any device.

    Raises:
        ConfigError: a listed role cannot be sharded, or the stage does not support sharding. The message gives the
            reason.
    """
    names = stage.roles if recipe.shard is True else [name for name in recipe.shard or () if name in stage.roles]
    if not names:
        return ()
    location = recipe.locations.get("shard", "shard")
    problem = _stage_problem(stage)
    if problem is None and not hasattr(_fsdp(), "set_force_sum_reduction_for_comms"):
        problem = f"torch {torch.__version__} cannot sum the gradients of sharded parameters (a newer torch can)"
    if problem is not None:
        raise ConfigError(f"{location}: {problem}. Remove `shard`.")
    selected = []
    for name in names:
        problem = _role_problem(name, stage, features.get(name, ()), models[name])
        if problem is None:
            selected.append(name)
        elif recipe.shard is not True:
            raise ConfigError(f"{location}: role {name!r} cannot be sharded: {problem}.")
    return tuple(selected)


def shard_roles(network: Network, roles: Collection[str], device: torch.device, world: World) -> None:
    """Shards the weights of the given roles (networks) over all ranks, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not roles:
        return
    mesh = init_device_mesh(device.type, (world.size,))
    for name in roles:
        role = network.role(name)
        role.extractor.stop = False  # a forward that stops early would leave the current blocks gathered
        model = role.model
        blocks: list[Any] = [model.get_submodule(path) for path in block_paths(model)]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # The layers outside the blocks stay gathered until the backward: it may start at an inner feature, so the hook
        # on the model's output, which would gather them again, may never run.
        fully_shard(model, mesh=mesh, reshard_after_forward=not _has_backward(role))
        units: list[Any] = [*blocks, model]
        for unit in units:
            # A rank's loss is its fraction of the effective batch's loss: gradients are summed, not averaged.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    network.sharded = tuple(roles)


def block_paths(model: nn.Module) -> list[str]:
    """Returns the paths of a model's blocks: modules with submodules and parameters, in a Sequential or ModuleList.

    A Sequential or ModuleList that contains blocks is not a block itself. For a model with tied parameters the list
    is empty, because two blocks may share a parameter, but each parameter must belong to only one FSDP2 unit.
    """
    parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        return []
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        contains_blocks = isinstance(child, CONTAINERS) and any(map(_is_block, child.children()))
        if isinstance(module, CONTAINERS) and _is_block(child) and not contains_blocks:
            yield child_path
        else:
            yield from _blocks(child, child_path)


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _fsdp() -> type | None:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch was built without torch.distributed
        return None
    return FSDPModule


def _stage_problem(stage: StageConfig) -> str | None:
    """Returns the reason why a training stage does not support sharding; None if it supports sharding."""
    if stage.updates:
        return "a stage with `updates` computes gradients for some of the roles at a time, and FSDP2 cannot do that"
    if stage.artifacts:
        return f"one process builds the artifacts of stage {stage.name!r}, and this process would need the full weights"
    if stage.precision == "fp16":
        return "the gradient scaler of fp16 needs all gradients before a step (with precision: bf16, sharding works)"
    return None


def _role_problem(name: str, stage: StageConfig, features: Sequence[Feature], model: nn.Module) -> str | None:
    """Returns the reason why a role (network) cannot be sharded; None if it can be sharded."""
    role = stage.roles[name]
    if role.mode == "reuse":
        return f"it reuses the module of role {role.source_role!r}"
    if role.mode not in ("trainable", "frozen"):
        return f"it is the {role.mode} of role {role.source_role!r}"
    for follower in stage.roles.values():
        if follower.name != name and follower.source_role == name:
            return f"role {follower.name!r} ({follower.mode}) needs the full weights of {name!r}"
    if role.transforms:
        return "its weight transform (`transform`) needs full weights"
    if stage.ema is not None and stage.export == name:
        return "`ema` averages full weights"
    for operand in stage.read_operands():
        if operand.kind == "role" and operand.is_state and operand.role == name:
            return f"the operand {operand} needs full weights"
    if role.mode == "frozen" and not role.upstream_roles:
        return None
    return _feature_problem(features, model)


def _feature_problem(features: Sequence[Feature], model: nn.Module) -> str | None:
    """Returns an error message if a feature is inside a block, where FSDP2 cannot start a backward; otherwise None."""
    blocks = block_paths(model)
    for feature in (feature for feature in features if not feature.is_output):
        path = find_module(model, feature.path)[0]
        if any(path.startswith(f"{block}.") for block in blocks):
            return f"{feature} is inside a block, where no backward can start. Read the input or output of the block"
    return None


def _has_backward(role: Role) -> bool:
    """Returns True if gradients may flow through a role (network): it is trained, or it reads another role's output."""
    return role.trainable or bool(role.config.upstream_roles)
