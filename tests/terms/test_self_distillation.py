"""Memory of the self-distillation terms: earlier visits, masked rows, hidden labels, resume."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_term

CLASSES, SAMPLES = 4, 12
INJECTED = {"samples": SAMPLES, "num_classes": CLASSES}
MEMORY_TERMS = ["self_target", "last_batch", "temporal_ensemble"]


def build_memory_term(name, **params):
    return build_term(name, params, **INJECTED).double()


def batch(seed, index, *, with_label=True):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(len(index), CLASSES, generator=generator, dtype=torch.float64).mul(2)
    label = torch.randint(CLASSES, (len(index),), generator=generator)
    operands = {"student": student.requires_grad_(), "index": torch.tensor(index)}
    return {**operands, "label": label} if with_label else operands


def batch_for(name, seed, index):
    return batch(seed, index, with_label=name == "self_target")


def test_self_target_without_memory_is_plain_cross_entropy():
    term = build_memory_term("self_target", alpha=0.0)
    term(**batch(0, [3, 5, 7]))
    operands = batch(2, [5, 0, 9])
    expected = F.cross_entropy(operands["student"], operands["label"], reduction="none")
    assert_close(term(**operands), expected)
    with_memory = build_memory_term("self_target", alpha=0.6)
    with_memory(**batch(0, [3, 5, 7]))
    loss = with_memory(**operands)
    assert not torch.allclose(loss[0], expected[0])
    assert_close(loss[1:], expected[1:])  # samples at their first visit


def test_each_visit_replaces_the_previous_one():
    term = build_memory_term("self_target", alpha=1.0)
    term(**batch(0, [4, 6]))
    previous = batch(1, [4, 6])
    term(**previous)
    operands = batch(2, [4, 6])
    expected = -(previous["student"].softmax(1) * operands["student"].log_softmax(1)).sum(1)
    assert_close(term(**operands), expected)


@pytest.mark.parametrize("name", MEMORY_TERMS)
def test_resumed_memory_continues_with_the_same_numbers(name):
    continued, resumed = build_memory_term(name), build_memory_term(name)
    continued(**batch_for(name, 0, [3, 5, 7]))
    resumed.load_state_dict(continued.state_dict())
    operands = batch_for(name, 1, [5, 3, 1])
    loss = resumed(**operands)
    assert torch.equal(loss, continued(**operands))
    assert not torch.allclose(build_memory_term(name)(**operands), loss)


@pytest.mark.parametrize("name", MEMORY_TERMS)
def test_padded_row_does_not_overwrite_the_sample_with_its_index(name):
    term = build_memory_term(name)
    operands = batch_for(name, 0, [3, 5, 3])
    operands["student"] = operands["student"].detach()
    operands["student"][2] = float("nan")
    term(**operands, mask=torch.tensor([True, True, False]))
    stored = term.bank.values[torch.tensor([3, 5])]
    student = operands["student"][:2]
    if name == "temporal_ensemble":
        assert_close(stored, 0.4 * torch.cat([student.softmax(1), torch.ones(2, 1).double()], 1))
    else:
        assert_close(stored, student.softmax(1) if name == "self_target" else student)


def test_hidden_labels_give_zero_and_are_not_stored():
    term = build_memory_term("self_target", alpha=1.0)
    loss = term(**{**batch(0, [1, 2]), "label": torch.tensor([-100, 3])})
    assert loss[0] == 0 and loss[1] > 0
    assert term.bank.written_at[1] == -1 and term.bank.written_at[2] == 1


def test_last_batch_compares_only_with_the_previous_step():
    term = build_memory_term("last_batch", temperature=2.0)
    assert (term(**batch_for("last_batch", 0, [1, 2, 3, 4])) == 0).all()
    operands = batch_for("last_batch", 1, [3, 4, 5, 6])
    loss = term(**operands)
    assert (loss[:2] > 0).all() and (loss[2:] == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), operands["student"])
    assert (gradient[:2] != 0).any(1).all() and (gradient[2:] == 0).all()
    assert (term(**batch_for("last_batch", 2, [1, 2, 7, 8])) == 0).all(), "1 and 2 were seen two steps ago"


def test_last_batch_without_overlap_is_zero():
    term = build_memory_term("last_batch")
    for seed, index in enumerate(([0, 1], [2, 3], [0, 1])):
        assert (term(**batch_for("last_batch", seed, index)) == 0).all()


def test_virtual_teacher_has_a_soft_maximum_at_the_label():
    """The gradient is p - u, and u is larger at the label by exp((correct - rest) / T)."""
    student = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    loss = build_term("tf_kd")(student, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    virtual = (student.softmax(1) - gradient)[0]
    assert_close(virtual[2] / virtual[0], torch.tensor(math.exp((0.99 - 0.0025) / 20), dtype=torch.float64))


def test_temporal_ensemble_is_zero_at_the_first_visit():
    loss = build_memory_term("temporal_ensemble")(**batch_for("temporal_ensemble", 0, [2, 5]))
    assert_close(loss, torch.zeros(2, dtype=torch.float64))


def test_temporal_ensemble_target_is_the_bias_corrected_mean_of_three_visits():
    term, predictions = build_memory_term("temporal_ensemble", momentum=0.7), []
    for seed in range(3):
        operands = batch_for("temporal_ensemble", seed, [3, 1])
        term(**operands)
        predictions.append(operands["student"][0].softmax(0).detach())
    mean = sum(w * p for w, p in zip((0.49, 0.7, 1.0), predictions, strict=True)) / 2.19
    operands = batch_for("temporal_ensemble", 7, [8, 3])
    loss = term(**operands)
    expected = (operands["student"][1].softmax(0) - mean).square().mean()
    assert_close(loss[1], expected)
    gradients = [torch.autograd.grad(value, operands["student"], retain_graph=True)[0] for value in (loss[1], expected)]
    assert_close(*gradients)
