"""Terms that compare features through a kernel: channels as samples of a distribution, samples as pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, equal_shapes, feature_maps, require
from kdbench.terms.numerics import (
    at_least_float32,
    full_precision,
    pair_mean,
    ratio,
    row_weights,
    safe_sqrt,
    valid_rows,
)


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the two sets of channels: (batch,). See `NeuronSelectivity`."""
    with full_precision(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        s, t = (_patterns(values, size) for values in (student, teacher))
        return _polynomial(t, t) + _polynomial(s, s) - 2 * _polynomial(s, t)


def _patterns(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Each channel as a vector of length 1 over the places, (batch, channels, places), pooled to `size`."""
    if features.shape[2:] != size:
        features = F.adaptive_avg_pool2d(features, size)
    flat = features.flatten(2)
    return ratio(flat, safe_sqrt(flat.square().sum(2, keepdim=True)))


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all pairs of channels of <a_i, b_j>^2: (batch,)."""
    return (a @ b.transpose(1, 2)).square().mean((1, 2))


def cc_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    gamma: Number = 0.4,
    order: int = 2,
) -> Tensor:
    """Mean squared difference of the two kernel matrices of a batch; a scalar. See `CorrelationCongruence`."""
    with full_precision(student):
        student, teacher = valid_rows(student, mask), valid_rows(teacher, mask)
        counts = row_weights(student, mask, weight)
        difference = _correlation(student, gamma, order) - _correlation(teacher, gamma, order)
        return pair_mean(difference.square(), counts)


def _correlation(rows: Tensor, gamma: Number, order: int) -> Tensor:
    """exp(-gamma * |x - y|^2) of rows of length 1, as its Taylor series in the cosine up to `order`: (batch, batch)."""
    directions = ratio(rows, safe_sqrt(rows.square().sum(1, keepdim=True)))
    cosines = directions @ directions.t()
    series = torch.ones_like(cosines)
    for power in range(1, order + 1):
        series = series + (2 * gamma) ** power / math.factorial(power) * cosines**power
    return math.e ** (-2 * gamma) * series


@TERMS.register("nst", space="sample", version=1, features=True, paper="arXiv:1707.01219")
class NeuronSelectivity(Term):
    """Neuron selectivity transfer: the student's channels are spread over the places as the teacher's channels are.

    loss = mean k(t, t') + mean k(s, s') - 2 mean k(s, t) over all pairs of channels, with k(a, b) = <a, b>^2 and each
    channel scaled to length 1 over the places: the squared maximum mean discrepancy (MMD) with the polynomial kernel
    (degree 2, no constant), the best one of the paper. As in RepDistiller, whose published figures use weight 50 over
    the inner layers (one edge each), the larger map is average-pooled; the paper interpolates.

    Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv:1707.01219.
    Shapes: student, teacher (batch, channels, height, width), channels and sizes may differ -> (batch,), without unit.
    """

    def check_shapes(self, **shapes: Size) -> None:
        feature_maps(student=shapes["student"], teacher=shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return nst_loss(student, teacher)


def mmd_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Squared distance of the mean features of two batches; a scalar. See `MeanDiscrepancy`."""
    student, teacher = valid_rows(student, mask), valid_rows(teacher, mask)
    counts = row_weights(student, mask, weight)
    difference = ratio((counts.unsqueeze(1) * (student - teacher)).sum(0), counts.sum())
    return difference.square().sum()


@TERMS.register("mmd", space="batch", version=1, features=True, paper="AAAI 2019")
class MeanDiscrepancy(Term):
    """Maximum mean discrepancy with the linear kernel: the mean feature of a batch is the same on both sides.

    loss = |mean_i s_i - mean_i t_i|^2, the sum over the elements, as the text has it. Single samples may differ: of one
    network under two distortions of its input, only what the distortions do to all samples alike is taken away. There
    both sides learn (`teacher_grad: true`).
    Masked rows count nowhere; a row of weight c counts c times in both means (weights are relative).

    Xu and Liu, Data-Distortion Guided Self-Distillation for Deep Neural Networks, AAAI 2019.
    Shapes: student, teacher (batch, ...) of equal shape -> scalar, squared units of the feature.
    """

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return mmd_loss(student, teacher, mask, weight)


@TERMS.register("cc", space="batch", version=1, features=True, paper="arXiv:1904.01802")
class CorrelationCongruence(Term):
    """Correlation congruence: the kernel matrix of a batch is the same for student and teacher.

    loss = 1/n^2 * sum_ij (K_s[i, j] - K_t[i, j])^2, with K(x, y) = exp(-2 gamma) * sum_p (2 gamma)^p / p! * <x, y>^p,
    p = 0 ... order: the Taylor series of the Gaussian kernel for features of length 1. gamma 0.4 and order 2 as in the
    paper. The code that its authors gave to RepDistiller is another loss (products of the feature differences of
    neighbouring rows, after trained embeddings); this is the paper's.
    Masked rows count nowhere; a pair of rows with weights c_i, c_j counts c_i * c_j times (weights are relative).

    Peng, Jin, Liu, Zhou, Wu, Liu, Li and Zhang, Correlation Congruence for Knowledge Distillation, ICCV 2019,
    arXiv:1904.01802.
    Shapes: student, teacher (batch, ...), any rank and size -> scalar without unit.
    """

    def __init__(self, gamma: Number = 0.4, order: int = 2) -> None:
        super().__init__()
        require("cc", "above 0", gamma=gamma)
        if order < 1:
            raise ConfigError(f"cc: order must be at least 1, got {order}")
        self.gamma = gamma
        self.order = order

    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) < 2:
                raise ValueError(f"compares samples by a feature, but the {role}'s operand is one number per sample")

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return cc_loss(student, teacher, mask, weight, gamma=self.gamma, order=self.order)
