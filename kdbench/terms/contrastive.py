"""Contrastive terms: a sample's student and teacher features agree, and differ from features of different samples."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Size, Tensor, nn

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_parameters
from kdbench.terms.numerics import autocast_disabled, flatten_and_mask, row_weights, safe_divide, safe_normalize

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
    """Computes the InfoNCE loss: the mean over rows i of -log softmax_j(cos(student_i, teacher_j) / T) at j = i.

    Args:
        student: features (batch, ...).
        teacher: features (batch, ...) with the same number of elements.
        mask: bool (batch,), False for padded rows.
        weight: (batch,), >= 0. A row of weight 2 counts as two rows of weight 1.
        temperature: T > 0.

    Returns:
        A scalar, nats.
    """
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        logits = safe_normalize(student) @ safe_normalize(teacher).t() / temperature
        log_weights = torch.where(weights > 0, weights, 1).log().masked_fill(weights <= 0, -torch.inf)
        # A masked row stays its own candidate, so that no softmax is empty; its loss has weight 0.
        empty_row = torch.eye(len(weights), dtype=torch.bool, device=weights.device) & (weights <= 0)
        # The positive is one of the candidates: it has the weight of its row.
        loss = (logits + torch.where(empty_row, 0, log_weights)).logsumexp(1) - (
            logits.diagonal() + torch.where(weights > 0, log_weights, 0)
        )
        return safe_divide((weights * loss).sum(), weights.sum())


def hash_words(words: Tensor) -> Tensor:
    """Hashes 32-bit words that are stored as int64. Every bit of the result depends on every bit of the input.

    The hash is `lowbias32` by C. Wellons (https://nullprogram.com/blog/2018/07/31/). All devices compute equal results.
    """
    words = words & WORD_MASK
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & WORD_MASK
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & WORD_MASK
    return words ^ (words >> 16)


def sample_negatives(sample_class: Tensor, row_class: Tensor, key: Tensor, count: int) -> Tensor:
    """Draws negatives for each row: samples of a different class, uniformly and with replacement.

    Args:
        sample_class: class of each sample in the dataset, (samples,), int64. Samples of unknown class have an extra
            class number in common.
        row_class: class of each row of the batch, (batch,).
        key: seed of the draws of each row, (batch,), int64.
        count: number of draws per row.

    Returns:
        Positions in `sample_class`, (batch, count). If every sample has the class of the row, all samples are drawn
        from.
    """
    # Sorted by class, the samples of a row's class are one interval; draws are numbers outside of it.
    sorted_class, order = sample_class.sort(stable=True)
    class_start = torch.searchsorted(sorted_class, row_class)
    class_size = torch.searchsorted(sorted_class, row_class, right=True) - class_start
    negatives = len(sample_class) - class_size
    draw_number = torch.arange(count, device=key.device, dtype=torch.int64)
    words = hash_words(hash_words(key).unsqueeze(1) + hash_words(draw_number + 1).unsqueeze(0))
    # The high word of word * range is uniform in [0, range).
    draw = words * torch.where(negatives > 0, negatives, len(sample_class)).unsqueeze(1) >> 32
    skip_class = (draw >= class_start.unsqueeze(1)) & (negatives > 0).unsqueeze(1)
    return order[draw + torch.where(skip_class, class_size.unsqueeze(1), 0)]


def nce_loss(scores: Tensor, samples: int) -> Tensor:
    """Computes the noise-contrastive loss -log h(positive) - sum over negatives of log(1 - h(negative)), per row.

    h(x) = x / (x + negatives / samples) is the probability that the score x belongs to the positive.

    Args:
        scores: scores of the positive (first column) and of the negatives, (batch, 1 + negatives), above 0.
        samples: number of samples that the negatives were drawn from.

    Returns:
        (batch,), nats.
    """
    noise = (scores.shape[1] - 1) / samples
    positive, negative = scores[:, 0], scores[:, 1:]
    log_h_positive = (positive / (positive + noise + EPSILON)).log()
    return -log_h_positive - (noise / (negative + noise + EPSILON)).log().sum(1)


def _check_equal_elements(shapes: dict[str, Size], adapter_side: str) -> None:
    """Raises ValueError if the features of student and teacher differ in their number of elements.

    Args:
        shapes: operand name -> shape, including the batch dimension.
        adapter_side: operand that should get an adapter, for the message.
    """
    student, teacher = (shapes[role][1:].numel() for role in ("student", "teacher"))
    if student != teacher:
        raise ValueError(
            f"compares features by their angle, but the student's feature has {student} elements and the teacher's "
            f"feature has {teacher}; give {adapter_side} an adapter"
        )


@TERMS.register("info_nce", space="batch", version=1, features=True, paper="arXiv:1807.03748")
class InfoNCE(Term):
    """InfoNCE: cross-entropy of matching the student's feature to the teacher's feature of the same sample.

    loss = mean_i -log(exp(<s_i, t_i> / T) / sum_j exp(<s_i, t_j> / T))

    s_i and t_i are the features of student and teacher for row i, scaled to length 1. j runs over all rows of the
    batch (the candidates), including i. The default T is 0.07, as in SLidR and CMC. If student and teacher differ in
    width, give the student an adapter.

    Args:
        temperature: T > 0.

    Shape:
        student (after its adapter), teacher: (batch, ...), equal number of elements.
        Returns a scalar, nats. Masked rows are not candidates and do not count in the mean. A row of weight 2 counts as
        two rows of weight 1.

    References:
        Van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding, 2018,
        arXiv:1807.03748.
    """

    def __init__(self, temperature: Number = 0.07) -> None:
        super().__init__()
        check_parameters("info_nce", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_elements(shapes, "one of them")

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return info_nce_loss(student, teacher, mask, weight, temperature=self.temperature)


@TERMS.register(
    "crd", space="batch", version=1, features=True, injected=("samples", "shapes"), paper="arXiv:1910.10699"
)
class ContrastiveRepresentationDistillation(Term):
    """CRD: contrast of each sample's student-teacher pair with thousands of negatives from a memory bank.

    loss = mean over rows of L(s, teacher's bank) + L(t, student's bank)
    L = -log h(x of the positive) - sum over negatives of log(1 - h(x)), h(x) = x / (x + negatives / samples)
    x = exp(<u, v> / T) / Z

    s and t are the features of student and teacher. u is such a feature after a trained linear map to `width`
    elements, scaled to length 1. v is a vector of a bank. Each network has one bank, with one vector per sample of
    the dataset; after each step, the vectors of the batch move towards the new u. The positive is the sample of the
    row. Z is chosen in the first step, so that the mean of x is 1 / samples, and is constant afterwards. Except for
    Z, the loss of a sample does not depend on the rest of the batch.

    The term follows the authors' code (RepDistiller: pooled features, term weight 0.8), with two differences.
    Negatives are samples of different classes, drawn with replacement. The class of a sample is known only after the
    sample was in a batch; before that, its bank vector is noise. Without labels, every sample has its own class. The
    draws depend only on the step and on the sample's index.

    Args:
        width: width of the embedding.
        negatives: number of negatives per row.
        temperature: T > 0.
        momentum: weight of the previous vector in the update of a bank, in [0, 1].

    Shape:
        student, teacher: (batch, ...), any rank and size. index: (batch,), int64. label: (batch,), int64, optional.
        Returns a scalar, nats. Masked rows do not count and do not enter the banks. A row of weight 2 counts as two
        rows of weight 1. Memory: the banks, 2 * samples * width numbers, and batch * samples during a step.

    References:
        Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699.
    """

    bank_student: Tensor
    bank_teacher: Tensor
    sample_class: Tensor
    scale: Tensor
    num_steps: Tensor
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
            raise ConfigError(
                "crd: draws negatives from the data, so the data needs a known size of at least two samples, "
                f"got {samples}"
            )
        self.samples, self.negatives, self.temperature, self.momentum = samples, negatives, temperature, momentum
        self.embed_student = nn.Linear(math.prod(shapes["student"]), width)
        self.embed_teacher = nn.Linear(math.prod(shapes["teacher"]), width)
        limit = 1 / math.sqrt(width / 3)
        for name in ("student", "teacher"):
            # The last row takes the writes of masked rows.
            self.register_buffer(f"bank_{name}", torch.empty(samples + 1, width).uniform_(-limit, limit))
        self.register_buffer("sample_class", torch.full((samples + 1,), -1, dtype=torch.int64))
        self.register_buffer("scale", torch.full((2,), -1.0))  # Z of both sides; negative before the first step
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
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
            student_rows = safe_normalize(self.embed_student(flatten_and_mask(student, mask)))
            teacher_rows = safe_normalize(self.embed_teacher(flatten_and_mask(teacher, mask)))
            weights = row_weights(student_rows, mask, weight)
            index = index.long() if mask is None else torch.where(mask, index.long(), 0)
            row_class = self._row_classes(index, label)
            key = hash_words(self.seed + hash_words(self.num_steps)) + index
            negatives = sample_negatives(self.sample_class[:-1], row_class, key, self.negatives)
            candidates = torch.cat([index.unsqueeze(1), negatives], 1)
            loss = self._side_loss(student_rows, self.bank_teacher, candidates, weights, 0)
            loss = loss + self._side_loss(teacher_rows, self.bank_student, candidates, weights, 1)
            if self.training:
                self._update_banks(student_rows, teacher_rows, index, row_class, mask)
        return safe_divide((weights * loss).sum(), weights.sum())

    def _row_classes(self, index: Tensor, label: Tensor | None) -> Tensor:
        """Returns the class of each row, (batch,). A row without a label gets a class number of its own."""
        single_class = index + WORD_MASK
        return single_class if label is None else torch.where(label < 0, single_class, label.long())

    def _side_loss(self, rows: Tensor, bank: Tensor, candidates: Tensor, weights: Tensor, side: int) -> Tensor:
        """Computes the loss of one network's embeddings against the bank of the other network; returns (batch,).

        Args:
            rows: embeddings of this batch (batch, width).
            bank: stored vectors of the other network (samples + 1, width).
            candidates: positions in the bank (batch, 1 + negatives), the positive first.
            weights: weight of each row (batch,).
            side: 0 for embeddings of the student, 1 for embeddings of the teacher.
        """
        # A copy, because the bank is updated before the backward pass reads it. One product with the whole bank and a
        # gather of numbers: gathering the vectors would take `width` times the memory.
        cosines = rows @ bank.clone().to(rows.dtype).t()
        scores = (cosines.gather(1, candidates) / self.temperature).exp()
        valid = (weights > 0).to(scores.dtype)
        initial_scale = self.samples * safe_divide((valid * scores.detach().mean(1)).sum(), valid.sum())
        scale = torch.where(self.scale[side] > 0, self.scale[side].to(scores.dtype), initial_scale)
        if self.training:
            self.scale[side] = scale
        return nce_loss(scores / torch.where(scale > 0, scale, 1), self.samples)

    @torch.no_grad()
    def _update_banks(
        self, student_rows: Tensor, teacher_rows: Tensor, index: Tensor, row_class: Tensor, mask: Tensor | None
    ) -> None:
        positions = index if mask is None else torch.where(mask, index, self.samples)
        for bank, rows in ((self.bank_student, student_rows), (self.bank_teacher, teacher_rows)):
            updated = self.momentum * bank[positions] + (1 - self.momentum) * rows.to(bank.dtype)
            bank[positions] = safe_normalize(updated)
        self.sample_class[positions] = row_class
        self.num_steps += 1


@TERMS.register(
    "queue_similarity", space="batch", version=1, features=True, injected=("shapes",), paper="arXiv:2101.04731"
)
class QueueSimilarity(Term):
    """SEED: cross-entropy between the similarities of student and teacher to a queue of teacher features.

    loss = mean_i -sum_j q_ij log p_ij
    q_i = softmax_j(<t_i, k_j> / teacher_temperature), p_i = softmax_j(<s_i, k_j> / temperature)

    s_i and t_i are the features of student and teacher for row i. All features are scaled to length 1. The candidates
    k_j are teacher features of the current batch, and the teacher features of the last `size` rows of earlier batches
    (a first-in-first-out queue). Labels and negatives are not needed. Empty positions of the queue do not count; at
    first, SEED's code fills them with noise, and COMODO's code with samples. In distributed training all processes
    share one queue: the rows of a batch enter the queue in the order of the ranks.

    Args:
        size: length of the queue, at least the batch size.
        temperature: temperature of the student, above 0. SEED uses 0.2, COMODO 0.05.
        teacher_temperature: temperature of the teacher, above 0. SEED uses 0.01 (in its code 1e-4), COMODO 0.1.
        candidates: teacher features of the current batch that are candidates. `own`: only the feature of the row itself
            (SEED). `batch`: the features of all rows (COMODO, arXiv:2503.07259).

    Shape:
        student (after its adapter), teacher: (batch, ...), equal number of elements.
        Returns a scalar, nats. Masked rows have no loss, are not candidates and do not enter the queue. A row of weight
        2 counts as two rows of weight 1 in the mean. Memory: size * width numbers, and batch * size during a step.

    References:
        Fang, Wang, Wang, Zhang, Yang and Liu, SEED: Self-supervised Distillation For Visual Representation, ICLR 2021,
        arXiv:2101.04731. The formula follows the authors' code (jacobswan1/SEED: seed/builder.py) and the code of
        COMODO (Breezelled/COMODO: comodo/loss.py).
    """

    queue: Tensor
    enqueued: Tensor

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
        # The last row takes the writes of masked rows.
        self.register_buffer("queue", torch.zeros(size + 1, math.prod(shapes["teacher"])))
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64))  # rows in all, also those overwritten

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_elements(shapes, "the student")

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if student.shape[0] > self.size:
            raise ConfigError(
                f"queue_similarity: a batch of {student.shape[0]} rows does not fit into a queue of {self.size}; raise "
                "the size of the queue"
            )
        with autocast_disabled(student):
            student_rows = safe_normalize(flatten_and_mask(student, mask))
            teacher_rows = safe_normalize(flatten_and_mask(teacher, mask)).detach()
            weights = row_weights(student_rows, mask, weight)
            batch_keys, is_candidate = self._batch_candidates(teacher_rows, weights)
            # A copy, because the queue is updated before the backward pass reads it.
            queue_keys = self.queue[:-1].clone().to(student_rows.dtype).t()
            is_filled = torch.arange(self.size, device=queue_keys.device) < self.enqueued
            is_candidate = torch.cat([is_candidate, is_filled.expand(len(student_rows), -1)], 1)
            teacher_logits = self._logits(teacher_rows, batch_keys, queue_keys, is_candidate) / self.teacher_temperature
            student_logits = self._logits(student_rows, batch_keys, queue_keys, is_candidate) / self.temperature
            log_p = torch.where(is_candidate, student_logits.log_softmax(1), 0)
            loss = -(teacher_logits.softmax(1) * log_p).sum(1)
            if self.training:
                self._enqueue(teacher_rows, mask)
        return safe_divide((weights * loss).sum(), weights.sum())

    def _batch_candidates(self, teacher_rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the teacher features of this batch that are candidates, and a mask of valid candidates.

        Args:
            teacher_rows: teacher features (batch, width).
            weights: weight of each row (batch,), 0 for masked rows.

        Returns:
            Candidates (batch, 1, width) for `own`, or (1, batch, width) for `batch`; and the mask of valid pairs of row
            and candidate, bool (batch, 1) or (batch, batch).
        """
        if self.candidates == "own":
            return teacher_rows.unsqueeze(1), torch.ones_like(weights, dtype=torch.bool).unsqueeze(1)
        # Each row stays its own candidate, so that no softmax is empty.
        identity = torch.eye(len(weights), dtype=torch.bool, device=weights.device)
        return teacher_rows.unsqueeze(0), (weights > 0).unsqueeze(0) | identity

    @staticmethod
    def _logits(rows: Tensor, batch_keys: Tensor, queue_keys: Tensor, is_candidate: Tensor) -> Tensor:
        cosines = torch.cat([(batch_keys @ rows.unsqueeze(2)).squeeze(2), rows @ queue_keys], 1)
        return cosines.masked_fill(~is_candidate, -torch.inf)

    @torch.no_grad()
    def _enqueue(self, teacher_rows: Tensor, mask: Tensor | None) -> None:
        valid = teacher_rows.new_ones(len(teacher_rows), dtype=torch.int64) if mask is None else mask.long()
        positions = (self.enqueued + valid.cumsum(0) - 1) % self.size
        self.queue[torch.where(valid > 0, positions, self.size)] = teacher_rows.to(self.queue.dtype)
        self.enqueued += valid.sum()
