"""Terms over class statistics: "cmi" follows its classes, "scar" finds the nearest wrong one."""

import math

import pytest
import torch
from torch.testing import assert_close

from helpers.term_inputs import build_term, run_without_values
from helpers.term_reference import _kl, _softmax, numerical_gradient

CLASSES = 4


def cmi(decay=0.9):
    return build_term("cmi", {"decay": decay}, num_classes=CLASSES).double()


def batch(seed, labels):
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(len(labels), CLASSES, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), torch.tensor(labels)


def mean_of(student, labels, wanted):
    rows = [_softmax(s) for s, label in zip(student.tolist(), labels.tolist(), strict=True) if label == wanted]
    return [sum(row[k] for row in rows) / len(rows) for k in range(CLASSES)]


def test_cmi_is_the_divergence_from_the_decayed_class_mean():
    made = cmi()
    first, labels = batch(0, [1, 1, 3])
    made(first, labels)
    now, seen = batch(1, [1, 0, 3, 3])
    loss = made(now, seen)
    decayed = {
        1: [0.9 * a + 0.1 * b for a, b in zip(mean_of(first, labels, 1), mean_of(now, seen, 1), strict=True)],
        3: [0.9 * a + 0.1 * b for a, b in zip(mean_of(first, labels, 3), mean_of(now, seen, 3), strict=True)],
        0: mean_of(now, seen, 0),
    }

    def plain(student):
        return [_kl(_softmax(s), decayed[label]) for s, label in zip(student, seen.tolist(), strict=True)]

    assert_close(loss, torch.tensor(plain(now.tolist()), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), now)
    assert_close(gradient, numerical_gradient(lambda s: sum(plain(s)), now.detach()))
    assert_close(made.centroids.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    assert_close(made.centroids[2], torch.full((CLASSES,), 0.25, dtype=torch.float64), msg="never seen")


def test_maximising_cmi_spreads_the_predictions_of_a_class():
    made = cmi()
    student, labels = batch(0, [1, 1, 1, 3])
    loss = made(student, labels)[:3].sum()
    (gradient,) = torch.autograd.grad(loss, student)
    spread = (student + 0.05 * gradient).softmax(1)[:3].var(0).sum()
    assert spread > student.softmax(1)[:3].var(0).sum()


def test_masked_and_hidden_rows_move_no_centroid():
    made, other = cmi(), cmi()
    student, labels = batch(0, [1, 1, 3])
    spoiled = torch.cat([student.detach(), torch.full((2, CLASSES), float("nan"), dtype=torch.float64)])
    made(spoiled, torch.tensor([1, 1, 3, 3, -100]), mask=torch.tensor([True, True, True, False, True]))
    other(student, labels)
    assert_close(made.centroids, other.centroids)
    hidden = made(student, torch.tensor([-100, 1, 3]))
    assert hidden[0] == 0 and (hidden[1:] != 0).all()


def test_cmi_keeps_its_centroids_through_a_resume_reads_nothing_and_takes_half_precision():
    whole, resumed = cmi(), cmi()
    whole(*batch(0, [1, 1, 3]))
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed(*batch(1, [1, 3])), whole(*batch(1, [1, 3])))
    student, labels = batch(0, [1, 1, 3])
    half = student.detach().bfloat16()
    loss = build_term("cmi", num_classes=CLASSES)(half, labels)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    leaf = student.detach().float().requires_grad_()
    run_without_values(lambda: build_term("cmi", num_classes=CLASSES), {"student": leaf, "label": labels})
    with pytest.raises(ValueError, match="the data's 4 classes"):
        cmi().check_shapes(student=torch.Size((2, 5)))


def statistics(elements=3):
    torch.manual_seed(0)
    means = torch.rand(CLASSES, elements, dtype=torch.float64)
    roots = torch.randn(CLASSES, elements, elements, dtype=torch.float64)
    return means, roots @ roots.transpose(1, 2) + torch.eye(elements, dtype=torch.float64)


def plain_scar(student, label, means, precision, power=0.5):
    losses = []
    for row, own in zip(student, label, strict=True):
        x = [max(value, 0) ** power for value in row]
        length = math.sqrt(sum(value * value for value in x))
        found = []
        for c, mean in enumerate(means):
            if c == own:
                continue
            size = math.sqrt(sum(value * value for value in mean))
            d = [a / length - b / size for a, b in zip(x, mean, strict=True)]
            pairs = ((i, j) for i in range(len(d)) for j in range(len(d)))
            found.append(sum(d[i] * precision[c][i][j] * d[j] for i, j in pairs))
        losses.append(min(found))
    return losses


def test_scar_is_that_of_plain_loops():
    means, precision = statistics()
    student = (torch.rand(6, 3, dtype=torch.float64) + 0.1).requires_grad_()
    label = torch.tensor([0, 1, 2, 3, 0, -100])
    loss = build_term("scar")(student, label, means, precision)
    given = (label.tolist(), means.tolist(), precision.tolist())
    assert_close(loss, torch.tensor(plain_scar(student.tolist(), *given), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert_close(gradient, numerical_gradient(lambda s: sum(plain_scar(s, *given)), student.detach()))
    wrong = build_term("scar", {"power": 1.0})(student, label, means, precision)
    assert not torch.allclose(wrong, loss)


def test_scar_moves_features_to_another_class_and_never_to_their_own():
    means, _ = statistics()
    precision = torch.eye(3, dtype=torch.float64).expand(CLASSES, 3, 3)
    student = (means**2).clone().requires_grad_()  # the root of it lies on the class's mean
    label = torch.arange(CLASSES)
    loss = build_term("scar")(student, label, means, precision)
    assert (loss > 1e-3).all(), "the own class is at distance 0 and must not count"
    assert (build_term("scar")(student, torch.full((CLASSES,), -100), means, precision) < 1e-12).all()


def test_scar_has_a_finite_gradient_at_dead_features_reads_nothing_and_takes_half_precision():
    means, precision = statistics()
    student = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = build_term("scar")(student, torch.tensor([0, 1]), means, precision)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()
    half = build_term("scar")(torch.rand(2, 3).bfloat16(), torch.tensor([0, 1]), means.float(), precision.float())
    assert half.dtype == torch.float32
    operands = {"student": torch.rand(2, 3, requires_grad=True), "label": torch.tensor([0, 1])}
    run_without_values(lambda: build_term("scar"), {**operands, "means": means.float(), "precision": precision.float()})
    with pytest.raises(ValueError, match=r"needs means per class of size \[3\]"):
        build_term("scar").check_shapes(student=torch.Size((2, 3)), means=torch.Size((4, 5)))
