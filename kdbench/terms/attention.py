"""Terms that compare where networks look."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, feature_maps, require
from kdbench.terms.numerics import at_least_float32, ratio, safe_sqrt


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
    return ratio(flat, safe_sqrt(flat.square().sum(1, keepdim=True)))


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


@TERMS.register("at", space="sample", version=1, features=True, paper="arXiv:1612.03928")
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
        require("at", "at least 1", p=p)
        self.p = p

    def check_shapes(self, **shapes: Size) -> None:
        feature_maps(student=shapes["student"], teacher=shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return at_loss(student, teacher, self.p)
