"""Terms that compare how samples of a batch relate to each other: similarities, distances, angles.

Every term takes features (batch, ...) of any rank, flattened per sample; student and teacher may differ in all but
the batch. Rows that `mask` (bool) leaves out do not count in any statistic: value and gradient are those of the batch
without them. Under `weight` (>= 0, relative: scaled to a mean of 1 over the rows that count) a pair of rows counts
c_i * c_j times in every mean and sum, a triple c_i * c_j * c_k. All shapes are static; nothing waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, require
from kdbench.terms.numerics import full_precision, pair_mean, ratio, row_weights, safe_sqrt, valid_rows


def sp_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of the row-normalised similarity matrices; a scalar. See `SimilarityPreserving`."""
    with full_precision(student):
        student, teacher = valid_rows(student, mask), valid_rows(teacher, mask)
        counts = row_weights(student, mask, weight)
        difference = _normalised_gram(student, counts) - _normalised_gram(teacher, counts)
        return pair_mean(difference.square(), counts)


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Huber distance of the pairwise distances, each over its mean; a scalar. See `RelationalKD`."""
    student, teacher = valid_rows(student, mask), valid_rows(teacher, mask)
    counts = row_weights(student, mask, weight)
    ours, theirs = _relative_distances(student, counts), _relative_distances(teacher, counts)
    return pair_mean(F.smooth_l1_loss(ours, theirs, reduction="none"), counts)


def rkd_angle_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Huber distance of the cosines of the angles that all triples form; a scalar. See `RelationalKD`."""
    with full_precision(student):
        student, teacher = valid_rows(student, mask), valid_rows(teacher, mask)
        counts = row_weights(student, mask, weight)
        loss = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
        triples = counts[:, None, None] * counts[None, :, None] * counts[None, None, :]
        return ratio((triples * loss).sum(), triples.sum())


def pkt_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-7,
) -> Tensor:
    """Mean over pairs of q_ij * log(q_ij / p_ij); a scalar. See `ProbabilisticTransfer`."""
    with full_precision(student):
        student, teacher = valid_rows(student, mask), valid_rows(teacher, mask)
        counts = row_weights(student, mask, weight)
        p, q = _neighbours(student, counts, eps), _neighbours(teacher, counts, eps)
        return pair_mean(q * ((q + eps).log() - (p + eps).log()), counts)


def _normalised_gram(rows: Tensor, counts: Tensor) -> Tensor:
    """Inner products (batch, batch), each row divided by its length over the rows that count."""
    gram = rows @ rows.t()
    return ratio(gram, safe_sqrt((counts * gram.square()).sum(1, keepdim=True)))


def _differences(rows: Tensor) -> Tensor:
    """(batch, batch, elements): entry [i, j] leads from row i to row j.

    Not by way of inner products, which is cheaper but loses the distance of near neighbours to rounding.
    """
    return rows.unsqueeze(0) - rows.unsqueeze(1)


def _relative_distances(rows: Tensor, counts: Tensor) -> Tensor:
    """Euclidean distances (batch, batch) over their mean; the mean leaves out each row's distance to itself."""
    distances = safe_sqrt(_differences(rows).square().sum(2))
    pairs = counts.unsqueeze(0) * counts.unsqueeze(1)
    pairs = pairs - torch.diag_embed(pairs.diagonal())
    return ratio(distances, ratio((pairs * distances).sum(), pairs.sum()))


def _cosines(rows: Tensor) -> Tensor:
    """(batch, batch, batch): entry [i, j, k] is the cosine of the angle at row i between rows j and k; 0 if j = i."""
    differences = _differences(rows)
    directions = ratio(differences, safe_sqrt(differences.square().sum(2, keepdim=True)))
    return directions @ directions.transpose(1, 2)


def _neighbours(rows: Tensor, counts: Tensor, eps: float) -> Tensor:
    """How probable row j is as a neighbour of row i, by the cosine kernel (cos + 1) / 2; rows sum to 1."""
    lengths = safe_sqrt(rows.square().sum(1, keepdim=True))
    directions = ratio(rows, torch.where(lengths > 0, lengths + eps, 0))  # 0/eps is 0 too, but its gradient 1/eps
    kernel = (directions @ directions.t() + 1) / 2
    return ratio(kernel, (counts * kernel).sum(1, keepdim=True))


def _is_zero(weight: Number) -> bool:
    """Whether a weight is the plain number 0. A scheduled weight is a tensor, whose value is never read here."""
    return not isinstance(weight, Tensor) and weight == 0


class _RelationTerm(Term):
    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) < 2:
                raise ValueError(
                    f"compares samples by a feature of at least one element each, but the {role}'s operand has the "
                    f"shape {list(shapes[role])}, a single number per sample at most"
                )
        if shapes["student"][0] != shapes["teacher"][0]:
            raise ValueError(
                f"compares relations within one batch, but the student's operand has {shapes['student'][0]} rows "
                f"and the teacher's {shapes['teacher'][0]}"
            )


@TERMS.register("sp", space="batch", version=1, features=True, paper="arXiv:1907.09682")
class SimilarityPreserving(_RelationTerm):
    """Similarity-preserving KD: samples that the teacher finds alike are alike for the student.

    loss = 1/n^2 * sum_ij (G_s[i, j] - G_t[i, j])^2, with G = F F^T of the flattened features, each row of G divided by
    its length. RepDistiller, verified by the author, uses the last feature map and weight 3000.
    Masked rows count nowhere; in each sum over j, a row of weight c_j counts c_j times (weights are relative).

    Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
    Shapes: student, teacher (batch, ...), any rank and size -> scalar without unit.
    """

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return sp_loss(student, teacher, mask, weight)


@TERMS.register("rkd", space="batch", version=1, features=True, paper="arXiv:1904.05068")
class RelationalKD(_RelationTerm):
    """Relational KD: the student's features keep the teacher's distances (up to scale) and angles.

    loss = weight_distance * mean_ij h(d_s[i, j] - d_t[i, j])
         + weight_angle * mean_ijk h(cos_s[i, j, k] - cos_t[i, j, k]),
    h the Huber loss (smooth L1, beta 1), d a Euclidean distance over the mean distance of distinct rows, cos the
    cosine of the angle at i between j and k. The means run over all pairs and triples (also i = j, which add 0) and
    the weights are 25 and 50, as in RepDistiller, which uses the pooled feature and term weight 1.
    Masked rows count nowhere; a pair of rows with weights c_i, c_j counts c_i * c_j in each mean, a triple
    c_i * c_j * c_k (weights are relative). Memory: batch^2 * elements and batch^3 numbers; prefer pooled features.
    A part whose weight is the number 0 is not computed.

    Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    Shapes: student, teacher (batch, ...), any rank and size -> scalar without unit.
    """

    def __init__(self, weight_distance: Number = 25.0, weight_angle: Number = 50.0) -> None:
        super().__init__()
        require("rkd", "at least 0", weight_distance=weight_distance, weight_angle=weight_angle)
        if _is_zero(weight_distance) and _is_zero(weight_angle):
            raise ConfigError("rkd: weight_distance and weight_angle are both 0, so nothing is left of the term")
        self.weight_distance = weight_distance
        self.weight_angle = weight_angle

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if _is_zero(self.weight_angle):
            return self.weight_distance * rkd_distance_loss(student, teacher, mask, weight)
        if _is_zero(self.weight_distance):
            return self.weight_angle * rkd_angle_loss(student, teacher, mask, weight)
        distance = self.weight_distance * rkd_distance_loss(student, teacher, mask, weight)
        return distance + self.weight_angle * rkd_angle_loss(student, teacher, mask, weight)


@TERMS.register("pkt", space="batch", version=1, features=True, paper="arXiv:1803.10837")
class ProbabilisticTransfer(_RelationTerm):
    """Probabilistic knowledge transfer: each sample's neighbours are as probable for the student as for the teacher.

    loss = 1/n^2 * sum_ij q_ij * log(q_ij / p_ij), with p_ij = k_ij / sum_j k_ij, k = (cosine + 1) / 2 of the flattened
    features, a sample being its own neighbour too; 1e-7 guards norms and logarithms. The authors' code, which
    RepDistiller repeats with the pooled feature and weight 30000.
    Masked rows count nowhere; in each sum over j, a row of weight c_j counts c_j times (weights are relative).

    Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
    arXiv:1803.10837.
    Shapes: student, teacher (batch, ...), any rank and size -> scalar, nats over n.
    """

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return pkt_loss(student, teacher, mask, weight)
