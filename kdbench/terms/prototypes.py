"""Terms that use one vector per class, such as the mean of the teacher's features."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, equal_shapes
from kdbench.terms.numerics import at_least_float32, ratio, safe_sqrt


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
    directions = ratio(centres, _length(centres).unsqueeze(1))
    along = (student * directions).sum(1)
    return torch.where(label < 0, 0, 1 - ratio(along, torch.maximum(_length(student), _length(teacher))))


def _length(rows: Tensor) -> Tensor:
    return safe_sqrt(rows.square().sum(1))


@TERMS.register("nd", space="sample", version=1, features=True, operands=("means",), paper="arXiv:2305.17007")
class NormAndDirection(Term):
    """ND loss of KD++: the student's feature is long, and points to the mean of the teacher's features of its class.

    loss = 1 - <f_s, mu_y / |mu_y|> / max(|f_s|, |f_t|), y the label. While the student's feature is the shorter one,
    the loss also makes it longer; from the teacher's length on only its direction counts. Lengths keep their gradient,
    as in the authors' code (WangYZ1608/Knowledge-Distillation-via-ND), which adds this term to kd, dkd or ReviewKD at
    the penultimate feature. `means` are the class means of the teacher's features over the training set, made by an
    earlier stage: `made: STAGE.NAME`. Where the widths differ, the authors' adapter is batch norm, dropout 0.5 and a
    linear map; `linear` is the nearest one here.

    Wang, Cheng, Duan, Wang, Feng and Kong, Improving Knowledge Distillation via Regularizing Feature Norm and
    Direction, ECCV 2024, arXiv:2305.17007.
    Shapes: student (after its adapter), teacher (batch, elements), means (classes, elements), label (batch,)
    -> (batch,), without unit, in [0, 2].
    """

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("features", shapes["student"], shapes["teacher"])
        means = shapes.get("means")
        if means is not None and means[-1] != shapes["teacher"][1:].numel():
            raise ValueError(
                f"needs class means of the compared feature, {shapes['teacher'][1:].numel()} elements each, "
                f"but `means` has {means[-1]}"
            )

    def forward(self, student: Tensor, teacher: Tensor, means: Tensor, label: Tensor) -> Tensor:
        return nd_loss(student, teacher, means, label)
