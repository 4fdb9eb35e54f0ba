"""Cases of `kdbench.terms.adversarial`."""

from __future__ import annotations

import math

from helpers.cases.base import Mistake, TermCase, with_params
from helpers.cases.logits import kd
from helpers.cases.loops import kl_divergence, sigmoid, softmax


def ctkd(student, teacher, lowest=1.0, span=20.0):
    return kd(student, teacher, lowest + span * sigmoid(1.0))


CTKD = TermCase(
    "ctkd",
    ctkd,
    {"span": 3.0},
    controls={"span": with_params(span=4.0)},
    gradient_only=["reverse"],
    mistakes=[
        Mistake("the student has 10 classes and the teacher 11", shapes={"student": (8, 10), "teacher": (8, 11)}),
        Mistake("ctkd: span must be above 0", {"span": 0.0}),
        Mistake("ctkd: hidden must be at least 1", {"hidden": 0}),
    ],
)


def binary(student, target=1.0):
    losses = []
    for value in student:
        s = sigmoid(value[0] if isinstance(value, list) else value)
        losses.append(-target * math.log(s) - (1 - target) * math.log(1 - s))
    return losses


BINARY = TermCase(
    "binary",
    binary,
    {"target": 1.0},
    student=(1,),
    teacher=None,
    class_symmetric=False,
    controls={"target 0": with_params(target=0.0)},
    variants={"soft": {"params": {"target": 0.3}, "student": (), "controls": {"target 1": with_params(target=1.0)}}},
    mistakes=[
        Mistake("one logit per sample", shapes={"student": (8, 2)}),
        Mistake("target must be in", {"target": 2.0}),
    ],
    benchmark={"student": "one"},
    recipe_operands="student: one:logits",
)


def competition(student, teacher, temperature=3.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        p, q, m = ([min(max(x, 0.01), 0.99) for x in distribution] for distribution in (p, q, m))
        divergence = kl_divergence(m, p) / 2 + kl_divergence(m, q) / 2
        losses.append(1 - min(max(divergence, 0.0), 1.0))
    return losses


COMPETITION = TermCase(
    "competition",
    competition,
    zero_tolerance=None,
    controls={"T 1": with_params(temperature=1.0)},
    mistakes=[
        Mistake("the student has 10 classes and the teacher 11", shapes={"student": (8, 10), "teacher": (8, 11)}),
        Mistake("competition: temperature must be above 0", {"temperature": 0}),
    ],
)
