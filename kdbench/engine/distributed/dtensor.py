"""DTensor helpers: gather full tensors, shard full tensors, and compute norms across ranks.

Every function also accepts plain tensors. The functions that gather or shard return a plain tensor unchanged. The
norm of plain tensors is torch's norm.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from kdbench.engine.distributed.world import World


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Returns True if a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # the import is slow, and without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensors(tree: Any, *, keep: bool = True) -> Any:
    """Gathers every sharded tensor in nested mappings and lists to a full tensor on the CPU.

    This is a collective: all ranks must call it with the same tree.

    Args:
        tree: tensor, mapping, list or tuple. A value of another type is returned unchanged.
        keep: False on a rank that needs no result. The rank takes part in the collectives and gets empty tensors.

    Returns:
        A new tree, or `tree` itself if it contains no sharded tensor.
    """
    if isinstance(tree, Tensor):
        if not is_sharded(tree):
            return tree
        gathered = tree.full_tensor()
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(tree, Mapping):
        entries = {key: full_tensors(value, keep=keep) for key, value in tree.items()}
        return tree if all(entries[key] is value for key, value in tree.items()) else entries
    if isinstance(tree, list | tuple):
        items = [full_tensors(value, keep=keep) for value in tree]
        return tree if all(new is old for new, old in zip(items, tree, strict=True)) else type(tree)(items)
    return tree


def shard_like(value: Any, reference: Any) -> Any:
    """Shards a full tensor over the ranks in the same way as the DTensor `reference`.

    Returns `value` unchanged if `reference` is not a DTensor, or if the shapes of `value` and `reference` differ.
    """
    if not isinstance(value, Tensor) or not isinstance(reference, Tensor) or not is_sharded(reference):
        return value
    if value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(reference.device, reference.dtype)
    return distribute_tensor(value, reference.device_mesh, reference.placements)


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict of full tensors into a model whose parameters may be sharded."""
    references = model.state_dict()
    model.load_state_dict({name: shard_like(value, references.get(name)) for name, value in state.items()})


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Shards the full tensors in an optimizer's state dict, each in the same way as its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    references = dict(zip(indices, parameters, strict=True))
    sharded = {
        index: {key: shard_like(value, references[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": sharded}


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, or a plain tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def total_norm(tensors: Collection[Tensor], world: World, norm_type: float = 2.0) -> Tensor:
    """Computes the norm of the vector that contains all elements of all tensors. Every rank returns the same value.

    Args:
        tensors: plain tensors, which must be equal on all ranks, and DTensors.
        world: the process group.
        norm_type: 2 or infinity.
    """
    sharded = [local_tensor(tensor) for tensor in tensors if is_sharded(tensor)]
    plain = [tensor for tensor in tensors if not is_sharded(tensor)]
    plain_norm = nn.utils.get_total_norm(plain, norm_type, foreach=True) if plain else None
    if not sharded:
        return torch.tensor(0.0) if plain_norm is None else plain_norm
    local_norm = nn.utils.get_total_norm(sharded, norm_type, foreach=True)
    if norm_type == 2.0:
        square = world.all_reduce_sum_(local_norm.square())
        return (square + (0.0 if plain_norm is None else plain_norm.square())).sqrt()
    # A maximum over ranks, by the one reduction that `World` has: each rank fills its own entry.
    norms = local_norm.new_zeros(world.size)
    norms[world.rank] = local_norm
    maximum = world.all_reduce_sum_(norms).max()
    return maximum if plain_norm is None else torch.maximum(maximum, plain_norm)


def clip_grad_norm_(parameters: Collection[nn.Parameter], max_norm: float, world: World) -> Tensor:
    """Scales gradients in place to a total norm of at most `max_norm`, and returns the norm before scaling."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(map(is_sharded, gradients)):
        return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    norm = total_norm(gradients, world)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the epsilon of torch's clip_grad_norm_
    torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm
