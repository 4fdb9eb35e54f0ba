"""Terms of games: who descends, who ascends."""

import pytest
import torch
from torch.testing import assert_close

from helpers.term_inputs import build_term
from kdbench.errors import ConfigError

SHAPES = {"shapes": {"student": (5,), "teacher": (5,)}}


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (2 * torch.randn(2, 6, 5, dtype=torch.float64)).unbind()


def made(**params):
    return build_term("ctkd", params, **SHAPES).double()


def test_the_temperature_ascends_and_the_student_descends(logits):
    student, teacher = logits[0].requires_grad_(), logits[1]
    ctkd = made(reverse=1.0)
    loss = ctkd(student, teacher).mean()
    loss.backward()
    step = 1e-3
    with torch.no_grad():
        moved = ctkd(student - step * student.grad, teacher).mean()
        ctkd.theta -= step * ctkd.theta.grad  # as any optimiser moves it
        harder = ctkd(student, teacher).mean()
    assert moved < loss
    assert harder > loss


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_the_reversal_has_the_strength_asked_for(logits, reverse):
    ctkd, other = made(reverse=reverse), made()
    ctkd(*logits).mean().backward()
    temperature = (1 + 20 * torch.sigmoid(other.theta.detach())).requires_grad_()
    theirs = (temperature**2) * torch.nn.functional.kl_div(
        (logits[0] / temperature).log_softmax(1),
        (logits[1] / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    (slope,) = torch.autograd.grad(theirs.sum(), temperature)
    sigmoid = torch.sigmoid(other.theta.detach())
    assert_close(ctkd.theta.grad, -reverse * slope * 20 * sigmoid * (1 - sigmoid))


def test_a_scheduled_reversal_is_read_when_it_runs(logits):
    strength = torch.tensor(0.5, dtype=torch.float64)
    ctkd = build_term("ctkd", {"reverse": strength}, **SHAPES).double()
    ctkd(*logits).mean().backward()
    half = ctkd.theta.grad.clone()
    ctkd.theta.grad = None
    strength.fill_(1.0)
    ctkd(*logits).mean().backward()
    assert_close(ctkd.theta.grad, 2 * half)


def test_each_sample_has_its_own_temperature_and_no_reversed_gradient_reaches_the_student(logits):
    ctkd = made(scope="instance", reverse=1.0)
    student = logits[0].requires_grad_()
    temperature = ctkd.temperature(*logits)
    assert temperature.shape == (6, 1)
    assert (temperature > 1).all() and (temperature < 21).all() and temperature.std() > 0
    loss = ctkd(student, logits[1])
    (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
    fixed = temperature.detach()
    assert_close(gradient, fixed * ((student / fixed).softmax(1) - (logits[1] / fixed).softmax(1)))
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ctkd.net.parameters())
    with torch.no_grad():
        for parameter in ctkd.net.parameters():
            parameter -= 1e-3 * parameter.grad
        assert ctkd(*logits).mean() > loss.mean()


def test_a_verdict_costs_what_it_should():
    verdict = torch.tensor([[-30.0], [0.0], [30.0]])
    assert_close(build_term("binary", {"target": 1.0})(verdict), torch.tensor([30.0, 0.6931472, 0.0]))
    assert_close(build_term("binary", {"target": 0.0})(verdict[:, 0]), torch.tensor([0.0, 0.6931472, 30.0]))
    with pytest.raises(ValueError, match="one logit per sample"):
        build_term("binary").check_shapes(student=torch.Size((8, 2)))
    with pytest.raises(ConfigError, match="target must be in"):
        build_term("binary", {"target": 2.0})


def test_competition_falls_as_the_networks_part_and_both_get_the_gradient(logits):
    competition = build_term("competition")
    same = competition(logits[0], logits[0])
    assert_close(same, torch.ones(6, dtype=torch.float64))
    student, teacher = (side.requires_grad_() for side in logits)
    competition(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0
    assert (competition(student, teacher) > competition(2 * student, 2 * teacher)).float().mean() > 0.5
