"""What generated images should satisfy; "bn_statistics", whose teacher is no batch, is tested here alone."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.term_inputs import build_term, run_without_values
from helpers.term_reference import numerical_gradient
from kdbench.terms.data_free import TotalVariation


def plain(student, teacher, counts=None):
    counts = counts or [1.0] * len(student)
    mean_apart = variance_apart = 0.0
    for channel in range(len(student[0])):
        values = [
            (count, x)
            for count, row in zip(counts, student, strict=True)
            for line in row[channel]
            for x in line
            if count
        ]
        whole = sum(count for count, _ in values)
        mean = sum(count * x for count, x in values) / whole
        variance = sum(count * (x - mean) ** 2 for count, x in values) / whole
        mean_apart += (mean - teacher[0][channel]) ** 2
        variance_apart += (variance - teacher[1][channel]) ** 2
    return math.sqrt(mean_apart) + math.sqrt(variance_apart)


@pytest.fixture
def operands():
    torch.manual_seed(0)
    student = torch.randn(5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    return student, torch.stack([torch.randn(3), torch.rand(3) + 0.5]).double()


@pytest.mark.parametrize("counts", [None, [1.0, 0.0, 2.0, 1.0, 3.0]])
def test_bn_statistics_are_those_of_plain_loops(operands, counts):
    student, teacher = operands
    weight = None if counts is None else torch.tensor(counts)
    loss = build_term("bn_statistics")(student, teacher, weight=weight)
    assert_close(loss.item(), plain(student.tolist(), teacher.tolist(), counts))
    (gradient,) = torch.autograd.grad(loss, student)
    assert_close(gradient, numerical_gradient(lambda s: plain(s, teacher.tolist(), counts), student.detach()))


def test_bn_statistics_vanish_for_the_very_batch_that_a_batchnorm_remembers(operands):
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    norm(operands[0])
    rows = operands[0].numel() / 3
    seen = torch.stack([norm.running_mean, norm.running_var * (rows - 1) / rows])  # torch remembers the unbiased one
    loss = build_term("bn_statistics")(operands[0], seen)
    assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    assert build_term("bn_statistics")(operands[0] + 1, seen) > 1


def test_bn_statistics_do_not_see_masked_rows_and_an_empty_batch_gives_zero(operands):
    student, teacher = operands
    mask = torch.tensor([True, False, True, True, False])
    spoiled = student.detach().clone()
    spoiled[~mask] = float("nan")
    spoiled.requires_grad_()
    loss = build_term("bn_statistics")(spoiled, teacher, mask=mask)
    assert_close(loss, build_term("bn_statistics")(student[mask], teacher))
    loss.backward()
    assert (spoiled.grad[~mask] == 0).all() and spoiled.grad[mask].abs().sum() > 0
    assert build_term("bn_statistics")(spoiled, teacher, mask=torch.zeros(5, dtype=torch.bool)) == 0


def test_bn_statistics_take_vectors_half_precision_and_read_nothing(operands):
    student, teacher = operands
    flat = build_term("bn_statistics")(student[:, :, 0, 0], teacher)
    assert_close(flat, build_term("bn_statistics")(student[:, :, :1, :1], teacher))
    half = build_term("bn_statistics")(student.bfloat16(), teacher.float())
    assert half.dtype == torch.float32
    run_without_values(
        lambda: build_term("bn_statistics"), {"student": student.detach().requires_grad_(), "teacher": teacher}
    )
    with pytest.raises(ValueError, match="a BatchNorm's input"):
        build_term("bn_statistics").check_shapes(student=torch.Size((2, 3, 4, 4)), teacher=torch.Size((2, 5)))


def test_one_hot_is_least_for_a_sure_teacher_and_information_entropy_for_a_balanced_batch():
    sure, unsure = 20 * torch.eye(4), torch.zeros(4, 4)
    assert (build_term("one_hot")(sure) < 1e-6).all()
    assert_close(build_term("one_hot")(unsure), torch.full((4,), math.log(4)))
    assert_close(build_term("information_entropy")(sure), torch.tensor(-math.log(4)), rtol=1e-4, atol=1e-6)
    one_class = torch.zeros(4, 4)
    one_class[:, 0] = 20
    assert build_term("information_entropy")(one_class) > -1e-5


def test_a_flat_image_has_no_variation_and_a_finite_gradient():
    image = torch.ones(2, 3, 5, 5, requires_grad=True)
    for norm in (1, 2):
        loss = TotalVariation(norm)(image)
        assert (loss == 0).all()
        loss.sum().backward()
        assert image.grad.isfinite().all()
    with pytest.raises(ValueError, match="2 pixels a side"):
        TotalVariation().check_shapes(student=torch.Size((2, 3, 1, 5)))
