"""Terms of adversarial training: gradient signs and strengths."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from helpers.term_inputs import build_term

SHAPES = {"shapes": {"student": (5,), "teacher": (5,)}}


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (2 * torch.randn(2, 6, 5, dtype=torch.float64)).unbind()


def build_ctkd(**params):
    return build_term("ctkd", params, **SHAPES).double()


def test_ctkd_temperature_ascends_while_the_student_descends(logits):
    student, teacher = logits[0].requires_grad_(), logits[1]
    ctkd = build_ctkd(reverse=1.0)
    loss = ctkd(student, teacher).mean()
    loss.backward()
    step = 1e-3
    with torch.no_grad():
        student_loss = ctkd(student - step * student.grad, teacher).mean()
        ctkd.theta -= step * ctkd.theta.grad  # a plain SGD step
        temperature_loss = ctkd(student, teacher).mean()
    assert student_loss < loss
    assert temperature_loss > loss


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_ctkd_reverses_the_gradient_with_the_given_strength(logits, reverse):
    ctkd, theta = build_ctkd(reverse=reverse), build_ctkd().theta.detach()
    ctkd(*logits).mean().backward()
    temperature = (1 + 20 * torch.sigmoid(theta)).requires_grad_()
    kd = (temperature**2) * torch.nn.functional.kl_div(
        (logits[0] / temperature).log_softmax(1),
        (logits[1] / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    (slope,) = torch.autograd.grad(kd.sum(), temperature)
    sigmoid = torch.sigmoid(theta)
    assert_close(ctkd.theta.grad, -reverse * slope * 20 * sigmoid * (1 - sigmoid))


def test_ctkd_reads_a_scheduled_strength_in_every_step(logits):
    strength = torch.tensor(0.5, dtype=torch.float64)
    ctkd = build_ctkd(reverse=strength)
    ctkd(*logits).mean().backward()
    half = ctkd.theta.grad.clone()
    ctkd.theta.grad = None
    strength.fill_(1.0)
    ctkd(*logits).mean().backward()
    assert_close(ctkd.theta.grad, 2 * half)


def test_ctkd_instance_temperatures_differ_by_sample_and_reverse_no_gradient_of_the_student(logits):
    ctkd = build_ctkd(scope="instance", reverse=1.0)
    student = logits[0].requires_grad_()
    temperature = ctkd.temperature(*logits)
    assert temperature.shape == (6, 1)
    assert (temperature > 1).all() and (temperature < 21).all() and temperature.std() > 0
    loss = ctkd(student, logits[1])
    (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
    constant = temperature.detach()
    assert_close(gradient, constant * ((student / constant).softmax(1) - (logits[1] / constant).softmax(1)))
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ctkd.net.parameters())
    with torch.no_grad():
        for parameter in ctkd.net.parameters():
            parameter -= 1e-3 * parameter.grad
        assert ctkd(*logits).mean() > loss.mean()


def test_binary_cross_entropy_of_certain_and_uncertain_discriminators():
    logit = torch.tensor([[-30.0], [0.0], [30.0]])
    assert_close(build_term("binary", {"target": 1.0})(logit), torch.tensor([30.0, 0.6931472, 0.0]))
    assert_close(build_term("binary", {"target": 0.0})(logit[:, 0]), torch.tensor([0.0, 0.6931472, 30.0]))


def test_competition_falls_with_disagreement_and_both_networks_get_a_gradient(logits):
    competition = build_term("competition")
    assert_close(competition(logits[0], logits[0]), torch.ones(6, dtype=torch.float64))
    student, teacher = (side.requires_grad_() for side in logits)
    competition(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0
    assert (competition(student, teacher) > competition(2 * student, 2 * teacher)).float().mean() > 0.5
