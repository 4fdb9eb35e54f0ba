"""Terms on generated images, for data-free distillation: predictions of the teacher, BatchNorm statistics, priors."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_logits
from kdbench.terms.numerics import at_least_float32, flatten_and_mask, row_weights, safe_divide, safe_sqrt


@TERMS.register("one_hot", space="row", version=1, paper="arXiv:1904.01186")
class OneHotLoss(Term):
    """DAFL: cross-entropy of a prediction with its own most probable class, so that the teacher is certain.

    loss = -log p_k at k = argmax p, p = softmax(student)

    The student operand is the teacher's logits on generated images. The weight is 1 in the paper and in the authors'
    code.

    Shape:
        student: logits (batch, classes).
        Returns (batch,), nats.

    Example (recipe):
        one_hot: {type: one_hot, student: teacher:logits}

    References:
        Chen et al., Data-Free Learning of Student Networks, ICCV 2019, arXiv:1904.01186.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])

    def forward(self, student: Tensor) -> Tensor:
        return -F.log_softmax(at_least_float32(student), dim=1).amax(1)


@TERMS.register("information_entropy", space="batch", version=1, paper="arXiv:1904.01186")
class InformationEntropyLoss(Term):
    """DAFL: negative entropy of the batch's mean prediction, so that all classes are equally frequent.

    loss = sum_k m_k log m_k, m = mean over the batch of softmax(student)

    The authors' code uses log10. Its weight 5 (for MNIST, as in the paper) is therefore 2.171 for this term, which
    uses nats.

    Shape:
        student: logits (batch, classes), at least 2 classes.
        Returns a scalar between -log(classes) and 0, nats. A row of weight 2 counts twice. Masked rows are left out.

    References:
        Chen et al., Data-Free Learning of Student Networks, ICCV 2019, arXiv:1904.01186.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)

    def forward(self, student: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        p = F.softmax(flatten_and_mask(student, mask), dim=1)
        weights = row_weights(p, mask, weight)
        mean = safe_divide((weights.unsqueeze(1) * p).sum(0), weights.sum())
        return (mean * torch.where(mean > 0, mean, 1).log()).sum()


@TERMS.register("activation", space="row", version=1, features=True, paper="arXiv:1904.01186")
class ActivationLoss(Term):
    """DAFL: negative mean of the absolute values of the teacher's features, so that images give strong features.

    loss = -mean over elements of |feature|

    The mean follows the authors' code, which uses weight 0.1. The paper has the sum.

    Shape:
        student: features (batch, ...).
        Returns (batch,), units of the feature.

    References:
        Chen et al., Data-Free Learning of Student Networks, ICCV 2019, arXiv:1904.01186.
    """

    def forward(self, student: Tensor) -> Tensor:
        return -at_least_float32(student).flatten(1).abs().mean(1)


@TERMS.register("bn_statistics", space="batch", version=1, features=True, paper="arXiv:1912.08795")
class BatchNormStatistics(Term):
    """DeepInversion: distance of the batch's mean and variance from the running statistics of a BatchNorm.

    loss = |mean(x) - running mean| + |var(x) - running var|

    | | is the Euclidean norm over the channels. Mean and (biased) variance are over batch and positions. The authors'
    code gives the first BatchNorm of a ResNet ten times the weight, for which a recipe needs a second term.

    Shape:
        student: input of the BatchNorm (batch, channels, ...).
        teacher: (2, channels), running mean and running variance of this BatchNorm.
        Returns a scalar, units of the feature. A row of weight 2 counts twice in mean and variance. Masked rows are
        left
        out.

    Example (recipe):
        bn: {type: bn_statistics, student: teacher:bn1/in, teacher: teacher:bn1/stats}   # or a list for several

    References:
        Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha and Kautz, Dreaming to Distill, CVPR 2020, arXiv:1912.08795.
    """

    def check_shapes(self, **shapes: Size) -> None:
        student, teacher = shapes["student"], shapes["teacher"]
        if len(student) < 2 or teacher[-1] != student[1]:
            raise ValueError(
                f"compares the statistics of {list(student[1:])[:1]} channels with those of {list(teacher)[-1:]}: "
                "the operands are a BatchNorm's input (`/in`) and the same BatchNorm's statistics (`/stats`)"
            )

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        x = flatten_and_mask(student, mask).reshape(student.shape[0], student.shape[1], -1)
        rows = row_weights(x, mask, weight)
        weights = rows.reshape(-1, 1, 1)
        total = rows.sum() * x.shape[2]
        mean = safe_divide((weights * x).sum((0, 2)), total)
        variance = safe_divide((weights * (x - mean.unsqueeze(1)).square()).sum((0, 2)), total)
        squared_distances = [(mean - teacher[0]).square().sum(), (variance - teacher[1]).square().sum()]
        return sum(safe_sqrt(value) for value in squared_distances) * (rows.sum() > 0)


@TERMS.register("total_variation", space="row", version=1, paper="arXiv:1912.08795")
class TotalVariation(Term):
    """Image prior: total variation, the differences of neighbouring pixels in four directions.

    The directions are rows, columns and the two diagonals.

    norm 1: mean absolute difference, summed over the four directions, as in DeepInversion's code.
    norm 2: Euclidean norm of each image's differences, summed over the four directions. DeepInversion's code takes
    one norm
            over the whole batch.

    Args:
        norm: 1 or 2.

    Shape:
        student: images (batch, channels, height, width), at least 2 pixels high and wide.
        Returns (batch,), units of the image.

    References:
        Yin et al., Dreaming to Distill, CVPR 2020, arXiv:1912.08795 (`get_image_prior_losses`).
    """

    def __init__(self, norm: Literal[1, 2] = 1) -> None:
        super().__init__()
        self.norm = norm

    def check_shapes(self, **shapes: Size) -> None:
        shape = shapes["student"]
        if len(shape) != 4 or min(shape[2:]) < 2:
            raise ValueError(
                f"reads images [channels, height, width] of at least 2 pixels a side, not {list(shape[1:])}"
            )

    def forward(self, student: Tensor) -> Tensor:
        x = at_least_float32(student)
        differences = (
            x[:, :, :, :-1] - x[:, :, :, 1:],
            x[:, :, :-1, :] - x[:, :, 1:, :],
            x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
            x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        )
        flat = [difference.flatten(1) for difference in differences]
        if self.norm == 1:
            return torch.stack([difference.abs().mean(1) for difference in flat]).sum(0)
        return torch.stack([safe_sqrt(difference.square().sum(1)) for difference in flat]).sum(0)


@TERMS.register("image_norm", space="row", version=1, paper="arXiv:1912.08795")
class ImageNorm(Term):
    """Image prior: Euclidean norm of the image, so that pixels stay near 0.

    loss = |image|, the Euclidean norm, as in the authors' code

    Shape:
        student: images (batch, ...).
        Returns (batch,), units of the image.

    References:
        Yin et al., Dreaming to Distill, CVPR 2020, arXiv:1912.08795.
    """

    def forward(self, student: Tensor) -> Tensor:
        return safe_sqrt(at_least_float32(student).flatten(1).square().sum(1))
