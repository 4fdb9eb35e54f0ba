"""Adapters that narrow an operand: any term then works on a part of the classes, or on standardised logits."""

import re

import pytest
import torch
from torch.testing import assert_close

from helpers.term_inputs import build_part
from kdbench.registry import ADAPTERS
from kdbench.terms.divergences import StandardisedKD
from kdbench.terms.logits import kd_loss


def adapter(name, source=(6,), target=(6,), **params):
    return build_part(ADAPTERS, name, params, source=source, target=target)


def test_distillation_over_old_classes_leaves_the_new_ones_alone():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, dtype=torch.float64)
    student.requires_grad_()
    keep = adapter("classes", keep=[0, 1, 4])
    loss = kd_loss(keep(student), keep(teacher), 2.0)
    assert_close(loss, kd_loss(student[:, [0, 1, 4]], teacher[:, [0, 1, 4]], 2.0))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient[:, [2, 3, 5]] == 0).all() and (gradient[:, [0, 1, 4]] != 0).all()
    assert keep.shape == (3,) and adapter("classes", (6, 4), keep=[5]).shape == (1, 4)
    assert not keep.state_dict(), "nothing to learn and nothing to keep"


def test_standardised_logits_have_mean_0_and_deviation_1_and_make_standardised_kd_of_kd():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 6, dtype=torch.float64) + 2
    both = adapter("standardise")
    assert_close(both(student).mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(both(student).std(1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(kd_loss(both(student), both(teacher), 2.0), StandardisedKD(2.0)(student, teacher))
    assert_close(
        StandardisedKD(2.0)(7 * student - 1, teacher), StandardisedKD(2.0)(student, teacher), rtol=1e-5, atol=0
    )


def test_the_log_of_stored_probabilities_teaches_as_the_logits_did():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, dtype=torch.float64)
    stored = adapter("log")(teacher.softmax(1))
    assert_close(stored.softmax(1), teacher.softmax(1))
    assert_close(kd_loss(student, stored, 1.0), kd_loss(student, teacher, 1.0))
    assert adapter("log")(torch.tensor([[0.0] * 5 + [1.0]])).isfinite().all()


def test_equal_logits_have_a_finite_gradient():
    flat = torch.ones(2, 6, requires_grad=True)
    adapter("standardise")(flat).square().sum().backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "source", "params", "words"),
    [
        ("classes", (6,), {"keep": [6]}, "from 0 to 5, got [6]"),
        ("classes", (6,), {"keep": []}, "got []"),
        ("classes", (6,), {"keep": [1, 1]}, "names a class twice"),
        ("standardise", (3, 4, 4), {}, "over at least 2 classes"),
        ("standardise", (1,), {}, "over at least 2 classes"),
        ("log", (3, 4, 4), {}, "[3, 4, 4] per sample"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_in_words(name, source, params, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        adapter(name, source, **params)
