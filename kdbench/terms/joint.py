"""Labels of two kinds at once: the class, and what was done to the image."""

from __future__ import annotations

from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Term, logits_of
from kdbench.terms.logits import cross_entropy_loss


@TERMS.register(
    "joint_cross_entropy",
    space="sample",
    version=1,
    injected=("num_classes",),
    operands=("kind",),
    paper="arXiv:2107.13715",
)
class JointCrossEntropy(Term):
    """HSAKD: cross-entropy with class and transformation together, one joint class for each pair of them.

    loss = -log softmax(student)[label * kinds + kind]. `kind` says which transformation the image went through, such as
    the quarter turns that a random `rotate90` tells: with `turned: {from: image, then: [rotate90]}`,
    `kind: train.turned_turns`. The student is a head with `num_classes: CLASSES * KINDS`. Hidden labels (negative): 0.

    Yang, An, Cai and Xu, Hierarchical Self-supervised Augmented Knowledge Distillation, IJCAI 2021, arXiv:2107.13715;
    the order of the joint classes as in the authors' code (winycg/HSAKD).
    Shapes: student logits (batch, classes * kinds), kind (batch,) of 0 to kinds - 1, label (batch,) -> (batch,), nats.
    """

    def __init__(self, num_classes: int, kinds: int = 4) -> None:
        super().__init__()
        if kinds < 2:
            raise ConfigError(f"joint_cross_entropy: kinds must be at least 2, got {kinds}")
        self.classes, self.kinds = num_classes, kinds

    def check_shapes(self, **shapes: Size) -> None:
        logits_of("student", shapes["student"])
        if shapes["student"][1] != self.classes * self.kinds:
            raise ValueError(
                f"needs a value for each pair of {self.classes} classes and {self.kinds} kinds, "
                f"{self.classes * self.kinds} in all, but the student has {shapes['student'][1]}"
            )

    def forward(self, student: Tensor, kind: Tensor, label: Tensor) -> Tensor:
        return cross_entropy_loss(student, label * self.kinds + kind * (label >= 0))
