"""Test case of a term: operands, parameters, reference, controls and mistakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdbench.registry import TERMS, Entry

BATCH, CLASSES, SAMPLES = 5, 4, 40
LABELS = [3, 0, 1, 3, 2]
INDEX = [7, 3, 11, 39, 0, 22, 15]

Operands: TypeAlias = dict[str, Tensor]
Control: TypeAlias = "Callable[[TermCase, Operands], Tensor]"


@dataclass(frozen=True)
class Mistake:
    """A mistake of a user and the message that reports it.

    Attributes:
        message: regular expression that the message matches.
        params: constructor parameters. Without `shapes` the constructor raises ConfigError.
        shapes: shapes of the operands (with batch). If given, `check_shapes` raises ValueError.
    """

    message: str
    params: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class TermCase:
    """Everything that tests and benchmarks need of one term.

    Attributes:
        term: registered name.
        reference: loss as plain loops over nested lists of floats; returns a list (space row) or a float. Its keywords
            are the operands and `params`. Further keywords that it may name: `history`, the operands of earlier steps;
            `constant`, the student operand where the formula has no gradient; `term`, a built term with its parameters
            and its state before the step.
        params: constructor parameters.
        student, teacher: shape of one row (of the operand, in space model). None: the term does not read it.
        row_operands: shapes of further float operands with rows.
        fields: fields of the batch, repeated or cut to the size of the batch.
        fixed: operands without rows, such as class means.
        student_is_distribution: the student operand is probabilities, not logits.
        history: fields that replace `fields` in each earlier step; student and teacher are new draws. A term with a
            memory needs at least one step.
        controls: name -> loss with one mechanism disabled or changed; it must differ from the reference.
        variants: name -> fields of this class that differ, for further parameters or shapes.
        mistakes: wrong parameters and shapes with their messages.
        zero_tolerance: bound of the loss where student and teacher are equal; None if it is not 0 there.
        class_symmetric: renaming the classes does not change the loss.
        coupled_rows: a loss per row that depends on the other rows through a state.
        stops_gradient: a part of the formula is detached, so that finite differences of the loss are not its gradient.
        unit_interval: scheduled parameters in [0, 1].
        gradient_only: scheduled parameters that change the gradient, not the loss.
        benchmark: operand -> kind of operand in the benchmarks (`SHAPES` in benchmarks/operands.py). Default: logits;
            maps for a term with the fact `features`.
        recipe_operands: operands and required parameters of the term in the recipes of tests/test_recipes.py. Default:
            logits, or maps for a term with the fact `features`. None: the term reads artifacts of an earlier stage.
        name: identifier in test names.
    """

    term: str
    reference: Callable[..., Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    student: tuple[int, ...] = (CLASSES,)
    teacher: tuple[int, ...] | None = (CLASSES,)
    row_operands: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fixed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    student_is_distribution: bool = False
    history: Sequence[Mapping[str, Sequence[Any]]] = ()
    controls: Mapping[str, Control] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mistakes: Sequence[Mistake] = ()
    zero_tolerance: float | None = 1e-12
    class_symmetric: bool = True
    coupled_rows: bool = False
    stops_gradient: bool = False
    unit_interval: Sequence[str] = ()
    gradient_only: Sequence[str] = ()
    benchmark: Mapping[str, str] = field(default_factory=dict)
    recipe_operands: str | None = ""
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.term

    @property
    def entry(self) -> Entry:
        return TERMS.entry(self.term)

    @property
    def space(self) -> str:
        return self.entry.facts["space"]

    def expand(self) -> Iterator[TermCase]:
        """Yields the case itself and its variants; a variant has only its own controls."""
        yield self
        for name, changes in self.variants.items():
            unique: dict[str, Any] = {"name": f"{self.term}-{name}", "variants": {}, "mistakes": (), "controls": {}}
            yield replace(self, **{**unique, **changes})

    def build(self, dtype: torch.dtype = torch.float64, *, with_history: bool = True, **params: Any) -> Any:
        """Builds the term, always with the same parameters, after the steps of `history`."""
        torch.manual_seed(0)
        injected = {
            "samples": SAMPLES,
            "num_classes": CLASSES,
            "shapes": {"student": self.student, "teacher": self.teacher},
        }
        term = TERMS.build(self.term, {**self.params, **params}, **injected)
        term = term if dtype == torch.float32 else term.to(dtype)
        if with_history:
            for operands in self.history_operands(dtype):
                term(**operands)
        return term

    def loss(self, **operands: Any) -> Tensor:
        """Computes the loss by a new term, so that no call depends on the state after an earlier one."""
        exact = operands["student"].dtype == torch.float64
        return self.build(torch.float64 if exact else torch.float32)(**operands)

    def operands(self, batch: int = BATCH, dtype: torch.dtype = torch.float64, seed: int = 0) -> Operands:
        """Draws the operands; the student operand is a leaf that requires a gradient."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {"student": self.student, "teacher": self.teacher, **self.row_operands}
        rows = () if self.space == "model" else (batch,)
        operands = {
            name: (1.5 * torch.randn(*rows, *shape, generator=generator, dtype=torch.float64)).to(dtype)
            for name, shape in shapes.items()
            if shape is not None
        }
        if self.student_is_distribution:
            operands["student"] = operands["student"].softmax(1)
        operands["student"].requires_grad_()
        operands |= {name: _field(values, batch) for name, values in self.fields.items()}
        return operands | {name: torch.tensor(values, dtype=dtype) for name, values in self.fixed.items()}

    def history_operands(self, dtype: torch.dtype = torch.float64) -> list[Operands]:
        """Draws the operands of each earlier step, detached."""
        steps = []
        for number, fields in enumerate(self.history):
            operands = self.operands(dtype=dtype, seed=100 + number)
            operands |= {name: _field(values, BATCH) for name, values in fields.items()}
            steps.append({name: value.detach() for name, value in operands.items()})
        return steps

    def select_rows(self, operands: Mapping[str, Tensor], rows: Tensor) -> Operands:
        """Selects rows of all operands that have rows."""
        return {name: value if name in self.fixed else value[rows] for name, value in operands.items()}

    def with_equal_sides(self, operands: Mapping[str, Tensor]) -> Operands:
        """Replaces each operand of the teacher by the student's."""
        sides = {name: name.replace("teacher", "student") for name in operands if name.startswith("teacher")}
        return {**operands, **{teacher: operands[student].detach() for teacher, student in sides.items()}}

    def reference_loss(self, operands: Mapping[str, Tensor]) -> Callable[[Any], Any]:
        """Returns the reference as a function of the student operand (nested list)."""
        plain = {name: value.tolist() for name, value in operands.items()}
        context: dict[str, Callable[[], Any]] = {
            "history": lambda: [{k: v.tolist() for k, v in step.items()} for step in self.history_operands()],
            "constant": lambda: plain["student"],
            "term": self.build,
        }
        accepted = inspect.signature(self.reference).parameters
        keywords = {**plain, **self.params, **{name: make() for name, make in context.items() if name in accepted}}
        return lambda student: self.reference(**{**keywords, "student": student})


def _field(values: Sequence[Any], batch: int) -> Tensor:
    field_values = torch.tensor(values)
    field_values = field_values.double() if field_values.is_floating_point() else field_values
    return field_values[torch.arange(batch) % len(field_values)]


def with_params(**params: Any) -> Control:
    """Control: different constructor parameters."""
    return lambda case, operands: case.build(**params)(**operands)


def scaled(factor: float) -> Control:
    """Control: the loss times a factor, such as a mean instead of a sum."""
    return lambda case, operands: factor * case.build()(**operands)


def without(*names: str) -> Control:
    """Control: optional operands left out."""
    return lambda case, operands: case.build()(**{k: v for k, v in operands.items() if k not in names})


def without_history(case: TermCase, operands: Operands) -> Tensor:
    """Control: a memory that saw no earlier step."""
    return case.build(with_history=False)(**operands)


def swapped(case: TermCase, operands: Operands) -> Tensor:
    """Control: student and teacher exchanged."""
    return case.build()(**{**operands, "student": operands["teacher"], "teacher": operands["student"]})


def replaced(**changes: Callable[[Tensor], Tensor]) -> Control:
    """Control: operands changed by functions."""
    return lambda case, operands: case.build()(**{**operands, **{k: f(operands[k]) for k, f in changes.items()}})
