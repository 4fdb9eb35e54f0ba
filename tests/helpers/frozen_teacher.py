"""Recipe with a frozen teacher, for the tests of prefetching and of the teacher cache."""

from __future__ import annotations

import torch
from torch import Tensor

DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 61}\n"
"""61 = 7 * 8 + 5: the last batch is smaller, so that blocks of steps do not end with epochs."""
PLAIN = """
student: {model: {type: t_conv, norm: batch}}
teacher: {model: {type: t_conv, norm: batch}}
terms: {ce: cross_entropy, kd: {type: kd, temperature: 2}}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
augment: [{type: crop, padding: 1}, flip]
label_fraction: 20
epochs: 2
batch_size: 8
frozen_batch_size: 32
tensorboard: false
"""
SECOND_TEACHER = "models: {second: {model: {type: t_layers, hidden: 16, dropout: 0.4}, frozen: true, input: strong}}\n"
TWO_VIEWS = "augment: {image: [{type: crop, padding: 1}, flip], strong: [{type: crop, padding: 2}, rotate90]}\n"
TWO_TEACHERS_TERM = "terms: {ce: cross_entropy, kd: {type: kd, teacher: [teacher, second]}}\n"
FEATURES = (
    "terms: {hint: {type: hint, student: {path: conv1, adapter: conv1x1}, teacher: conv1}, "
    "at: {type: at, student: norm2, teacher: 'teacher:conv2/in'}}\n"
)
BATCH_TERMS = (
    "terms: {ce: cross_entropy, sp: {type: sp, student: pool, teacher: pool}, "
    "rkd: {type: rkd, student: pool, teacher: pool, weight: 0.1}}\n"
)


def recipe_text(extra: str = "", *, exact: bool = True) -> str:
    """Returns PLAIN with the keys of `extra` replaced; float64 if `exact`."""
    keys = {line.split(":", 1)[0] for line in extra.splitlines()}
    lines = [line for line in PLAIN.splitlines() if line.split(":", 1)[0] not in keys]
    return "\n".join(lines) + "\n" + extra + ("precision: float64\n" if exact else "")


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Compares up to the rounding of float64: BLAS may sum 5 rows and 32 rows in different orders."""
    return first.keys() == second.keys() and all(
        torch.allclose(first[key].double(), second[key].double(), rtol=1e-11, atol=1e-11) for key in first
    )
