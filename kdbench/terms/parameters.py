"""Terms between parameters: how far a network has moved from another, or from where it was.

Operands are the parameters of a network, or of one of its modules, as one vector.
"""

from __future__ import annotations

from typing import Literal

from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term
from kdbench.terms.numerics import at_least_float32


def weight_distance_loss(student: Tensor, teacher: Tensor, distance: Literal["l1", "l2"] = "l2") -> Tensor:
    """Sum of squared (`l2`) or absolute (`l1`) differences of two parameter vectors (parameters,): a scalar."""
    difference = at_least_float32(student) - at_least_float32(teacher)
    return (difference.square() if distance == "l2" else difference.abs()).sum()


def ewc_loss(student: Tensor, teacher: Tensor, fisher: Tensor) -> Tensor:
    """Half the sum of squared differences, each times the Fisher information of its parameter: a scalar."""
    difference = at_least_float32(student) - at_least_float32(teacher)
    return (fisher.to(difference.dtype) * difference.square()).sum() / 2


def _check_equal_parameter_counts(shapes: dict[str, Size]) -> None:
    """Raises ValueError unless all operands are vectors of equally many parameters."""
    for name, shape in shapes.items():
        if len(shape) != 1:
            raise ValueError(f"reads the parameters of a module as one vector, but {name} has the shape {list(shape)}")
        if shape != shapes["student"]:
            raise ValueError(
                f"compares parameters one by one, but the student's module has {shapes['student'][0]} "
                f"and {name} {shape[0]}; name modules of the same architecture"
            )


@TERMS.register("weight_distance", space="model", version=1, paper="arXiv:1802.01483")
class WeightDistance(Term):
    """Weight distance: the student's parameters stay near those of another network of the same architecture.

    loss = sum over parameters of (w - w0)^2 (`l2`), or of |w - w0| (`l1`). L2-SP, where w0 are the weights that
    training started from, has half the sum: fold factors into the weight. Smith et al. (A Closer Look at
    Rehearsal-Free Continual Learning, arXiv:2203.17269) hold the self-attention blocks alone, w0 being the network
    after the last task.

    Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018,
    arXiv:1802.01483.
    Shapes: student, teacher (parameters,) -> scalar, squared units of the parameters (their unit for l1).
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
    """Elastic weight consolidation: parameters that an old task depends on are held near their old values.

    loss = 1/2 * sum_i F_i * (w_i - w0_i)^2, w0 the parameters after the old task and F the diagonal of its Fisher
    information, the mean of squared gradients of log p(label), which an earlier stage makes. Equation 3 of the paper;
    its lambda is the term's weight.

    Kirkpatrick, Pascanu, Rabinowitz et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017,
    arXiv:1612.00796.
    Shapes: student, teacher, fisher (parameters,) -> scalar without unit.
    """

    def check_shapes(self, **shapes: Size) -> None:
        _check_equal_parameter_counts(shapes)

    def forward(self, student: Tensor, teacher: Tensor, fisher: Tensor) -> Tensor:
        return ewc_loss(student, teacher, fisher)
