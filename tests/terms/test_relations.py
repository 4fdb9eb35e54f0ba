"""Invariances of the terms on relations between the rows of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from helpers.cases.relations import rkd
from kdbench.terms.relations import RelationalKD, pkt_loss, rkd_angle_loss, rkd_distance_loss, sp_loss

LOSSES = {"sp": sp_loss, "rkd-distance": rkd_distance_loss, "rkd-angle": rkd_angle_loss, "pkt": pkt_loss}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def features():
    torch.manual_seed(0)
    student = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(6, 3, 2, dtype=torch.float64)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@every_loss
def test_rotating_and_scaling_the_feature_space_changes_nothing(features, loss):
    student, teacher = features
    assert_close(loss(3 * student @ rotation(5), teacher), loss(student, teacher), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
def test_rkd_is_invariant_to_translation_and_sp_and_pkt_are_not(features, name):
    student, teacher = features
    assert_close(LOSSES[name](student + 2, teacher), LOSSES[name](student, teacher))
    for loss in (sp_loss, pkt_loss):
        assert not torch.allclose(loss(student + 2, teacher), loss(student, teacher), rtol=1e-2)


def test_pkt_is_invariant_to_the_length_of_each_feature_and_sp_is_not(features):
    student, teacher = features
    stretched = student * torch.linspace(1, 4, 6, dtype=torch.float64).unsqueeze(1)
    assert_close(pkt_loss(stretched, teacher), pkt_loss(student, teacher), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(sp_loss(stretched, teacher), sp_loss(student, teacher), rtol=1e-2)


def test_rkd_is_the_weighted_sum_of_distance_and_angle_loss(features):
    distance, angle = rkd_distance_loss(*features), rkd_angle_loss(*features)
    assert_close(RelationalKD(2.0, 3.0)(*features), 2 * distance + 3 * angle)
    assert_close(RelationalKD(2.0, 0.0)(*features), 2 * distance)
    assert_close(RelationalKD(0.0, 3.0)(*features), 3 * angle)


def test_rkd_weights_pairs_and_triples_by_the_product_of_their_row_weights(features):
    student, teacher = features
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 3.0])
    expected = rkd(student.tolist(), teacher.tolist(), weight=weight.tolist())
    assert_close(RelationalKD()(student, teacher, weight=weight).item(), expected)


@pytest.mark.parametrize("loss", [sp_loss, pkt_loss])
def test_weighted_row_counts_like_repeated_rows_up_to_the_batch_size(features, loss):
    """Both losses fall as 1/n by definition; relative weights keep n, repeated rows raise it."""
    student, teacher = features
    repeats = torch.tensor([1, 2, 1, 3, 1, 2])
    weighted = loss(student, teacher, weight=repeats)
    repeated = loss(student.repeat_interleave(repeats, 0), teacher.repeat_interleave(repeats, 0)) * 10 / 6
    assert_close(weighted, repeated)
    assert_close(*(torch.autograd.grad(value, student)[0] for value in (weighted, repeated)))


@every_loss
def test_weights_of_masked_rows_do_not_matter(features, loss):
    mask = torch.tensor([True, True, False, True, True, False])
    weight = torch.tensor([1.0, 2.0, float("nan"), 0.5, 1.0, 7.0])
    student, teacher = features
    expected = loss(student[mask], teacher[mask], weight=weight[mask])
    assert_close(loss(student, teacher, mask, weight), expected)


@every_loss
@pytest.mark.parametrize("rows", ["equal", "zero"])
def test_equal_and_zero_rows_give_finite_gradients(loss, rows):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), torch.randn(6, 4)
    student[1] = student[0] if rows == "equal" else 0
    student[2] = student[0] if rows == "equal" else 0
    teacher[3] = teacher[4] if rows == "equal" else 0
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 100


@every_loss
def test_collapsed_student_gives_finite_loss_and_gradient(loss):
    torch.manual_seed(0)
    for student in (torch.zeros(6, 5), torch.ones(6, 5)):
        student.requires_grad_()
        value = loss(student, torch.randn(6, 4))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_near_neighbours_far_from_the_origin_keep_their_distance_in_float32():
    torch.manual_seed(0)
    near = 0.01 * torch.randn(6, 5)
    far = near + 100
    exact = rkd_angle_loss(far.double(), near.double())
    assert_close(rkd_angle_loss(far, near).double(), exact, rtol=1e-3, atol=1e-6)
