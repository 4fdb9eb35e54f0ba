"""Terms on feature vectors: distances, cosine, norm and direction."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_equal_shapes
from kdbench.terms.numerics import at_least_float32, safe_divide, safe_sqrt


def to_channel_vectors(features: Tensor) -> Tensor:
    """Features as vectors in the last dimension, at least float32: maps (batch, channels, h, w) become (batch, h, w,
    channels); tokens (batch, length, width) and vectors (batch, width) are so already."""
    features = at_least_float32(features)
    return features.movedim(1, -1) if features.dim() == 4 else features


def scaled_to_length(vectors: Tensor) -> Tensor:
    """Vectors of the last dimension at length 1; zeros stay zeros."""
    return safe_divide(vectors, safe_sqrt(vectors.square().sum(-1, keepdim=True)))


def mean_over_tokens(loss: Tensor, tokens: Tensor | None) -> Tensor:
    """Mean over all places of (batch, ...), or over those that `tokens` marks in (batch, length): (batch,).

    A sample none of whose tokens is marked gives 0.
    """
    if tokens is None:
        return loss.reshape(len(loss), -1).mean(1)
    counts = tokens.to(torch.bool)
    return safe_divide(torch.where(counts, loss, 0).sum(1), counts.sum(1).to(loss.dtype))


def feature_distance_loss(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    *,
    distance: Literal["l1", "l2", "smooth_l1"] = "l2",
    scale: Literal["none", "length", "layer_norm"] = "none",
) -> Tensor:
    """Distance of scaled features, averaged over a sample's elements: (batch,). See `FeatureDistance`."""
    pair = [to_channel_vectors(student), to_channel_vectors(teacher)]
    if scale == "length":
        pair = [scaled_to_length(values) for values in pair]
    elif scale == "layer_norm":
        pair = [F.layer_norm(values, values.shape[-1:]) for values in pair]
    kinds = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
    return mean_over_tokens(kinds[distance](pair[0], pair[1], reduction="none").mean(-1), tokens)


def cosine_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """1 - cosine of the angle between the vectors of student and teacher, averaged over the places: (batch,)."""
    cosines = (scaled_to_length(to_channel_vectors(student)) * scaled_to_length(to_channel_vectors(teacher))).sum(-1)
    return mean_over_tokens(1 - cosines, tokens)


def check_tokens(shapes: dict[str, Size]) -> None:
    """Raises ValueError when `tokens` does not mark the tokens of the student's operand."""
    marks, student = shapes.get("tokens"), shapes["student"]
    if marks is not None and (len(student) != 3 or marks[1:] != student[1:2]):
        raise ValueError(
            f"counts marked tokens, so the student's operand must be [length, width] with one mark each, but it is "
            f"{list(student[1:])} and `tokens` is {list(marks[1:])} per sample"
        )


@TERMS.register(
    "feature_distance", space="row", version=1, features=True, operands=("tokens",), paper="arXiv:2208.12256"
)
class FeatureDistance(Term):
    """Distance of features: absolute, squared or smooth, as they are or scaled, over all or some tokens.

    loss = mean over places and channels of d(f(student) - f(teacher)); d(x) = |x| (`l1`), x^2 (`l2`), or x^2 / 2 below
    1 and |x| - 1/2 above (`smooth_l1`); f leaves vectors as they are, scales each to length 1 (`length`), or to mean 0
    and variance 1 over the channels (`layer_norm`). `tokens` (a mask, batch x length) says which tokens count.

    DMAE compares visible tokens by l1 or l2, without scaling or, with a projector, at length 1 (authors' code,
    UCSC-VLAA/DMAE). ViT-Linearizer (arXiv:2504.00037) predicts the teacher's last feature at the tokens that the
    student did not see: `smooth_l1`, `tokens` = the hidden ones. smooth_l1 plus `cosine` is the pair of GPFM and SAK.

    Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou and Xie, Masked Autoencoders Enable Efficient Knowledge Distillers, CVPR
    2023, arXiv:2208.12256.
    Shapes: student (after its adapter), teacher equal: (batch, width), (batch, length, width) or (batch, channels,
    height, width); tokens (batch, length), bool or 0/1 -> (batch,), unit of the scaled feature, squared for l2.
    """

    def __init__(
        self,
        distance: Literal["l1", "l2", "smooth_l1"] = "l2",
        scale: Literal["none", "length", "layer_norm"] = "none",
    ) -> None:
        super().__init__()
        self.distance: Literal["l1", "l2", "smooth_l1"] = distance
        self.scale: Literal["none", "length", "layer_norm"] = scale

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])
        check_tokens(shapes)

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        return feature_distance_loss(student, teacher, tokens, distance=self.distance, scale=self.scale)


@TERMS.register("cosine", space="row", version=1, features=True, operands=("tokens",), paper="arXiv:1910.01108")
class CosineDistance(Term):
    """Cosine distance: the student's feature points where the teacher's points, whatever its length.

    loss = mean over places of 1 - <s, t> / (|s| |t|), one vector per sample, per token or per place of a map.
    `tokens` (a mask, batch x length) says which tokens count. DistilBERT aligns hidden states so, over the tokens that
    are no padding. A vector of length 0 counts 1 and gets no gradient.

    Sanh, Debut, Chaumond and Wolf, DistilBERT, a distilled version of BERT, 2019, arXiv:1910.01108.
    Shapes: student (after its adapter), teacher equal: (batch, width), (batch, length, width) or (batch, channels,
    height, width); tokens (batch, length), bool or 0/1 -> (batch,), without unit, in [0, 2].
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("directions of features", shapes["student"], shapes["teacher"])
        check_tokens(shapes)

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        return cosine_loss(student, teacher, tokens)


def nd_loss(student: Tensor, teacher: Tensor, means: Tensor, label: Tensor) -> Tensor:
    """1 - the student's feature along its class's direction, over the larger of both lengths: (batch,).

    Args:
        student: features (batch, elements).
        teacher: features of equal shape; only their length is read.
        means: the mean feature of each class (classes, elements).
        label: classes (batch,), int64. A negative label is a hidden one: the loss is 0 there.

    Returns:
        (batch,) without unit: 0 where the student points along the class mean and is at least as long as the
        teacher, 1 where it is orthogonal or zero, 2 at most.
    """
    student, teacher = at_least_float32(student).flatten(1), at_least_float32(teacher).flatten(1)
    centres = means.to(student.dtype).flatten(1)[label.clamp(min=0)]
    directions = safe_divide(centres, _row_norms(centres).unsqueeze(1))
    along = (student * directions).sum(1)
    return torch.where(label < 0, 0, 1 - safe_divide(along, torch.maximum(_row_norms(student), _row_norms(teacher))))


def _row_norms(rows: Tensor) -> Tensor:
    return safe_sqrt(rows.square().sum(1))


@TERMS.register("nd", space="row", version=1, features=True, operands=("means",), paper="arXiv:2305.17007")
class NormAndDirection(Term):
    """ND loss of KD++: the student's feature is long, and points to the mean of the teacher's features of its class.

    loss = 1 - <f_s, mu_y / |mu_y|> / max(|f_s|, |f_t|), y the label. While the student's feature is the shorter one,
    the loss also makes it longer; from the teacher's length on only its direction counts. Lengths keep their gradient,
    as in the authors' code (WangYZ1608/Knowledge-Distillation-via-ND), which adds this term to kd, dkd or ReviewKD at
    the penultimate feature. `means` are the class means of the teacher's features over the training set, made by an
    earlier stage: `artifact: STAGE.NAME`. Where the widths differ, the authors' adapter is batch norm, dropout 0.5 and a
    linear map; `linear` is the nearest one here.

    Wang, Cheng, Duan, Wang, Feng and Kong, Improving Knowledge Distillation via Regularizing Feature Norm and
    Direction, ECCV 2024, arXiv:2305.17007.
    Shapes: student (after its adapter), teacher (batch, elements), means (classes, elements), label (batch,)
    -> (batch,), without unit, in [0, 2].
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])
        means = shapes.get("means")
        if means is not None and means[-1] != shapes["teacher"][1:].numel():
            raise ValueError(
                f"needs class means of the compared feature, {shapes['teacher'][1:].numel()} elements each, "
                f"but `means` has {means[-1]}"
            )

    def forward(self, student: Tensor, teacher: Tensor, means: Tensor, label: Tensor) -> Tensor:
        return nd_loss(student, teacher, means, label)
