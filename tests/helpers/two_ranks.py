"""What two processes find when they add gradients up and agree on errors. Started by torchrun, from test_gradients.py.

Writes what each rank found to `<first argument>/<rank>.pt`.
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
    """The gradients of two micro-batches, summed; and how many buckets left before the backward was over."""
    model = network()
    sums = GradientReducer(list(model.parameters()), world, bucket_bytes=bytes_)
    for _ in range(2):  # a second step must not know of the first
        model.zero_grad(set_to_none=True)
        for number, batch in enumerate(rows(world.rank)):
            if number == (0 if early_begin else 1):
                sums.prepare_for_backward()
            used = model[:3] if skip_head and world.rank == 1 else model
            used(batch).square().sum().backward()
        sums.finish()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], sums.overlapped_buckets


def error_message(world: World, failing: int | None) -> str:
    try:
        with world.sync_errors():
            if world.rank == failing:
                raise UserError("the folder is locked")
    except UserError as error:
        return str(error)
    return ""


def sharded_gradients(world: World, *, mean: bool = False) -> dict:
    """The gradients of a network in parts and their norms, whole; and how much of it lies here."""
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
        for part in (*role.model.blocks, role.model):
            part.set_gradient_divide_factor(float(world.size))
    beside = nn.Parameter(torch.ones(3, dtype=torch.float64))
    beside.grad = torch.full_like(beside, 2.0)
    role(images(world.rank))[Feature("blocks.1")].square().sum().backward()  # it begins in the middle of the network
    reached = [p for p in role.model.parameters() if p.grad is not None]
    assert all(is_sharded(p) and is_sharded(p.grad) for p in reached)
    found = {"gradients": {n: full_tensors(p.grad) for n, p in role.model.named_parameters() if p.grad is not None}}
    found["here"] = sum(local_tensor(p).numel() for p in role.model.parameters())
    found["norm"] = total_norm([p.grad for p in (beside, *reached)], world)
    found["largest"] = total_norm([p.grad for p in (beside, *reached)], world, math.inf)
    assert torch.equal(clip_grad_norm_([beside, *reached], 0.5, world), found["norm"])
    found["clipped"] = total_norm([p.grad for p in (beside, *reached)], world)
    return found


def images(rank: int) -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    found = {
        "small": summed_gradients(world, bytes_=1),
        "whole": summed_gradients(world, bytes_=2**20),
        "too early": summed_gradients(world, bytes_=1, early_begin=True),
        "uneven": summed_gradients(world, bytes_=1, skip_head=True),
        "parted": sharded_gradients(world) if CAN_SHARD else {},
        "mean": sharded_gradients(world, mean=True) if CAN_SHARD else {},
        "told": [error_message(world, failing) for failing in (0, 1, None)],
    }
    torch.save(found, Path(sys.argv[1]) / f"{world.rank}.pt")
    dist.destroy_process_group()
