"""TAID: interpolation of the target, its adaptive step, its bounds and its state."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from helpers.cases.divergences import taid
from helpers.term_inputs import build_term

CLASSES, RATE, MOMENTUM = 4, 0.3, 0.6


def build_taid(**params):
    return build_term("taid", {"least": 0.2, "rate": RATE, "momentum": MOMENTUM, **params}).double()


def batch(seed, rows=3):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, CLASSES, generator=generator, dtype=torch.float64)
    return {"student": student.requires_grad_(), "teacher": teacher}


def reference_loss(operands, t):
    """Computes the loss at a constant interpolation t."""
    student, teacher = operands["student"].tolist(), operands["teacher"].tolist()
    return taid(student, teacher, constant=student, least=t)


def test_interpolation_follows_the_formula_and_never_falls():
    term, t, decrease, previous, interpolations = build_taid(), 0.2, 0.0, math.inf, []
    for seed in range(5):
        operands = batch(seed)
        loss = term(**operands)
        expected = reference_loss(operands, t)
        assert_close(loss.item(), expected)
        interpolations.append(t)
        if previous < math.inf:
            decrease = MOMENTUM * decrease + (1 - MOMENTUM) * (previous - expected) / previous
            t = min(1.0, t + RATE / (1 + math.exp(-decrease)) * (1 - t))
        previous = expected
        assert_close(term.t.item(), t)
    assert interpolations == sorted(interpolations) and interpolations[-1] > interpolations[0] + 0.2


def test_interpolation_without_adaptive_step_is_constant():
    term = build_taid(rate=0.0)
    for seed in range(5):
        term(**batch(seed))
    assert_close(term.t.item(), 0.2)


def test_student_in_the_target_is_detached():
    """The gradient is softmax(student) - target, as for a constant target."""
    operands = batch(0)
    (gradient,) = torch.autograd.grad(build_taid()(**operands), operands["student"])
    target = (0.8 * operands["student"] + 0.2 * operands["teacher"]).softmax(1)
    assert_close(gradient, (operands["student"].softmax(1) - target) / 3)


def test_loss_is_cross_entropy_with_the_teacher_at_one_and_the_students_entropy_at_zero():
    operands = batch(0)
    log_p = operands["student"].log_softmax(1)
    assert_close(build_taid(least=1.0)(**operands), -(operands["teacher"].softmax(1) * log_p).sum(1).mean())
    assert_close(build_taid(least=0.0)(**operands), -(log_p.exp() * log_p).sum(1).mean())


def test_scheduled_lower_bound_is_the_interpolation_of_the_first_step():
    term, operands = build_taid(least=torch.tensor(0.9), rate=0.0), batch(0)
    assert_close(term(**operands).item(), reference_loss(operands, torch.tensor(0.9).item()))


def test_masked_rows_do_not_change_the_interpolation():
    unpadded, padded = build_taid(), build_taid()
    garbage = torch.full((1, CLASSES), float("nan"))
    for seed in range(3):
        operands = batch(seed, rows=2)
        padded_operands = {name: torch.cat([value.detach(), garbage]) for name, value in operands.items()}
        assert_close(padded(**padded_operands, mask=torch.tensor([True, True, False])), unpadded(**operands))
    assert_close(padded.t, unpadded.t)


def test_rows_count_by_weight():
    operands = batch(3, rows=2)
    rows = [reference_loss({name: value[i : i + 1] for name, value in operands.items()}, 0.2) for i in range(2)]
    loss = build_taid()(**operands, weight=torch.tensor([1.0, 3.0]).double())
    assert_close(loss.item(), (rows[0] + 3 * rows[1]) / 4)


def test_resumed_term_continues_with_the_same_numbers():
    continued, resumed = build_taid(), build_taid()
    for seed in range(3):
        continued(**batch(seed))
    resumed.load_state_dict(continued.state_dict())
    assert torch.equal(resumed(**batch(3)), continued(**batch(3)))


def test_evaluation_does_not_change_the_state():
    term = build_taid().eval()
    term(**batch(0))
    assert term.previous_loss.isinf() and term.t == 0
