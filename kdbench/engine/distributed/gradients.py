"""The sum of an update's gradients over all ranks, begun while the backward still runs.

The runner sums, not a wrapper around a model, so that any wiring of roles and terms is distributed the same way: each
rank's loss is its share of the whole batch's, and the gradients add up.
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
    """Adds the gradients of some parameters up over all ranks, bucket by bucket.

    The buckets are the same on every rank and in every step: the parameters from the last to the first, as a backward
    meets them. A bucket is sent as soon as all of its gradients are there, and never before the buckets in front of
    it, so that all ranks send in one order whatever their backwards meet first; what a backward left out is sent as
    zeros at the end. Bits do not depend on when a bucket was sent.

    Args:
        parameters: those of one update.
        world: alone, nothing is done.
        bucket_bytes: a bucket is closed when it holds so much.

    Attributes:
        early: how many buckets were on their way before the last backward was over.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: World, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.buckets = _buckets(parameters, bucket_bytes) if world.size > 1 else []
        self.overlapped_buckets = 0
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, dist.Work]] = []
        self._open = False
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def prepare_for_backward(self) -> None:
        """Says that the next backward completes the gradients: the last micro-batch of a step."""
        self._wait()  # a step that is tried again (without the compiler) may have sent some already
        self._missing = [len(bucket) for bucket in self.buckets]
        self._open = True

    def finish(self) -> None:
        """Sends what is left and waits; the parameters then hold the sums."""
        self._open = False
        self.overlapped_buckets = len(self._sent)
        while len(self._sent) < len(self.buckets):
            self._send()
        self._wait()

    def _arrived(self, number: int, _: Tensor) -> None:
        if not self._open:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        gradients = []
        for parameter in self.buckets[len(self._sent)]:
            if parameter.grad is None:  # a rank whose rows gave none still takes part
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((flat, work))

    def _wait(self) -> None:
        for bucket, (flat, work) in zip(self.buckets, self._sent, strict=False):
            work.wait()
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])  # pyright: ignore[reportPrivateImportUsage]
        self._sent = []


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """The parameters from the last to the first, in groups of one type and of about one size."""
    buckets: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in reversed(parameters):
        if not buckets or filled >= bucket_bytes or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel() * parameter.element_size()
    return buckets
