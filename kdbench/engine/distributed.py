"""Several processes: where this one stands, sums over all of them, and statistics that span them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds the tensor up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
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
def join_world(device_type: str) -> Iterator[World]:
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


def own_gpu(world: World) -> torch.device:
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
        return sum_over_ranks(gradient)  # itself differentiable: a gradient may go through a gradient


def sum_over_ranks(value: Tensor) -> Tensor:
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
        return sum_over_ranks(gradient)[start : start + ctx.rows], None


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """Returns the rows of all ranks, in rank order, on every rank; gradients flow back to each rank's own."""
    if world.size == 1:
        return rows
    if not rows.is_floating_point():
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)
    return _GatherRows.apply(rows, world)  # type: ignore[no-any-return]


def own_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yields the buffers that each rank gathers from its own rows; those of `SyncBatchNorm` are equal on all ranks."""
    for module in model.modules():
        if not isinstance(module, SyncBatchNorm):
            yield from module.buffers(recurse=False)


def copy_from_main(tensors: Iterable[Tensor], world: World) -> None:
    """Gives every rank rank 0's values, in place."""
    if world.size == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(flat, 0)
        parts = flat.split([tensor.numel() for tensor in same])
        torch._foreach_copy_(same, [part.view_as(t) for part, t in zip(parts, same, strict=True)])  # pyright: ignore[reportPrivateImportUsage]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with statistics over all ranks; works on gloo (CPU) as well as on NCCL.

    Input (batch, channels, ...). Equals BatchNorm on the concatenated batch, in value and in gradient. Rows that were
    repeated to make the ranks equal count in no statistic.

    Attributes:
        valid: bool (batch,), False for a repeated row; None where every row counts. Set before each forward.
    """

    world = World()
    valid: Tensor | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.world.size == 1:
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input if input.dtype == torch.float64 else input.float()
        rows = wide.new_ones(input.shape[0]) if self.valid is None else self.valid.to(wide.dtype)
        rows = rows.view([-1] + [1] * (input.dim() - 1))
        count = rows.sum().reshape(1) * (input.numel() // (input.shape[0] * input.shape[1]))
        sums = sum_over_ranks(torch.cat([(wide * rows).sum(axes), count]))
        total = sums[-1]
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        variance = sum_over_ranks((centred * centred * rows).sum(axes)) / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                # momentum None asks for the plain average over all batches so far.
                momentum: Any
                if self.momentum is None and self.num_batches_tracked is not None:
                    momentum = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
                else:
                    momentum = self.momentum or 0.0
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (total / (total - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)


def synchronise_batchnorm(model: nn.Module, world: World) -> nn.Module:
    """Replaces every BatchNorm of a model by one with statistics over all ranks, keeping weights and paths."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            replaced = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            replaced.load_state_dict(child.state_dict())
            replaced.to(next(iter(child.state_dict().values())).device if child.state_dict() else "cpu")
            replaced.train(child.training)
            replaced.world = world
            setattr(model, name, replaced)
        else:
            synchronise_batchnorm(child, world)
    return model
