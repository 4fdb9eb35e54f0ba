"""A queue of the teacher's earlier features: what is compared with it, what enters it, and what a resume finds."""

import math

import pytest
import torch
from torch import Size
from torch.testing import assert_close

from helpers.term_inputs import run_without_values
from helpers.term_reference import numerical_gradient
from kdbench.errors import ConfigError
from kdbench.registry import TERMS

WIDTH, SIZE = 3, 5


def build(**params):
    shapes = {"student": (WIDTH,), "teacher": (WIDTH,)}
    given = {"size": SIZE, "temperature": 0.4, "teacher_temperature": 0.3, **params}
    return TERMS.build("queue_similarity", given, shapes=shapes).double()


def batch(seed, rows=2):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64)
    return {"student": student.requires_grad_(), "teacher": teacher}


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def plain(student, teacher, queue, candidates="own", counts=None):
    """Cross-entropy of the two distributions over the candidates and the queue, in plain loops."""
    ours, theirs = [unit(s) for s in student], [unit(t) for t in teacher]
    counts = counts or [1] * len(ours)
    total = 0.0
    for i, (s, t) in enumerate(zip(ours, theirs, strict=True)):
        keys = [theirs[i]] if candidates == "own" else theirs
        keys = [*keys, *queue]
        p = softmax([sum(a * b for a, b in zip(s, k, strict=True)) / 0.4 for k in keys])
        q = softmax([sum(a * b for a, b in zip(t, k, strict=True)) / 0.3 for k in keys])
        total -= counts[i] * sum(b * math.log(a) for a, b in zip(p, q, strict=True))
    return total / sum(counts)


def units(*batches):
    return [unit(row) for rows in batches for row in rows["teacher"].tolist()]


@pytest.mark.parametrize("candidates", ["own", "batch"])
def test_samples_of_earlier_batches_are_compared_first_in_first_out(candidates):
    made, shown = build(candidates=candidates), [batch(seed) for seed in range(4)]
    for number, now in enumerate(shown):
        queue = units(*shown[:number])[-SIZE:]
        loss = made(**now)
        rows, theirs = now["student"].tolist(), now["teacher"].tolist()
        assert_close(loss.item(), plain(rows, theirs, queue, candidates))
        (gradient,) = torch.autograd.grad(loss, now["student"])
        expected = numerical_gradient(lambda s, t=theirs, q=queue: plain(s, t, q, candidates), now["student"].detach())
        assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    forgetful = build(candidates=candidates)  # control: without the queue the loss is another one
    assert abs(forgetful(**shown[-1]).item() - loss.item()) > 1e-3


def test_the_teacher_gets_no_gradient_and_equal_sides_are_the_best():
    made, now = build(temperature=0.3), batch(0)
    made(**batch(1))
    teacher = now["teacher"].requires_grad_()
    made.eval()
    equal = now["teacher"].detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made(student=equal, teacher=teacher), equal)
    assert_close(gradient, torch.zeros_like(gradient))
    assert torch.autograd.grad(made(**now), teacher, allow_unused=True) == (None,)


def test_evaluation_moves_no_queue():
    made = build().eval()
    made(**batch(0))
    assert made.held == 0 and not made.queue.any()


@pytest.mark.parametrize("candidates", ["own", "batch"])
def test_a_masked_row_neither_counts_nor_enters(candidates):
    whole, padded = build(candidates=candidates), build(candidates=candidates)
    now, more = batch(0), batch(0, rows=2)
    whole(**batch(1))
    padded(**batch(1))
    spoiled = {name: torch.cat([value.detach(), torch.full((1, WIDTH), float("nan"))]) for name, value in more.items()}
    assert_close(padded(**spoiled, mask=torch.tensor([True, True, False])), whole(**now))
    assert_close(padded.queue[:-1], whole.queue[:-1])
    assert padded.held == whole.held == 4
    first = {name: value[:1] for name, value in now.items()}
    weighed = build(candidates=candidates)(**now, weight=torch.tensor([1.0, 0.0]).double())
    assert_close(weighed, build(candidates=candidates)(**first))


def test_rows_count_by_weight():
    made, now = build(), batch(0)
    made(**batch(1))
    loss = made(**now, weight=torch.tensor([1.0, 3.0]).double())
    expected = plain(now["student"].tolist(), now["teacher"].tolist(), units(batch(1)), counts=[1, 3])
    assert_close(loss.item(), expected)


def test_the_queue_is_in_the_state_and_a_resume_goes_on_with_it():
    whole, resumed = build(), build()
    whole(**batch(0))
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed(**batch(1)), whole(**batch(1)))
    assert not torch.allclose(build()(**batch(1)), resumed(**batch(1)))


def test_nothing_waits_for_the_host():
    assert run_without_values(build, batch(0)).dim() == 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="size must be at least 1"):
        build(size=0)
    with pytest.raises(ConfigError, match="candidates must be one of own, batch"):
        build(candidates="all")
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        build(teacher_temperature=0)
    with pytest.raises(ValueError, match="the student's has 4 elements and the teacher's 3"):
        build().check_shapes(student=Size((2, 4)), teacher=Size((2, 3)))
    with pytest.raises(ConfigError, match="a batch of 6 does not fit into a queue of 5"):
        build()(**batch(0, rows=6))
