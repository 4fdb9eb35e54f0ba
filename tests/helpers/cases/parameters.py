"""Cases of `kdbench.terms.parameters`."""

from __future__ import annotations

from helpers.cases.base import Mistake, TermCase, replaced, scaled, with_params

PARAMETERS = (9,)


def weight_distance(student, teacher, distance="l2"):
    gaps = [w - w0 for w, w0 in zip(student, teacher, strict=True)]
    return sum(gap**2 if distance == "l2" else abs(gap) for gap in gaps)


WEIGHT_DISTANCE = TermCase(
    "weight_distance",
    weight_distance,
    student=PARAMETERS,
    teacher=PARAMETERS,
    class_symmetric=False,
    controls={"l1": with_params(distance="l1"), "mean": scaled(1 / 9)},
    variants={"l1": {"params": {"distance": "l1"}, "controls": {"l2": with_params(distance="l2")}}},
    mistakes=[
        Mistake("the student's module has 9 parameters and teacher has 8", shapes={"student": (9,), "teacher": (8,)}),
        Mistake("distance must be one of l1, l2", {"distance": "l3"}),
    ],
    benchmark={"student": "weights", "teacher": "weights"},
    recipe_operands="student: 'student:fc/weights', teacher: 'teacher:fc/weights'",
)


def ewc(student, teacher, fisher):
    return sum(f * (w - w0) ** 2 / 2 for w, w0, f in zip(student, teacher, fisher, strict=True))


EWC = TermCase(
    "ewc",
    ewc,
    student=PARAMETERS,
    teacher=PARAMETERS,
    fixed={"fisher": [0.5, 2.0, 0.1, 1.0, 3.0, 0.2, 0.7, 1.5, 0.4]},
    class_symmetric=False,
    controls={"sum": scaled(2), "equal information": replaced(fisher=lambda fisher: 0 * fisher + fisher.mean())},
    mistakes=[
        Mistake("fisher has 8", shapes={"student": (9,), "teacher": (9,), "fisher": (8,)}),
        Mistake(
            r"as one vector, but student has the shape \[2, 9\]",
            shapes={"student": (2, 9), "teacher": (9,), "fisher": (9,)},
        ),
    ],
    benchmark={"student": "weights", "teacher": "weights", "fisher": "weights"},
    recipe_operands="student: 'student:fc/weights', teacher: 'teacher:fc/weights', fisher: 'teacher:fc/weights'",
)
