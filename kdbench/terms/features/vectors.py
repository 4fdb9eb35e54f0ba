"""Terms on feature vectors: distances, cosine, norm and direction."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_equal_shapes
from kdbench.terms.numerics import at_least_float32, safe_divide, safe_normalize, safe_sqrt


def to_channel_vectors(features: Tensor) -> Tensor:
    """Moves the channels of maps to the last dimension and converts to at least float32.

    Returns (batch, h, w, channels).

    Tokens (batch, length, width) and vectors (batch, width), whose channels are last, keep their shape.
    """
    features = at_least_float32(features)
    return features.movedim(1, -1) if features.dim() == 4 else features


def mean_over_tokens(loss: Tensor, tokens: Tensor | None) -> Tensor:
    """Averages (batch, ...) over all positions, or (batch, length) over the tokens in the mask `tokens`.

    Returns (batch,).

    The mean of a row without tokens in the mask is 0.
    """
    if tokens is None:
        return loss.reshape(len(loss), -1).mean(1)
    token_mask = tokens.to(torch.bool)
    return safe_divide(torch.where(token_mask, loss, 0).sum(1), token_mask.sum(1).to(loss.dtype))


def feature_distance_loss(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    *,
    distance: Literal["l1", "l2", "smooth_l1"] = "l2",
    scale: Literal["none", "length", "layer_norm"] = "none",
) -> Tensor:
    """Averages the distance of scaled features (see `FeatureDistance`) over the elements. Returns (batch,)."""
    pair = [to_channel_vectors(student), to_channel_vectors(teacher)]
    if scale == "length":
        pair = [safe_normalize(vectors) for vectors in pair]
    elif scale == "layer_norm":
        pair = [F.layer_norm(vectors, vectors.shape[-1:]) for vectors in pair]
    losses = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
    return mean_over_tokens(losses[distance](pair[0], pair[1], reduction="none").mean(-1), tokens)


def cosine_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Averages 1 - cosine of the student's and the teacher's vectors over the positions. Returns (batch,)."""
    cosines = (safe_normalize(to_channel_vectors(student)) * safe_normalize(to_channel_vectors(teacher))).sum(-1)
    return mean_over_tokens(1 - cosines, tokens)


def check_tokens(shapes: dict[str, Size]) -> None:
    """Raises ValueError if the operand `tokens` is not a mask over the tokens of the student's operand.

    Args:
        shapes: operand name -> shape, including the batch dimension. The operand `tokens` may be missing.
    """
    mask, student = shapes.get("tokens"), shapes["student"]
    if mask is not None and (len(student) != 3 or mask[1:] != student[1:2]):
        raise ValueError(
            f"has a mask over tokens, so per sample the student's operand must have the shape [length, width] and "
            f"`tokens` the shape [length], but they have the shapes {list(student[1:])} and {list(mask[1:])}"
        )


@TERMS.register(
    "feature_distance", space="row", version=1, features=True, operands=("tokens",), paper="arXiv:2208.12256"
)
class FeatureDistance(Term):
    """Distance of features: absolute, squared or smooth L1, optionally scaled, over all or some tokens.

    loss = mean over positions and channels of d(f(student) - f(teacher))

    d(x) by `distance`:
        l1           |x|
        l2           x^2
        smooth_l1    x^2 / 2 for |x| < 1, |x| - 1/2 otherwise
    f by `scale`:
        none         the features themselves
        length       vectors scaled to length 1
        layer_norm   vectors scaled to mean 0 and variance 1 over the channels

    DMAE compares the visible tokens by `l1` or `l2`, either without scaling, or with a projector and the scale `length`
    (authors' code, UCSC-VLAA/DMAE). In ViT-Linearizer (arXiv:2504.00037), the student predicts the teacher's last
    feature at the tokens that are hidden from the student: use `smooth_l1`, and a mask of the hidden tokens as operand
    `tokens`. GPFM and SAK add up the terms `feature_distance` with `smooth_l1` and `cosine`.

    Args:
        distance: `l1`, `l2` or `smooth_l1`.
        scale: `none`, `length` or `layer_norm`.

    Shape:
        student (after its adapter), teacher: equal shapes, (batch, width), (batch, length, width) or (batch, channels,
            height, width). tokens: mask of the tokens that count, (batch, length), bool or 0/1, optional.
        Returns (batch,), unit of the scaled feature, squared for l2.

    References:
        Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou and Xie, Masked Autoencoders Enable Efficient Knowledge Distillers,
        CVPR 2023, arXiv:2208.12256.
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
    """Cosine distance of the features of student and teacher; the length of a feature has no effect.

    loss = mean over positions of 1 - <s, t> / (|s| |t|)

    s and t are the vectors of student and teacher: one per sample, per token, or per position of a feature map. A
    vector of length 0 has loss 1 and no gradient. DistilBERT aligns the hidden states of the tokens that are not
    padding by this loss.

    Shape:
        student (after its adapter), teacher: equal shapes, (batch, width), (batch, length, width) or (batch, channels,
            height, width). tokens: mask of the tokens that count, (batch, length), bool or 0/1, optional.
        Returns (batch,), without unit, in [0, 2].

    References:
        Sanh, Debut, Chaumond and Wolf, DistilBERT, a distilled version of BERT, 2019, arXiv:1910.01108.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("directions of features", shapes["student"], shapes["teacher"])
        check_tokens(shapes)

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        return cosine_loss(student, teacher, tokens)


def nd_loss(student: Tensor, teacher: Tensor, means: Tensor, label: Tensor) -> Tensor:
    """Computes the ND loss 1 - <student, unit vector of the class mean> / max(|student|, |teacher|), per row.

    Args:
        student: features (batch, elements).
        teacher: features of equal shape. Only their lengths are read.
        means: mean feature of each class (classes, elements).
        label: class of each row, (batch,), int64. Rows with a negative (hidden) label have loss 0.

    Returns:
        (batch,), without unit, in [0, 2]. The loss is 0 if the student's feature has the direction of the class mean
        and is at least as long as the teacher's feature. The loss is 1 if the student's feature is orthogonal to the
        class mean, or zero.
    """
    student, teacher = at_least_float32(student).flatten(1), at_least_float32(teacher).flatten(1)
    directions = safe_normalize(means.to(student.dtype).flatten(1)[label.clamp(min=0)])
    component = (student * directions).sum(1)
    max_norm = torch.maximum(_row_norms(student), _row_norms(teacher))
    return torch.where(label < 0, 0, 1 - safe_divide(component, max_norm))


def _row_norms(rows: Tensor) -> Tensor:
    return safe_sqrt(rows.square().sum(1))


@TERMS.register("nd", space="row", version=1, features=True, operands=("means",), paper="arXiv:2305.17007")
class NormAndDirection(Term):
    """ND loss of KD++: a student feature that is long and points to the teacher's class mean.

    loss = 1 - <f_s, mu_y / |mu_y|> / max(|f_s|, |f_t|)

    mu_y is the mean of the teacher's features over the class y of the label, an artifact of an earlier stage. While
    the student's feature is shorter than the teacher's, the loss also makes it longer; beyond that length only the
    direction counts. Lengths keep their gradient, as in the authors' code (WangYZ1608/Knowledge-Distillation-via-ND),
    which adds this term to kd, dkd or ReviewKD at the penultimate feature. If the widths differ, the authors' adapter
    is batch norm, dropout 0.5 and a linear map; the nearest one here is `linear`.

    Shape:
        student (after its adapter), teacher: (batch, elements). means: (classes, elements). label: (batch,), int64;
            rows with a hidden label (negative) have loss 0.
        Returns (batch,), without unit, in [0, 2].

    Example (recipe):
        nd: {type: nd, student: {path: layer2, adapter: linear}, teacher: layer2, means: "artifact:means.centers"}

    References:
        Wang, Cheng, Duan, Wang, Feng and Kong, Improving Knowledge Distillation via Regularizing Feature Norm and
        Direction, ECCV 2024, arXiv:2305.17007.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])
        means = shapes.get("means")
        if means is not None and means[-1] != shapes["teacher"][1:].numel():
            raise ValueError(
                f"needs class means of the compared feature, {shapes['teacher'][1:].numel()} elements each, "
                f"but each row of `means` has {means[-1]}"
            )

    def forward(self, student: Tensor, teacher: Tensor, means: Tensor, label: Tensor) -> Tensor:
        return nd_loss(student, teacher, means, label)
