"""Variational information distillation: the teacher's feature as a Gaussian around what the student's predicts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from kdbench.registry import TERMS
from kdbench.terms.base import Term, require
from kdbench.terms.numerics import at_least_float32, full_precision

LEAST_VARIANCE = 1e-5


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """((target - mean)^2 / variance + log variance) / 2, averaged over a sample's elements: (batch,), in nats.

    The constant log(2 pi) / 2 is left out. variance must broadcast against the others and be above 0.
    """
    return (((mean - target).square() / variance + variance.log()) / 2).flatten(1).mean(1)


@TERMS.register("vid", space="sample", version=1, features=True, injected=("shapes",), paper="arXiv:1904.05835")
class VariationalInformation(Term):
    """Variational information distillation: the student's feature tells as much as it can of the teacher's.

    loss = mean over elements of ((t - mu(s))^2 / v_c + log v_c) / 2: the negative log-likelihood of the teacher's
    feature t (without its constant, so it may be below 0), which bounds the mutual information of t and s. mu is three
    1x1 convolutions with ReLU between, as wide as the teacher; v_c = softplus(a_c) + 1e-5 one variance per teacher
    channel, learnt, 5 at first. All belong to the term and train with it. As the authors' code in RepDistiller, whose
    published figures use weight 1 over the inner layers (one edge each): the larger map is average-pooled. Vectors are
    maps of one place.

    Ahn, Hu, Damianou, Lawrence and Dai, Variational Information Distillation for Knowledge Transfer, CVPR 2019,
    arXiv:1904.05835.
    Shapes: student, teacher (batch, channels, height, width) or (batch, width), channels and sizes may differ
    -> (batch,), nats per element.
    """

    def __init__(self, shapes: dict, variance: float = 5.0) -> None:
        super().__init__()
        require("vid", "above 0", variance=variance)
        inside, outside = shapes["student"][0], shapes["teacher"][0]
        self.mean = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((outside,), math.log(math.expm1(variance))))

    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) not in (2, 4):
                raise ValueError(
                    f"reads feature maps [channels, height, width] or vectors, but the {role}'s operand is "
                    f"{list(shapes[role][1:])} per sample"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with full_precision(student):
            student, teacher = _maps(student), _maps(teacher)
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = (
                values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)
                for values in (student, teacher)
            )
            variance = F.softplus(self.scale) + LEAST_VARIANCE
            return gaussian_nll(self.mean(student), teacher, variance.view(1, -1, 1, 1))


def _maps(features: Tensor) -> Tensor:
    features = at_least_float32(features)
    return features if features.dim() == 4 else features[:, :, None, None]
