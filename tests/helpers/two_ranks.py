"""Sums gradients and synchronises errors on two ranks. test_gradients.py starts this script with torchrun.

Each rank writes its results to `<first argument>/<rank>.pt`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.sharding import CAN_SHARD
from kdbench.engine.distributed.gradients import GradientReducer
from kdbench.engine.distributed.world import World
from kdbench.errors import UserError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def rows(rank: int) -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def summed_gradients(
    world: World, *, bytes_: int, early_begin: bool = False, skip_head: bool = False
) -> tuple[list[Tensor], int]:
    """Sums the gradients of two micro-batches; also returns the number of buckets sent during the backward pass."""
    model = network()
    reducer = GradientReducer(list(model.parameters()), world, bucket_bytes=bytes_)
    for _ in range(2):  # the second step must be independent of the first
        model.zero_grad(set_to_none=True)
        for number, batch in enumerate(rows(world.rank)):
            if number == (0 if early_begin else 1):
                reducer.prepare_for_backward()
            layers = model[:3] if skip_head and world.rank == 1 else model
            layers(batch).square().sum().backward()
        reducer.finish()
    return [
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    ], reducer.overlapped_buckets


def error_message(world: World, failing: int | None) -> str:
    """Returns the error that this rank sees when rank `failing` raises; None: no rank raises."""
    try:
        with world.sync_errors():
            if world.rank == failing:
                raise UserError("the folder is locked")
    except UserError as error:
        return str(error)
    return ""


def sharded_gradients(world: World, *, mean: bool = False) -> dict:
    """Returns the full gradients of a sharded network, their norms, and the number of parameters on this rank."""
    from helpers.plugin_parts import Blocks
    from kdbench.config.schema import RoleConfig
    from kdbench.engine.distributed.dtensor import clip_grad_norm_, full_tensors, is_sharded, local_tensor, total_norm
    from kdbench.engine.distributed.sharding import shard_roles
    from kdbench.engine.network.features import Feature
    from kdbench.engine.network.network import Network
    from kdbench.engine.network.roles import Role

    torch.manual_seed(0)
    config = RoleConfig(name="student", model=None, input="train.image")
    role = Role(config, Blocks().double(), [Feature("blocks.1")])
    shard_roles(Network({"student": role}, {}, {"student": "train"}, world), ["student"], torch.device("cpu"), world)
    if mean:
        for module in (*role.model.blocks, role.model):
            module.set_gradient_divide_factor(float(world.size))
    unsharded = nn.Parameter(torch.ones(3, dtype=torch.float64))
    unsharded.grad = torch.full_like(unsharded, 2.0)
    role(images(world.rank))[
        Feature("blocks.1")
    ].square().sum().backward()  # the backward pass starts in the middle of the network
    parameters = [p for p in role.model.parameters() if p.grad is not None]
    assert all(is_sharded(p) and is_sharded(p.grad) for p in parameters)
    results = {"gradients": {n: full_tensors(p.grad) for n, p in role.model.named_parameters() if p.grad is not None}}
    results["local_size"] = sum(local_tensor(p).numel() for p in role.model.parameters())
    results["norm"] = total_norm([p.grad for p in (unsharded, *parameters)], world)
    results["largest"] = total_norm([p.grad for p in (unsharded, *parameters)], world, math.inf)
    assert torch.equal(clip_grad_norm_([unsharded, *parameters], 0.5, world), results["norm"])
    results["clipped"] = total_norm([p.grad for p in (unsharded, *parameters)], world)
    return results


def images(rank: int) -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    results = {
        "small": summed_gradients(world, bytes_=1),
        "one bucket": summed_gradients(world, bytes_=2**20),
        "too early": summed_gradients(world, bytes_=1, early_begin=True),
        "uneven": summed_gradients(world, bytes_=1, skip_head=True),
        "sharded": sharded_gradients(world) if CAN_SHARD else {},
        "mean": sharded_gradients(world, mean=True) if CAN_SHARD else {},
        "errors": [error_message(world, failing) for failing in (0, 1, None)],
    }
    torch.save(results, Path(sys.argv[1]) / f"{world.rank}.pt")
    dist.barrier()  # no rank leaves the group while the other rank still uses it
    dist.destroy_process_group()
