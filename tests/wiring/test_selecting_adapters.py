"""Adapters on logits: selection of classes, standardisation, logarithm of stored probabilities."""

from __future__ import annotations

import re

import pytest
import torch
from torch.testing import assert_close

from helpers.term_inputs import build_part
from kdbench.registry import ADAPTERS
from kdbench.terms.divergences import StandardisedKD
from kdbench.terms.logits import kd_loss


def build_adapter(name, source=(6,), target=(6,), **params):
    return build_part(ADAPTERS, name, params, source=source, target=target)


def test_kd_over_old_classes_gives_new_classes_no_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, dtype=torch.float64)
    student.requires_grad_()
    old_classes = build_adapter("classes", keep=[0, 1, 4])
    loss = kd_loss(old_classes(student), old_classes(teacher), 2.0)
    assert_close(loss, kd_loss(student[:, [0, 1, 4]], teacher[:, [0, 1, 4]], 2.0))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient[:, [2, 3, 5]] == 0).all() and (gradient[:, [0, 1, 4]] != 0).all()
    assert old_classes.shape == (3,) and build_adapter("classes", (6, 4), keep=[5]).shape == (1, 4)
    assert not old_classes.state_dict(), "no parameters and no saved buffers"


def test_standardised_logits_have_mean_0_and_deviation_1_and_turn_kd_into_standardised_kd():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 6, dtype=torch.float64) + 2
    adapter = build_adapter("standardise")
    assert_close(adapter(student).mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(adapter(student).std(1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    expected = StandardisedKD(2.0)(student, teacher)
    assert_close(kd_loss(adapter(student), adapter(teacher), 2.0), expected)
    assert_close(StandardisedKD(2.0)(7 * student - 1, teacher), expected, rtol=1e-5, atol=0)


def test_log_of_stored_probabilities_gives_the_same_loss_as_the_logits():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, dtype=torch.float64)
    stored = build_adapter("log")(teacher.softmax(1))
    assert_close(stored.softmax(1), teacher.softmax(1))
    assert_close(kd_loss(student, stored, 1.0), kd_loss(student, teacher, 1.0))
    assert build_adapter("log")(torch.tensor([[0.0] * 5 + [1.0]])).isfinite().all()


def test_standardisation_of_equal_logits_has_a_finite_gradient():
    logits = torch.ones(2, 6, requires_grad=True)
    build_adapter("standardise")(logits).square().sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "source", "params", "message"),
    [
        ("classes", (6,), {"keep": [6]}, "from 0 to 5, got [6]"),
        ("classes", (6,), {"keep": []}, "got []"),
        ("classes", (6,), {"keep": [1, 1]}, "each class only once"),
        ("standardise", (3, 4, 4), {}, "over at least 2 classes"),
        ("standardise", (1,), {}, "over at least 2 classes"),
        ("log", (3, 4, 4), {}, "[3, 4, 4] per sample"),
    ],
)
def test_unsuitable_operands_and_parameters_raise(name, source, params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_adapter(name, source, **params)
