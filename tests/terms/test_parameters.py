"""Terms between parameter vectors: effect of the Fisher information, and gradients through a module's vector."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from kdbench.terms.parameters import ewc_loss, weight_distance_loss


def test_equal_information_is_half_the_squared_distance_and_zero_information_no_penalty():
    student, teacher = torch.randn(2, 9)
    assert_close(ewc_loss(student, teacher, torch.ones(9)), weight_distance_loss(student, teacher) / 2)
    assert ewc_loss(student, teacher, torch.zeros(9)) == 0


def test_information_determines_which_parameter_changes():
    """Gradient descent on a task loss plus EWC keeps the important parameter; under L2 both change alike (control)."""
    fisher = torch.tensor([100.0, 0.01])

    def train(penalty):
        weights = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([weights], lr=0.01)
        for _ in range(500):
            loss = (weights - 1).square().sum() + penalty(weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return weights.detach()

    consolidated = train(lambda w: ewc_loss(w, torch.zeros(2), fisher))
    assert consolidated[0] < 0.05
    assert consolidated[1] > 0.9
    uniform = train(lambda w: weight_distance_loss(w, torch.zeros(2)))
    assert_close(uniform[0], uniform[1])


def test_gradient_reaches_every_parameter_of_a_module_through_the_vector():
    model, old = nn.Linear(3, 2), nn.Linear(3, 2)
    vectors = [nn.utils.parameters_to_vector(module.parameters()) for module in (model, old)]
    weight_distance_loss(vectors[0], vectors[1].detach()).backward()
    assert_close(model.weight.grad, 2 * (model.weight - old.weight).detach())
    assert_close(model.bias.grad, 2 * (model.bias - old.bias).detach())
