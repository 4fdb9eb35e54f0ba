"""Terms between parameter vectors: they have no rows, so they stand outside the shared cases."""

import pytest
import torch
from torch import Size, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from kdbench.registry import TERMS
from kdbench.terms.parameters import ewc_loss, weight_distance_loss

CASES = [("weight_distance", {"distance": "l2"}), ("weight_distance", {"distance": "l1"}), ("ewc", {})]
every_case = pytest.mark.parametrize(("name", "params"), CASES, ids=lambda value: str(value))


def operands(name):
    generator = torch.Generator().manual_seed(0)
    student, teacher, fisher = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    found = {"student": student.requires_grad_(), "teacher": teacher}
    return {**found, "fisher": fisher.square()} if name == "ewc" else found


def plain(student, teacher, fisher=None, distance="l2"):
    """Value and gradient, parameter by parameter."""
    value, gradient = 0.0, []
    for place, (w, w0) in enumerate(zip(student, teacher, strict=True)):
        gap = w - w0
        if fisher is not None:
            value += fisher[place] * gap**2 / 2
            gradient.append(fisher[place] * gap)
        elif distance == "l2":
            value += gap**2
            gradient.append(2 * gap)
        else:
            value += abs(gap)
            gradient.append(1.0 if gap > 0 else -1.0)
    return value, gradient


@every_case
def test_value_and_gradient_are_those_of_plain_loops(name, params):
    given = operands(name)
    loss = TERMS.build(name, params)(**given)
    loss.backward()
    value, gradient = plain(*(given[key].tolist() for key in given), **params)
    assert_close(loss.item(), value)
    assert_close(given["student"].grad, torch.tensor(gradient, dtype=torch.float64))


@every_case
def test_half_precision_parameters_give_a_float32_loss(name, params):
    given = {key: value.detach().bfloat16() for key, value in operands(name).items()}
    loss = TERMS.build(name, params)(**given)
    assert loss.dtype == torch.float32
    assert_close(loss, TERMS.build(name, params)(**{key: value.float() for key, value in given.items()}))


@every_case
def test_reads_nothing_on_the_host(name, params):
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in operands(name).items()}
        loss = TERMS.build(name, params)(**fake)
        loss.backward()
    assert loss.shape == ()
    assert fake["student"].grad.shape == (9,)


def test_even_information_is_half_the_squared_distance_and_none_is_no_penalty():
    student, teacher = torch.randn(2, 9)
    assert_close(ewc_loss(student, teacher, torch.ones(9)), weight_distance_loss(student, teacher) / 2)
    assert ewc_loss(student, teacher, torch.zeros(9)) == 0


def test_information_decides_which_parameter_moves_when_the_task_pulls_at_all():
    """Gradient descent on a pull plus EWC: what the old task needs stays; under L2 both move alike (the control)."""
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

    held = train(lambda w: ewc_loss(w, torch.zeros(2), fisher))
    assert held[0] < 0.05
    assert held[1] > 0.9
    alike = train(lambda w: weight_distance_loss(w, torch.zeros(2)))
    assert_close(alike[0], alike[1])


def test_modules_of_other_sizes_are_refused_in_words():
    with pytest.raises(ValueError, match="the student's module has 9 and teacher 8"):
        TERMS.build("weight_distance", {}).check_shapes(student=Size((9,)), teacher=Size((8,)))
    with pytest.raises(ValueError, match="fisher 8"):
        TERMS.build("ewc", {}).check_shapes(student=Size((9,)), teacher=Size((9,)), fisher=Size((8,)))
    with pytest.raises(ValueError, match=r"as one vector, but student has the shape \[2, 9\]"):
        TERMS.build("ewc", {}).check_shapes(student=Size((2, 9)), teacher=Size((9,)), fisher=Size((9,)))


def test_the_gradient_reaches_every_parameter_of_a_module_through_the_vector():
    model, old = nn.Linear(3, 2), nn.Linear(3, 2)
    vectors = [nn.utils.parameters_to_vector(module.parameters()) for module in (model, old)]
    weight_distance_loss(vectors[0], vectors[1].detach()).backward()
    assert_close(model.weight.grad, 2 * (model.weight - old.weight).detach())
    assert_close(model.bias.grad, 2 * (model.bias - old.bias).detach())
