"""Cases of `kdbench.terms.features.summaries`."""

from __future__ import annotations

from helpers.cases.base import Mistake, TermCase, replaced, scaled, with_params
from helpers.cases.loops import common_size, dot, flatten, mean_square, pooled, unit

BATCH_MAP, BATCH_VECTOR = (8, 3, 4, 4), (8, 10)


def _attention(feature, height, width, p):
    channels = [pooled(channel, height, width) for channel in feature]
    strength = [
        sum(abs(channel[r][c]) ** p for channel in channels) / len(channels)
        for r in range(height)
        for c in range(width)
    ]
    return unit(strength)


def at(student, teacher, p=2.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        size = common_size(s, t)
        losses.append(mean_square(_attention(s, *size, p), _attention(t, *size, p)))
    return losses


AT = TermCase(
    "at",
    at,
    student=(3, 2, 2),
    teacher=(5, 2, 2),
    controls={"p 1": with_params(p=1.0), "sum": scaled(4)},
    variants={
        "pooled": {
            "params": {"p": 3.0},
            "student": (2, 4, 2),
            "teacher": (3, 2, 4),
            "controls": {"p 2": with_params(p=2.0)},
        }
    },
    mistakes=[
        Mistake("feature maps", shapes={"student": BATCH_VECTOR, "teacher": BATCH_MAP}),
        Mistake("name a convolutional feature", shapes={"student": BATCH_MAP, "teacher": BATCH_VECTOR}),
        Mistake("at: p must be at least 1, got 0.5", {"p": 0.5}),
    ],
)


def fsp(student, teacher, student_from, teacher_from):
    losses = []
    for s, t, s_from, t_from in zip(student, teacher, student_from, teacher_from, strict=True):
        matrices = []
        for first, second in ((s_from, s), (t_from, t)):
            size = common_size(first, second)
            first, second = ([flatten(pooled(channel, *size)) for channel in feature] for feature in (first, second))
            matrices.append([[dot(a, b) / len(a) for b in second] for a in first])
        losses.append(mean_square(*matrices))
    return losses


FSP = TermCase(
    "fsp",
    fsp,
    student=(3, 2, 2),
    teacher=(3, 4, 2),
    row_operands={"student_from": (2, 4, 4), "teacher_from": (2, 4, 2)},
    controls={"channels exchanged": replaced(student_from=lambda features: features.flip(1)), "sum": scaled(6)},
    mistakes=[
        Mistake("the teacher's operand has the shape", shapes={"student": BATCH_MAP, "teacher": BATCH_VECTOR}),
        Mistake(
            "3 and 7",
            shapes={
                "student": BATCH_MAP,
                "teacher": BATCH_MAP,
                "student_from": BATCH_MAP,
                "teacher_from": (8, 7, 4, 4),
            },
        ),
    ],
    benchmark={"student_from": "early map", "teacher_from": "early map"},
    recipe_operands="student: conv2, teacher: conv2, student_from: conv1, teacher_from: teacher:conv1",
)
