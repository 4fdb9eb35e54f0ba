"""Cases of `kdbench.terms.divergences`."""

from __future__ import annotations

import math

from helpers.cases.base import BATCH, CLASSES, LABELS, Mistake, TermCase, scaled, swapped, with_params
from helpers.cases.logits import kd
from helpers.cases.loops import kl_divergence, softmax

DIFFERENT_CLASSES = {"student": (8, 10), "teacher": (8, 11)}


def divergence(student, teacher, kind="js", temperature=1.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        value = {
            "forward_kl": kl_divergence(q, p),
            "reverse_kl": kl_divergence(p, q),
            "js": kl_divergence(p, m) / 2 + kl_divergence(q, m) / 2,
            "soft_cross_entropy": -sum(b * math.log(a) for a, b in zip(p, q, strict=True)),
        }[kind]
        losses.append(temperature**2 * value)
    return losses


DIVERGENCE = TermCase(
    "divergence",
    divergence,
    {"temperature": 2.0},
    controls={"no T^2": scaled(1 / 4), "KL": with_params(kind="reverse_kl")},
    variants={
        "forward": {
            "params": {"kind": "forward_kl"},
            "controls": {"reversed": swapped, "js": with_params(kind="js")},
        },
        "reverse": {"params": {"kind": "reverse_kl"}, "controls": {"reversed": swapped}},
        "soft": {
            "params": {"kind": "soft_cross_entropy"},
            "zero_tolerance": None,
            "controls": {"reversed": swapped, "KL": with_params(kind="forward_kl")},
        },
    },
    mistakes=[
        Mistake("10 classes and the teacher 11", shapes=DIFFERENT_CLASSES),
        Mistake("divergence: temperature must be above 0", {"temperature": 0}),
        Mistake("kind must be one of forward_kl, reverse_kl, js, soft_cross_entropy", {"kind": "kl"}),
    ],
)


def label_mse(student, label):
    return [
        sum((p - (k == y)) ** 2 for k, p in enumerate(softmax(s))) / len(s) for s, y in zip(student, label, strict=True)
    ]


LABEL_MSE = TermCase(
    "label_mse",
    label_mse,
    teacher=None,
    fields={"label": LABELS},
    controls={"sum": scaled(CLASSES)},
    mistakes=[Mistake("reads logits", shapes={"student": (8, 3, 4, 4), "label": (8,)})],
)


def probability_mse(student, teacher):
    return [
        sum((a - b) ** 2 for a, b in zip(softmax(s), softmax(t), strict=True)) / len(s)
        for s, t in zip(student, teacher, strict=True)
    ]


PROBABILITY_MSE = TermCase(
    "probability_mse",
    probability_mse,
    controls={"sum": scaled(CLASSES)},
    mistakes=[Mistake("10 classes and the teacher 11", shapes=DIFFERENT_CLASSES)],
)


def _standardised(logits):
    mean = sum(logits) / len(logits)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [(z - mean) / (deviation + 1e-7) for z in logits]


def standardised_kd(student, teacher, temperature=2.0):
    return kd([_standardised(s) for s in student], [_standardised(t) for t in teacher], temperature)


STANDARDISED_KD = TermCase(
    "standardised_kd",
    standardised_kd,
    {"temperature": 3.0},
    controls={"no T^2": scaled(1 / 9)},
    mistakes=[
        Mistake("at least 2 classes", shapes={"student": (8, 1), "teacher": (8, 1)}),
        Mistake("standardised_kd: temperature must be above 0", {"temperature": 0}),
    ],
)


def entropy(student, of="logits"):
    return [-sum(p * math.log(p) for p in (softmax(s) if of == "logits" else s)) for s in student]


ENTROPY = TermCase(
    "entropy",
    entropy,
    teacher=None,
    controls={"negative": scaled(-1)},
    variants={
        "gate": {
            "params": {"of": "probabilities"},
            "student_is_distribution": True,
            "controls": {"logits": with_params(of="logits")},
        }
    },
    mistakes=[
        Mistake("at least 2 classes", shapes={"student": (8, 1)}),
        Mistake("of must be one of logits, probabilities", {"of": "gate"}),
    ],
)


def sinkhorn(student, teacher, temperature=2.0, epsilon=0.1, iterations=20):
    n = len(student)
    p, q = [softmax(s, temperature) for s in student], [softmax(t, temperature) for t in teacher]
    cost = [[sum(abs(a - b) for a, b in zip(p[i], q[j], strict=True)) for j in range(n)] for i in range(n)]
    plan = [[math.exp(-cost[i][j] / epsilon) for j in range(n)] for i in range(n)]
    for _ in range(iterations):
        plan = [[x / sum(row) for x in row] for row in plan]
        columns = [sum(plan[i][j] for i in range(n)) for j in range(n)]
        plan = [[plan[i][j] / columns[j] for j in range(n)] for i in range(n)]
    return sum(plan[i][j] * cost[i][j] for i in range(n) for j in range(n)) / n


SINKHORN = TermCase(
    "sinkhorn",
    sinkhorn,
    {"temperature": 1.5, "epsilon": 0.2, "iterations": 3},
    zero_tolerance=None,
    controls={
        "sum": scaled(BATCH),
        "one iteration": with_params(iterations=1),
        "different kernel": with_params(epsilon=0.4),
    },
    mistakes=[
        Mistake("10 classes and the teacher 11", shapes=DIFFERENT_CLASSES),
        Mistake("epsilon must be at least 0.025, got 0.02", {"epsilon": 0.02}),
        Mistake("iterations must be at least 1", {"iterations": 0}),
    ],
)


def taid(student, teacher, constant, history=(), least=0.4, rate=5e-4, momentum=0.99, end=1.0):
    """Repeats the update of t over the earlier steps; the student in the target is constant."""

    def cross_entropy_to_target(student, teacher, constant, t):
        total = 0.0
        for s, z, c in zip(student, teacher, constant, strict=True):
            q = softmax([(1 - t) * a + t * b for a, b in zip(c, z, strict=True)])
            total -= sum(b * math.log(a) for a, b in zip(softmax(s), q, strict=True))
        return total / len(student)

    t, decrease, previous = least, 0.0, None
    for step in history:
        loss = cross_entropy_to_target(step["student"], step["teacher"], step["student"], t)
        if previous is not None:
            decrease = momentum * decrease + (1 - momentum) * (previous - loss) / previous
            t = min(end, t + rate / (1 + math.exp(-decrease)) * (1 - t))
        previous = loss
    return cross_entropy_to_target(student, teacher, constant, t)


TAID = TermCase(
    "taid",
    taid,
    {"least": 0.2, "rate": 0.3, "momentum": 0.6},
    stops_gradient=True,
    zero_tolerance=None,
    controls={"higher t": with_params(least=0.5), "sum": scaled(BATCH), "sides": swapped},
    variants={"adapted": {"history": [{}, {}, {}], "controls": {"no adaptive step": with_params(rate=0.0)}}},
    mistakes=[
        Mistake("least must be at most end", {"least": 0.9, "end": 0.5}),
        Mistake(r"rate must be in \[0, 1\]", {"rate": 2.0}),
        Mistake("the student has 4 classes and the teacher 5", shapes={"student": (2, 4), "teacher": (2, 5)}),
    ],
    unit_interval=["least"],
)
