"""What a term is: named operands in, an unreduced loss over its declared space out."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Size, Tensor, nn

from kdbench.errors import ConfigError

Space = Literal["row", "batch", "model"]


Number: TypeAlias = float | Tensor
"""A number, or a 0-dim float tensor that the runner moves along a schedule. Only parameters annotated so can be
scheduled. Never branch on its value outside `__init__`: reading a tensor waits for the device."""


class Term(nn.Module):
    """Base of all terms. A subclass is registered with its space:

        @TERMS.register("kd", space="row")

    The parameters of `forward` name what the term reads: `student` and `teacher` are its operands (after their
    adapters), `mask` and `weight` are the validity and the weight of each row (either may be None), every other name
    is a field of the batch, such as `label` or `index`; one with the default None is passed only where it exists.
    Further operands are declared by a fact, `operands=("reward",)`, and addressed in the recipe by that key.

    Injected where the constructor asks for them: num_classes, samples (how many the student's source has in all:
    `index` is below it).

    space:
        sample: returns (batch,). token: (batch, length). pixel: (batch, height, width). The runner multiplies by mask
            and weights, sums, and divides by the number of valid entries of the whole effective batch.
        batch: returns a scalar that couples the rows. It takes `mask` and `weight` and uses valid rows only.
        model: returns a scalar that depends on no row.

    A term owns its parameters and its state as any module does; the optimiser and the checkpoint find them.
    """

    def check_shapes(self, **shapes: Size) -> None:
        """Raises ValueError, in words, when operands of these shapes cannot be compared. Called once, by the plan."""


def check_equal_shapes(operand_kind: str, student: Size, teacher: Size) -> None:
    """Raises ValueError when two operands that are compared element by element differ in shape."""
    if student != teacher:
        raise ValueError(
            f"compares {operand_kind} of equal shape, but the student's is {list(student[1:])} "
            f"and the teacher's {list(teacher[1:])} per sample"
        )


def check_equal_classes(student: Size, teacher: Size, *, min_classes: int = 1) -> None:
    """Raises ValueError when two operands are not logits (batch, classes) over the same, at least `least`, classes."""
    for role, shape in (("student", student), ("teacher", teacher)):
        check_logits(role, shape, min_classes=min_classes)
    if student[1] != teacher[1]:
        raise ValueError(
            f"compares logits class by class, but the student has {student[1]} classes and the teacher {teacher[1]}"
        )


def check_logits(operand: str, shape: Size, *, min_classes: int = 1) -> None:
    """Raises ValueError when an operand is not logits (batch, classes) over at least `least` classes."""
    if len(shape) != 2:
        raise ValueError(
            f"reads logits, one vector of classes per sample, but the {operand}'s operand is {list(shape[1:])} per sample"
        )
    if shape[1] < min_classes:
        raise ValueError(f"needs at least {min_classes} classes, but the {operand} has {shape[1]}")


def check_feature_maps(**shapes: Size) -> None:
    """Raises ValueError when an operand is no feature map (batch, channels, height, width); by the operands' names."""
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"reads feature maps [channels, height, width], but the {name}'s operand is {list(shape[1:])} per "
                "sample; name a convolutional feature"
            )


def check_parameters(
    part_name: str, rule: Literal["above 0", "at least 0", "at least 1", "in [0, 1]"], **parameters: Number
) -> None:
    """Raises ConfigError when a parameter breaks the rule. Tensors pass: their schedule was checked before."""
    for key, value in parameters.items():
        if isinstance(value, Tensor):
            continue
        kept = {
            "above 0": value > 0,
            "at least 0": value >= 0,
            "at least 1": value >= 1,
            "in [0, 1]": 0 <= value <= 1,
        }[rule]
        if not kept or value == float("inf"):
            raise ConfigError(f"{part_name}: {key} must be {rule}, got {value}")
