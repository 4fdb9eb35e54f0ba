"""Hints and attention maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdbench.terms.features.maps import hint_loss
from kdbench.terms.features.summaries import at_loss, attention_map


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(3, 5, 6, 6)


def test_hint_is_the_mean_over_elements_for_any_rank():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, 6)
    loss = hint_loss(student, teacher)
    assert_close(loss.mean(), F.mse_loss(student, teacher))
    assert_close(hint_loss(student.flatten(1), teacher.flatten(1)), loss)
    assert_close(hint_loss(2 * student, 2 * teacher), 4 * loss)


def test_attention_maps_have_length_one_and_are_invariant_to_scale_and_channel_order(maps):
    student, teacher = maps
    assert_close(attention_map(student).norm(dim=1), torch.ones(3))
    loss = at_loss(student, teacher)
    scale = torch.tensor([0.1, 3.0, 70.0]).view(3, 1, 1, 1)
    assert_close(at_loss(scale * student, teacher), loss)
    assert_close(at_loss(-student[:, [3, 1, 0, 2]], teacher), loss)


def test_attention_depends_on_the_position(maps):
    student, _ = maps
    assert (at_loss(student.flip(3), student) > 0.001).all()


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_attention_with_odd_exponent_is_invariant_to_the_sign(maps, p):
    student, teacher = maps
    assert_close(at_loss(-student, teacher, p), at_loss(student, teacher, p))


def test_larger_map_is_average_pooled_on_either_side(maps):
    student, _ = maps
    small = torch.randn(3, 7, 3, 2)
    pooled = F.avg_pool2d(student, (2, 3))
    assert_close(at_loss(student, small), at_loss(pooled, small))
    assert_close(at_loss(small, student), at_loss(small, pooled))
    tall, wide = torch.randn(3, 2, 6, 3), torch.randn(3, 2, 3, 6)  # each is the larger one in one direction
    assert_close(at_loss(tall, wide), at_loss(F.avg_pool2d(tall, (2, 1)), F.avg_pool2d(wide, (1, 2))))


@pytest.mark.parametrize("p", [1.0, 2.0, 2.5])
def test_zero_feature_gives_finite_loss_and_gradient(maps, p):
    student, teacher = maps
    zero_row = (student * torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1)).detach().requires_grad_()
    loss = at_loss(zero_row, teacher, p)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert zero_row.grad.isfinite().all()
    assert zero_row.grad.abs().max() < 1
