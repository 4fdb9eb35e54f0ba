"""Terms on relations between samples, positions and tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_parameters
from kdbench.terms.features.vectors import mean_over_tokens, scaled_to_length
from kdbench.terms.numerics import (
    at_least_float32,
    autocast_disabled,
    flatten_and_mask,
    mean_over_pairs,
    row_weights,
    safe_divide,
    safe_sqrt,
)


def sp_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of the row-normalised similarity matrices; a scalar. See `SimilarityPreserving`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        counts = row_weights(student, mask, weight)
        difference = _normalised_gram(student, counts) - _normalised_gram(teacher, counts)
        return mean_over_pairs(difference.square(), counts)


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Huber distance of the pairwise distances, each over its mean; a scalar. See `RelationalKD`."""
    student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
    counts = row_weights(student, mask, weight)
    ours, theirs = _relative_distances(student, counts), _relative_distances(teacher, counts)
    return mean_over_pairs(F.smooth_l1_loss(ours, theirs, reduction="none"), counts)


def rkd_angle_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Huber distance of the cosines of the angles that all triples form; a scalar. See `RelationalKD`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        counts = row_weights(student, mask, weight)
        loss = F.smooth_l1_loss(_angle_cosines(student), _angle_cosines(teacher), reduction="none")
        triples = counts[:, None, None] * counts[None, :, None] * counts[None, None, :]
        return safe_divide((triples * loss).sum(), triples.sum())


def pkt_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-7,
) -> Tensor:
    """Mean over pairs of q_ij * log(q_ij / p_ij); a scalar. See `ProbabilisticTransfer`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        counts = row_weights(student, mask, weight)
        p, q = _neighbour_probabilities(student, counts, eps), _neighbour_probabilities(teacher, counts, eps)
        return mean_over_pairs(q * ((q + eps).log() - (p + eps).log()), counts)


def _normalised_gram(rows: Tensor, counts: Tensor) -> Tensor:
    """Inner products (batch, batch), each row divided by its length over the rows that count."""
    gram = rows @ rows.t()
    return safe_divide(gram, safe_sqrt((counts * gram.square()).sum(1, keepdim=True)))


def _pairwise_differences(rows: Tensor) -> Tensor:
    """(batch, batch, elements): entry [i, j] leads from row i to row j.

    Not by way of inner products, which is cheaper but loses the distance of near neighbours to rounding.
    """
    return rows.unsqueeze(0) - rows.unsqueeze(1)


def _relative_distances(rows: Tensor, counts: Tensor) -> Tensor:
    """Euclidean distances (batch, batch) over their mean; the mean leaves out each row's distance to itself."""
    distances = safe_sqrt(_pairwise_differences(rows).square().sum(2))
    pairs = counts.unsqueeze(0) * counts.unsqueeze(1)
    pairs = pairs - torch.diag_embed(pairs.diagonal())
    return safe_divide(distances, safe_divide((pairs * distances).sum(), pairs.sum()))


def _angle_cosines(rows: Tensor) -> Tensor:
    """(batch, batch, batch): entry [i, j, k] is the cosine of the angle at row i between rows j and k; 0 if j = i."""
    differences = _pairwise_differences(rows)
    directions = safe_divide(differences, safe_sqrt(differences.square().sum(2, keepdim=True)))
    return directions @ directions.transpose(1, 2)


def _neighbour_probabilities(rows: Tensor, counts: Tensor, eps: float) -> Tensor:
    """How probable row j is as a neighbour of row i, by the cosine kernel (cos + 1) / 2; rows sum to 1."""
    lengths = safe_sqrt(rows.square().sum(1, keepdim=True))
    directions = safe_divide(rows, torch.where(lengths > 0, lengths + eps, 0))  # 0/eps is 0 too, but its gradient 1/eps
    kernel = (directions @ directions.t() + 1) / 2
    return safe_divide(kernel, (counts * kernel).sum(1, keepdim=True))


def _is_constant_zero(weight: Number) -> bool:
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
        check_parameters("rkd", "at least 0", weight_distance=weight_distance, weight_angle=weight_angle)
        if _is_constant_zero(weight_distance) and _is_constant_zero(weight_angle):
            raise ConfigError("rkd: weight_distance and weight_angle are both 0, so nothing is left of the term")
        self.weight_distance = weight_distance
        self.weight_angle = weight_angle

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if _is_constant_zero(self.weight_angle):
            return self.weight_distance * rkd_distance_loss(student, teacher, mask, weight)
        if _is_constant_zero(self.weight_distance):
            return self.weight_angle * rkd_angle_loss(student, teacher, mask, weight)
        distance = self.weight_distance * rkd_distance_loss(student, teacher, mask, weight)
        return distance + self.weight_angle * rkd_angle_loss(student, teacher, mask, weight)


@TERMS.register("pkt", space="batch", version=1, features=True, paper="arXiv:1803.10837")
class ProbabilisticKnowledgeTransfer(_RelationTerm):
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
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        counts = row_weights(student, mask, weight)
        difference = _gaussian_kernel_series(student, gamma, order) - _gaussian_kernel_series(teacher, gamma, order)
        return mean_over_pairs(difference.square(), counts)


def _gaussian_kernel_series(rows: Tensor, gamma: Number, order: int) -> Tensor:
    """exp(-gamma * |x - y|^2) of rows of length 1, as its Taylor series in the cosine up to `order`: (batch, batch)."""
    directions = safe_divide(rows, safe_sqrt(rows.square().sum(1, keepdim=True)))
    cosines = directions @ directions.t()
    series = torch.ones_like(cosines)
    for power in range(1, order + 1):
        series = series + (2 * gamma) ** power / math.factorial(power) * cosines**power
    return math.e ** (-2 * gamma) * series


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
        check_parameters("cc", "above 0", gamma=gamma)
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


AttentionPart = Literal["whole", "query", "key", "value"]


def as_tokens(features: Tensor) -> Tensor:
    """Tokens (batch, length, width), at least float32; the places of a map (batch, width, h, w) are tokens, too."""
    features = at_least_float32(features)
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def token_relation_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean over tokens of 1 - cosine of the rows of the two similarity matrices: (batch,). See `TokenRelation`."""
    with autocast_disabled(student):
        ours, theirs = _normalised_token_cosines(student, tokens), _normalised_token_cosines(teacher, tokens)
        return mean_over_tokens(1 - (ours * theirs).sum(2), tokens)


def _normalised_token_cosines(features: Tensor, tokens: Tensor | None) -> Tensor:
    """Cosines of all pairs of tokens (batch, length, length), each row scaled to length 1 over the counted tokens."""
    directions = scaled_to_length(as_tokens(features))
    cosines = directions @ directions.transpose(1, 2)
    if tokens is not None:
        cosines = torch.where(tokens.to(torch.bool).unsqueeze(1), cosines, 0)
    return safe_divide(cosines, safe_sqrt(cosines.square().sum(2, keepdim=True)))


def attention_relation_loss(student: Tensor, teacher: Tensor, heads: int = 1, part: AttentionPart = "whole") -> Tensor:
    """KL(teacher || student) of how each token attends to all, over heads and tokens: (batch,).

    See `AttentionRelation` for the arguments.
    """
    with autocast_disabled(student):
        log_p, log_q = _log_relations(student, heads, part), _log_relations(teacher, heads, part)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean((1, 2))


def _log_relations(features: Tensor, heads: int, part: AttentionPart) -> Tensor:
    """Log-softmax of the scaled inner products of all pairs of tokens, per relation head: (batch, heads, l, l)."""
    vectors = at_least_float32(features)
    if part != "whole":
        vectors = vectors.chunk(3, dim=2)[("query", "key", "value").index(part)]
    split = vectors.unflatten(2, (heads, -1)).transpose(1, 2)
    return F.log_softmax(split @ split.transpose(2, 3) / math.sqrt(split.shape[-1]), dim=-1)


@TERMS.register("token_relation", space="row", version=1, features=True, operands=("tokens",), paper="arXiv:2504.00037")
class TokenRelation(Term):
    """Token relations: tokens of one image that are alike for the teacher are alike for the student.

    loss = 1/L * sum_i (1 - <A_s[i] / |A_s[i]|, A_t[i] / |A_t[i]|>), A[i, j] the cosine of tokens i and j: activation
    matching of ViT-Linearizer, one edge per pair of stages (4 there, averaged: give the term the weight 1/4). Needs no
    projector; widths may differ. `tokens` (a mask, batch x length) says which tokens count: those that the student saw,
    since relations of hidden tokens would tell it what it is to predict (section 3.3). No code was published: this
    follows the text as its summaries give it.

    Wei and Chellappa, ViT-Linearizer: Distilling Quadratic Knowledge into Linear-Time Vision Models, ICCV 2025,
    arXiv:2504.00037.
    Shapes: student, teacher (batch, length, width) or (batch, width, height, width'), of equal length; tokens
    (batch, length), bool or 0/1 -> (batch,), without unit, in [0, 2].
    """

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_lengths(shapes)
        marks, length = shapes.get("tokens"), _token_count(shapes["student"])
        if marks is not None and tuple(marks[1:]) != (length,):
            raise ValueError(
                f"needs one mark for each of {length} tokens, but `tokens` is {list(marks[1:])} per sample"
            )

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        return token_relation_loss(student, teacher, tokens)


@TERMS.register("attention_relation", space="row", version=1, features=True, paper="arXiv:2012.15828")
class AttentionRelation(Term):
    """MiniLM v2: each token attends to the others as the teacher's does, by queries, keys or values alone.

    loss = mean over relation heads and tokens of KL(R_t || R_s), R = softmax(V V^T / sqrt(d)) row by row, V one part of
    the attention (queries, keys or values) split anew into `heads` parts of d elements, so that student and teacher may
    differ in width and in heads; one term per part, of weight 1 each in the paper. `part` takes the first, second or
    last third of an operand that holds all three, as the output of a `qkv` layer does; `whole` takes it as it is.
    Hybrid Distill (ICLR 2024, arXiv:2306.15876) takes such relations from a masked-image teacher.

    Wang, Bao, Huang, Dong and Wei, MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
    Pretrained Transformers, Findings of ACL 2021, arXiv:2012.15828.
    Shapes: student, teacher (batch, length, width), of equal length, widths divisible by `heads` (by 3 * heads where
    `part` is not whole) -> (batch,), nats.
    """

    def __init__(self, heads: int = 1, part: Literal["whole", "query", "key", "value"] = "whole") -> None:
        super().__init__()
        if heads < 1:
            raise ConfigError(f"attention_relation: heads must be at least 1, got {heads}")
        self.heads = heads
        self.part: AttentionPart = part

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_lengths(shapes, maps=False)
        divisor = self.heads * (1 if self.part == "whole" else 3)
        for role in ("student", "teacher"):
            if shapes[role][2] % divisor:
                raise ValueError(
                    f"splits each token into {divisor} equal parts ({self.heads} heads, part {self.part}), but the "
                    f"{role}'s have {shapes[role][2]} elements"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_relation_loss(student, teacher, self.heads, self.part)


def _token_count(shape: Size) -> int:
    return shape[2] * shape[3] if len(shape) == 4 else shape[1]


def _check_equal_lengths(shapes: dict[str, Size], *, maps: bool = True) -> None:
    for role in ("student", "teacher"):
        if len(shapes[role]) not in ((3, 4) if maps else (3,)):
            raise ValueError(
                f"reads tokens [length, width]{' or maps [width, h, w]' if maps else ''}, but the {role}'s operand is "
                f"{list(shapes[role][1:])} per sample"
            )
    if _token_count(shapes["student"]) != _token_count(shapes["teacher"]):
        raise ValueError(
            f"compares tokens one by one, but the student has {_token_count(shapes['student'])} "
            f"and the teacher {_token_count(shapes['teacher'])}"
        )
