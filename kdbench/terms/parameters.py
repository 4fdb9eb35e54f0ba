"""Terms between parameter vectors: distance of a network from another one, or from its own earlier weights.

Each operand is the parameters of a network, or of one of its modules, as one vector.
"""

from __future__ import annotations

from typing import Literal

from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term
from kdbench.terms.numerics import at_least_float32


def weight_distance_loss(student: Tensor, teacher: Tensor, distance: Literal["l1", "l2"] = "l2") -> Tensor:
    """Sums the squared (`l2`) or absolute (`l1`) differences of two parameter vectors (parameters,): a scalar."""
    difference = at_least_float32(student) - at_least_float32(teacher)
    return (difference.square() if distance == "l2" else difference.abs()).sum()


def ewc_loss(student: Tensor, teacher: Tensor, fisher: Tensor) -> Tensor:
    """Computes half the sum of squared differences, each times the Fisher information of its parameter: a scalar."""
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
                f"compares parameters one by one, but the student's module has {shapes['student'][0]} "
                f"and {operand} {shape[0]}; name modules of the same architecture"
            )


@TERMS.register("weight_distance", space="model", version=1, paper="arXiv:1802.01483")
class WeightDistance(Term):
    """Distance of the student's parameters from those of a network of the same architecture.

    loss = sum over parameters of (w - w0)^2 (`l2`) or |w - w0| (`l1`)

    L2-SP has half the sum, with w0 the weights that training started from: include the factor in the weight. Smith et
    al. (A Closer Look at Rehearsal-Free Continual Learning, arXiv:2203.17269) penalise only the self-attention blocks,
    with w0 the network after the previous task.

    Args:
        distance: `l1` or `l2`.

    Shape:
        student, teacher: (parameters,).
        Returns a scalar, squared units of the parameters (their unit for l1).

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

    w0 are the parameters after the old task. F is the diagonal of its Fisher information, the mean of squared gradients
    of log p(label), an artifact of an earlier stage.

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
