"""The dataclasses of a term of the loss and of its edges (pairs of operands)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.schema.keys import Key, declare, declare_keys, derived
from kdbench.config.schema.parts import LOCATION, NO_LOCATION, OperandConfig, PartConfig, PartWithOperands
from kdbench.errors import Location


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """A pair of operands that a term compares. `teacher` is None if the term has no teacher operand."""

    student: OperandConfig = field(metadata=derived("`student` of the term"))
    teacher: OperandConfig | None = field(metadata=derived("`teacher` of the term"))


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One term of the loss: an entry of the key `terms`.

    Attributes:
        weight: factor of the loss: a number, or the config of a schedule.
        edges: pairs of student and teacher operands. The loss is the sum over all pairs.
        operands: name -> operand, for all operands of the term except student and teacher.
        params: name -> value, for the parameters of the term's class. A value may be the config of a schedule.
    """

    name: str = field(metadata=derived("the key in `terms`"))
    type: str = field(metadata=declare("a name of `kdbench list terms`", example="type: kd"))
    weight: float | PartConfig = field(
        default=1.0,
        metadata=declare(
            "factor of the loss: a number, or a schedule",
            type="float | Schedule",
            default_text="1",
            example="weight: {type: warmup, over: 20}",
        ),
    )
    edges: tuple[EdgeConfig, ...] = field(
        default=(),
        metadata=declare_keys(
            Key(
                "student",
                "operand that is trained, such as `ROLE:PATH`; a list of operands is compared with a list of "
                "teacher operands, element by element",
                type="Operand | list[Operand]",
                default_text="the logits of the role `student`",
                example="student: layer2",
            ),
            Key(
                "teacher",
                "operand that teaches, without gradient; `others`: each student operand of a list is taught by every "
                "other operand of this list",
                type="Operand | list[Operand]",
                default_text="the logits of the role `teacher`, if the term needs a teacher",
                example="teacher: [t1, t2]",
            ),
        ),
    )
    mask: str | None = field(
        default=None,
        metadata=declare(
            "boolean field of the batch; the loss includes only rows where the field is true",
            default_text="all rows",
            example="mask: labelled",
        ),
    )
    teacher_grad: bool = field(
        default=False,
        metadata=declare("whether gradients also flow into the teacher operand", example="teacher_grad: true"),
    )
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the term")
    )
    sample_weight: PartWithOperands | None = field(
        default=None,
        metadata=declare(
            "weight of each sample: a name of `kdbench list sample_weights` with its parameters and operands",
            type="SampleWeight",
            default_text="equal weights",
            example="sample_weight: {type: focal, power: 1}",
        ),
    )
    route: PartWithOperands | None = field(
        default=None,
        metadata=declare(
            "weight of each teacher for each sample: a name of `kdbench list routers` with its parameters and "
            "operands. The term must have two or more teachers",
            type="Router",
            default_text="equal weights",
            example='route: {type: top_k, k: 2, read: "student:pool"}',
        ),
    )
    operands: Mapping[str, OperandConfig] = field(
        default_factory=dict, metadata=derived("the keys that are operands of the term")
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)

    def read_operands(self) -> Iterator[OperandConfig]:
        """Yields all operands of the term, its sample weight and its router.

        A combination is replaced by its operands.
        """
        operands = [*self.operands.values()]
        for part in (self.sample_weight, self.route):
            operands += part.operands.values() if part is not None else ()
        for edge in self.edges:
            operands += [edge.student, *([edge.teacher] if edge.teacher is not None else [])]
        for operand in operands:
            yield from operand.leaves()
