"""Terms with a queue: what the teacher said of earlier batches is what this batch is compared with."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, require
from kdbench.terms.distances import scaled_to_length
from kdbench.terms.numerics import full_precision, ratio, row_weights, valid_rows


@TERMS.register(
    "queue_similarity", space="batch", version=1, features=True, injected=("shapes",), paper="arXiv:2101.04731"
)
class QueueSimilarity(Term):
    """SEED: the student finds a sample as like the queue's samples as the teacher does; no labels, no negatives.

    loss_i = -sum_j q_ij log p_ij, q_i = softmax_j(<t_i, k_j> / teacher_temperature), p_i = softmax_j(<s_i, k_j> /
    temperature), all at length 1. The k are teacher features: the sample's own (`candidates: own`, SEED) or those of
    the whole batch (`candidates: batch`, as COMODO has it, arXiv:2503.07259, row m049), and the last `size` ones of
    earlier batches, first in first out. 0.2 and 0.01 are SEED's text (its code: 1e-4), 0.05 and 0.1 COMODO's.
    Places of the queue that are still empty do not count; SEED's code fills them with noise at first, COMODO's with
    samples. Masked rows do not count, are no candidates and do not enter the queue; rows count by weight in the mean
    (weights are relative). Several processes keep one queue; rows of one batch enter it in the order of the ranks.
    Memory: size * width numbers, and batch * size while a step runs.

    Fang, Wang, Wang, Zhang, Yang and Liu, SEED: Self-supervised Distillation For Visual Representation, ICLR 2021,
    arXiv:2101.04731. As in the authors' code (jacobswan1/SEED: seed/builder.py) and in COMODO's (Breezelled/COMODO:
    comodo/loss.py).
    Shapes: student (after its adapter), teacher (batch, ...), equally many elements -> scalar, nats.
    """

    queue: Tensor
    held: Tensor

    def __init__(
        self,
        shapes: dict,
        size: int = 65536,
        temperature: Number = 0.2,
        teacher_temperature: Number = 0.01,
        candidates: Literal["own", "batch"] = "own",
    ) -> None:
        super().__init__()
        require("queue_similarity", "above 0", temperature=temperature, teacher_temperature=teacher_temperature)
        if size < 1:
            raise ConfigError(f"queue_similarity: size must be at least 1, got {size}")
        self.size, self.candidates = size, candidates
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        # one row more than the queue has takes what must not enter it
        self.register_buffer("queue", torch.zeros(size + 1, math.prod(shapes["teacher"])))
        self.register_buffer("held", torch.zeros((), dtype=torch.int64))  # how many have entered in all

    def check_shapes(self, **shapes: Size) -> None:
        student, teacher = (shapes[role][1:].numel() for role in ("student", "teacher"))
        if student != teacher:
            raise ValueError(
                f"compares features by their angle, but the student's has {student} elements and the teacher's "
                f"{teacher}; give the student an adapter"
            )

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if student.shape[0] > self.size:
            raise ConfigError(
                f"queue_similarity: a batch of {student.shape[0]} does not fit into a queue of {self.size}"
            )
        with full_precision(student):
            ours = scaled_to_length(valid_rows(student, mask))
            theirs = scaled_to_length(valid_rows(teacher, mask)).detach()
            counts = row_weights(ours, mask, weight)
            near, known = self._near(theirs, counts)
            # a copy, since the queue moves before the backward pass reads it
            far = self.queue[:-1].clone().to(ours.dtype).t()
            filled = (torch.arange(self.size, device=far.device) < self.held).expand(len(ours), -1)
            known = torch.cat([known, filled], 1)
            target = self._logits(theirs, near, far, known) / self.teacher_temperature
            own = self._logits(ours, near, far, known) / self.temperature
            loss = -(target.softmax(1) * torch.where(known, own.log_softmax(1), 0)).sum(1)
            if self.training:
                self._enter(theirs, mask)
        return ratio((counts * loss).sum(), counts.sum())

    def _near(self, theirs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of this batch (1 or batch, candidates, width), and which count (batch, candidates)."""
        if self.candidates == "own":
            return theirs.unsqueeze(1), torch.ones_like(counts, dtype=torch.bool).unsqueeze(1)
        own = torch.eye(len(counts), dtype=torch.bool, device=counts.device)  # so that no softmax is empty
        return theirs.unsqueeze(0), (counts > 0).unsqueeze(0) | own

    @staticmethod
    def _logits(rows: Tensor, near: Tensor, far: Tensor, known: Tensor) -> Tensor:
        cosines = torch.cat([(near @ rows.unsqueeze(2)).squeeze(2), rows @ far], 1)
        return cosines.masked_fill(~known, -torch.inf)

    @torch.no_grad()
    def _enter(self, theirs: Tensor, mask: Tensor | None) -> None:
        valid = theirs.new_ones(len(theirs), dtype=torch.int64) if mask is None else mask.long()
        places = (self.held + valid.cumsum(0) - 1) % self.size
        self.queue[torch.where(valid > 0, places, self.size)] = theirs.to(self.queue.dtype)
        self.held += valid.sum()
