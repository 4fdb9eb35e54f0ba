"""Terms on features before their activation: on which side of zero a neuron stands."""

from __future__ import annotations

from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, equal_shapes, require
from kdbench.terms.numerics import at_least_float32


def ab_loss(student: Tensor, teacher: Tensor, margin: Number = 1.0) -> Tensor:
    """Squared distance to the margin on the teacher's side of zero, summed over a sample's neurons: (batch,).

    Args:
        student: pre-activations (batch, ...).
        teacher: pre-activations of equal shape; only their sign is read.
        margin: m >= 0; a neuron rests once it is past +m where the teacher's is active, past -m where it is not.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    active = (teacher > 0).to(student.dtype)
    missing = active * (margin - student).clamp(min=0) + (1 - active) * (margin + student).clamp(min=0)
    return missing.square().flatten(1).sum(1)


@TERMS.register("ab", space="sample", version=1, features=True, paper="arXiv:1811.03233")
class ActivationBoundaries(Term):
    """Activation boundaries: each of the student's neurons is active where the teacher's is, with a margin.

    loss = sum over neurons of (m - s)_+^2 where t > 0, and of (m + s)_+^2 elsewhere; s and t are features BEFORE the
    activation (a hook on the batch norm, or `PATH/in` of the ReLU). A sum, in the paper as in the authors' code
    (bhheo/AB_distillation) and RepDistiller, which both multiply by 3/1000 and halve the weight for each layer
    farther from the end: fold that into the weights of the edges. The student operand takes the adapter that the
    paper calls connector: a 1x1 convolution with batch norm, without ReLU (`conv1x1` with `batch_norm: true`).
    The paper initialises the student's backbone by this term alone, then trains by the labels: two stages.

    Heo, Lee, Yun and Choi, Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons,
    AAAI 2019, arXiv:1811.03233.
    Shapes: student (after its adapter), teacher (batch, ...) of equal shape -> (batch,), squared units of the feature.
    """

    def __init__(self, margin: Number = 1.0) -> None:
        super().__init__()
        require("ab", "at least 0", margin=margin)
        self.margin = margin

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("pre-activations", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ab_loss(student, teacher, self.margin)
