"""TAID: the target moves from the student to the teacher, faster where the loss falls, and remembers how far it is."""

import math

import pytest
import torch
from torch import Size
from torch.testing import assert_close

from helpers.term_inputs import build_term, run_without_values
from kdbench.errors import ConfigError

CLASSES, RATE, MOMENTUM = 4, 0.3, 0.6


def build(**params):
    return build_term("taid", {"least": 0.2, "rate": RATE, "momentum": MOMENTUM, **params}).double()


def batch(seed, rows=3):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, CLASSES, generator=generator, dtype=torch.float64)
    return {"student": student.requires_grad_(), "teacher": teacher}


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def plain(student, teacher, t, counts=None):
    counts, total = counts or [1] * len(student), 0.0
    for c, s, z in zip(counts, student, teacher, strict=True):
        q = softmax([(1 - t) * a + t * b for a, b in zip(s, z, strict=True)])
        total -= c * sum(b * math.log(a) for a, b in zip(softmax(s), q, strict=True))
    return total / sum(counts)


def test_the_target_moves_by_the_formula_and_never_back():
    made, t, drift, before, went = build(), 0.2, 0.0, math.inf, []
    for seed in range(5):
        now = batch(seed)
        loss = made(**now)
        expected = plain(now["student"].tolist(), now["teacher"].tolist(), t)
        assert_close(loss.item(), expected)
        went.append(t)
        if before < math.inf:
            drift = MOMENTUM * drift + (1 - MOMENTUM) * (before - expected) / before
            t = min(1.0, t + RATE / (1 + math.exp(-drift)) * (1 - t))
        before = expected
        assert_close(made.t.item(), t)
    assert went == sorted(went) and went[-1] > went[0] + 0.2
    still = build(rate=0.0)  # control: without the adaptive step the target stays where it began
    for seed in range(5):
        still(**batch(seed))
    assert_close(still.t.item(), 0.2)


def test_the_student_in_the_target_is_a_constant():
    """The gradient is softmax(student) - target, as for any fixed target."""
    now = batch(0)
    (gradient,) = torch.autograd.grad(build()(**now), now["student"])
    mixed = (0.8 * now["student"] + 0.2 * now["teacher"]).softmax(1)
    assert_close(gradient, (now["student"].softmax(1) - mixed) / 3)


def test_at_one_it_is_the_cross_entropy_with_the_teacher_and_at_zero_the_own_entropy():
    now = batch(0)
    log_p = now["student"].log_softmax(1)
    assert_close(build(least=1.0)(**now), -(now["teacher"].softmax(1) * log_p).sum(1).mean())
    assert_close(build(least=0.0)(**now), -(log_p.exp() * log_p).sum(1).mean())


def test_the_least_value_is_kept_and_may_be_scheduled():
    made = build(least=torch.tensor(0.9), rate=0.0)
    now = batch(0)
    assert_close(made(**now).item(), plain(now["student"].tolist(), now["teacher"].tolist(), torch.tensor(0.9).item()))


def test_masked_rows_neither_count_nor_move_the_target():
    whole, padded = build(), build()
    for seed in range(3):
        now = batch(seed, rows=2)
        spoiled = {k: torch.cat([v.detach(), torch.full((1, CLASSES), float("nan"))]) for k, v in now.items()}
        assert_close(padded(**spoiled, mask=torch.tensor([True, True, False])), whole(**now))
    assert_close(padded.t, whole.t)
    now = batch(3, rows=2)
    weighed = build()(**now, weight=torch.tensor([1.0, 3.0]).double())
    assert_close(weighed.item(), plain(now["student"].tolist(), now["teacher"].tolist(), 0.2, counts=[1, 3]))


def test_how_far_it_is_is_in_the_state_and_evaluation_moves_nothing():
    whole, resumed = build(), build()
    for seed in range(3):
        whole(**batch(seed))
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed(**batch(3)), whole(**batch(3)))
    resting = build().eval()
    resting(**batch(0))
    assert resting.before.isinf() and resting.t == 0


def test_nothing_waits_for_the_host():
    assert run_without_values(build, batch(0)).dim() == 0


def test_wrong_values_are_refused():
    with pytest.raises(ConfigError, match="least must be at most end"):
        build(least=0.9, end=0.5)
    with pytest.raises(ConfigError, match=r"rate must be in \[0, 1\]"):
        build(rate=2.0)
    with pytest.raises(ValueError, match="the student has 4 classes and the teacher 5"):
        build().check_shapes(student=Size((2, 4)), teacher=Size((2, 5)))
