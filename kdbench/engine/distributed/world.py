"""The process group of a run: rank and size, collectives, and gradients through collectives."""

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
    """Rank of this process and number of processes; collectives over all ranks.

    The default is a single process, in which every collective returns its argument.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes files."""
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place and without gradient; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank. The value is pickled."""
        if self.size == 1:
            return value
        container = [value]
        dist.broadcast_object_list(container)
        return container[0]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Raises on all ranks if the block raised a UserError on any rank.

        For work that can fail on one rank alone, such as locking a folder or reading a local file. The block itself
        must contain no collective: a rank that failed would not take part, and the others would wait for ever.

        Raises:
            UserError: this rank's error; otherwise the first failed rank's error, prefixed with its rank.
        """
        local_error: UserError | None = None
        try:
            yield
        except UserError as error:
            local_error = error
        if self.size > 1:
            messages: list[str | None] = [None] * self.size
            dist.all_gather_object(messages, None if local_error is None else str(local_error))
            failures = (f"process {rank} of {self.size}: {text}" for rank, text in enumerate(messages) if text)
            first_failure = next(failures, None)
            if local_error is None and first_failure is not None:
                raise UserError(first_failure)
        if local_error is not None:
            raise local_error


@contextmanager
def init_world(device_type: str) -> Iterator[World]:
    """Initialises the process group of torchrun for the duration of the block.

    Args:
        device_type: `cuda` selects NCCL, every other type gloo.

    Yields:
        The world of this process; a single process if torchrun's environment variables are absent.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    owns_group = not dist.is_initialized()
    if owns_group:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if owns_group:
            dist.destroy_process_group()


def set_local_gpu(world: World) -> torch.device:
    """Makes the GPU with this process's local rank the current device; returns it.

    Raises:
        UserError: the machine has fewer GPUs than local processes.
    """
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise UserError(
            f"this machine has {count} GPUs, but torchrun started process {world.local_rank + 1} on it, and each "
            f"process needs its own GPU. Use --nproc-per-node {count} or less, or device=cpu."
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce_sum(gradient)  # differentiable, for gradients of gradients


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sums a tensor over all ranks, with gradient; the backward sums the gradients of all ranks."""
    return _AllReduceSum.apply(value)  # type: ignore[no-any-return]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.row_count = world, rows.shape[0]
        return _all_gather(rows, world)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start = ctx.world.rank * ctx.row_count
        return all_reduce_sum(gradient)[start : start + ctx.row_count], None


def all_gather_rows(rows: Tensor, world: World) -> Tensor:
    """Concatenates the rows of all ranks, in rank order; gradients flow back to the rank that owns the row.

    Shape:
        rows: (batch, ...), the same on every rank. Returns (world.size * batch, ...).
    """
    if world.size == 1:
        return rows
    if not rows.is_floating_point():
        return _all_gather(rows, world)
    return _AllGatherRows.apply(rows, world)  # type: ignore[no-any-return]


def _all_gather(rows: Tensor, world: World) -> Tensor:
    blocks = [torch.empty_like(rows) for _ in range(world.size)]
    dist.all_gather(blocks, rows.contiguous())
    return torch.cat(blocks)
