"""BatchNorm with statistics over all ranks, for gloo and NCCL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdbench.engine.distributed.world import World, all_reduce_sum


def per_rank_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yields the buffers that each rank gathers from its own rows; those of `SyncBatchNorm` are equal on all ranks."""
    for module in model.modules():
        if not isinstance(module, SyncBatchNorm):
            yield from module.buffers(recurse=False)


def broadcast_buffers(buffers: Iterable[Tensor], world: World) -> None:
    """Gives every rank rank 0's values, in place."""
    if world.size == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in buffers:
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
        sums = all_reduce_sum(torch.cat([(wide * rows).sum(axes), count]))
        total = sums[-1]
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        variance = all_reduce_sum((centred * centred * rows).sum(axes)) / total
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


def convert_sync_batchnorm(model: nn.Module, world: World) -> nn.Module:
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
            convert_sync_batchnorm(child, world)
    return model
