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
    """Rank of this process, number of processes, and collectives over all ranks.

    By default, there is a single process, and every collective returns its argument.

    Attributes:
        rank: number of this process among all processes.
        size: number of processes.
        local_rank: number of this process among the processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes files."""
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks in place, without gradient, and returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Sends a Python object from rank 0 to all ranks by pickle; returns the object of rank 0 on every rank."""
        if self.size == 1:
            return value
        container = [value]
        dist.broadcast_object_list(container)
        return container[0]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Raises a UserError on all ranks if the block raises a UserError on any rank.

        Use it for work that can fail on a single rank, such as locking a folder or reading a local file. The block
        must
        not contain a collective: a failed rank would not take part, and the remaining ranks would wait for ever.

        Raises:
            UserError: the error of this rank. On a rank without an error: the error of the first failed rank, and the
                number of that rank.
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
        device_type: type of a torch device. `cuda` selects NCCL, every other type selects gloo.

    Yields:
        The world of this process. Without torchrun's environment variables, it is the world of a single process.
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
    """Makes the GPU with this process's local rank the current CUDA device, and returns this device.

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
    """Sums a tensor over all ranks, with gradient: the backward sums the gradients of all ranks."""
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
    """Concatenates the rows of all ranks, in rank order. Gradients flow back to the rank from which a row came.
    Shape:
        rows: (batch, ...), the same shape on every rank. Returns (world.size * batch, ...).
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
