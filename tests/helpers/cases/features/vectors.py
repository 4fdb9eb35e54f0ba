"""Cases of `kdbench.terms.features.vectors`."""

from __future__ import annotations

import math

from helpers.cases.base import LABELS, Mistake, TermCase, replaced, scaled, with_params, without
from helpers.cases.loops import dot, unit

MAP, TOKENS, VECTOR = (3, 2, 2), (4, 6), (6,)
TOKEN_MASK = [
    [True, False, True, True],
    [True, True, True, True],
    [False, True, True, False],
    [True, True, False, True],
    [False, True, False, True],
]
VECTOR_AND_MAP = {"student": (8, 10), "teacher": (8, 3, 4, 4)}


def to_vectors(feature):
    """Returns a feature as vectors: the tokens, the positions of a map, or the one vector of a sample."""
    if not isinstance(feature[0], list):
        return [feature]
    if isinstance(feature[0][0], list):
        rows, columns = len(feature[0]), len(feature[0][0])
        return [[channel[r][c] for channel in feature] for r in range(rows) for c in range(columns)]
    return feature


def _masked_mean(values, mask):
    counted = [value for value, counts in zip(values, mask, strict=True) if counts]
    return sum(counted) / len(counted) if counted else 0.0


def feature_distance(student, teacher, tokens=None, distance="l2", scale="none"):
    def scale_vector(vector):
        if scale == "length":
            return unit(vector)
        if scale == "layer_norm":
            mean = sum(vector) / len(vector)
            variance = sum((x - mean) ** 2 for x in vector) / len(vector)
            return [(x - mean) / math.sqrt(variance + 1e-5) for x in vector]
        return vector

    def distance_of(gap):
        smooth = 0.5 * gap * gap if abs(gap) < 1 else abs(gap) - 0.5
        return {"l1": abs(gap), "l2": gap * gap, "smooth_l1": smooth}[distance]

    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        values = []
        for a, b in zip(to_vectors(s), to_vectors(t), strict=True):
            a, b = scale_vector(a), scale_vector(b)
            values.append(sum(distance_of(x - y) for x, y in zip(a, b, strict=True)) / len(a))
        losses.append(_masked_mean(values, tokens[i] if tokens else [1] * len(values)))
    return losses


FEATURE_DISTANCE = TermCase(
    "feature_distance",
    feature_distance,
    student=TOKENS,
    teacher=TOKENS,
    controls={"l1": with_params(distance="l1"), "sum": scaled(6)},
    variants={
        "length": {
            "params": {"distance": "l1", "scale": "length"},
            "student": MAP,
            "teacher": MAP,
            "controls": {"not scaled": with_params(scale="none"), "l2": with_params(distance="l2")},
        },
        "masked": {
            "params": {"distance": "smooth_l1", "scale": "layer_norm"},
            "fields": {"tokens": TOKEN_MASK},
            "controls": {"all tokens": without("tokens"), "not scaled": with_params(scale="none")},
        },
        "vectors": {"params": {"distance": "smooth_l1"}, "student": VECTOR, "teacher": VECTOR},
    },
    mistakes=[
        Mistake("features of equal shape", shapes=VECTOR_AND_MAP),
        Mistake("has a mask over tokens", shapes={"student": (8, 10), "teacher": (8, 10), "tokens": (8, 10)}),
        Mistake("distance must be one of l1, l2, smooth_l1", {"distance": "l3"}),
    ],
)


def cosine(student, teacher, tokens=None):
    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        values = [1 - dot(unit(a), unit(b)) for a, b in zip(to_vectors(s), to_vectors(t), strict=True)]
        losses.append(_masked_mean(values, tokens[i] if tokens else [1] * len(values)))
    return losses


COSINE = TermCase(
    "cosine",
    cosine,
    student=VECTOR,
    teacher=VECTOR,
    controls={"sum": scaled(6)},
    variants={
        "map": {"student": MAP, "teacher": MAP, "controls": {"sum": scaled(4)}},
        "masked": {
            "student": TOKENS,
            "teacher": TOKENS,
            "fields": {"tokens": TOKEN_MASK},
            "controls": {"all tokens": without("tokens")},
        },
    },
    mistakes=[
        Mistake(
            r"they have the shapes \[5, 6\] and \[4\]",
            shapes={"student": (8, 5, 6), "teacher": (8, 5, 6), "tokens": (8, 4)},
        ),
    ],
)


def nd(student, teacher, means, label):
    losses = []
    for s, t, row_class in zip(student, teacher, label, strict=True):
        if row_class < 0:
            losses.append(0.0)
            continue
        max_norm = max(math.sqrt(dot(s, s)), math.sqrt(dot(t, t)))
        losses.append(1 - dot(s, unit(means[row_class])) / max_norm)
    return losses


ND = TermCase(
    "nd",
    nd,
    student=VECTOR,
    teacher=VECTOR,
    fields={"label": LABELS},
    fixed={"means": [[1.0, 2, 0, -1, 0, 1], [0, -1, 1, 1, 2, 0], [3, 0, 1, 0, 0, -2], [1, 1, 1, 1, 1, 1]]},
    zero_tolerance=None,
    controls={
        "cosine": replaced(teacher=lambda teacher: 0 * teacher),
        "different class": replaced(label=lambda label: 3 - label),
    },
    mistakes=[
        Mistake("features of equal shape", shapes={"student": (8, 10), "teacher": (8, 9)}),
        Mistake("each row of `means` has 9", shapes={"student": (8, 10), "teacher": (8, 10), "means": (4, 9)}),
    ],
    benchmark={"student": "vector", "teacher": "vector", "means": "class means"},
    recipe_operands=None,
)
