"""Terms on summaries of feature maps: attention maps and FSP matrices."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_feature_maps, check_parameters
from kdbench.terms.numerics import at_least_float32, autocast_disabled, safe_normalize


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Computes attention maps: averages |feature|^p over the channels and scales each row to length 1.

    Args:
        features: (batch, channels, height, width), at least float32.
        p: exponent, at least 1. A higher p emphasises the strongest positions more.

    Returns:
        (batch, height * width), without unit. A row is 0 if the feature is 0 everywhere.
    """
    strength = features.square() if p == 2 else features.abs().pow(p)
    return safe_normalize(strength.mean(1).flatten(1))


def at_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """Averages the squared difference of two attention maps over the positions. Returns (batch,).

    Maps of different size are first average-pooled to the smaller height and width.

    Args:
        student: (batch, channels, height, width).
        teacher: (batch, channels', height', width').
        p: exponent of the attention map.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    if student.shape[2:] != size:
        student = F.adaptive_avg_pool2d(student, size)
    if teacher.shape[2:] != size:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return (attention_map(student, p) - attention_map(teacher, p)).square().mean(1)


@TERMS.register("at", space="row", version=1, features=True, paper="arXiv:1612.03928")
class AttentionTransfer(Term):
    """Attention transfer: squared difference of the normalised spatial attention maps.

    loss = mean over positions of (Q_s / |Q_s| - Q_t / |Q_t|)^2, Q = mean over channels of |feature|^p

    The formula is that of the authors' released code and of RepDistiller, whose published figures use weight 1000 for
    each layer. The paper has the norm of the difference instead. As in RepDistiller, the larger of the two maps is
    average-pooled.

    Args:
        p: exponent, at least 1.

    Shape:
        student, teacher: (batch, channels, height, width); channels and sizes may differ.
        Returns (batch,), without unit.

    References:
        Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928.
    """

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        check_parameters("at", "at least 1", p=p)
        self.p = p

    def check_shapes(self, **shapes: Size) -> None:
        check_feature_maps(student=shapes["student"], teacher=shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return at_loss(student, teacher, self.p)


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Computes the FSP matrix of two layers: inner products of their channels, averaged over the positions.

    Args:
        first: features of the earlier layer (batch, channels, height, width).
        second: features of the later layer (batch, channels', height', width'). The larger map of the two is
            average-pooled to the smaller height and width.

    Returns:
        (batch, channels, channels'), squared units of the features.
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, second = (
        (features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)).flatten(2)
        for features in (first, second)
    )
    return first @ second.transpose(1, 2) / first.shape[2]


def fsp_loss(student: Tensor, teacher: Tensor, student_from: Tensor, teacher_from: Tensor) -> Tensor:
    """Averages the squared difference of two FSP matrices (see `FSPMatrix`) over their entries. Returns (batch,)."""
    with autocast_disabled(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        student_from, teacher_from = at_least_float32(student_from), at_least_float32(teacher_from)
        return (fsp_matrix(student_from, student) - fsp_matrix(teacher_from, teacher)).square().mean((1, 2))


@TERMS.register(
    "fsp",
    space="row",
    version=1,
    features=True,
    operands=("student_from", "teacher_from"),
    paper="CVPR 2017",
)
class FSPMatrix(Term):
    """Flow of solution procedure: squared difference of the FSP matrices between two layers.

    loss = mean over entries of (G_s - G_t)^2, G[i, j] = mean over positions of from_i * to_j

    G[i, j] is the inner product of channel i of the earlier layer (`student_from`, `teacher_from`) and channel j of
    the later layer (`student`, `teacher`). As in RepDistiller, the larger map is average-pooled, and all entries are
    averaged. The paper uses maps of equal size from the two ends of a residual stage, pools by the maximum, and sums
    the entries. It trains with this term alone first, and then on the labels alone.

    Shape:
        student, teacher, student_from, teacher_from: (batch, channels, height, width). Student and teacher have equal
            channels at each end; sizes may differ.
        Returns (batch,), fourth power of the features' unit.

    References:
        Yim, Joo, Bae and Kim, A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
        Learning, CVPR 2017.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_feature_maps(**shapes)
        for student, teacher in (("student", "teacher"), ("student_from", "teacher_from")):
            if student in shapes and teacher in shapes and shapes[student][1] != shapes[teacher][1]:
                raise ValueError(
                    f"compares channels by pairs, so {student} and {teacher} need the same number of channels, but "
                    f"have {shapes[student][1]} and {shapes[teacher][1]}; give one of them an adapter, such as conv1x1"
                )

    def forward(self, student: Tensor, teacher: Tensor, student_from: Tensor, teacher_from: Tensor) -> Tensor:
        return fsp_loss(student, teacher, student_from, teacher_from)
