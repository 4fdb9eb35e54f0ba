"""Terms on relations (similarities, distances, angles) between the samples of a batch, or between tokens."""

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
    """Computes the loss of the term `SimilarityPreserving` for two batches of features; returns a scalar."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        difference = _normalized_gram(student, weights) - _normalized_gram(teacher, weights)
        return mean_over_pairs(difference.square(), weights)


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Computes the distance part of relational KD; returns a scalar.

    It is the mean Huber loss between the pairwise distances of student and teacher features. Each network's distances
    are first divided by their mean.
    """
    student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
    weights = row_weights(student, mask, weight)
    student_distances, teacher_distances = (_relative_distances(rows, weights) for rows in (student, teacher))
    return mean_over_pairs(F.smooth_l1_loss(student_distances, teacher_distances, reduction="none"), weights)


def rkd_angle_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Computes the angle part of relational KD; returns a scalar.

    It is the mean Huber loss between the cosines of the angles that triples of student features and triples of
    teacher features form.
    """
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
    """Computes the loss of probabilistic knowledge transfer; returns a scalar.

    It is the mean of q_ij * log(q_ij / p_ij) over all pairs of rows (i, j). p_ij (student) and q_ij (teacher) are the
    probabilities that row j is a neighbour of row i.
    """
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        p, q = _neighbor_probabilities(student, weights, eps), _neighbor_probabilities(teacher, weights, eps)
        return mean_over_pairs(q * ((q + eps).log() - (p + eps).log()), weights)


def _normalized_gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Computes the inner products of all pairs of rows (batch, batch), and scales each row of the result to length 1.

    `weights` (batch,) weight the squares in that length.
    """
    gram = rows @ rows.t()
    return safe_divide(gram, safe_sqrt((weights * gram.square()).sum(1, keepdim=True)))


def _pairwise_differences(rows: Tensor) -> Tensor:
    """Computes the differences of all pairs of rows: entry [i, j] of (batch, batch, elements) is row j minus row i.

    Distances computed from inner products would be cheaper, but inaccurate for close rows.
    """
    return rows.unsqueeze(0) - rows.unsqueeze(1)


def _relative_distances(rows: Tensor, weights: Tensor) -> Tensor:
    """Computes pairwise Euclidean distances (batch, batch), divided by their weighted mean.

    The mean excludes the diagonal.
    """
    distances = safe_sqrt(_pairwise_differences(rows).square().sum(2))
    pair_weights = weights.unsqueeze(0) * weights.unsqueeze(1)
    pair_weights = pair_weights - torch.diag_embed(pair_weights.diagonal())
    return safe_divide(distances, safe_divide((pair_weights * distances).sum(), pair_weights.sum()))


def _angle_cosines(rows: Tensor) -> Tensor:
    """Computes the cosines of the angles of all triples of rows, (batch, batch, batch).

    Entry [i, j, k] belongs to the angle at row i between the directions to row j and row k. It is 0 if j = i or k = i.
    """
    directions = safe_normalize(_pairwise_differences(rows))
    return directions @ directions.transpose(1, 2)


def _neighbor_probabilities(rows: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Computes the probability that row j is a neighbour of row i, as entry [i, j] of (batch, batch).

    The probability is proportional to (cosine of rows i and j + 1) / 2. The weighted sum over j is 1.
    """
    lengths = safe_sqrt(rows.square().sum(1, keepdim=True))
    # Not 0 / eps for a zero row: its gradient would be 1 / eps.
    directions = safe_divide(rows, torch.where(lengths > 0, lengths + eps, 0))
    kernel = (directions @ directions.t() + 1) / 2
    return safe_divide(kernel, (weights * kernel).sum(1, keepdim=True))


def _is_constant_zero(weight: Number) -> bool:
    """Returns whether `weight` is the number 0. For a scheduled weight (a tensor), returns False without reading it."""
    return not isinstance(weight, Tensor) and weight == 0


class _RelationTerm(Term):
    """Base class of terms on relations between rows; checks the shapes of the student's and the teacher's features."""

    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) < 2:
                raise ValueError(
                    f"compares samples by their features, one vector per sample, but the {role}'s operand has the "
                    f"shape {list(shapes[role])}, at most one number per sample"
                )
        if shapes["student"][0] != shapes["teacher"][0]:
            raise ValueError(
                f"compares relations within one batch, but the student's operand has {shapes['student'][0]} rows "
                f"and the teacher's operand has {shapes['teacher'][0]}"
            )


@TERMS.register("sp", space="batch", version=1, features=True, paper="arXiv:1907.09682")
class SimilarityPreserving(_RelationTerm):
    """Similarity-preserving KD: squared difference of the similarity matrices of student and teacher.

    loss = 1/n^2 * sum_ij (G_s[i, j] - G_t[i, j])^2, G = F F^T with each row divided by its length

    n is the number of rows. F are the flattened features of the batch, of the student in G_s and of the teacher in
    G_t. RepDistiller, whose implementation the author verified, uses the last feature map and the weight 3000.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar without unit. Masked rows do not count. A row of weight 2 counts as two rows of weight 1.

    References:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
    """

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return sp_loss(student, teacher, mask, weight)


@TERMS.register("rkd", space="batch", version=1, features=True, paper="arXiv:1904.05068")
class RelationalKD(_RelationTerm):
    """Relational KD: Huber loss on the pairwise distances, and on the angles of triples, of the rows in a batch.

    loss = weight_distance * mean_ij h(d_s[i, j] - d_t[i, j])
         + weight_angle * mean_ijk h(cos_s[i, j, k] - cos_t[i, j, k])

    h is the Huber loss (smooth L1, beta 1). d[i, j] is the Euclidean distance of the features of rows i and j,
    divided by the mean distance of distinct rows. cos[i, j, k] is the cosine of the angle at row i between the
    directions to row j and row k. Index s is the student, t the teacher. As in RepDistiller, the means are over all
    pairs and triples; pairs and triples with equal rows add 0. RepDistiller uses pooled features, the default weights
    and term weight 1.

    Args:
        weight_distance: weight of the distances, >= 0. With the number 0, distances are not computed.
        weight_angle: weight of the angles, >= 0. With the number 0, angles are not computed.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar without unit. Masked rows do not count. A row of weight 2 counts as two rows of weight 1.
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

    loss = 1/n^2 * sum_ij q_ij * log(q_ij / p_ij), p_ij = k_ij / sum_j k_ij, k_ij = (cosine_ij + 1) / 2

    n is the number of rows. p_ij (from the student's flattened features) and q_ij (from the teacher's) are the
    probabilities that sample j is a neighbour of sample i. A sample is also a neighbour of itself. 1e-7 is added to
    norms and inside logarithms, as in the authors' code and in RepDistiller. RepDistiller uses pooled features and
    the weight 30000.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar, nats divided by n. Masked rows do not count. A row of weight 2 counts as two rows of weight 1.

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
    """Averages the squared difference of the student's and the teacher's Gaussian kernel matrix; returns a scalar."""
    with autocast_disabled(student):
        student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student, mask, weight)
        student_kernel, teacher_kernel = (_gaussian_kernel_series(rows, gamma, order) for rows in (student, teacher))
        return mean_over_pairs((student_kernel - teacher_kernel).square(), weights)


def _gaussian_kernel_series(rows: Tensor, gamma: Number, order: int) -> Tensor:
    """Computes the Gaussian kernel exp(-gamma * |x - y|^2) of all pairs of rows x, y, after scaling them to length 1.

    The kernel is a Taylor series in the cosine of x and y, up to the power `order`. Returns (batch, batch).
    """
    directions = safe_normalize(rows)
    cosines = directions @ directions.t()
    series = torch.ones_like(cosines)
    for power in range(1, order + 1):
        series = series + (2 * gamma) ** power / math.factorial(power) * cosines**power
    return math.e ** (-2 * gamma) * series


@TERMS.register("cc", space="batch", version=1, features=True, paper="arXiv:1904.01802")
class CorrelationCongruence(Term):
    """Correlation congruence: squared difference of the Gaussian kernel matrices of student and teacher.

    loss = 1/n^2 * sum_ij (K_s[i, j] - K_t[i, j])^2
    K(x, y) = exp(-2 gamma) * sum_p (2 gamma)^p / p! * <x, y>^p, p = 0 ... order

    n is the number of rows. K[i, j] is K(x, y) for the features x and y of rows i and j, scaled to length 1, of the
    student in K_s and of the teacher in K_t. K(x, y) is the Taylor series of the Gaussian kernel. This is the loss of
    the paper. The authors' code in RepDistiller computes a different loss: products of the feature differences of
    neighbouring rows, after trained embeddings.

    Args:
        gamma: parameter of the kernel, above 0. The paper uses 0.4.
        order: highest power of the series, at least 1. The paper uses 2.

    Shape:
        student, teacher: (batch, ...), any rank and size.
        Returns a scalar without unit. Masked rows do not count. A row of weight 2 counts as two rows of weight 1.

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
                raise ValueError(
                    f"compares samples by their features, one vector per sample, but the {role}'s operand is one "
                    "number per sample"
                )

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return cc_loss(student, teacher, mask, weight, gamma=self.gamma, order=self.order)


AttentionPart = Literal["whole", "query", "key", "value"]


def as_tokens(features: Tensor) -> Tensor:
    """Returns `features` as tokens (batch, length, width), cast to at least float32.

    A feature map (batch, width, h, w) becomes h * w tokens. Tokens (batch, length, width) keep their shape.
    """
    features = at_least_float32(features)
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def token_relation_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Compares the token similarities of student and teacher by cosine distance; returns one loss per sample.

    Each token has one row of similarities to all tokens. The loss is 1 - the cosine of the student's row and the
    teacher's row, averaged over the tokens.

    Args:
        student: tokens (batch, length, width), or feature map (batch, width, h, w).
        teacher: tokens or feature map with the same number of tokens; the width may differ.
        tokens: mask of the tokens that count, (batch, length). None: all tokens count.
    """
    with autocast_disabled(student):
        student_relations = _normalized_token_cosines(student, tokens)
        teacher_relations = _normalized_token_cosines(teacher, tokens)
        return mean_over_tokens(1 - (student_relations * teacher_relations).sum(2), tokens)


def _normalized_token_cosines(features: Tensor, tokens: Tensor | None) -> Tensor:
    """Computes the cosines of all pairs of tokens, and scales each row of the result to length 1.

    Columns of tokens outside of the mask `tokens` (batch, length) are 0. Returns (batch, length, length).
    """
    directions = safe_normalize(as_tokens(features))
    cosines = directions @ directions.transpose(1, 2)
    if tokens is not None:
        cosines = torch.where(tokens.to(torch.bool).unsqueeze(1), cosines, 0)
    return safe_normalize(cosines)


def attention_relation_loss(student: Tensor, teacher: Tensor, heads: int = 1, part: AttentionPart = "whole") -> Tensor:
    """Computes the loss of the term `AttentionRelation` for tokens (batch, length, width); returns (batch,)."""
    with autocast_disabled(student):
        log_p, log_q = _log_relations(student, heads, part), _log_relations(teacher, heads, part)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean((1, 2))


def _log_relations(features: Tensor, heads: int, part: AttentionPart) -> Tensor:
    """Computes the log-softmax of the scaled inner products of all pairs of tokens, for each relation head.

    Returns (batch, heads, length, length). Each row of the last dimension is one log-distribution.
    """
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

    L is the number of tokens, A_s the matrix of the student and A_t the matrix of the teacher. Student and teacher may
    differ in width, so no projector is needed. In ViT-Linearizer this loss is the activation matching. The paper
    averages it over 4 stages of the networks: give the term four pairs of operands and the weight 1/4. The paper uses
    only the tokens that the student sees, because relations of hidden tokens would leak the target that the student
    predicts (section 3.3). The authors' code is not published; the formula follows summaries of the paper.

    Shape:
        student, teacher: tokens (batch, length, width) or feature maps (batch, width, h, w), with the same number of
            tokens. tokens: mask of the tokens that count, (batch, length), bool or 0/1, optional.
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

    V are the queries, the keys or the values of a self-attention layer, split into `heads` relation heads of d elements
    each. Student and teacher may differ in width and in their number of attention heads. The paper has three terms with
    weight 1: one each for queries, keys and values. Hybrid Distill (ICLR 2024, arXiv:2306.15876) distils such relations
    from a teacher that was trained by masked image modelling.

    Args:
        heads: number of relation heads, at least 1.
        part: `query`, `key` or `value`: the first, second or last third of an operand that contains all three, such
            as the output of a `qkv` layer. `whole`: the complete operand.

    Shape:
        student, teacher: (batch, length, width), of equal length. The widths are divisible by `heads`, or by 3 * heads
            if `part` is not `whole`.
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
                    f"splits each token into {divisor} equal parts (heads {self.heads}, part {self.part}), but the "
                    f"{role}'s tokens have {shapes[role][2]} elements"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_relation_loss(student, teacher, self.heads, self.part)


def _token_count(shape: Size) -> int:
    return shape[2] * shape[3] if len(shape) == 4 else shape[1]


def _check_equal_lengths(shapes: dict[str, Size], *, allow_maps: bool = True) -> None:
    """Raises ValueError unless student and teacher have the same number of tokens.

    Args:
        shapes: operand name -> shape, including the batch dimension.
        allow_maps: whether feature maps (batch, width, h, w) are accepted as h * w tokens.
    """
    for role in ("student", "teacher"):
        if len(shapes[role]) not in ((3, 4) if allow_maps else (3,)):
            raise ValueError(
                f"reads tokens [length, width]{' or feature maps [width, h, w]' if allow_maps else ''}, but the "
                f"{role}'s operand has the shape {list(shapes[role][1:])} per sample"
            )
    if _token_count(shapes["student"]) != _token_count(shapes["teacher"]):
        raise ValueError(
            f"compares tokens one by one, but the student has {_token_count(shapes['student'])} tokens "
            f"and the teacher has {_token_count(shapes['teacher'])}"
        )
