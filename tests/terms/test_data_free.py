"""Terms on generated images: BatchNorm statistics, predictions, image priors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.cases.data_free import bn_statistics
from helpers.cases.loops import numerical_gradient
from helpers.term_inputs import build_term
from kdbench.terms.data_free import TotalVariation


@pytest.fixture
def operands():
    torch.manual_seed(0)
    student = torch.randn(5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    return student, torch.stack([torch.randn(3), torch.rand(3) + 0.5]).double()


def test_bn_statistics_of_weighted_rows_equal_those_of_plain_loops(operands):
    student, teacher = operands
    weights = [1.0, 0.0, 2.0, 1.0, 3.0]
    loss = build_term("bn_statistics")(student, teacher, weight=torch.tensor(weights))
    assert_close(loss.item(), bn_statistics(student.tolist(), teacher.tolist(), weights))
    (gradient,) = torch.autograd.grad(loss, student)
    expected = numerical_gradient(lambda s: bn_statistics(s, teacher.tolist(), weights), student.detach())
    assert_close(gradient, expected)


def test_bn_statistics_are_zero_for_the_batch_that_the_batchnorm_has_seen(operands):
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    norm(operands[0])
    rows = operands[0].numel() / 3
    # torch stores the unbiased variance.
    statistics = torch.stack([norm.running_mean, norm.running_var * (rows - 1) / rows])
    loss = build_term("bn_statistics")(operands[0], statistics)
    assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    assert build_term("bn_statistics")(operands[0] + 1, statistics) > 1


def test_bn_statistics_of_vectors_equal_those_of_maps_of_size_one(operands):
    student, teacher = operands
    vectors = build_term("bn_statistics")(student[:, :, 0, 0], teacher)
    assert_close(vectors, build_term("bn_statistics")(student[:, :, :1, :1], teacher))


def test_one_hot_is_smallest_for_certain_predictions_and_information_entropy_for_a_balanced_batch():
    certain, uncertain = 20 * torch.eye(4), torch.zeros(4, 4)
    assert (build_term("one_hot")(certain) < 1e-6).all()
    assert_close(build_term("one_hot")(uncertain), torch.full((4,), math.log(4)))
    assert_close(build_term("information_entropy")(certain), torch.tensor(-math.log(4)), rtol=1e-4, atol=1e-6)
    single_class = torch.zeros(4, 4)
    single_class[:, 0] = 20
    assert build_term("information_entropy")(single_class) > -1e-5


@pytest.mark.parametrize("norm", [1, 2])
def test_constant_image_has_no_variation_and_a_finite_gradient(norm):
    image = torch.ones(2, 3, 5, 5, requires_grad=True)
    loss = TotalVariation(norm)(image)
    assert (loss == 0).all()
    loss.sum().backward()
    assert image.grad.isfinite().all()
