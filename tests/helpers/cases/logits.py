"""Cases of `kdbench.terms.logits`."""

from __future__ import annotations

import math

import torch

from helpers.cases.base import (
    BATCH,
    CLASSES,
    LABELS,
    Mistake,
    TermCase,
    replaced,
    scaled,
    swapped,
    with_params,
    without,
)
from helpers.cases.loops import dot, kl_divergence, softmax

LOGITS, MAP = (8, 10), (8, 3, 4, 4)


def cross_entropy(student, label, label_other=None, mix=None, label_smoothing=0.0):
    losses = []
    for i, logits in enumerate(student):
        classes = len(logits)
        p = softmax(logits)
        labels = [(label[i], 1.0)] if mix is None else [(label[i], mix[i]), (label_other[i], 1 - mix[i])]
        loss = 0.0
        for row_label, fraction in labels:
            if row_label < 0:
                continue
            for k in range(classes):
                target = label_smoothing / classes + (1 - label_smoothing) * (k == row_label)
                loss -= fraction * target * math.log(p[k])
        losses.append(loss)
    return losses


CROSS_ENTROPY = TermCase(
    "cross_entropy",
    cross_entropy,
    teacher=None,
    fields={"label": LABELS},
    controls={"batch mean": scaled(1 / BATCH)},
    variants={
        "smooth": {"params": {"label_smoothing": 0.1}, "controls": {"no smoothing": with_params(label_smoothing=0.0)}},
        "mixup": {
            "params": {"label_smoothing": 0.1},
            "fields": {"label": LABELS, "label_other": [1, 0, 2, 0, 3], "mix": [1.0, 0.5, 0.25, 0.0, 0.9]},
            "controls": {"not mixed": without("label_other", "mix")},
        },
    },
    mistakes=[
        Mistake("reads logits", shapes={"student": MAP, "label": (8,)}),
        Mistake(r"label_smoothing must be in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
    ],
    unit_interval=["label_smoothing"],
)


def kd(student, teacher, temperature=4.0):
    return [
        temperature**2 * kl_divergence(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(student, teacher, strict=True)
    ]


KD = TermCase(
    "kd",
    kd,
    {"temperature": 3.0},
    controls={"no T^2": scaled(1 / 9), "reversed KL": swapped},
    variants={"cold": {"params": {"temperature": 1.0}, "controls": {"T left at 4": with_params(temperature=4.0)}}},
    mistakes=[
        Mistake("the student has 10 classes and the teacher 100", shapes={"student": LOGITS, "teacher": (8, 100)}),
        Mistake(r"the teacher's operand has the shape \[3, 4, 4\]", shapes={"student": LOGITS, "teacher": MAP}),
        Mistake("kd: temperature must be above 0, got 0", {"temperature": 0}),
        Mistake("temperature must be above 0, got inf", {"temperature": float("inf")}),
        Mistake("temperature must be above 0, got nan", {"temperature": float("nan")}),
    ],
)


def dkd(student, teacher, label, alpha=1.0, beta=8.0, temperature=4.0):
    losses = []
    for s, t, target in zip(student, teacher, label, strict=True):
        if target < 0:
            losses.append(0.0)
            continue
        p, q = softmax(s, temperature), softmax(t, temperature)
        tckd = kl_divergence([q[target], 1 - q[target]], [p[target], 1 - p[target]])
        rest = [k for k in range(len(s)) if k != target]
        nckd = kl_divergence(softmax([t[k] for k in rest], temperature), softmax([s[k] for k in rest], temperature))
        losses.append(temperature**2 * (alpha * tckd + beta * nckd))
    return losses


DKD = TermCase(
    "dkd",
    dkd,
    {"alpha": 1.0, "beta": 6.0, "temperature": 2.0},
    fields={"label": LABELS},
    controls={
        "no T^2": scaled(1 / 4),
        "weights exchanged": with_params(alpha=6.0, beta=1.0),
        "no TCKD": with_params(alpha=0.0),
    },
    mistakes=[
        Mistake("at least 2 classes", shapes={"student": (8, 1), "teacher": (8, 1), "label": (8,)}),
        Mistake("dkd: beta must be at least 0", {"beta": -1.0}),
        Mistake("dkd: temperature must be above 0", {"temperature": -4}),
    ],
)


def logit_mse(student, teacher, center=False):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        shift = (sum(s) - sum(t)) / len(s) if center else 0.0
        losses.append(sum((a - b - shift) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
    return losses


LOGIT_MSE = TermCase(
    "logit_mse",
    logit_mse,
    controls={"sum": scaled(CLASSES), "centered": with_params(center=True)},
    variants={"centered": {"params": {"center": True}, "controls": {"not centered": with_params(center=False)}}},
    mistakes=[Mistake("10 classes and the teacher 11", shapes={"student": LOGITS, "teacher": (8, 11)})],
)


def _correlation(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    x, y = [a - mean_x for a in x], [b - mean_y for b in y]
    return dot(x, y) / (math.sqrt(dot(x, x)) * math.sqrt(dot(y, y)) + 1e-8)


def dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    p = [softmax(s, temperature) for s in student]
    q = [softmax(t, temperature) for t in teacher]
    inter = [1 - _correlation(a, b) for a, b in zip(p, q, strict=True)]
    intra = [1 - _correlation([row[k] for row in p], [row[k] for row in q]) for k in range(len(p[0]))]
    return temperature**2 * (beta * sum(inter) / len(inter) + gamma * sum(intra) / len(intra))


DIST = TermCase(
    "dist",
    dist,
    {"beta": 2.0, "gamma": 3.0, "temperature": 2.0},
    controls={"no T^2": scaled(1 / 4), "no intra": with_params(gamma=0.0), "no inter": with_params(beta=0.0)},
    mistakes=[
        Mistake("at least 2 classes", shapes={"student": (8, 1), "teacher": (8, 1)}),
        Mistake("dist: gamma must be at least 0", {"gamma": -1}),
    ],
    zero_tolerance=1e-5,  # 1e-8 in the denominator of the correlation
)


def joint_cross_entropy(student, kind, label, kinds=4):
    losses = []
    for logits, k, row_label in zip(student, kind, label, strict=True):
        pairs = [(c, j) for c in range(len(logits) // kinds) for j in range(kinds)]
        p = dict(zip(pairs, softmax(logits), strict=True))
        losses.append(0.0 if row_label < 0 else -math.log(p[row_label, k]))
    return losses


JOINT_CROSS_ENTROPY = TermCase(
    "joint_cross_entropy",
    joint_cross_entropy,
    {"kinds": 2},
    student=(2 * CLASSES,),
    teacher=None,
    fields={"label": LABELS, "kind": [0, 1, 1, 0, 1]},
    class_symmetric=False,
    controls={
        "kinds first": replaced(student=lambda student: student.unflatten(1, (2, CLASSES)).mT.flatten(1)),
        "not transformed": replaced(kind=torch.zeros_like),
    },
    mistakes=[
        Mistake("kinds must be at least 2, got 1", {"kinds": 1}),
        Mistake("one logit for each pair of 4 classes and 2 kinds, 8 in all", shapes={"student": (8, 4)}),
    ],
    benchmark={"student": "joint logits", "kind": "turns"},
    recipe_operands="student: pairs:logits, kind: train.label",
)


def bkd(student, teacher, counts, temperature=2.0, beta=0.9999):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        raised = [q * (1 - beta) / (1 - beta**n) for q, n in zip(softmax(t, temperature), counts, strict=True)]
        target = [x / sum(raised) for x in raised]
        losses.append(temperature**2 * kl_divergence(target, softmax(s, temperature)))
    return losses


BKD = TermCase(
    "bkd",
    bkd,
    {"temperature": 3.0, "beta": 0.99},
    fixed={"counts": [200.0, 50.0, 10.0, 1.0]},
    class_symmetric=False,  # the counts are not renamed with the classes
    zero_tolerance=None,  # the target is not the teacher's own prediction
    controls={
        "no T^2": scaled(1 / 9),
        "equal class weights": with_params(beta=0.0),
        "1 / count": with_params(beta=0.9999),
    },
    mistakes=[
        Mistake("beta must be at least 0 and below 1, got 1", {"beta": 1.0}),
        Mistake(
            r"samples of each of 10 classes, but counts has the shape \[9\]",
            shapes={"student": LOGITS, "teacher": LOGITS, "counts": (9,)},
        ),
    ],
    benchmark={"counts": "class counts"},
    recipe_operands=None,
)
