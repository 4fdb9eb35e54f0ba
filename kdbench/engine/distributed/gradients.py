"""Sum of gradients over all ranks, computed while the backward still runs.

`DistributedDataParallel` wraps one model. `GradientReducer` works on parameters, so any combination of networks and
loss terms is distributed in the same way. Each rank computes its fraction of the loss of the effective batch.
Therefore gradients are summed over ranks, not averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdbench.engine.distributed.world import World

BUCKET_BYTES = 25 * 2**20


class GradientReducer:
    """Reducer that sums the gradients of parameters over all ranks, bucket by bucket.

    A bucket is a group of parameters whose gradients are summed in one collective. The buckets are the same on every
    rank and in every step. They contain the parameters from the last to the first, the usual order of a backward. The
    collective of a bucket starts when the gradients of the bucket are complete and the collectives of all earlier
    buckets have started. So all ranks start the collectives in the same order, even if the order of their backward
    passes differs. The method `finish` replaces missing gradients by zeros. The sums do not depend on the time at
    which a collective starts.

    Args:
        parameters: the parameters of one optimizer.
        world: the process group. With one process the reducer does nothing.
        bucket_bytes: size at which a bucket is full.

    Attributes:
        overlapped_buckets: number of buckets whose collective started before the end of the last backward of a step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: World, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.buckets = _buckets(parameters, bucket_bytes) if world.size > 1 else []
        self.overlapped_buckets = 0
        self._pending_gradients: list[int] = []  # by bucket
        self._in_flight: list[tuple[Tensor, dist.Work]] = []  # flat buffer and collective, in the order of the buckets
        self._overlaps = False
        for index, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, index))

    def prepare_for_backward(self) -> None:
        """Enables the sums over ranks during the next backward, which must be the last backward of a training step."""
        self._wait()  # a step that is repeated without the compiler may have issued some buckets before
        self._pending_gradients = [len(bucket) for bucket in self.buckets]
        self._overlaps = True

    def finish(self) -> None:
        """Sums the remaining gradients over all ranks, and waits until the sums of all gradients are available."""
        self._overlaps = False
        self.overlapped_buckets = len(self._in_flight)
        while len(self._in_flight) < len(self.buckets):
            self._reduce_next()
        self._wait()

    def _on_gradient(self, index: int, _: Tensor) -> None:
        if not self._overlaps:
            return
        self._pending_gradients[index] -= 1
        while len(self._in_flight) < len(self.buckets) and self._pending_gradients[len(self._in_flight)] == 0:
            self._reduce_next()

    def _reduce_next(self) -> None:
        gradients = []
        for parameter in self.buckets[len(self._in_flight)]:
            if parameter.grad is None:  # another rank may have a gradient, so this one takes part with zeros
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._in_flight.append((flat, work))

    def _wait(self) -> None:
        for bucket, (flat, work) in zip(self.buckets, self._in_flight, strict=False):
            work.wait()
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            values = flat.split([gradient.numel() for gradient in gradients])
            views = [value.view_as(gradient) for value, gradient in zip(values, gradients, strict=True)]
            torch._foreach_copy_(gradients, views)  # pyright: ignore[reportPrivateImportUsage]
        self._in_flight = []


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Groups parameters, from the last to the first, into buckets of one dtype and about equal size."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        if not buckets or size >= bucket_bytes or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
