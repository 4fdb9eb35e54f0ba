"""Operands that cannot be compared and parameters out of range are refused before training, in words."""

import pytest
import torch
from torch import Size

from kdbench.errors import ConfigError
from kdbench.registry import TERMS

VECTOR, MAP = Size((8, 10)), Size((8, 3, 4, 4))

REFUSED = [
    ("cross_entropy", MAP, None, "reads logits"),
    ("kd", VECTOR, Size((8, 100)), "the student has 10 classes and the teacher 100"),
    ("kd", VECTOR, MAP, r"the teacher's operand is \[3, 4, 4\]"),
    ("dkd", Size((8, 1)), Size((8, 1)), "at least 2 classes"),
    ("logit_mse", VECTOR, Size((8, 11)), "10 classes and the teacher 11"),
    ("dist", Size((8, 1)), Size((8, 1)), "at least 2 classes"),
    ("hint", VECTOR, Size((8, 11)), r"the student's is \[10\] and the teacher's \[11\]"),
    ("at", VECTOR, MAP, "feature maps"),
    ("at", MAP, VECTOR, "name a convolutional feature"),
    ("sp", Size((8,)), VECTOR, r"shape \[8\]"),
    ("rkd", VECTOR, Size((8,)), "teacher's operand"),
    ("pkt", VECTOR, Size((4, 10)), "8 rows and the teacher's 4"),
]

ACCEPTED = [
    ("cross_entropy", VECTOR, None),
    *((name, VECTOR, VECTOR) for name in ("kd", "dkd", "logit_mse", "dist", "hint")),
    ("hint", MAP, MAP),
    ("at", MAP, Size((8, 7, 2, 2))),
    *((name, VECTOR, MAP) for name in ("sp", "rkd", "pkt")),
]


def shapes(student, teacher):
    return {"student": student, "label": Size((8,)), **({} if teacher is None else {"teacher": teacher})}


@pytest.mark.parametrize(("name", "student", "teacher", "words"), REFUSED)
def test_shapes_that_cannot_be_compared_are_refused(name, student, teacher, words):
    with pytest.raises(ValueError, match=words):
        TERMS.build(name, {}).check_shapes(**shapes(student, teacher))


@pytest.mark.parametrize(("name", "student", "teacher"), ACCEPTED)
def test_shapes_that_can_be_compared_pass(name, student, teacher):
    TERMS.build(name, {}).check_shapes(**shapes(student, teacher))


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("kd", {"temperature": 0}, "kd: temperature must be above 0, got 0"),
        ("kd", {"temperature": float("inf")}, "temperature must be above 0, got inf"),
        ("kd", {"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ("dkd", {"beta": -1.0}, "dkd: beta must be at least 0"),
        ("dkd", {"temperature": -4}, "dkd: temperature must be above 0"),
        ("dist", {"gamma": -1}, "dist: gamma must be at least 0"),
        ("cross_entropy", {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ("at", {"p": 0.5}, "at: p must be at least 1, got 0.5"),
        ("rkd", {"weight_angle": -50}, "rkd: weight_angle must be at least 0"),
        ("rkd", {"weight_angle": 0, "weight_distance": 0.0}, "nothing is left"),
    ],
)
def test_parameters_out_of_range_are_refused(name, params, words):
    with pytest.raises(ConfigError, match=words):
        TERMS.build(name, params)


def test_a_tensor_is_never_read_when_a_term_is_built():
    term = TERMS.build("kd", {"temperature": torch.empty((), device="meta")})
    assert term.temperature.device.type == "meta"
