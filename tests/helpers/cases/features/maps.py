"""Cases of `kdbench.terms.features.maps`."""

from __future__ import annotations

import math

from helpers.cases.base import Mistake, TermCase, scaled, with_params
from helpers.cases.loops import common_size, dot, flatten, mean_square, pooled, unit

MAP = (3, 2, 2)
VECTOR_AND_MAP = {"student": (8, 10), "teacher": (8, 3, 4, 4)}


def hint(student, teacher):
    return [mean_square(s, t) for s, t in zip(student, teacher, strict=True)]


HINT = TermCase(
    "hint",
    hint,
    student=MAP,
    teacher=MAP,
    controls={"sum": scaled(12)},
    variants={"vectors": {"student": (6,), "teacher": (6,), "controls": {"sum": scaled(6)}}},
    mistakes=[
        Mistake(
            r"shape is \[10\] and the teacher's shape is \[11\]",
            shapes={"student": (8, 10), "teacher": (8, 11)},
        )
    ],
)


def ab(student, teacher, margin=1.0):
    """Follows the authors' formula with its two conditions."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        loss = 0.0
        for a, b in zip(flatten(s), flatten(t), strict=True):
            if b > 0 and a <= margin:
                loss += (a - margin) ** 2
            if b <= 0 and a > -margin:
                loss += (a + margin) ** 2
        losses.append(loss)
    return losses


AB = TermCase(
    "ab",
    ab,
    student=MAP,
    teacher=MAP,
    zero_tolerance=None,
    controls={"mean": scaled(1 / 12), "m 0": with_params(margin=0.0)},
    variants={
        "margin": {
            "params": {"margin": 0.3},
            "student": (6,),
            "teacher": (6,),
            "controls": {"m 1": with_params(margin=1.0)},
        }
    },
    mistakes=[
        Mistake("pre-activations of equal shape", shapes=VECTOR_AND_MAP),
        Mistake("ab: margin must be at least 0", {"margin": -1.0}),
    ],
)


def ft(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        s_factor, t_factor = unit(flatten(s)), unit(flatten(t))
        losses.append(sum(abs(a - b) for a, b in zip(s_factor, t_factor, strict=True)) / len(s_factor))
    return losses


FT = TermCase(
    "ft",
    ft,
    student=MAP,
    teacher=MAP,
    controls={
        "sum": scaled(12),
        "not normalised": lambda case, operands: (operands["student"] - operands["teacher"]).abs().flatten(1).mean(1),
    },
    mistakes=[Mistake("factors of equal shape", shapes=VECTOR_AND_MAP)],
    benchmark={"student": "map", "teacher": "map"},
    recipe_operands="student: conv2, teacher: conv2",
)


def reconstruction(student, teacher):
    return [mean_square(s, t) for s, t in zip(student, teacher, strict=True)]


RECONSTRUCTION = TermCase(
    "reconstruction",
    reconstruction,
    student=MAP,
    teacher=MAP,
    controls={"sum": scaled(12)},
    mistakes=[Mistake("an output and its target of equal shape", shapes=VECTOR_AND_MAP)],
    benchmark={"student": "image", "teacher": "image"},
    recipe_operands="student: conv2, teacher: conv2",
)


def _position_vectors(feature, size):
    """Returns one list of channels per position, average-pooled to `size`; a vector has one position."""
    if not isinstance(feature[0], list):
        return [feature]
    channels = [flatten(pooled(channel, *size)) for channel in feature]
    return [list(position) for position in zip(*channels, strict=True)]


def vid(student, teacher, term, variance=5.0):
    """Evaluates the term's network position by position and channel by channel."""
    layers = [layer.weight.flatten(1).tolist() for layer in term.mean if hasattr(layer, "weight")]
    variances = [math.log1p(math.exp(a)) + 1e-5 for a in term.scale.tolist()]
    losses = []
    for s, t in zip(student, teacher, strict=True):
        size = common_size(s, t) if isinstance(s[0], list) else (1, 1)
        values = []
        for x, target in zip(_position_vectors(s, size), _position_vectors(t, size), strict=True):
            for number, matrix in enumerate(layers):
                x = [dot(row, x) for row in matrix]
                x = [max(value, 0.0) for value in x] if number < 2 else x
            for mean, y, v in zip(x, target, variances, strict=True):
                values.append(0.5 * ((y - mean) ** 2 / v + math.log(v)))
        losses.append(sum(values) / len(values))
    return losses


VID = TermCase(
    "vid",
    vid,
    student=MAP,
    teacher=(5, 2, 2),
    zero_tolerance=None,
    controls={"different variance": with_params(variance=2.0), "sum": scaled(20)},
    variants={
        "pooled": {"student": (3, 4, 2), "teacher": (5, 2, 4), "controls": {"sum": scaled(20)}},
        "vectors": {"student": (6,), "teacher": (4,), "controls": {"sum": scaled(4)}},
    },
    mistakes=[
        Mistake("vid: variance must be above 0", {"variance": 0.0}),
        Mistake("feature maps", shapes={"student": (2, 4, 3), "teacher": (2, 3)}),
    ],
)


def hcl(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        loss, scale_weight, weight_sum = mean_square(s, t), 1.0, 1.0
        if isinstance(s[0], list):
            for size in (4, 2, 1):
                if size < len(s[0]):
                    scale_weight /= 2
                    weight_sum += scale_weight
                    pooled_maps = [[pooled(channel, size, size) for channel in feature] for feature in (s, t)]
                    loss += scale_weight * mean_square(*pooled_maps)
        losses.append(loss / weight_sum)
    return losses


HCL = TermCase(
    "hcl",
    hcl,
    student=(2, 4, 4),
    teacher=(2, 4, 4),
    controls={
        "one scale": lambda case, operands: (operands["student"] - operands["teacher"]).square().flatten(1).mean(1)
    },
    variants={"vectors": {"student": (6,), "teacher": (6,), "controls": {"sum": scaled(6)}}},
    mistakes=[Mistake("features of equal shape", shapes={"student": (8, 3, 4, 4), "teacher": (8, 10)})],
)
