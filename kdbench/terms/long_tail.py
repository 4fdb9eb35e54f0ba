"""Terms for data whose classes are not equally frequent."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, equal_classes, require
from kdbench.terms.logits import kd_loss
from kdbench.terms.numerics import at_least_float32


def log_class_weights(counts: Tensor, beta: float) -> Tensor:
    """log of 1 / E_c, E_c = (1 - beta^n_c) / (1 - beta) the effective number of samples of class c, up to a constant.

    Args:
        counts: (classes,), n_c; a class without samples counts as one of a single sample.
        beta: in [0, 1); 0 makes all classes equal, near 1 the weights are 1 / n_c.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.log(-torch.expm1(at_least_float32(counts).clamp(min=1) * log_beta))


@TERMS.register("bkd", space="sample", version=1, operands=("counts",), paper="arXiv:2104.10510")
class BalancedSoftTargets(Term):
    """BKD: soft targets in which rare classes count more, for a teacher that learnt from long-tailed data.

    loss = T^2 * KL(q' || softmax(student / T)), q'_c in proportion to w_c softmax(teacher / T)_c, with w_c one over the
    effective number of class c: (1 - beta) / (1 - beta^n_c) (Cui et al. 2019, arXiv:1901.05555). As in the authors'
    code (BKDLoss), where plain cross-entropy stands beside it with weight 1. With beta 0 it is `kd`.

    Zhang, Chen, Hu and Peng, Balanced Knowledge Distillation for Long-tailed Learning, 2021, arXiv:2104.10510.
    Shapes: student, teacher logits (batch, classes), counts (classes,), such as what the maker `class_counts` made ->
    (batch,), nats times T^2.
    """

    def __init__(self, temperature: Number = 2.0, beta: float = 0.9999) -> None:
        super().__init__()
        require("bkd", "above 0", temperature=temperature)
        if not 0 <= beta < 1:
            raise ConfigError(f"bkd: beta must be at least 0 and below 1, got {beta}")
        self.temperature, self.beta = temperature, beta

    def check_shapes(self, **shapes: Size) -> None:
        equal_classes(shapes["student"], shapes["teacher"])
        if tuple(shapes["counts"]) != (shapes["student"][1],):
            raise ValueError(
                f"weighs {shapes['student'][1]} classes by how many samples each has, but counts is "
                f"{list(shapes['counts'])}"
            )

    def forward(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        log_q = F.log_softmax(at_least_float32(teacher) / self.temperature, dim=1)
        balanced = self.temperature * (log_q + log_class_weights(counts, self.beta))
        return kd_loss(student, balanced, self.temperature)
