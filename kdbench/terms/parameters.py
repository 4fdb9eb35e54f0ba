"""Terms on weights: distance between two networks, or between a network and its own earlier weights.

Each operand is one vector that contains all parameters of a network, or of one of its modules.
"""

from __future__ import annotations

from typing import Literal

from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term
from kdbench.terms.numerics import at_least_float32


def weight_distance_loss(student: Tensor, teacher: Tensor, distance: Literal["l1", "l2"] = "l2") -> Tensor:
    """Sums the squared (`l2`) or absolute (`l1`) differences of two parameter vectors; returns a scalar."""
    difference = at_least_float32(student) - at_least_float32(teacher)
    return (difference.square() if distance == "l2" else difference.abs()).sum()


def ewc_loss(student: Tensor, teacher: Tensor, fisher: Tensor) -> Tensor:
    """Computes 1/2 * sum_i fisher_i * (student_i - teacher_i)^2 for vectors (parameters,); returns a scalar."""
    difference = at_least_float32(student) - at_least_float32(teacher)
    return (fisher.to(difference.dtype) * difference.square()).sum() / 2


def _check_equal_parameter_counts(shapes: dict[str, Size]) -> None:
    """Raises ValueError unless all operands are vectors of the same length."""
    for operand, shape in shapes.items():
        if len(shape) != 1:
            raise ValueError(
                f"reads the parameters of a module as one vector, but {operand} has the shape {list(shape)}"
            )
        if shape != shapes["student"]:
            raise ValueError(
                f"compares parameters one by one, but the student's module has {shapes['student'][0]} parameters "
                f"and {operand} has {shape[0]}; name modules of the same architecture"
            )


@TERMS.register("weight_distance", space="model", version=1, paper="arXiv:1802.01483")
class WeightDistance(Term):
    """Distance between the parameters of the student and the parameters of a network of the same architecture.

    loss = sum over parameters of (w - w0)^2 (`l2`) or |w - w0| (`l1`)

    w are the parameters of the student, w0 those of the teacher. L2-SP has half the sum, and its w0 are the weights at
    the start of training: include the factor 1/2 in the weight of the term. Smith et al. (A Closer Look at
    Rehearsal-Free Continual Learning, arXiv:2203.17269) penalise only the self-attention blocks, and their w0 are the
    weights after the previous task.

    Args:
        distance: `l1` or `l2`.

    Shape:
        student, teacher: (parameters,).
        Returns a scalar, squared units of the parameters (l2) or units of the parameters (l1).

    References:
        Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML
        2018, arXiv:1802.01483.
    """

    def __init__(self, distance: Literal["l1", "l2"] = "l2") -> None:
        super().__init__()
        self.distance: Literal["l1", "l2"] = distance

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_parameter_counts(shapes)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return weight_distance_loss(student, teacher, self.distance)


@TERMS.register("ewc", space="model", version=1, operands=("fisher",), paper="arXiv:1612.00796")
class ElasticWeightConsolidation(Term):
    """Elastic weight consolidation: squared distance from old parameters, weighted by their Fisher information.

    loss = 1/2 * sum_i F_i * (w_i - w0_i)^2 (equation 3 of the paper; its lambda is the term's weight)

    w are the parameters of the student, w0 the parameters after the old task. F is the diagonal of the Fisher
    information on the old task: the mean of the squared gradients of log p(label). F is the result (artifact) of an
    earlier stage of the recipe.

    Shape:
        student, teacher, fisher: (parameters,).
        Returns a scalar without unit.

    References:
        Kirkpatrick, Pascanu, Rabinowitz et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017,
        arXiv:1612.00796.
    """

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_parameter_counts(shapes)

    def forward(self, student: Tensor, teacher: Tensor, fisher: Tensor) -> Tensor:
        return ewc_loss(student, teacher, fisher)
