"""Terms that compare features element by element."""

from __future__ import annotations

from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, equal_shapes
from kdbench.terms.numerics import at_least_float32


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of features (batch, ...) of equal shape, averaged over a sample's elements: (batch,)."""
    return (at_least_float32(student) - at_least_float32(teacher)).square().flatten(1).mean(1)


@TERMS.register("hint", space="sample", version=1, features=True, adapter="conv_regressor", paper="arXiv:1412.6550")
class Hint(Term):
    """FitNets: the student's feature, through a regressor, equals the teacher's hint.

    loss = mean over elements of (regressor(student) - teacher)^2. The paper writes half the sum; the mean is that of
    RepDistiller, whose published figures use weight 100. The regressor is the student operand's adapter:
    `conv_regressor` by default; for vectors write `adapter: linear`.

    Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550.
    Shapes: student (after its adapter), teacher (batch, ...) of equal shape -> (batch,), squared units of the feature.
    """

    def check_shapes(self, **shapes: Size) -> None:
        equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher)
