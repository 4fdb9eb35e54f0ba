"""BatchNorm with statistics over all ranks (gloo and NCCL), and the broadcast of buffers from rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdbench.engine.distributed.world import World, all_reduce_sum


def per_rank_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yields the buffers of a model that may differ between ranks: all buffers outside `SyncBatchNorm` layers."""
    for module in model.modules():
        if not isinstance(module, SyncBatchNorm):
            yield from module.buffers(recurse=False)


def broadcast_buffers(buffers: Iterable[Tensor], world: World) -> None:
    """Overwrites the buffers of every rank with the values of rank 0, in one broadcast for each dtype."""
    if world.size == 1:
        return
    buffers_by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        buffers_by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for group in buffers_by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in group])
        dist.broadcast(flat, 0)
        values = flat.split([buffer.numel() for buffer in group])
        views = [value.view_as(buffer) for value, buffer in zip(values, group, strict=True)]
        torch._foreach_copy_(group, views)  # pyright: ignore[reportPrivateImportUsage]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with statistics over all ranks, for gloo (CPU) and NCCL.

    Output and gradient equal the result of BatchNorm on the concatenated batches of all ranks. Rows that are repeated
    to give all ranks batches of equal size are excluded from the statistics.

    Shape:
        input: (batch, channels, ...). Returns the same shape.

    Attributes:
        world: the process group.
        valid: bool (batch,), False for a repeated row. None: no row is repeated. `Network` sets it for each batch.
    """

    world = World()
    valid: Tensor | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: expected an input with at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.world.size == 1:
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input if input.dtype == torch.float64 else input.float()  # sums in half precision lose too much
        mask = values.new_ones(input.shape[0]) if self.valid is None else self.valid.to(values.dtype)
        mask = mask.view([-1] + [1] * (input.dim() - 1))
        local_count = mask.sum().reshape(1) * (input.numel() // (input.shape[0] * input.shape[1]))
        # The count travels with the sums: one collective instead of two.
        sums = all_reduce_sum(torch.cat([(values * mask).sum(axes), local_count]))
        count = sums[-1]
        mean = sums[:-1] / count
        centered = values - mean.view(shape)
        # Two passes, because E[x^2] - E[x]^2 cancels when the mean is large.
        variance = all_reduce_sum((centered * centered * mask).sum(axes)) / count
        self._update_running_stats(mean, variance, count)
        output = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _update_running_stats(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            momentum: Any
            if self.momentum is None and self.num_batches_tracked is not None:
                # torch's meaning of momentum=None: the mean over all batches so far.
                momentum = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
            else:
                momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def convert_sync_batchnorm(model: nn.Module, world: World) -> nn.Module:
    """Replaces every BatchNorm inside a model by a `SyncBatchNorm`, in place, and returns the model.

    Weights and module paths stay the same.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            replacement = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            replacement.load_state_dict(child.state_dict())
            replacement.to(next(iter(child.state_dict().values())).device if child.state_dict() else "cpu")
            replacement.train(child.training)
            replacement.world = world
            model.register_module(name, replacement)
        else:
            convert_sync_batchnorm(child, world)
    return model
