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
from kdbench.terms.features.vectors import mean_over_tokens
from kdbench.terms.numerics import (
    at_least_float32,
    autocast_disabled,
    flatten_and_mask,
    mean_over_pairs,
    row_weights,
    safe_divide,
    safe_normalize,
    safe_sqrt,
)


def sp_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Averages the squared difference of the normalised similarity matrices; a scalar. See `SimilarityPreserving`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        difference = _normalized_gram(student, weights) - _normalized_gram(teacher, weights)
        return mean_over_pairs(difference.square(), weights)


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Averages the Huber loss of the pairwise distances, each over its mean; a scalar. See `RelationalKD`."""
    student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
    weights = row_weights(student, mask, weight)
    student_distances, teacher_distances = (_relative_distances(rows, weights) for rows in (student, teacher))
    return mean_over_pairs(F.smooth_l1_loss(student_distances, teacher_distances, reduction="none"), weights)


def rkd_angle_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Averages the Huber loss of the cosines of all angles of triples; a scalar. See `RelationalKD`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        loss = F.smooth_l1_loss(_angle_cosines(student), _angle_cosines(teacher), reduction="none")
        triple_weights = weights[:, None, None] * weights[None, :, None] * weights[None, None, :]
        return safe_divide((triple_weights * loss).sum(), triple_weights.sum())


def pkt_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-7,
) -> Tensor:
    """Averages q_ij * log(q_ij / p_ij) over all pairs; a scalar. See `ProbabilisticKnowledgeTransfer`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        p, q = _neighbor_probabilities(student, weights, eps), _neighbor_probabilities(teacher, weights, eps)
        return mean_over_pairs(q * ((q + eps).log() - (p + eps).log()), weights)


def _normalized_gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Computes inner products (batch, batch); each row is divided by its weighted length."""
    gram = rows @ rows.t()
    return safe_divide(gram, safe_sqrt((weights * gram.square()).sum(1, keepdim=True)))


def _pairwise_differences(rows: Tensor) -> Tensor:
    """Computes row j minus row i as entry [i, j] of (batch, batch, elements).

    Inner products would be cheaper, but lose the distance of near neighbours to rounding.
    """
    return rows.unsqueeze(0) - rows.unsqueeze(1)


def _relative_distances(rows: Tensor, weights: Tensor) -> Tensor:
    """Computes Euclidean distances (batch, batch) over their mean; the mean leaves out i = j."""
    distances = safe_sqrt(_pairwise_differences(rows).square().sum(2))
    pair_weights = weights.unsqueeze(0) * weights.unsqueeze(1)
    pair_weights = pair_weights - torch.diag_embed(pair_weights.diagonal())
    return safe_divide(distances, safe_divide((pair_weights * distances).sum(), pair_weights.sum()))


def _angle_cosines(rows: Tensor) -> Tensor:
    """Computes the cosine of the angle at row i between rows j and k as entry [i, j, k]; 0 if j = i."""
    directions = safe_normalize(_pairwise_differences(rows))
    return directions @ directions.transpose(1, 2)


def _neighbor_probabilities(rows: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Computes the probability of row j as a neighbour of row i by the kernel (cosine + 1) / 2; rows sum to 1."""
    lengths = safe_sqrt(rows.square().sum(1, keepdim=True))
    # Not 0 / eps for a zero row: its gradient would be 1 / eps.
    directions = safe_divide(rows, torch.where(lengths > 0, lengths + eps, 0))
    kernel = (directions @ directions.t() + 1) / 2
    return safe_divide(kernel, (weights * kernel).sum(1, keepdim=True))


def _is_constant_zero(weight: Number) -> bool:
    """Returns whether a weight is the number 0. The value of a scheduled weight (a tensor) is never read here."""
    return not isinstance(weight, Tensor) and weight == 0


class _RelationTerm(Term):
    """Base class of terms on relations between the rows of a batch; checks that both operands are features of it."""

    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) < 2:
                raise ValueError(
                    f"compares samples by a feature of at least one element each, but the {role}'s operand has the "
                    f"shape {list(shapes[role])}, at most one number per sample"
                )
        if shapes["student"][0] != shapes["teacher"][0]:
            raise ValueError(
                f"compares relations within one batch, but the student's operand has {shapes['student'][0]} rows "
                f"and the teacher's {shapes['teacher'][0]}"
            )


@TERMS.register("sp", space="batch", version=1, features=True, paper="arXiv:1907.09682")
class SimilarityPreserving(_RelationTerm):
    """Similarity-preserving KD: squared difference of the batch's similarity matrices.

    loss = 1/n^2 * sum_ij (G_s[i, j] - G_t[i, j])^2, G = F F^T with each row divided by its length

    F are the flattened features of the batch. RepDistiller, verified by the author, has the last feature map and weight
    3000.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar without unit. Masked rows are left out; in each sum over j, a row of weight c_j counts c_j
        times (weights are relative).

    References:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
    """

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return sp_loss(student, teacher, mask, weight)


@TERMS.register("rkd", space="batch", version=1, features=True, paper="arXiv:1904.05068")
class RelationalKD(_RelationTerm):
    """Relational KD: Huber loss of the pairwise distances and of the angles of triples in a batch.

    loss = weight_distance * mean_ij h(d_s[i, j] - d_t[i, j])
         + weight_angle * mean_ijk h(cos_s[i, j, k] - cos_t[i, j, k])

    h is the Huber loss (smooth L1, beta 1); d is a Euclidean distance over the mean distance of distinct rows; cos is
    the cosine of the angle at i between j and k. As in RepDistiller, which has the pooled feature and term weight 1,
    the means are over all pairs and triples (i = j adds 0).

    Args:
        weight_distance: >= 0; 25 as in RepDistiller. The number 0 skips the distances.
        weight_angle: >= 0; 50 as in RepDistiller. The number 0 skips the angles.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar without unit. Masked rows are left out; a pair of rows with weights c_i, c_j counts c_i * c_j
        in each mean, a triple c_i * c_j * c_k (weights are relative).
        Memory: batch^2 * elements and batch^3 numbers; prefer pooled features.

    References:
        Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """

    def __init__(self, weight_distance: Number = 25.0, weight_angle: Number = 50.0) -> None:
        super().__init__()
        check_parameters("rkd", "at least 0", weight_distance=weight_distance, weight_angle=weight_angle)
        if _is_constant_zero(weight_distance) and _is_constant_zero(weight_angle):
            raise ConfigError("rkd: weight_distance and weight_angle are both 0, so the term has no loss")
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
    """Probabilistic knowledge transfer: divergence of the neighbour probabilities of each sample.

    loss = 1/n^2 * sum_ij q_ij * log(q_ij / p_ij), p_ij = k_ij / sum_j k_ij, k = (cosine + 1) / 2

    p is the student's, q the teacher's, from flattened features; a sample is its own neighbour too. 1e-7 is added to
    norms and inside logarithms. As in the authors' code and in RepDistiller, which has the pooled feature and weight
    30000.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar, nats over n. Masked rows are left out; in each sum over j, a row of weight c_j counts c_j
        times (weights are relative).

    References:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
        arXiv:1803.10837.
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
    """Averages the squared difference of the two kernel matrices of a batch; a scalar. See `CorrelationCongruence`."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        student_kernel, teacher_kernel = (_gaussian_kernel_series(rows, gamma, order) for rows in (student, teacher))
        return mean_over_pairs((student_kernel - teacher_kernel).square(), weights)


def _gaussian_kernel_series(rows: Tensor, gamma: Number, order: int) -> Tensor:
    """Computes exp(-gamma * |x - y|^2) of normalised rows as Taylor series in the cosine up to `order`."""
    directions = safe_normalize(rows)
    cosines = directions @ directions.t()
    series = torch.ones_like(cosines)
    for power in range(1, order + 1):
        series = series + (2 * gamma) ** power / math.factorial(power) * cosines**power
    return math.e ** (-2 * gamma) * series


@TERMS.register("cc", space="batch", version=1, features=True, paper="arXiv:1904.01802")
class CorrelationCongruence(Term):
    """Correlation congruence: squared difference of the Gaussian kernel matrices of a batch.

    loss = 1/n^2 * sum_ij (K_s[i, j] - K_t[i, j])^2
    K(x, y) = exp(-2 gamma) * sum_p (2 gamma)^p / p! * <x, y>^p, p = 0 ... order

    K is the Taylor series of the Gaussian kernel for features of length 1. This is the loss of the paper. The code that
    its authors contributed to RepDistiller is a different loss: products of the feature differences of neighbouring
    rows, after trained embeddings.

    Args:
        gamma: above 0; 0.4 in the paper.
        order: of the series, at least 1; 2 in the paper.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar without unit. Masked rows are left out; a pair of rows with weights c_i, c_j counts c_i * c_j
        times (weights are relative).

    References:
        Peng, Jin, Liu, Zhou, Wu, Liu, Li and Zhang, Correlation Congruence for Knowledge Distillation, ICCV 2019,
        arXiv:1904.01802.
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
    """Returns tokens (batch, length, width), at least float32; a map (batch, width, h, w) has h * w tokens."""
    features = at_least_float32(features)
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def token_relation_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Averages 1 - cosine of the rows of the two similarity matrices over the tokens: (batch,). See `TokenRelation`."""
    with autocast_disabled(student):
        student_relations = _normalized_token_cosines(student, tokens)
        teacher_relations = _normalized_token_cosines(teacher, tokens)
        return mean_over_tokens(1 - (student_relations * teacher_relations).sum(2), tokens)


def _normalized_token_cosines(features: Tensor, tokens: Tensor | None) -> Tensor:
    """Computes the cosines of all pairs of tokens (batch, length, length), each row at length 1 over `tokens`."""
    directions = safe_normalize(as_tokens(features))
    cosines = directions @ directions.transpose(1, 2)
    if tokens is not None:
        cosines = torch.where(tokens.to(torch.bool).unsqueeze(1), cosines, 0)
    return safe_normalize(cosines)


def attention_relation_loss(student: Tensor, teacher: Tensor, heads: int = 1, part: AttentionPart = "whole") -> Tensor:
    """Computes KL(teacher || student) of the attention of each token to all, averaged over heads and tokens: (batch,).

    See `AttentionRelation` for the arguments.
    """
    with autocast_disabled(student):
        log_p, log_q = _log_relations(student, heads, part), _log_relations(teacher, heads, part)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean((1, 2))


def _log_relations(features: Tensor, heads: int, part: AttentionPart) -> Tensor:
    """Computes the log-softmax of scaled inner products of all pairs of tokens: (batch, heads, length, length)."""
    vectors = at_least_float32(features)
    if part != "whole":
        vectors = vectors.chunk(3, dim=2)[("query", "key", "value").index(part)]
    head_vectors = vectors.unflatten(2, (heads, -1)).transpose(1, 2)
    inner_products = head_vectors @ head_vectors.transpose(2, 3)
    return F.log_softmax(inner_products / math.sqrt(head_vectors.shape[-1]), dim=-1)


@TERMS.register("token_relation", space="row", version=1, features=True, operands=("tokens",), paper="arXiv:2504.00037")
class TokenRelation(Term):
    """Token relations: cosine distance of the rows of the token similarity matrices (ViT-Linearizer).

    loss = 1/L * sum_i (1 - <A_s[i] / |A_s[i]|, A_t[i] / |A_t[i]|>), A[i, j] = cosine of tokens i and j

    The activation matching of ViT-Linearizer, one edge per pair of stages (4 there, averaged: give the term the weight
    1/4). Widths may differ, no projector is needed. The paper counts the tokens that the student sees, because
    relations of hidden tokens would leak its prediction target (section 3.3). Its code is not published; this follows
    the text as its summaries give it.

    Shape:
        student, teacher: (batch, length, width) or (batch, width, height, width'), of equal length. tokens: mask of the
            tokens that count, (batch, length), bool or 0/1, optional.
        Returns (batch,), without unit, in [0, 2].

    References:
        Wei and Chellappa, ViT-Linearizer: Distilling Quadratic Knowledge into Linear-Time Vision Models, ICCV 2025,
        arXiv:2504.00037.
    """

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_lengths(shapes)
        mask, length = shapes.get("tokens"), _token_count(shapes["student"])
        if mask is not None and tuple(mask[1:]) != (length,):
            raise ValueError(
                f"needs a mask over {length} tokens, but `tokens` has the shape {list(mask[1:])} per sample"
            )

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        return token_relation_loss(student, teacher, tokens)


@TERMS.register("attention_relation", space="row", version=1, features=True, paper="arXiv:2012.15828")
class AttentionRelation(Term):
    """MiniLM v2: KL divergence of the self-attention relations, computed from queries, keys or values alone.

    loss = mean over relation heads and tokens of KL(R_t || R_s), R = softmax(V V^T / sqrt(d)) row by row

    V is one part of the attention (queries, keys or values), split into `heads` relation heads of d elements, so that
    student and teacher may differ in width and in attention heads. One term per part, with weight 1 each in the paper.
    Hybrid Distill (ICLR 2024, arXiv:2306.15876) has such relations from a masked-image teacher.

    Args:
        heads: number of relation heads, at least 1.
        part: `query`, `key` or `value`: the first, second or last third of an operand that contains all three, such as
            the output of a `qkv` layer. `whole`: the operand itself.

    Shape:
        student, teacher: (batch, length, width), of equal length; widths divisible by `heads` (by 3 * heads if `part`
            is not whole).
        Returns (batch,), nats.

    References:
        Wang, Bao, Huang, Dong and Wei, MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
        Pretrained Transformers, Findings of ACL 2021, arXiv:2012.15828.
    """

    def __init__(self, heads: int = 1, part: Literal["whole", "query", "key", "value"] = "whole") -> None:
        super().__init__()
        if heads < 1:
            raise ConfigError(f"attention_relation: heads must be at least 1, got {heads}")
        self.heads = heads
        self.part: AttentionPart = part

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_lengths(shapes, allow_maps=False)
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


def _check_equal_lengths(shapes: dict[str, Size], *, allow_maps: bool = True) -> None:
    """Raises ValueError if student and teacher are not tokens (or maps) of equal length."""
    for role in ("student", "teacher"):
        if len(shapes[role]) not in ((3, 4) if allow_maps else (3,)):
            raise ValueError(
                f"reads tokens [length, width]{' or maps [width, h, w]' if allow_maps else ''}, but the {role}'s "
                f"operand is {list(shapes[role][1:])} per sample"
            )
    if _token_count(shapes["student"]) != _token_count(shapes["teacher"]):
        raise ValueError(
            f"compares tokens one by one, but the student has {_token_count(shapes['student'])} "
            f"and the teacher {_token_count(shapes['teacher'])}"
        )
