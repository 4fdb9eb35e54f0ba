"""Features compared at several scales."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, equal_shapes
from kdbench.terms.features import hint_loss
from kdbench.terms.numerics import at_least_float32

SCALES = (4, 2, 1)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps, and of the maps average-pooled to 4x4, 2x2 and 1x1: (batch,).

    Args:
        student: (batch, channels, height, width), or (batch, elements), which has one scale only.
        teacher: of equal shape.

    Returns:
        (batch,): the mean over the scales, each half as heavy as the one before; scales not below the map's height
        are left out.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    loss, share, shares = hint_loss(student, teacher), 1.0, 1.0
    for size in SCALES if student.dim() == 4 else ():
        if size >= student.shape[2]:
            continue
        share /= 2
        shares += share
        pooled = [F.adaptive_avg_pool2d(values, (size, size)) for values in (student, teacher)]
        loss = loss + share * hint_loss(pooled[0], pooled[1])
    return loss / shares


@TERMS.register("hcl", space="sample", version=1, features=True, paper="arXiv:2104.09044")
class HierarchicalContext(Term):
    """Hierarchical context loss of ReviewKD: the student's feature equals the teacher's at each of several scales.

    loss = (d(s, t) + d_4 / 2 + d_2 / 4 + d_1 / 8) / (1 + 1/2 + 1/4 + 1/8), d the mean squared difference and d_k that
    of the maps average-pooled to k x k; a scale not smaller than the map is left out and the others move up, as in the
    authors' code (dvlab-research/ReviewKD), which warms the term up over 20 epochs: give its weight a schedule. In
    ReviewKD the student operand is the output of a chain of attention based fusions (ABF) from the deepest layer to the
    shallowest; with a single layer that chain is convolution and batch norm, an adapter.

    Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.
    Shapes: student (after its adapter), teacher (batch, channels, height, width) or (batch, elements), equal
    -> (batch,), squared units of the feature.
    """

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hcl_loss(student, teacher)
