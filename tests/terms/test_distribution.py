"""Terms on class statistics: running class means (`cmi`) and the nearest wrong class (`scar`)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from helpers.cases.distribution import scar
from helpers.cases.loops import numerical_gradient
from helpers.term_inputs import build_term

CLASSES = 4


def build_cmi(decay=0.9):
    return build_term("cmi", {"decay": decay}, num_classes=CLASSES).double()


def batch(seed, labels):
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(len(labels), CLASSES, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), torch.tensor(labels)


def test_cmi_class_means_are_distributions_and_an_absent_class_stays_uniform():
    cmi = build_cmi()
    cmi(*batch(0, [1, 1, 3]))
    cmi(*batch(1, [1, 0, 3, 3]))
    assert_close(cmi.centroids.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    assert_close(cmi.centroids[2], torch.full((CLASSES,), 0.25, dtype=torch.float64))


def test_maximising_cmi_spreads_the_predictions_of_a_class():
    cmi = build_cmi()
    student, labels = batch(0, [1, 1, 1, 3])
    loss = cmi(student, labels)[:3].sum()
    (gradient,) = torch.autograd.grad(loss, student)
    spread = (student + 0.05 * gradient).softmax(1)[:3].var(0).sum()
    assert spread > student.softmax(1)[:3].var(0).sum()


def test_masked_and_hidden_rows_do_not_change_the_class_means():
    padded, unpadded = build_cmi(), build_cmi()
    student, labels = batch(0, [1, 1, 3])
    garbage = torch.full((2, CLASSES), float("nan"), dtype=torch.float64)
    mask = torch.tensor([True, True, True, False, True])
    padded(torch.cat([student.detach(), garbage]), torch.tensor([1, 1, 3, 3, -100]), mask=mask)
    unpadded(student, labels)
    assert_close(padded.centroids, unpadded.centroids)
    loss = padded(student, torch.tensor([-100, 1, 3]))
    assert loss[0] == 0 and (loss[1:] != 0).all()


def test_cmi_resumes_with_its_class_means():
    continued, resumed = build_cmi(), build_cmi()
    continued(*batch(0, [1, 1, 3]))
    resumed.load_state_dict(continued.state_dict())
    assert torch.equal(resumed(*batch(1, [1, 3])), continued(*batch(1, [1, 3])))


@pytest.fixture
def statistics():
    torch.manual_seed(0)
    means = torch.rand(CLASSES, 3, dtype=torch.float64)
    roots = torch.randn(CLASSES, 3, 3, dtype=torch.float64)
    return means, roots @ roots.transpose(1, 2) + torch.eye(3, dtype=torch.float64)


def test_scar_of_a_hidden_label_is_the_distance_to_the_nearest_of_all_classes(statistics):
    student = (torch.rand(6, 3, dtype=torch.float64) + 0.1).requires_grad_()
    label = torch.tensor([0, 1, 2, 3, 0, -100])
    loss = build_term("scar")(student, label, *statistics)
    plain = (label.tolist(), *(value.tolist() for value in statistics))
    assert_close(loss, torch.tensor(scar(student.tolist(), *plain), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert_close(gradient, numerical_gradient(lambda s: sum(scar(s, *plain)), student.detach()))


def test_scar_never_selects_the_class_of_the_label(statistics):
    means, _ = statistics
    precision = torch.eye(3, dtype=torch.float64).expand(CLASSES, 3, 3)
    student = (means**2).clone().requires_grad_()  # its root equals the class mean
    loss = build_term("scar")(student, torch.arange(CLASSES), means, precision)
    assert (loss > 1e-3).all(), "the class of the label has distance 0"
    hidden = torch.full((CLASSES,), -100)
    assert (build_term("scar")(student, hidden, means, precision) < 1e-12).all()


def test_scar_has_a_finite_gradient_at_zero_features(statistics):
    student = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = build_term("scar")(student, torch.tensor([0, 1]), *statistics)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()
