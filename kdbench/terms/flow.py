"""Terms that compare how features flow from one layer of a network to another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, feature_maps
from kdbench.terms.numerics import at_least_float32, full_precision


def flow_matrix(first: Tensor, second: Tensor) -> Tensor:
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
    with full_precision(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        student_from, teacher_from = at_least_float32(student_from), at_least_float32(teacher_from)
        return (flow_matrix(student_from, student) - flow_matrix(teacher_from, teacher)).square().mean((1, 2))


@TERMS.register(
    "fsp",
    space="sample",
    version=1,
    features=True,
    operands=("student_from", "teacher_from"),
    paper="CVPR 2017",
)
class Flow(Term):
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
        feature_maps(**shapes)
        for ours, theirs in (("student", "teacher"), ("student_from", "teacher_from")):
            if ours in shapes and theirs in shapes and shapes[ours][1] != shapes[theirs][1]:
                raise ValueError(
                    f"compares channels by pairs, so {ours} and {theirs} need equally many, but have "
                    f"{shapes[ours][1]} and {shapes[theirs][1]}; give one of them an adapter, such as conv1x1"
                )

    def forward(self, student: Tensor, teacher: Tensor, student_from: Tensor, teacher_from: Tensor) -> Tensor:
        return fsp_loss(student, teacher, student_from, teacher_from)
