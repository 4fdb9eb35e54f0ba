"""Tensors of which each process holds a share (DTensors, of roles in parts): put together, taken apart, measured.

Everything here takes whole tensors too, and does with them what torch would.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from kdbench.engine.distributed.world import World


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether this process holds a share of a tensor only (a DTensor)."""
    loaded = sys.modules.get("torch.distributed.tensor")  # not imported where nothing is parted
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def full_tensors(tree: Any, *, keep: bool = True) -> Any:
    """Returns nested mappings and lists with every parted tensor put together, on the CPU.

    All ranks call it, in one order.

    Args:
        keep: false gives empty tensors instead, on a rank that only takes part.
    """
    if isinstance(tree, Tensor):
        if not is_sharded(tree):
            return tree
        gathered = tree.full_tensor()
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(tree, Mapping):
        found = {key: full_tensors(value, keep=keep) for key, value in tree.items()}
        return tree if all(found[key] is value for key, value in tree.items()) else found
    if isinstance(tree, list | tuple):
        items = [full_tensors(value, keep=keep) for value in tree]
        return tree if all(new is old for new, old in zip(items, tree, strict=True)) else type(tree)(items)
    return tree


def shard_like(value: Any, reference: Any) -> Any:
    """Returns this rank's share of a whole tensor where `like` lies in parts and has its shape; else the value."""
    if not isinstance(value, Tensor) or not isinstance(reference, Tensor) or not is_sharded(reference) or value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(reference.device, reference.dtype)
    return distribute_tensor(value, reference.device_mesh, reference.placements)


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads whole weights into a model that may lie in parts."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in state.items()})


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a whole state of an optimiser as one whose parameters may lie in parts takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    like = dict(zip(numbers, parameters, strict=True))
    parts = {n: {k: shard_like(v, like[n]) for k, v in values.items()} for n, values in state["state"].items()}
    return {**state, "state": parts}


def local_tensor(tensor: Tensor) -> Tensor:
    """The share of a tensor that lies in this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def total_norm(tensors: Collection[Tensor], world: World, norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors as one vector, the same on every rank; order 2 or infinity.

    Args:
        tensors: some may lie in parts, of which each rank adds its own.
    """
    kinds = [[local_tensor(tensor) for tensor in tensors if is_sharded(tensor) == kind] for kind in (False, True)]
    norms = [nn.utils.get_total_norm(kind, norm_type, foreach=True) for kind in kinds if kind]
    if not kinds[1]:
        return norms[0] if norms else torch.tensor(0.0)
    if norm_type == 2.0:
        mine = norms[-1].square()
        return (world.all_reduce_sum_(mine) + (norms[0].square() if kinds[0] else 0.0)).sqrt()
    mine = norms[-1].new_zeros(world.size)
    mine[world.rank] = norms[-1]
    return torch.stack([world.all_reduce_sum_(mine).max(), *norms[:-1]]).max()


def clip_grad_norm_(parameters: Collection[nn.Parameter], max_norm: float, world: World) -> Tensor:
    """Scales gradients down to a total norm of at most `limit`; returns the norm that they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(map(is_sharded, gradients)):
        return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    norm = total_norm(gradients, world)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
    torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm
