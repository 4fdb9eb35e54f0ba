"""Terms that a generated image should satisfy: what a teacher would say of it, and what images are like."""

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
    """DAFL: a teacher that knows the image is sure of its class, whichever it is.

    loss = -log q_k at the class k that the prediction itself ranks first. The student operand is the teacher's
    logits on generated images: `student: teacher:logits`. Weight 1 in the paper and the authors' code.

    Chen et al., Data-Free Learning of Student Networks, ICCV 2019, arXiv:1904.01186.
    Shapes: student logits (batch, classes) -> (batch,), nats.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])

    def forward(self, student: Tensor) -> Tensor:
        return -F.log_softmax(at_least_float32(student), dim=1).amax(1)


@TERMS.register("information_entropy", space="batch", version=1, paper="arXiv:1904.01186")
class InformationEntropyLoss(Term):
    """DAFL: the batch holds all classes alike: negative entropy of the mean prediction.

    loss = sum_k m_k log m_k, m the mean over the batch of softmax(student). In nats; the authors' code takes log10,
    so that its weight 5 is 2.171 here (5 for MNIST, the text's weights are the code's).
    Rows that the mask leaves out count nowhere; a row of weight 2 counts twice in the mean.

    Chen et al., Data-Free Learning of Student Networks, ICCV 2019, arXiv:1904.01186.
    Shapes: student logits (batch, classes) -> scalar, nats, between -log(classes) and 0.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)

    def forward(self, student: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        p = F.softmax(flatten_and_mask(student, mask), dim=1)
        counts = row_weights(p, mask, weight)
        mean = safe_divide((counts.unsqueeze(1) * p).sum(0), counts.sum())
        return (mean * torch.where(mean > 0, mean, 1).log()).sum()


@TERMS.register("activation", space="row", version=1, features=True, paper="arXiv:1904.01186")
class ActivationLoss(Term):
    """DAFL: images excite the teacher's features: the negative mean of their absolute values.

    loss = -mean over elements of |feature|, the mean as in the authors' code (weight 0.1; the paper has the sum).

    Chen et al., Data-Free Learning of Student Networks, ICCV 2019, arXiv:1904.01186.
    Shapes: student features (batch, ...) -> (batch,), units of the feature.
    """

    def forward(self, student: Tensor) -> Tensor:
        return -at_least_float32(student).flatten(1).abs().mean(1)


@TERMS.register("bn_statistics", space="batch", version=1, features=True, paper="arXiv:1912.08795")
class BatchNormStatistics(Term):
    """DeepInversion: the batch has the mean and variance that a BatchNorm of the teacher remembers.

    loss = |mean(x) - running mean| + |var(x) - running var|, Euclidean norms over the channels, mean and (biased)
    variance over batch and places. Operands: the BatchNorm's input as student, its statistics as teacher:
    `student: teacher:bn1/in`, `teacher: teacher:bn1/stats`, lists for several. The authors' code gives the first
    BatchNorm of a ResNet ten times the weight: a term of its own.
    Rows that the mask leaves out count nowhere; a row of weight 2 counts twice in both statistics.

    Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha and Kautz, Dreaming to Distill, CVPR 2020, arXiv:1912.08795.
    Shapes: student (batch, channels, ...), teacher (2, channels): mean, variance -> scalar, units of the feature.
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
        counts = rows.reshape(-1, 1, 1)
        whole = rows.sum() * x.shape[2]
        mean = safe_divide((counts * x).sum((0, 2)), whole)
        variance = safe_divide((counts * (x - mean.unsqueeze(1)).square()).sum((0, 2)), whole)
        apart = [(mean - teacher[0]).square().sum(), (variance - teacher[1]).square().sum()]
        return sum(safe_sqrt(value) for value in apart) * (rows.sum() > 0)


@TERMS.register("total_variation", space="row", version=1, paper="arXiv:1912.08795")
class TotalVariation(Term):
    """Image prior: neighbouring pixels are alike, along rows, columns and both diagonals.

    norm 1: the mean absolute difference of neighbours, summed over the four directions, as in DeepInversion's code.
    norm 2: the Euclidean norm of the differences, summed likewise; the code's runs over the whole batch, which for n
    alike images is 1 / sqrt(n) of the sum over them.

    Yin et al., Dreaming to Distill, CVPR 2020, arXiv:1912.08795 (`get_image_prior_losses`).
    Shapes: student images (batch, channels, height, width) -> (batch,), units of the image.
    """

    def __init__(self, norm: Literal[1, 2] = 1) -> None:
        super().__init__()
        self.norm = norm

    def check_shapes(self, **shapes: Size) -> None:
        shape = shapes["student"]
        if len(shape) != 4 or min(shape[2:]) < 2:
            raise ValueError(
                f"reads images [channels, height, width] of 2 pixels a side at least, not {list(shape[1:])}"
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
    """Image prior: pixels stay near 0: the Euclidean norm of the image.

    Yin et al., Dreaming to Distill, CVPR 2020, arXiv:1912.08795, as in the authors' code.
    Shapes: student images (batch, ...) -> (batch,), units of the image.
    """

    def forward(self, student: Tensor) -> Tensor:
        return safe_sqrt(at_least_float32(student).flatten(1).square().sum(1))
