"""Targets that begin near the student and move to the teacher while it learns."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, equal_classes, require
from kdbench.terms.numerics import ratio, row_weights, valid_rows


@TERMS.register("taid", space="batch", version=1, paper="arXiv:2501.16937")
class TemporallyAdaptiveInterpolation(Term):
    """TAID: the target lies between the student's own distribution and the teacher's, nearer to it as the loss falls.

    loss = mean of -sum_k q_k log p_k, q = softmax((1 - t) z_s + t z_t) with the student's logits z_s held constant, p
    its softmax. After each step m <- momentum * m + (1 - momentum) (before - loss) / before, t <- t + rate * sigmoid(m)
    (1 - t), never below `least` and never above `end`. The authors' least value rises in a line from 0.2 or 0.4 to
    `end` over all steps: `least: {type: linear, start: 0.4, end: 1, by: step}`. As in their code (SakanaAI/TAID:
    src/distil_losses/taid.py), which reads the linear value of the step before. Under `accumulate` a step is a
    micro-batch. Masked rows do not count; rows count by weight in the mean (weights are relative).

    Shing, Misaki, Bao, Yokoi and Akiba, TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
    Transfer in Language Models, ICLR 2025, arXiv:2501.16937 (on images too).
    Shapes: student, teacher logits (batch, classes) -> scalar, nats.
    """

    t: Tensor
    drift: Tensor
    before: Tensor

    def __init__(self, least: Number = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> None:
        super().__init__()
        require("taid", "in [0, 1]", least=least, end=end, rate=rate, momentum=momentum)
        if not isinstance(least, Tensor) and least > end:
            raise ConfigError(f"taid: least must be at most end, got {least} and {end}")
        self.least, self.end, self.rate, self.momentum = least, end, rate, momentum
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("drift", torch.zeros(()))  # the running relative fall of the loss
        self.register_buffer("before", torch.full((), torch.inf))  # the loss of the step before

    def check_shapes(self, **shapes: Size) -> None:
        equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        own, theirs = valid_rows(student, mask), valid_rows(teacher, mask)
        counts = row_weights(own, mask, weight)
        t = self.t.clamp(min=self.least).clamp(max=self.end).to(own.dtype)
        target = ((1 - t) * own.detach() + t * theirs).softmax(1)
        rows = -(target * own.log_softmax(1)).sum(1)
        loss = ratio((counts * rows).sum(), counts.sum())
        if self.training:
            self._move(t.to(self.t.dtype), loss.detach().to(self.t.dtype))
        return loss

    def _move(self, t: Tensor, loss: Tensor) -> None:
        first = self.before.isinf()
        fall = torch.where(first, 0, (self.before - loss) / (self.before + 1e-15))
        drift = self.momentum * self.drift + (1 - self.momentum) * fall
        self.drift.copy_(torch.where(first, self.drift, drift))
        self.t.copy_(torch.where(first, t, (t + self.rate * self.drift.sigmoid() * (1 - t)).clamp(max=self.end)))
        self.before.copy_(loss)
