"""Properties of single terms on logits, beyond those of every term."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdbench.terms.logits import (
    CrossEntropy,
    cross_entropy_loss,
    dist_loss,
    dkd_components,
    dkd_loss,
    kd_loss,
    logit_mse_loss,
)

LABEL = torch.tensor([3, 0, 1, 3, 2, 5])


@pytest.fixture
def logits():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 6, 7, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_that_of_torch(logits, smoothing):
    loss = cross_entropy_loss(logits[0], LABEL, smoothing)
    assert_close(loss, F.cross_entropy(logits[0], LABEL, reduction="none", label_smoothing=smoothing))


def test_cross_entropy_of_a_mixed_batch_is_the_weighted_mean_over_both_labels(logits):
    term, label_other = CrossEntropy(0.1), LABEL.flip(0)
    assert_close(term(logits[0], LABEL, label_other, torch.ones(6)), term(logits[0], LABEL))
    half = term(logits[0], LABEL, label_other, torch.full((6,), 0.5))
    assert_close(half, (term(logits[0], LABEL) + term(logits[0], label_other)) / 2)
    torch.manual_seed(0)
    mix = torch.rand(6)
    soft = mix[:, None] * F.one_hot(LABEL, 7) + (1 - mix[:, None]) * F.one_hot(label_other, 7)
    expected = F.cross_entropy(logits[0], soft, reduction="none", label_smoothing=0.1)
    assert_close(term(logits[0], LABEL, label_other, mix), expected)


def test_hidden_labels_give_zero_and_do_not_change_the_other_rows(logits):
    student, teacher = logits
    hidden = torch.where(torch.arange(6) % 2 == 0, LABEL, -100)
    for loss, expected in (
        (cross_entropy_loss(student, hidden, 0.1), cross_entropy_loss(student, LABEL, 0.1)),
        (dkd_loss(student, teacher, hidden, 1.0, 8.0, 4.0), dkd_loss(student, teacher, LABEL, 1.0, 8.0, 4.0)),
    ):
        assert_close(loss[::2], expected[::2])
        assert (loss[1::2] == 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert (gradient[1::2] == 0).all()
        assert (gradient[::2] != 0).any(1).all()
    mixed = CrossEntropy()(student, hidden, hidden.roll(1), torch.full((6,), 0.25))
    assert mixed.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_tckd_plus_nckd_times_the_teachers_non_target_probability(logits, temperature):
    tckd, nckd = dkd_components(*logits, LABEL, temperature)
    non_target = 1 - (logits[1] / temperature).softmax(1).gather(1, LABEL[:, None]).squeeze(1)
    assert_close(temperature**2 * (tckd + non_target * nckd), kd_loss(*logits, temperature))


def test_dkd_is_linear_in_its_components(logits):
    tckd, nckd = dkd_components(*logits, LABEL, 2.0)
    assert_close(dkd_loss(*logits, LABEL, 0.5, 3.0, 2.0), 4 * (0.5 * tckd + 3 * nckd))


def test_kd_at_high_temperature_matches_centered_logits(logits):
    """Hinton et al., equation 4: the gradient tends to that of half the mean squared centered logit difference."""
    kd = torch.autograd.grad(kd_loss(*logits, 1e4).sum(), logits[0])[0]
    mse = torch.autograd.grad(logit_mse_loss(*logits, center=True).sum(), logits[0])[0]
    assert_close(kd, mse / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: cross_entropy_loss(s, LABEL, 0.1),
        lambda s, t: kd_loss(s, t, 4.0),
        lambda s, t: dkd_loss(s, t, LABEL, 1.0, 8.0, 4.0),
        lambda s, t: logit_mse_loss(s, t, center=True),
        lambda s, t: dist_loss(s, t),
    ],
    ids=["cross_entropy", "kd", "dkd", "logit_mse-centered", "dist"],
)
def test_constant_added_to_all_logits_of_a_row_changes_nothing(logits, loss):
    student, teacher = logits
    shift = torch.randn(6, 1, dtype=torch.float64)
    assert_close(loss(student + shift, teacher - shift), loss(student, teacher))


def test_logit_mse_depends_on_that_constant_and_is_quadratic(logits):
    student, teacher = logits
    assert_close(logit_mse_loss(teacher + 2.0, teacher), torch.full((6,), 4.0, dtype=torch.float64))
    assert_close(logit_mse_loss(3 * student, 3 * teacher), 9 * logit_mse_loss(student, teacher))


def test_scaling_logits_and_temperature_together_scales_kd_by_the_square(logits):
    student, teacher = logits
    assert_close(kd_loss(3 * student, 3 * teacher, 6.0), 9 * kd_loss(student, teacher, 2.0))


def test_kd_is_asymmetric_and_its_student_gradient_is_t_times_p_minus_q(logits):
    student, teacher = logits
    assert not torch.allclose(kd_loss(student, teacher, 4.0), kd_loss(teacher, student, 4.0))
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, 4.0).sum(), student)
    assert_close(gradient, 4 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)))


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_confident_networks_give_finite_losses_and_gradients_in_float32(scale):
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(2, 6, 7)).unbind()
    student.requires_grad_()
    for loss in (
        cross_entropy_loss(student, LABEL, 0.1).sum(),
        kd_loss(student, teacher, 1.0).sum(),
        dkd_loss(student, teacher, LABEL, 1.0, 8.0, 1.0).sum(),
        dist_loss(student, teacher),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_dkd_keeps_the_non_target_classes_of_a_confident_teacher_in_float32():
    """1 - p loses all digits at p = 1 - 1e-9; the sum over the other classes does not."""
    teacher = torch.tensor([[25.0, 2.0, 1.0, 0.0]])
    student = torch.tensor([[25.0, 0.0, 1.0, 2.0]])
    exact = dkd_components(student.double(), teacher.double(), torch.tensor([0]), 1.0)
    single = dkd_components(student, teacher, torch.tensor([0]), 1.0)
    for component, expected in zip(single, exact, strict=True):
        assert_close(component.double(), expected, rtol=1e-4, atol=1e-12)


def test_dist_depends_on_correlation_only(logits):
    """Any positive affine map of a row's probabilities has inter-class loss zero."""
    teacher = logits[1].softmax(1)
    student = (0.5 * teacher + 0.5 / 7).log()  # its softmax is the mixture with the uniform distribution
    loss = dist_loss(student, teacher.log())
    assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)
    assert kd_loss(student, teacher.log(), 1.0).sum() > 0.1


def test_dist_is_largest_for_opposite_predictions():
    student = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert_close(dist_loss(student, -student, beta=2.0, gamma=3.0), torch.tensor(10.0))


def test_dist_of_weighted_rows_equals_that_of_repeated_rows(logits):
    student, teacher = logits
    repeats = torch.tensor([1, 2, 1, 3, 1, 2])
    weighted = dist_loss(student, teacher, weight=repeats)
    repeated = dist_loss(student.repeat_interleave(repeats, 0), teacher.repeat_interleave(repeats, 0))
    assert_close(weighted, repeated)
    assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (weighted, repeated)))
