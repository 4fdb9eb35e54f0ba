"""Large networks in parts: each process keeps a share of a role's weights, gradients and optimiser state (FSDP2).

`shard: [student, teacher]` names the roles, `shard: true` takes every one that can be parted. A role is parted block
by block where its model has a sequence of blocks, else as a whole: a block's weights are gathered for its forward and
again for its backward, and its gradients are summed by torch, not by the runner. Checkpoints hold whole tensors, so
that a run may go on, or be evaluated, in parts or not.
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
    """The roles of a stage that lie in parts.

    Args:
        features: what is captured in each role.
        models: of all roles, to find their blocks; they may live on meta.

    Raises:
        ConfigError: one that was named cannot be parted, with the reason.
    """
    named = stage.roles if recipe.shard is True else [name for name in recipe.shard or () if name in stage.roles]
    if not named:
        return ()
    place = recipe.locations.get("shard", "shard")
    reason = _stage_fault(stage)
    if reason is None and not hasattr(_fsdp(), "set_force_sum_reduction_for_comms"):
        reason = f"torch {torch.__version__} cannot sum the gradients of parts; it needs a newer one"
    if reason is not None:
        raise ConfigError(f"{place}: {reason}. Leave `shard` out.")
    found = []
    for name in named:
        fault = _role_fault(name, stage, features.get(name, ()), models[name])
        if fault is None:
            found.append(name)
        elif recipe.shard is not True:
            raise ConfigError(f"{place}: role {name!r} cannot lie in parts: {fault}.")
    return tuple(found)


def shard_roles(network: Network, roles: Collection[str], device: torch.device, world: World) -> None:
    """Parts the named roles over all ranks, in place; afterwards each process holds its share of their weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not roles:
        return
    mesh = init_device_mesh(device.type, (world.size,))
    for name in roles:
        role = network.role(name)
        role.extractor.stop = False  # a forward that ends early would leave the blocks around the feature gathered
        model = role.model
        parted: list[Any] = [model.get_submodule(path) for path in block_paths(model)]
        for block in parted:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # What stands around the blocks stays gathered until the backward, which may begin at a feature, not at the end.
        fully_shard(model, mesh=mesh, reshard_after_forward=not _differentiated(role))
        everything: list[Any] = [*parted, model]
        for part in everything:
            part.set_gradient_divide_factor(1.0)  # a rank's loss is its share of the whole batch's: a sum, no mean
            part.set_force_sum_reduction_for_comms(True)
    network.sharded = tuple(roles)


def block_paths(model: nn.Module) -> list[str]:
    """The paths of a model's blocks: what is made of layers and stands in a sequence. None where weights are tied."""
    tied = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if len({id(parameter) for parameter in tied}) < len(tied):
        return []
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        own = f"{path}.{name}" if path else name
        of_blocks = isinstance(child, CONTAINERS) and any(map(_is_block, child.children()))
        if isinstance(module, CONTAINERS) and _is_block(child) and not of_blocks:
            yield own
        else:
            yield from _blocks(child, own)


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _fsdp() -> type | None:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch was built without it
        return None
    return FSDPModule


def _stage_fault(stage: StageConfig) -> str | None:
    if stage.updates:
        return "a stage with `updates` takes gradients of some roles at a time, which parts do not"
    if stage.artifacts:
        return f"what stage {stage.name!r} makes is made by one process, which would need the whole networks"
    if stage.precision == "fp16":
        return "fp16 looks at all gradients before a step; take precision: bf16"
    return None


def _role_fault(name: str, stage: StageConfig, features: Sequence[Feature], model: nn.Module) -> str | None:
    role = stage.roles[name]
    if role.mode not in ("trainable", "frozen"):
        return f"it is {'the same as' if role.mode == 'same' else f'the {role.mode} of'} {role.source_role!r}"
    for other in stage.roles.values():
        if other.name != name and other.source_role == name:
            return f"role {other.name!r} ({other.mode}) needs all of its weights"
    if role.transforms:
        return "`transform` works on whole weights"
    if stage.ema is not None and stage.export == name:
        return "`ema` averages whole weights"
    for operand in stage.read_operands():
        if operand.kind == "role" and operand.is_state and operand.role == name:
            return f"{operand} is read off its whole weights"
    if role.mode == "frozen" and not role.upstream_roles:
        return None
    blocks = block_paths(model)
    for feature in (feature for feature in features if not feature.is_output):
        path = find_module(model, feature.path)[0]
        if any(path.startswith(f"{block}.") for block in blocks):
            return (
                f"{feature} lies inside a block, where a backward cannot begin; read what goes into or out of the block"
            )
    return None


def _differentiated(role: Role) -> bool:
    """Whether a backward may go through a role."""
    return role.trainable or bool(role.config.upstream_roles)
