"""Cases of `kdbench.terms.features.heads`."""

from __future__ import annotations

import math

from helpers.cases.base import CLASSES, LABELS, Mistake, TermCase, scaled, swapped, with_params
from helpers.cases.loops import kl_divergence, sigmoid, softmax


def ofa(student, teacher, label, power=1.0, temperature=1.0):
    losses = []
    for s, t, row_class in zip(student, teacher, label, strict=True):
        p, q, loss = softmax(s, temperature), softmax(t, temperature), 0.0
        for k in range(len(s)):
            is_label = 1.0 if k == row_class else 0.0
            loss -= ((q[k] + is_label) ** power - is_label) * math.log(p[k])
        losses.append(0.0 if row_class < 0 else loss)
    return losses


OFA = TermCase(
    "ofa",
    ofa,
    {"power": 1.5},
    fields={"label": LABELS},
    zero_tolerance=None,
    controls={"power 1": with_params(power=1.0), "swapped": swapped},
    variants={
        "warm": {
            "params": {"power": 1.2, "temperature": 2.0},
            "controls": {"T 1": with_params(temperature=1.0), "T^2": scaled(4)},
        }
    },
    mistakes=[
        Mistake("10 classes and the teacher 100", shapes={"student": (8, 10), "teacher": (8, 100), "label": (8,)}),
        Mistake("ofa: power must be above 0", {"power": 0}),
    ],
)


def dhkd(student, teacher, temperature=2.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        loss = 0.0
        for a, b in zip(s, t, strict=True):
            p = sigmoid((a - b) / temperature)
            loss += kl_divergence([0.5, 0.5], [p, 1 - p])
        losses.append(temperature**2 * loss)
    return losses


DHKD = TermCase(
    "dhkd",
    dhkd,
    controls={"T 1": with_params(temperature=1.0), "no T^2": scaled(1 / 4), "mean": scaled(1 / CLASSES)},
    mistakes=[
        Mistake("reads logits", shapes={"student": (8, 10), "teacher": (8, 3, 4, 4)}),
        Mistake("dhkd: temperature must be above 0", {"temperature": -2}),
    ],
)
