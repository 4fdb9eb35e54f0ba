"""Terms on summaries of feature maps: attention maps and FSP matrices."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_feature_maps, check_parameters
from kdbench.terms.numerics import at_least_float32, autocast_disabled, safe_divide, safe_sqrt


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Mean over the channels of |feature|^p, as a vector of length 1 per sample.

    Args:
        features: (batch, channels, height, width), at least float32.
        p: >= 1; a higher p leaves the strongest places only.

    Returns:
        (batch, height * width) without unit; zeros where a feature is zero everywhere.
    """
    strength = features.square() if p == 2 else features.abs().pow(p)
    flat = strength.mean(1).flatten(1)
    return safe_divide(flat, safe_sqrt(flat.square().sum(1, keepdim=True)))


def at_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """Squared difference of attention maps, averaged over the places: (batch,).

    Maps of different size are first average-pooled to the smaller height and width.

    Args:
        student: (batch, channels, height, width).
        teacher: (batch, channels', height', width').
        p: power of the attention map.
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
    """Attention transfer: the student's normalised spatial attention map equals the teacher's.

    loss = mean over places of (Q_s / |Q_s| - Q_t / |Q_t|)^2, with Q = mean over channels of |feature|^p. This is the
    authors' released code, and RepDistiller's, whose published figures use weight 1000 over all layers (one edge
    each); the paper writes the norm of the difference. As in RepDistiller, the larger of two maps is average-pooled.

    Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928.
    Shapes: student, teacher (batch, channels, height, width), channels and sizes may differ -> (batch,), without unit.
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
    """Inner products of the channels of two layers, averaged over the places.

    Args:
        first: features of the earlier layer (batch, channels, height, width).
        second: features of the later layer (batch, channels', height', width'); the larger map of the two is
            average-pooled to the smaller height and width.

    Returns:
        (batch, channels, channels'), squared units of the features.
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, second = (
        (values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)).flatten(2)
        for values in (first, second)
    )
    return first @ second.transpose(1, 2) / first.shape[2]


def fsp_loss(student: Tensor, teacher: Tensor, student_from: Tensor, teacher_from: Tensor) -> Tensor:
    """Squared difference of the two flow matrices, averaged over their entries: (batch,). See `Flow`."""
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
    """Flow of solution procedure: the student goes from one layer to a later one as the teacher does.

    loss = mean over entries of (G_s - G_t)^2, with G[i, j] = mean over places of from_i * to_j: the inner product of
    channel i of the earlier layer (`student_from`, `teacher_from`) and channel j of the later one (`student`,
    `teacher`). One edge per pair of layers. As RepDistiller computes it: the larger map is average-pooled (the paper
    takes maps of equal size from both ends of a residual stage, and max-pools) and all entries are averaged, where
    the paper sums them. The paper trains by this term alone first and by the labels alone after: two stages.

    Yim, Joo, Bae and Kim, A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning, CVPR 2017.
    Shapes: four maps (batch, channels, height, width); student and teacher agree in the channels of each end, not in
    size -> (batch,), fourth power of the features' unit.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_feature_maps(**shapes)
        for ours, theirs in (("student", "teacher"), ("student_from", "teacher_from")):
            if ours in shapes and theirs in shapes and shapes[ours][1] != shapes[theirs][1]:
                raise ValueError(
                    f"compares channels by pairs, so {ours} and {theirs} need equally many, but have "
                    f"{shapes[ours][1]} and {shapes[theirs][1]}; give one of them an adapter, such as conv1x1"
                )

    def forward(self, student: Tensor, teacher: Tensor, student_from: Tensor, teacher_from: Tensor) -> Tensor:
        return fsp_loss(student, teacher, student_from, teacher_from)
