"""Contrastive terms: a sample's feature agrees with the teacher's of the same sample, not with those of others."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Size, Tensor, nn

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_parameters
from kdbench.terms.features.vectors import scaled_to_length
from kdbench.terms.numerics import autocast_disabled, flatten_and_mask, row_weights, safe_divide

WORD_MASK = 0xFFFFFFFF


EPSILON = 1e-7


def info_nce_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    temperature: Number = 0.07,
) -> Tensor:
    """Mean over rows of -log softmax_j(cos(student_i, teacher_j) / T) at j = i; a scalar. See `InfoNCE`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        counts = row_weights(student, mask, weight)
        logits = scaled_to_length(student) @ scaled_to_length(teacher).t() / temperature
        rows = torch.where(counts > 0, counts, 1).log().masked_fill(counts <= 0, -torch.inf)
        # A row that does not count is still its own candidate, so that no softmax is empty; its loss weighs nothing.
        own = torch.eye(len(counts), dtype=torch.bool, device=counts.device) & (counts <= 0)
        loss = (logits + torch.where(own, 0, rows)).logsumexp(1) - (
            logits.diagonal() + torch.where(counts > 0, rows, 0)
        )
        # The positive is one of the candidates, as often as its own row counts.
        return safe_divide((counts * loss).sum(), counts.sum())


def hash_words(word: Tensor) -> Tensor:
    """Scrambles 32-bit words held in int64: every bit of the result depends on every bit given.

    The finaliser `lowbias32` of C. Wellons (https://nullprogram.com/blog/2018/07/31/), the same on every device.
    """
    word = word & WORD_MASK
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & WORD_MASK
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & WORD_MASK
    return word ^ (word >> 16)


def sample_negatives(labels: Tensor, own: Tensor, key: Tensor, count: int) -> Tensor:
    """Draws samples of other classes, with replacement, each equally likely.

    Args:
        labels: the class of each sample (samples,), int64; samples of no known class share a number of their own.
        own: the class of each row (batch,).
        key: (batch,), int64; the draw of a row is a function of its key alone.
        count: draws per row.

    Returns:
        (batch, count) positions in `labels`. Where all samples are of the row's class, any sample.
    """
    ordered, order = labels.sort(stable=True)
    first = torch.searchsorted(ordered, own)
    size = torch.searchsorted(ordered, own, right=True) - first
    left = len(labels) - size  # samples of other classes
    ticks = torch.arange(count, device=key.device, dtype=torch.int64)
    words = hash_words(hash_words(key).unsqueeze(1) + hash_words(ticks + 1).unsqueeze(0))
    place = words * torch.where(left > 0, left, len(labels)).unsqueeze(1) >> 32
    skip = (place >= first.unsqueeze(1)) & (left > 0).unsqueeze(1)
    return order[place + torch.where(skip, size.unsqueeze(1), 0)]


def nce_loss(scores: Tensor, samples: int) -> Tensor:
    """-log h(positive) - sum over negatives of log(1 - h), h(x) = x / (x + negatives / samples): (batch,).

    Args:
        scores: (batch, 1 + negatives), above 0; the first of each row belongs to the positive.
        samples: of which the negatives were drawn evenly.
    """
    noise = (scores.shape[1] - 1) / samples
    positive, negative = scores[:, 0], scores[:, 1:]
    sure = (positive / (positive + noise + EPSILON)).log()
    return -sure - (noise / (negative + noise + EPSILON)).log().sum(1)


@TERMS.register("info_nce", space="batch", version=1, features=True, paper="arXiv:1807.03748")
class InfoNCE(Term):
    """InfoNCE: among the teacher's features of a batch, the student's picks that of its own sample.

    loss = mean_i -log(exp(<s_i, t_i> / T) / sum_j exp(<s_i, t_j> / T)), features at length 1, all rows of the batch as
    candidates, the own one included. T is 0.07 as in SLidR and CMC. Give the student an adapter where widths differ.
    Masked rows are no candidates and do not count; a row of weight c_j stands c_j times among the candidates and counts
    c_i times in the mean (weights are relative).

    Van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding, 2018, arXiv:1807.03748.
    Shapes: student (after its adapter), teacher (batch, ...), equally many elements -> scalar, nats.
    """

    def __init__(self, temperature: Number = 0.07) -> None:
        super().__init__()
        check_parameters("info_nce", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        student, teacher = (shapes[role][1:].numel() for role in ("student", "teacher"))
        if student != teacher:
            raise ValueError(
                f"compares features by their angle, but the student's has {student} elements and the teacher's "
                f"{teacher}; give one of them an adapter"
            )

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return info_nce_loss(student, teacher, mask, weight, temperature=self.temperature)


@TERMS.register(
    "crd", space="batch", version=1, features=True, injected=("samples", "shapes"), paper="arXiv:1910.10699"
)
class ContrastiveRepresentationDistillation(Term):
    """Contrastive representation distillation: pairs of the same sample are told from pairs with thousands of others.

    loss = L(s against the teacher's bank) + L(t against the student's bank), L = -log h(positive) - sum over
    `negatives` of log(1 - h), h(x) = x / (x + negatives / samples), x = exp(<u, v> / T) / Z. u, v are features at
    length 1 after a trained linear map to `width`; v comes from a bank with one vector per sample of the source, moved
    by `momentum` after each step; Z makes the mean of x at the first step 1 / samples, and stays. Z apart, the loss of
    a sample does not depend on the batch. The authors' code (RepDistiller: pooled features, term weight 0.8), but for
    two points: negatives, samples of other classes, are drawn with replacement, and a sample joins its class when it is
    first seen (before, its bank entry is noise). Without labels every sample is its own class. Draws are a function of
    the step and of the sample's index.
    Masked rows neither count nor enter a bank; rows count by weight in the mean (weights are relative).
    Memory: the banks, 2 * samples * width numbers, and batch * samples while a step runs.

    Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699.
    Shapes: student, teacher (batch, ...), any rank and size, index (batch,), label (batch,) or none -> scalar, nats.
    """

    bank_student: Tensor
    bank_teacher: Tensor
    classes: Tensor
    scale: Tensor
    clock: Tensor
    seed: Tensor

    def __init__(
        self,
        samples: int,
        shapes: dict,
        width: int = 128,
        negatives: int = 16384,
        temperature: Number = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_parameters("crd", "above 0", temperature=temperature)
        check_parameters("crd", "in [0, 1]", momentum=momentum)
        if width < 1 or negatives < 1:
            raise ConfigError(f"crd: width and negatives must be at least 1, got {width} and {negatives}")
        if samples < 2:
            raise ConfigError("crd: needs a source of at least two samples, of known size, for its negatives")
        self.samples, self.negatives, self.temperature, self.momentum = samples, negatives, temperature, momentum
        self.embed_student = nn.Linear(math.prod(shapes["student"]), width)
        self.embed_teacher = nn.Linear(math.prod(shapes["teacher"]), width)
        reach = 1 / math.sqrt(width / 3)
        for name in ("student", "teacher"):  # one row more takes what must not be kept
            self.register_buffer(f"bank_{name}", torch.empty(samples + 1, width).uniform_(-reach, reach))
        self.register_buffer("classes", torch.full((samples + 1,), -1, dtype=torch.int64))
        self.register_buffer("scale", torch.full((2,), -1.0))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.randint(WORD_MASK, ()))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        label: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        with autocast_disabled(student):
            ours = scaled_to_length(self.embed_student(flatten_and_mask(student, mask)))
            theirs = scaled_to_length(self.embed_teacher(flatten_and_mask(teacher, mask)))
            counts = row_weights(ours, mask, weight)
            index = index.long() if mask is None else torch.where(mask, index.long(), 0)
            own = self._row_classes(index, label)
            drawn = sample_negatives(
                self.classes[:-1], own, hash_words(self.seed + hash_words(self.clock)) + index, self.negatives
            )
            chosen = torch.cat([index.unsqueeze(1), drawn], 1)
            loss = self._side_loss(ours, self.bank_teacher, chosen, counts, 0)
            loss = loss + self._side_loss(theirs, self.bank_student, chosen, counts, 1)
            if self.training:
                self._update_banks(ours, theirs, index, own, mask)
        return safe_divide((counts * loss).sum(), counts.sum())

    def _row_classes(self, index: Tensor, label: Tensor | None) -> Tensor:
        """The label, or where there is none a class that holds this sample alone."""
        alone = index + WORD_MASK
        return alone if label is None else torch.where(label < 0, alone, label.long())

    def _side_loss(self, rows: Tensor, bank: Tensor, chosen: Tensor, counts: Tensor, side: int) -> Tensor:
        """The loss (batch,) of rows against what a bank held before this step."""
        # A copy, since the bank moves before the backward pass reads it. One product and a gather of numbers: to gather
        # the vectors themselves would take width times the memory.
        cosines = rows @ bank.clone().to(rows.dtype).t()
        scores = (cosines.gather(1, chosen) / self.temperature).exp()
        present = (counts > 0).to(scores.dtype)
        first = self.samples * safe_divide((present * scores.detach().mean(1)).sum(), present.sum())
        scale = torch.where(self.scale[side] > 0, self.scale[side].to(scores.dtype), first)
        if self.training:
            self.scale[side] = scale
        return nce_loss(scores / torch.where(scale > 0, scale, 1), self.samples)

    @torch.no_grad()
    def _update_banks(self, ours: Tensor, theirs: Tensor, index: Tensor, own: Tensor, mask: Tensor | None) -> None:
        places = index if mask is None else torch.where(mask, index, self.samples)
        for bank, rows in ((self.bank_student, ours), (self.bank_teacher, theirs)):
            moved = self.momentum * bank[places] + (1 - self.momentum) * rows.to(bank.dtype)
            bank[places] = scaled_to_length(moved)
        self.classes[places] = own
        self.clock += 1


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
        check_parameters(
            "queue_similarity", "above 0", temperature=temperature, teacher_temperature=teacher_temperature
        )
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
        with autocast_disabled(student):
            ours = scaled_to_length(flatten_and_mask(student, mask))
            theirs = scaled_to_length(flatten_and_mask(teacher, mask)).detach()
            counts = row_weights(ours, mask, weight)
            near, known = self._batch_candidates(theirs, counts)
            # a copy, since the queue moves before the backward pass reads it
            far = self.queue[:-1].clone().to(ours.dtype).t()
            filled = (torch.arange(self.size, device=far.device) < self.held).expand(len(ours), -1)
            known = torch.cat([known, filled], 1)
            target = self._logits(theirs, near, far, known) / self.teacher_temperature
            own = self._logits(ours, near, far, known) / self.temperature
            loss = -(target.softmax(1) * torch.where(known, own.log_softmax(1), 0)).sum(1)
            if self.training:
                self._enqueue(theirs, mask)
        return safe_divide((counts * loss).sum(), counts.sum())

    def _batch_candidates(self, theirs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
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
    def _enqueue(self, theirs: Tensor, mask: Tensor | None) -> None:
        valid = theirs.new_ones(len(theirs), dtype=torch.int64) if mask is None else mask.long()
        places = (self.held + valid.cumsum(0) - 1) % self.size
        self.queue[torch.where(valid > 0, places, self.size)] = theirs.to(self.queue.dtype)
        self.held += valid.sum()
