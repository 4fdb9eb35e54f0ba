"""Terms that compare two batches of predictions by what it costs to move one onto the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, equal_classes, require
from kdbench.terms.numerics import ratio, row_weights, valid_rows


def sinkhorn_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: Number = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The cost of an entropy-regularised transport between two batches of softmaxes; a scalar. See `Sinkhorn`."""
    counts = row_weights(valid_rows(student, mask), mask, weight)
    p = F.softmax(valid_rows(student, mask) / temperature, dim=1)
    q = F.softmax(valid_rows(teacher, mask) / temperature, dim=1)
    cost = (p.unsqueeze(1) - q.unsqueeze(0)).abs().sum(2)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = ratio(plan, (plan * counts).sum(1, keepdim=True))
        plan = ratio(plan, (plan * counts.unsqueeze(1)).sum(0, keepdim=True))
    pairs = counts.unsqueeze(0) * counts.unsqueeze(1)
    return ratio((pairs * plan * cost).sum(), counts.sum())


@TERMS.register("sinkhorn", space="batch", version=1, paper="arXiv:2402.17110")
class Sinkhorn(Term):
    """SinKD: what it costs to move the student's predictions of a batch onto the teacher's, sample to sample.

    loss = 1/n * sum_ij P_ij C_ij, C_ij = |p_i - q_j|_1 between the softened predictions of samples i and j, P the
    matrix exp(-C / epsilon) whose rows and then columns are scaled to sum 1, `iterations` times over. Gradients go
    through the scaling. A small epsilon makes P a matching of the samples, a large one spreads it evenly.

    As in the authors' code (2018cx/SinKD, loss.py), with T 2, epsilon 0.1 and 20 iterations; there it is a sum over the
    batch times 0.002, beside CE and KL: a weight of 0.002 n here. Of equal predictions it is not 0, since P leaves
    some mass between different samples. Rows of weight c count c times in every sum.

    Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, COLING 2024, arXiv:2402.17110.
    Shapes: student, teacher logits (batch, classes) -> scalar in [0, 2]. Needs batch * batch * classes numbers.
    """

    def __init__(self, temperature: Number = 2.0, epsilon: float = 0.1, iterations: int = 20) -> None:
        super().__init__()
        require("sinkhorn", "above 0", temperature=temperature)
        require("sinkhorn", "at least 1", iterations=iterations)
        if not epsilon >= 0.025:  # costs are at most 2, and exp(-2 / 0.025) is the last that float32 can tell from 0
            raise ConfigError(f"sinkhorn: epsilon must be at least 0.025, got {epsilon}")
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations

    def check_shapes(self, **shapes: Size) -> None:
        equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return sinkhorn_loss(student, teacher, self.temperature, self.epsilon, self.iterations, mask, weight)
