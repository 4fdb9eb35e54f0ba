"""Cases of `kdbench.terms.contrastive`."""

from __future__ import annotations

import math

import torch

from helpers.cases.base import (
    BATCH,
    INDEX,
    LABELS,
    SAMPLES,
    Mistake,
    TermCase,
    scaled,
    swapped,
    with_params,
    without_history,
)
from helpers.cases.loops import dot, flatten, softmax, unit
from kdbench.terms.contrastive import hash_words, sample_negatives


def info_nce(student, teacher, temperature=0.07):
    s_rows, t_rows = [unit(flatten(s)) for s in student], [unit(flatten(t)) for t in teacher]
    losses = [-math.log(softmax([dot(s, t) / temperature for t in t_rows])[i]) for i, s in enumerate(s_rows)]
    return sum(losses) / len(losses)


INFO_NCE = TermCase(
    "info_nce",
    info_nce,
    {"temperature": 0.5},
    student=(6,),
    teacher=(3, 2),
    zero_tolerance=None,
    controls={"T 1": with_params(temperature=1.0)},
    mistakes=[
        Mistake("5 elements and the teacher's feature has 6", shapes={"student": (2, 5), "teacher": (2, 2, 3)}),
        Mistake("info_nce: temperature must be above 0", {"temperature": 0}),
    ],
    benchmark={"student": "vector", "teacher": "vector"},
)


def _embedding(layer, vector):
    weights, biases = layer.weight.tolist(), layer.bias.tolist()
    return unit([dot(row, vector) + bias for row, bias in zip(weights, biases, strict=True)])


def crd(student, teacher, index, label, term, width, negatives, temperature=0.07):
    """Follows the authors' code: scores over a constant Z, and the two noise contrastive losses.

    The negatives are the draws of the term; tests/terms/test_contrastive.py checks their distribution.
    """
    noise = negatives / SAMPLES
    key = hash_words(term.seed + hash_words(term.num_steps)) + torch.tensor(index)
    negative_rows = sample_negatives(term.sample_class[:-1], torch.tensor(label), key, negatives).tolist()
    s_rows = [_embedding(term.embed_student, row) for row in student]
    t_rows = [_embedding(term.embed_teacher, flatten(row)) for row in teacher]
    total = 0.0
    for side, (rows, bank) in enumerate(((s_rows, term.bank_teacher), (t_rows, term.bank_student))):
        z, bank = term.scale[side].item(), bank.tolist()
        for row, positive, negative in zip(rows, index, negative_rows, strict=True):
            x_positive = math.exp(dot(row, bank[positive]) / temperature) / z
            total -= math.log(x_positive / (x_positive + noise + 1e-7))
            for j in negative:
                x = math.exp(dot(row, bank[j]) / temperature) / z
                total -= math.log(noise / (x + noise + 1e-7))
    return total / len(student)


CRD = TermCase(
    "crd",
    crd,
    {"width": 3, "negatives": 7, "temperature": 0.5},
    student=(4,),
    teacher=(2, 3),
    fields={"index": INDEX, "label": LABELS},
    history=[{"index": [7, 2, 11, 5, 39], "label": [3, 1, 1, 0, 3]}],
    zero_tolerance=None,
    controls={"no memory": without_history, "T 1": with_params(temperature=1.0), "sum": scaled(BATCH)},
    mistakes=[
        Mistake("crd: temperature must be above 0", {"temperature": 0.0}),
        Mistake(r"crd: momentum must be in \[0, 1\]", {"momentum": 1.5}),
        Mistake("width and negatives must be at least 1", {"negatives": 0}),
        Mistake("at least two samples", {"samples": 0}),
    ],
    benchmark={"student": "vector", "teacher": "vector"},
)


def queue_similarity(
    student, teacher, history=(), size=65536, temperature=0.2, teacher_temperature=0.01, candidates="own"
):
    s_rows, t_rows = [unit(s) for s in student], [unit(t) for t in teacher]
    queue = [unit(row) for step in history for row in step["teacher"]][-size:]
    total = 0.0
    for i, (s, t) in enumerate(zip(s_rows, t_rows, strict=True)):
        keys = [*([t_rows[i]] if candidates == "own" else t_rows), *queue]
        p = softmax([dot(s, key) / temperature for key in keys])
        q = softmax([dot(t, key) / teacher_temperature for key in keys])
        total -= sum(b * math.log(a) for a, b in zip(p, q, strict=True))
    return total / len(student)


QUEUE_PARAMS = {"size": 8, "temperature": 0.4, "teacher_temperature": 0.3}
QUEUE_SIMILARITY = TermCase(
    "queue_similarity",
    queue_similarity,
    QUEUE_PARAMS,
    student=(3,),
    teacher=(3,),
    history=[{}, {}],  # ten features: the first two have left the queue
    zero_tolerance=None,
    stops_gradient=True,
    controls={"no queue": without_history, "longer queue": with_params(size=10), "sides": swapped},
    variants={
        "batch": {
            "params": {**QUEUE_PARAMS, "candidates": "batch"},
            "controls": {"own": with_params(candidates="own"), "no queue": without_history},
        }
    },
    mistakes=[
        Mistake("size must be at least 1", {"size": 0}),
        Mistake("candidates must be one of own, batch", {"candidates": "all"}),
        Mistake("temperature must be above 0", {"teacher_temperature": 0}),
        Mistake(
            "4 elements and the teacher's feature has 3",
            shapes={"student": (2, 4), "teacher": (2, 3)},
        ),
    ],
)
