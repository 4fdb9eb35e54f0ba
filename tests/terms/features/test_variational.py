"""Variational information distillation: variances per channel, and training of the term's own network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.cases.features.maps import vid
from helpers.cases.loops import numerical_gradient
from helpers.term_inputs import build_term
from kdbench.terms.features.maps import gaussian_nll


def build_vid(student, teacher):
    return build_term("vid", shapes={"student": student, "teacher": teacher})


def test_every_teacher_channel_has_its_own_variance():
    torch.manual_seed(1)
    student = torch.randn(4, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, 2, 4, dtype=torch.float64)
    term = build_vid((3, 4, 2), (5, 2, 4)).double()
    with torch.no_grad():
        term.scale.add_(torch.randn_like(term.scale))
    loss = term(student, teacher)
    assert_close(loss, torch.tensor(vid(student.tolist(), teacher.tolist(), term), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    expected = numerical_gradient(lambda values: sum(vid(values, teacher.tolist(), term)), student.detach())
    assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_likelihood_is_highest_where_the_variance_is_the_mean_squared_error():
    mean, target = torch.randn(2, 64, 3, dtype=torch.float64)
    optimum = (mean - target).square().mean(0)
    minimum = gaussian_nll(mean, target, optimum).mean()
    for factor in (0.8, 1.25):
        assert gaussian_nll(mean, target, factor * optimum).mean() > minimum
    constant = math.log(2 * math.pi) / 2
    expected = -torch.distributions.Normal(mean, optimum.sqrt()).log_prob(target).mean()
    assert_close(minimum + constant, expected)


def test_training_the_term_brings_each_variance_to_the_residual_error():
    """From 5 to the error of the mean network. Control: with constant variance, the loss stays higher."""
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(512, 4, generator=generator).relu()
    teacher = student + torch.tensor([0.3, 0.5, 0.7, 0.9]) * torch.randn(512, 4, generator=generator)

    def train(names):
        term = build_vid((4,), (4,))
        assert_close(F.softplus(term.scale), torch.full((4,), 5.0))
        parameters = [value for name, value in term.named_parameters() if name.split(".")[0] in names]
        optimizer = torch.optim.Adam(parameters, lr=0.03)
        for _ in range(400):
            loss = term(student, teacher).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return term, loss.item()

    term, loss = train({"mean", "scale"})
    residual = (term.mean(student[:, :, None, None]).flatten(1) - teacher).square().mean(0)
    assert_close(F.softplus(term.scale), residual, rtol=0.1, atol=0)
    assert train({"mean"})[1] > loss + 0.3
