"""Cases of `kdbench.terms.continual`."""

from __future__ import annotations

import math

from helpers.cases.base import BATCH, LABELS, Mistake, TermCase, scaled, swapped, with_params
from helpers.cases.loops import dot, flatten, sigmoid


def icarl(student, teacher, label, old):
    losses = []
    for s, t, row_class in zip(student, teacher, label, strict=True):
        loss = 0.0
        for k in range(len(s)):
            p = sigmoid(s[k])
            q = sigmoid(t[k]) if k in old else float(k == row_class)
            loss -= q * math.log(p) + (1 - q) * math.log(1 - p)
        losses.append(loss)
    return losses


ICARL = TermCase(
    "icarl",
    icarl,
    {"old": [0, 2]},
    fields={"label": LABELS},
    zero_tolerance=None,
    class_symmetric=False,
    controls={"one old class": with_params(old=[0])},
    mistakes=[
        Mistake("each once, got", {"old": [1, 1]}),
        Mistake("lists old class 4", {"old": [4]}, shapes={"student": (8, 4), "teacher": (8, 4), "label": (8,)}),
    ],
    recipe_operands="old: [0, 1]",
)


def proxy_contrastive(student, label, temperature=0.09):
    loss = 0.0
    for s, row_class in zip(student, label, strict=True):
        total = sum(math.exp(s[batch_class] / temperature) for batch_class in label)
        loss -= math.log(math.exp(s[row_class] / temperature) / total)
    return loss / len(student)


PROXY_CONTRASTIVE = TermCase(
    "proxy_contrastive",
    proxy_contrastive,
    {"temperature": 0.5},
    teacher=None,
    fields={"label": LABELS},
    controls={"T 1": with_params(temperature=1.0), "sum": scaled(BATCH)},
    mistakes=[
        Mistake("give both or neither", shapes={"student": (4, 5), "label": (4,), "replayed": (3, 5)}),
        Mistake("5 classes and the teacher 6", shapes={"student": (4, 5), "replayed": (3, 6), "replayed_label": (3,)}),
        Mistake("proxy_contrastive: temperature must be above 0", {"temperature": 0}),
    ],
)


def proxy_distance(student, teacher, label):
    values = [(s[c] - t[c]) ** 2 for s, t in zip(student, teacher, strict=True) for c in label]
    return sum(values) / len(values)


PROXY_DISTANCE = TermCase(
    "proxy_distance",
    proxy_distance,
    fields={"label": LABELS},
    controls={
        "all classes": lambda case, operands: (operands["student"] - operands["teacher"]).square().mean(),
        "sum": scaled(BATCH),
    },
    mistakes=[Mistake("5 classes and the teacher 6", shapes={"student": (4, 5), "teacher": (4, 6)})],
)


def similarity_distribution(student, teacher, temperature=0.09):
    n, distributions = len(student), []
    for rows in ([flatten(row) for row in student], [flatten(row) for row in teacher]):
        lengths = [math.sqrt(dot(row, row)) for row in rows]
        powers = [
            [math.exp(dot(rows[i], rows[j]) / (lengths[i] * lengths[j]) / temperature) for j in range(n)]
            for i in range(n)
        ]
        distributions.append(
            [[powers[i][j] / sum(p for k, p in enumerate(powers[i]) if k != i) for j in range(n)] for i in range(n)]
        )
    q, p = distributions
    return -sum(p[i][j] * math.log(q[i][j]) for i in range(n) for j in range(n) if j != i) / n


SIMILARITY_DISTRIBUTION = TermCase(
    "similarity_distribution",
    similarity_distribution,
    {"temperature": 0.5},
    student=(4,),
    teacher=(2, 3),
    zero_tolerance=None,
    controls={"sides": swapped, "T 1": with_params(temperature=1.0)},
    mistakes=[Mistake("similarity_distribution: temperature must be above 0", {"temperature": 0})],
)
