"""Cases of `kdbench.terms.data_free`."""

from __future__ import annotations

import math

from helpers.cases.base import CLASSES, Mistake, TermCase, replaced, scaled, with_params
from helpers.cases.loops import dot, flatten, softmax

MAP = (3, 2, 2)


def one_hot(student):
    return [-math.log(max(softmax(s))) for s in student]


ONE_HOT = TermCase(
    "one_hot",
    one_hot,
    teacher=None,
    controls={"sum": scaled(CLASSES)},
    mistakes=[Mistake("reads logits", shapes={"student": (8, 3, 4, 4)})],
)


def information_entropy(student):
    p = [softmax(s) for s in student]
    mean = [sum(row[k] for row in p) / len(p) for k in range(len(p[0]))]
    return sum(m * math.log(m) for m in mean)


INFORMATION_ENTROPY = TermCase(
    "information_entropy",
    information_entropy,
    teacher=None,
    controls={"log10": scaled(0.4343)},
    mistakes=[Mistake("at least 2 classes", shapes={"student": (8, 1)})],
    recipe_operands="student: logits",
)


def activation(student):
    return [-sum(abs(x) for x in flatten(s)) / len(flatten(s)) for s in student]


ACTIVATION = TermCase(
    "activation", activation, student=MAP, teacher=None, controls={"sum": scaled(12)}, recipe_operands="student: conv2"
)


def bn_statistics(student, teacher, weight=None):
    weights = weight or [1.0] * len(student)
    mean_distance = variance_distance = 0.0
    for channel in range(len(student[0])):
        values = [(w, x) for w, row in zip(weights, student, strict=True) for line in row[channel] for x in line if w]
        total = sum(w for w, _ in values)
        mean = sum(w * x for w, x in values) / total
        variance = sum(w * (x - mean) ** 2 for w, x in values) / total
        mean_distance += (mean - teacher[0][channel]) ** 2
        variance_distance += (variance - teacher[1][channel]) ** 2
    return math.sqrt(mean_distance) + math.sqrt(variance_distance)


BN_STATISTICS = TermCase(
    "bn_statistics",
    bn_statistics,
    student=(3, 2, 4),
    teacher=None,
    fixed={"teacher": [[0.3, -0.2, 1.1], [0.7, 1.2, 0.5]]},
    controls={
        "running statistics exchanged": replaced(teacher=lambda teacher: teacher.flip(0)),
        "one norm": lambda case, operands: case.build()(**operands) / 2,
    },
    mistakes=[Mistake("a BatchNorm's input", shapes={"student": (2, 3, 4, 4), "teacher": (2, 5)})],
    benchmark={"student": "map", "teacher": "statistics"},
    recipe_operands="student: conv2, teacher: teacher:norm2/stats",
)


def total_variation(student, norm=1):
    losses = []
    for image in student:
        loss = 0.0
        for down, right in ((0, 1), (1, 0), (1, -1), (1, 1)):
            differences = [
                channel[r][c] - channel[r + down][c + right]
                for channel in image
                for r in range(len(channel) - down)
                for c in range(len(channel[0]))
                if 0 <= c + right < len(channel[0])
            ]
            mean = sum(abs(x) for x in differences) / len(differences)
            loss += mean if norm == 1 else math.sqrt(dot(differences, differences))
        losses.append(loss)
    return losses


TOTAL_VARIATION = TermCase(
    "total_variation",
    total_variation,
    student=(2, 3, 4),
    teacher=None,
    class_symmetric=False,
    controls={"norm 2": with_params(norm=2)},
    variants={"norm-2": {"params": {"norm": 2}, "controls": {"norm 1": with_params(norm=1)}}},
    mistakes=[
        Mistake("2 pixels a side", shapes={"student": (2, 3, 1, 5)}),
        Mistake("norm must be one of 1, 2", {"norm": 3}),
    ],
    benchmark={"student": "image"},
    recipe_operands="student: conv2",
)


def image_norm(student):
    return [math.sqrt(dot(flatten(s), flatten(s))) for s in student]


IMAGE_NORM = TermCase(
    "image_norm",
    image_norm,
    student=MAP,
    teacher=None,
    class_symmetric=False,
    controls={"doubled": scaled(2)},
    benchmark={"student": "image"},
    recipe_operands="student: conv2",
)
