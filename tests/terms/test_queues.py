"""Queue of teacher features (`queue_similarity`): order, masked rows, weights, resume."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from helpers.cases.contrastive import queue_similarity
from helpers.cases.loops import numerical_gradient
from kdbench.errors import ConfigError
from kdbench.registry import TERMS

WIDTH, SIZE = 3, 5


def build_term(**params):
    shapes = {"student": (WIDTH,), "teacher": (WIDTH,)}
    params = {"size": SIZE, "temperature": 0.4, "teacher_temperature": 0.3, **params}
    return TERMS.build("queue_similarity", params, shapes=shapes).double()


def batch(seed, rows=2):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64)
    return {"student": student.requires_grad_(), "teacher": teacher}


def reference_loss(student, teacher, history, candidates="own"):
    params = {"size": SIZE, "temperature": 0.4, "teacher_temperature": 0.3, "candidates": candidates}
    return queue_similarity(student, teacher, history, **params)


def plain(operands):
    return {name: value.tolist() for name, value in operands.items()}


@pytest.mark.parametrize("candidates", ["own", "batch"])
def test_queue_is_first_in_first_out(candidates):
    term, batches = build_term(candidates=candidates), [batch(seed) for seed in range(4)]
    for number, operands in enumerate(batches):
        history = [plain(step) for step in batches[:number]]
        loss = term(**operands)
        teacher = operands["teacher"].tolist()
        assert_close(loss.item(), reference_loss(operands["student"].tolist(), teacher, history, candidates))
        (gradient,) = torch.autograd.grad(loss, operands["student"])

        def loss_of(student, teacher=teacher, history=history):
            return reference_loss(student, teacher, history, candidates)

        assert_close(gradient, numerical_gradient(loss_of, operands["student"].detach()), rtol=1e-5, atol=1e-7)
    empty = build_term(candidates=candidates)  # control
    assert abs(empty(**batches[-1]).item() - loss.item()) > 1e-3


def test_teacher_gets_no_gradient_and_equality_is_the_optimum():
    term, operands = build_term(temperature=0.3), batch(0)
    term(**batch(1))
    teacher = operands["teacher"].requires_grad_()
    term.eval()
    student = operands["teacher"].detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term(student=student, teacher=teacher), student)
    assert_close(gradient, torch.zeros_like(gradient))
    assert torch.autograd.grad(term(**operands), teacher, allow_unused=True) == (None,)


def test_evaluation_does_not_change_the_queue():
    term = build_term().eval()
    term(**batch(0))
    assert term.enqueued == 0 and not term.queue.any()


@pytest.mark.parametrize("candidates", ["own", "batch"])
def test_masked_row_neither_counts_nor_enters_the_queue(candidates):
    unpadded, padded = build_term(candidates=candidates), build_term(candidates=candidates)
    operands = batch(0)
    unpadded(**batch(1))
    padded(**batch(1))
    garbage = torch.full((1, WIDTH), float("nan"))
    padded_operands = {name: torch.cat([value.detach(), garbage]) for name, value in batch(0).items()}
    assert_close(padded(**padded_operands, mask=torch.tensor([True, True, False])), unpadded(**operands))
    assert_close(padded.queue[:-1], unpadded.queue[:-1])
    assert padded.enqueued == unpadded.enqueued == 4


def test_rows_count_by_weight():
    term, operands = build_term(), batch(0)
    term(**batch(1))
    loss = term(**operands, weight=torch.tensor([1.0, 3.0]).double())
    row_losses = [
        reference_loss([student], [teacher], [plain(batch(1))])
        for student, teacher in zip(operands["student"].tolist(), operands["teacher"].tolist(), strict=True)
    ]
    assert_close(loss.item(), (row_losses[0] + 3 * row_losses[1]) / 4)


def test_resumed_queue_continues_with_the_same_numbers():
    continued, resumed = build_term(), build_term()
    continued(**batch(0))
    resumed.load_state_dict(continued.state_dict())
    assert torch.equal(resumed(**batch(1)), continued(**batch(1)))
    assert not torch.allclose(build_term()(**batch(1)), resumed(**batch(1)))


def test_batch_larger_than_the_queue_raises():
    with pytest.raises(ConfigError, match="a batch of 6 rows does not fit into a queue of 5"):
        build_term()(**batch(0, rows=6))
