"""Reduces the gradients of an update over all ranks while the backward still runs.

A reducer instead of DistributedDataParallel, which wraps one model: here any wiring of roles and terms is distributed
in the same way. Each rank's loss is its fraction of the effective batch's loss, so the gradients are summed.
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
    """Sums the gradients of the given parameters over all ranks, bucket by bucket.

    The buckets are the same on every rank and in every step. They follow the parameters from the last to the first, the
    usual order of a backward. A bucket is reduced as soon as all its gradients and all earlier buckets are complete, so
    all ranks issue their collectives in the same order, whatever the order of their backward. Gradients that a backward
    did not produce are reduced as zeros in `finish`. The result does not depend on when a bucket was reduced.

    Args:
        parameters: the parameters of one update.
        world: with one process the reducer does nothing.
        bucket_bytes: size at which a bucket is full.

    Attributes:
        overlapped_buckets: number of buckets that were issued before the last backward of a step ended.
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
        """Starts overlapping: the next backward, of the last micro-batch of a step, completes the gradients."""
        self._wait()  # a step that is repeated without the compiler may have issued some buckets before
        self._pending_gradients = [len(bucket) for bucket in self.buckets]
        self._overlaps = True

    def finish(self) -> None:
        """Reduces the remaining buckets and waits; the parameters' gradients are then the sums."""
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
    """Groups the parameters, from the last to the first, into buckets of one dtype and about equal size."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        if not buckets or size >= bucket_bytes or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
