"""Base class of all terms, and the checks of operand shapes and parameters that terms share."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Size, Tensor, nn

from kdbench.errors import ConfigError

Space = Literal["row", "batch", "model"]
"""Space of a loss.

`row`: one value per row. `batch`: one scalar that couples the rows. `model`: one scalar that depends on no row.
"""


Number: TypeAlias = float | Tensor
"""A number, or a 0-dim float tensor that contains the current value of a schedule.

A recipe can set a schedule (a value that changes during training) only for parameters with this annotation. Outside
`__init__`, do not branch on the value: reading a tensor synchronises with the device.
"""


class Term(nn.Module):
    """Base class of all terms.

    A subclass is registered with the space of its loss:

        @TERMS.register("kd", space="row", version=1, paper="arXiv:1503.02531")

    The parameters of `forward` are the operands of the term, by name:

        student, teacher: tensors that the recipe names, after their adapters.
        mask, weight: validity (bool) and weight of each row, (batch,). Each of them may be None.
        names in `operands=(...)` of the registration: further tensors that the recipe names.
        every other name: a field of the batch, such as `label` or `index`. If its default is None, the field is
        optional.

    The framework sets three constructor parameters, if the constructor has them: `num_classes`; `samples`, the number
    of samples in the student's dataset (the field `index` contains numbers below it); and `shapes`, operand name ->
    shape per sample.

    Space of the loss:
        row: `forward` returns (batch,) or (batch, ...). The training loop multiplies this loss by mask and weights,
        sums it, and divides by the number of valid entries of the effective batch.
        batch: `forward` returns a scalar that couples the rows. It takes `mask` and `weight` and uses valid rows only.
        model: `forward` returns a scalar that does not depend on the rows of a batch.

    A term is a module: the optimizer trains its parameters, and checkpoints contain its parameters and buffers.
    """

    def check_shapes(self, **shapes: Size) -> None:
        """Raises ValueError if the term cannot compare operands of these shapes.

        The framework calls this method once, before training. It prints the message of the error after the name of the
        term, so that the message begins with a verb: "reads logits, but ...".

        Args:
            shapes: operand name -> shape, including the batch dimension if the operand has one.
        """


def check_equal_shapes(operand_kind: str, student: Size, teacher: Size) -> None:
    """Raises ValueError if the operands of student and teacher differ in shape.

    Args:
        operand_kind: plural noun for the operands in the message, such as "features".
        student: shape of the student operand, including the batch dimension.
        teacher: shape of the teacher operand, including the batch dimension.
    """
    if student != teacher:
        raise ValueError(
            f"compares {operand_kind} of equal shape, but the student's shape is {list(student[1:])} "
            f"and the teacher's shape is {list(teacher[1:])} per sample"
        )


def check_equal_classes(student: Size, teacher: Size, *, min_classes: int = 1) -> None:
    """Raises ValueError unless student and teacher are logits (batch, classes) with the same number of classes.

    Args:
        student: shape of the student operand, including the batch dimension.
        teacher: shape of the teacher operand, including the batch dimension.
        min_classes: smallest allowed number of classes.
    """
    for role, shape in (("student", student), ("teacher", teacher)):
        check_logits(role, shape, min_classes=min_classes)
    if student[1] != teacher[1]:
        raise ValueError(
            f"compares logits class by class, but the student has {student[1]} classes and the teacher {teacher[1]}"
        )


def check_logits(operand: str, shape: Size, *, min_classes: int = 1) -> None:
    """Raises ValueError unless `shape` is the shape of logits (batch, classes).

    Args:
        operand: name of the operand, for the message.
        shape: shape of the operand, including the batch dimension.
        min_classes: smallest allowed number of classes.
    """
    if len(shape) != 2:
        raise ValueError(
            f"reads logits, one vector of shape [classes] per sample, but the {operand}'s operand has the shape "
            f"{list(shape[1:])} per sample"
        )
    if shape[1] < min_classes:
        raise ValueError(f"needs at least {min_classes} classes, but the {operand} has {shape[1]}")


def check_feature_maps(**shapes: Size) -> None:
    """Raises ValueError unless every operand has the shape of a feature map (batch, channels, height, width).

    Args:
        shapes: operand name -> shape, including the batch dimension.
    """
    for operand, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"reads feature maps of shape [channels, height, width], but the {operand}'s operand has the shape "
                f"{list(shape[1:])} per sample; name a convolutional feature"
            )


def check_parameters(
    part_name: str, rule: Literal["above 0", "at least 0", "at least 1", "in [0, 1]"], **parameters: Number
) -> None:
    """Raises ConfigError if a parameter of a part (a term, an adapter, ...) is out of range.

    Tensors are not checked: they contain the changing value of a schedule.

    Args:
        part_name: registered name of the part, for the message.
        rule: range of all `parameters`. Infinity is never in range.
        parameters: parameter name -> value.
    """
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
