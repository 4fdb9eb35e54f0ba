"""Factor transfer: a paraphraser learns to say the teacher's feature in fewer channels, the student learns that."""

from __future__ import annotations

from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, equal_shapes
from kdbench.terms.features import hint_loss
from kdbench.terms.numerics import at_least_float32, ratio, safe_sqrt


def unit_length(features: Tensor) -> Tensor:
    """Features (batch, ...) as vectors (batch, elements) of length 1, at least float32; zeros stay zeros."""
    flat = at_least_float32(features).flatten(1)
    return ratio(flat, safe_sqrt(flat.square().sum(1, keepdim=True)))


def ft_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Absolute difference of factors (batch, ...) of length 1, averaged over a sample's elements: (batch,)."""
    return (unit_length(student) - unit_length(teacher)).abs().mean(1)


@TERMS.register("ft", space="sample", version=1, paper="arXiv:1802.04977")
class FactorTransfer(Term):
    """Factor transfer: the student's translated feature points where the teacher's paraphrased feature points.

    loss = mean over elements of |F_s / |F_s|_2 - F_t / |F_t|_2|, each factor flattened to one vector. The paper writes
    the p-norm of this difference and takes p = 1; the mean over elements is that of the authors' L1Loss. RepDistiller
    compares channel means of squares instead, as attention transfer does: that is the term `at`, not this one.
    F_t is the output of a paraphraser's encoder, a role trained before by `reconstruction` and then frozen; F_s that
    of a translator, a trainable role or an adapter on the student's feature.

    Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
    arXiv:1802.04977.
    Shapes: student, teacher (batch, ...) of equal shape -> (batch,), without unit.
    """

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("factors", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ft_loss(student, teacher)


@TERMS.register("reconstruction", space="sample", version=1, paper="arXiv:1802.04977")
class Reconstruction(Term):
    """Reconstruction: a network's output equals its target, without any adapter between them.

    loss = mean over elements of (student - teacher)^2. The paraphraser of factor transfer is trained by it: `student`
    is the paraphraser's output, `teacher` the teacher's feature that it saw. The mean is RepDistiller's; the paper
    writes the sum. Unlike `hint` it has no regressor, which would mend what the network itself is to learn.

    Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
    arXiv:1802.04977.
    Shapes: student, teacher (batch, ...) of equal shape -> (batch,), squared units of the target.
    """

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("an output and its target", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher)
