"""Base class of all terms, and the checks of shapes and parameters that terms share."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Size, Tensor, nn

from kdbench.errors import ConfigError

Space = Literal["row", "batch", "model"]
"""Space of a loss: one value per row, one scalar that couples the rows, or one scalar that depends on no row."""


Number: TypeAlias = float | Tensor
"""A number, or a 0-dim float tensor that the runner updates along a schedule.

Only parameters with this annotation accept a schedule. Never branch on the value outside `__init__`: reading a tensor
synchronises with the device.
"""


class Term(nn.Module):
    """Base class of all terms.

    A subclass is registered with the space of its loss:

        @TERMS.register("kd", space="row", version=1, paper="arXiv:1503.02531")

    The parameter names of `forward` are the operands. `student` and `teacher` are the operands of an edge, after their
    adapters. `mask` and `weight` are the validity and the weight of each row; either may be None. Every other name is a
    field of the batch, such as `label` or `index`; a field with the default None is passed only if the batch has it.
    The fact `operands=("reward",)` declares further operands, which a recipe sets by that key.

    Injected into the constructor if it has a parameter of that name: `num_classes`, `samples` (size of the student's
    source; `index` is below it) and `shapes` (shape per sample of each operand, by name).

    Space of the loss:
        row: returns (batch,) or (batch, ...). The runner multiplies by mask and weights, sums, and divides by the
            number of valid entries of the effective batch.
        batch: returns a scalar that couples the rows. Takes `mask` and `weight` and uses valid rows only.
        model: returns a scalar that depends on no row.

    The parameters and buffers of a term are those of its module: optimizer and checkpoint include them.
    """

    def check_shapes(self, **shapes: Size) -> None:
        """Raises ValueError if the term cannot compare operands of these shapes. Called once, before training."""


def check_equal_shapes(operand_kind: str, student: Size, teacher: Size) -> None:
    """Raises ValueError if two operands that are compared element by element differ in shape."""
    if student != teacher:
        raise ValueError(
            f"compares {operand_kind} of equal shape, but the student's is {list(student[1:])} "
            f"and the teacher's {list(teacher[1:])} per sample"
        )


def check_equal_classes(student: Size, teacher: Size, *, min_classes: int = 1) -> None:
    """Raises ValueError if two operands are not logits (batch, classes) over the same classes."""
    for role, shape in (("student", student), ("teacher", teacher)):
        check_logits(role, shape, min_classes=min_classes)
    if student[1] != teacher[1]:
        raise ValueError(
            f"compares logits class by class, but the student has {student[1]} classes and the teacher {teacher[1]}"
        )


def check_logits(operand: str, shape: Size, *, min_classes: int = 1) -> None:
    """Raises ValueError if an operand is not logits (batch, classes) over at least `min_classes` classes."""
    if len(shape) != 2:
        raise ValueError(
            f"reads logits, one vector of classes per sample, but the {operand}'s operand is {list(shape[1:])} "
            "per sample"
        )
    if shape[1] < min_classes:
        raise ValueError(f"needs at least {min_classes} classes, but the {operand} has {shape[1]}")


def check_feature_maps(**shapes: Size) -> None:
    """Raises ValueError if an operand is not a feature map (batch, channels, height, width)."""
    for operand, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"reads feature maps [channels, height, width], but the {operand}'s operand is {list(shape[1:])} per "
                "sample; name a convolutional feature"
            )


def check_parameters(
    part_name: str, rule: Literal["above 0", "at least 0", "at least 1", "in [0, 1]"], **parameters: Number
) -> None:
    """Raises ConfigError if a number breaks the rule. Tensors pass: the values of a schedule are checked elsewhere."""
    for key, value in parameters.items():
        if isinstance(value, Tensor):
            continue
        is_valid = {
            "above 0": value > 0,
            "at least 0": value >= 0,
            "at least 1": value >= 1,
            "in [0, 1]": 0 <= value <= 1,
        }[rule]
        if not is_valid or value == float("inf"):
            raise ConfigError(f"{part_name}: {key} must be {rule}, got {value}")
