"""Cases of `kdbench.terms.distribution`."""

from __future__ import annotations

from helpers.cases.base import (
    BATCH,
    CLASSES,
    LABELS,
    Mistake,
    TermCase,
    replaced,
    scaled,
    with_params,
    without_history,
)
from helpers.cases.loops import common_size, dot, flatten, kl_divergence, pooled, softmax, unit

MAP = (3, 2, 2)


def nst(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        size = common_size(s, t)
        s_patterns, t_patterns = ([unit(flatten(pooled(channel, *size))) for channel in side] for side in (s, t))

        def kernel(first, second):
            return sum(dot(a, b) ** 2 for a in first for b in second) / (len(first) * len(second))

        both = kernel(s_patterns, t_patterns)
        losses.append(kernel(t_patterns, t_patterns) + kernel(s_patterns, s_patterns) - 2 * both)
    return losses


NST = TermCase(
    "nst",
    nst,
    student=MAP,
    teacher=(5, 2, 2),
    controls={"sum": scaled(4)},
    variants={"pooled": {"student": (2, 4, 2), "teacher": (3, 2, 4), "controls": {"sum": scaled(4)}}},
    mistakes=[
        Mistake("name a convolutional feature", shapes={"student": (8, 3, 4, 4), "teacher": (8, 10)}),
    ],
)


def mmd(student, teacher):
    """Compares the mean features of the batches one element at a time."""
    rows = list(zip((flatten(s) for s in student), (flatten(t) for t in teacher), strict=True))
    n, elements = len(student), range(len(rows[0][0]))
    return sum((sum(s[e] for s, _ in rows) / n - sum(t[e] for _, t in rows) / n) ** 2 for e in elements)


MMD = TermCase(
    "mmd",
    mmd,
    controls={"mean": scaled(1 / 3), "by sample": scaled(BATCH)},
    mistakes=[Mistake("features of equal shape", shapes={"student": (8, 10), "teacher": (8, 3, 4, 4)})],
)


def cmi(student, label, constant, history, decay=0.9999):
    """Repeats the decayed class means over the earlier steps and this one; they have no gradient."""
    means = {}
    steps = [(step["student"], step["label"]) for step in history] + [(constant, label)]
    for logits, labels in steps:
        for row_class in set(labels):
            rows = [softmax(s) for s, y in zip(logits, labels, strict=True) if y == row_class]
            mean = [sum(row[k] for row in rows) / len(rows) for k in range(len(rows[0]))]
            previous = means.get(row_class)
            if previous is not None:
                mean = [decay * a + (1 - decay) * b for a, b in zip(previous, mean, strict=True)]
            means[row_class] = mean
    return [kl_divergence(softmax(s), means[y]) for s, y in zip(student, label, strict=True)]


CMI = TermCase(
    "cmi",
    cmi,
    {"decay": 0.9},
    teacher=None,
    fields={"label": LABELS},
    history=[{"label": [3, 3, 1, 1, 2]}, {"label": [2, 2, 1, 3, 2]}],
    coupled_rows=True,
    stops_gradient=True,
    controls={"no memory": without_history, "different decay": with_params(decay=0.5), "negative": scaled(-1)},
    mistakes=[
        Mistake("the data's 4 classes, but the student has 5", shapes={"student": (2, 5)}),
        Mistake(r"cmi: decay must be in \[0, 1\]", {"decay": 1.5}),
    ],
)


def scar(student, label, means, precision, power=0.5):
    losses = []
    for row, row_class in zip(student, label, strict=True):
        x = unit([max(value, 0) ** power for value in row])
        distances = []
        for c, mean in enumerate(means):
            if c == row_class:
                continue
            d = [a - b for a, b in zip(x, unit(mean), strict=True)]
            pairs = ((i, j) for i in range(len(d)) for j in range(len(d)))
            distances.append(sum(d[i] * precision[c][i][j] * d[j] for i, j in pairs))
        losses.append(min(distances))
    return losses


SCAR_PRECISION = [
    [[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]],
    [[1.0, 0.0, 0.2], [0.0, 4.0, 1.0], [0.2, 1.0, 2.0]],
    [[2.0, 0.5, 0.5], [0.5, 1.0, 0.0], [0.5, 0.0, 3.0]],
    [[1.5, 0.3, 0.0], [0.3, 1.0, 0.4], [0.0, 0.4, 2.5]],
]
SCAR = TermCase(
    "scar",
    scar,
    student=(3,),
    teacher=None,
    fields={"label": LABELS},
    fixed={
        "means": [[0.9, 0.1, 0.4], [0.2, 0.8, 0.3], [0.5, 0.5, 0.9], [0.7, 0.6, 0.1]],
        "precision": SCAR_PRECISION,
    },
    controls={
        "power 1": with_params(power=1.0),
        "next class": replaced(label=lambda label: (label + 1) % CLASSES),
        "Euclidean": replaced(precision=lambda precision: 0 * precision + precision.new_ones(3).diag()),
    },
    mistakes=[
        Mistake(r"needs means per class of size \[3\]", shapes={"student": (2, 3), "means": (4, 5)}),
        Mistake("reads one feature vector per sample", shapes={"student": (2, 3, 4, 4)}),
        Mistake("scar: power must be above 0", {"power": 0.0}),
    ],
    benchmark={"student": "vector", "means": "class means", "precision": "class matrices"},
    recipe_operands=None,
)
