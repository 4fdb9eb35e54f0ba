"""Several processes: where this one stands, sums over all of them, and statistics that span them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdbench.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Adds the tensor up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Runs a block that may fail on one rank alone, such as at a locked folder or a file that one machine lacks.

        All ranks leave it together, with an error when any rank had one. No sum or broadcast may stand inside: a rank
        that failed would not take part.

        Raises:
            UserError: this rank's own, or else the first other rank's, with its number.
        """
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        if self.size > 1:
            told: list[str | None] = [None] * self.size
            dist.all_gather_object(told, None if own is None else str(own))
            other = next((f"process {rank} of {self.size}: {text}" for rank, text in enumerate(told) if text), None)
            if own is None and other is not None:
                raise UserError(other)
        if own is not None:
            raise own


@contextmanager
def init_world(device_type: str) -> Iterator[World]:
    """Joins the processes that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if started_here:
            dist.destroy_process_group()


def set_local_gpu(world: World) -> torch.device:
    """Takes the GPU of this process: that of its number on its machine.

    Raises:
        UserError: the machine has fewer.
    """
    found = torch.cuda.device_count()
    if world.local_rank >= found:
        raise UserError(
            f"this machine has {found} GPUs, but torchrun started process {world.local_rank + 1} on it; each needs one "
            f"of its own: --nproc-per-node {found} at most, or device=cpu."
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce_sum(gradient)  # itself differentiable: a gradient may go through a gradient


def all_reduce_sum(value: Tensor) -> Tensor:
    """Returns the sum over all ranks, on every rank; the gradients of all ranks' sums come back to each rank's own."""
    return _SumOverRanks.apply(value)  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start = ctx.world.rank * ctx.rows
        return all_reduce_sum(gradient)[start : start + ctx.rows], None


def all_gather_rows(rows: Tensor, world: World) -> Tensor:
    """Returns the rows of all ranks, in rank order, on every rank; gradients flow back to each rank's own."""
    if world.size == 1:
        return rows
    if not rows.is_floating_point():
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)
    return _GatherRows.apply(rows, world)  # type: ignore[no-any-return]
