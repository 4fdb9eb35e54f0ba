"""What the relational terms do and do not see of a batch."""

import pytest
import torch
from torch.testing import assert_close

from helpers import term_reference as reference
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
def test_turning_or_scaling_a_whole_feature_space_changes_nothing(features, loss):
    student, teacher = features
    assert_close(loss(3 * student @ rotation(5), teacher), loss(student, teacher), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
def test_rkd_does_not_see_where_the_origin_is_and_sp_and_pkt_do(features, name):
    student, teacher = features
    assert_close(LOSSES[name](student + 2, teacher), LOSSES[name](student, teacher))
    for other in (sp_loss, pkt_loss):
        assert not torch.allclose(other(student + 2, teacher), other(student, teacher), rtol=1e-2)


def test_pkt_does_not_see_the_length_of_each_feature_and_sp_does(features):
    student, teacher = features
    stretched = student * torch.linspace(1, 4, 6, dtype=torch.float64).unsqueeze(1)
    assert_close(pkt_loss(stretched, teacher), pkt_loss(student, teacher), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(sp_loss(stretched, teacher), sp_loss(student, teacher), rtol=1e-2)


def test_rkd_is_the_weighted_sum_of_its_parts(features):
    distance, angle = rkd_distance_loss(*features), rkd_angle_loss(*features)
    assert_close(RelationalKD(2.0, 3.0)(*features), 2 * distance + 3 * angle)
    assert_close(RelationalKD(2.0, 0.0)(*features), 2 * distance)
    assert_close(RelationalKD(0.0, 3.0)(*features), 3 * angle)


def test_rkd_weighs_pairs_and_triples_by_the_product_of_their_rows(features):
    student, teacher = features
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 3.0])
    expected = reference.rkd(student.tolist(), teacher.tolist(), counts=weight.tolist())
    assert_close(RelationalKD()(student, teacher, weight=weight).item(), expected)


@pytest.mark.parametrize("loss", [sp_loss, pkt_loss])
def test_a_weighted_row_counts_like_repeated_rows_up_to_the_size_of_the_batch(features, loss):
    """Both losses fall as 1/n by definition; relative weights keep n, repeated rows raise it."""
    student, teacher = features
    times = torch.tensor([1, 2, 1, 3, 1, 2])
    weighted = loss(student, teacher, weight=times)
    repeated = loss(student.repeat_interleave(times, 0), teacher.repeat_interleave(times, 0)) * 10 / 6
    assert_close(weighted, repeated)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (weighted, repeated))
    assert_close(ours, theirs)


@every_loss
def test_weights_of_rows_left_out_do_not_matter(features, loss):
    mask = torch.tensor([True, True, False, True, True, False])
    weight = torch.tensor([1.0, 2.0, float("nan"), 0.5, 1.0, 7.0])
    student, teacher = features
    expected = loss(student[mask], teacher[mask], weight=weight[mask])
    assert_close(loss(student, teacher, mask, weight), expected)


@every_loss
@pytest.mark.parametrize("rows", ["equal", "dead"])
def test_equal_and_dead_rows_give_finite_gradients(loss, rows):
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
def test_a_collapsed_student_gives_finite_numbers(loss):
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
