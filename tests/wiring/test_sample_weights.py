"""Weighers: each weight is what the formula says, detached (but for `learnt`), and of its own row only."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_part, run_without_values
from kdbench.errors import ConfigError
from kdbench.registry import SAMPLE_WEIGHTS
from kdbench.terms.divergences import divergence_loss

LABEL = torch.tensor([0, 2, 1, 4, 3, -100])
ALL = ["confidence", "threshold", "entropy_gap", "disagreement", "focal", "loss_ratio"]


def weigher(name, **params):
    return build_part(SAMPLE_WEIGHTS, name, params)


def operands(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    both = (3 * torch.randn(2, 6, 5, dtype=torch.float64)).to(dtype)
    given = {"student": both[0].clone().requires_grad_(), "teacher": both[1].clone().requires_grad_(), "label": LABEL}
    return {key: value for key, value in given.items() if key in SAMPLE_WEIGHTS.entry(name).inputs}


def test_every_weigher_is_tested():
    assert {*ALL, "outside", "learnt"} == {
        name for name, entry in SAMPLE_WEIGHTS.entries.items() if entry.module.startswith("kdbench")
    }


def entropy(logits):
    p = F.softmax(logits, 1)
    return -(p * p.log()).sum(1)


def plain(name, student=None, teacher=None, label=None):
    if name == "confidence":
        return torch.where(label < 0, 0, F.softmax(teacher, 1).gather(1, label.clamp(min=0)[:, None])[:, 0])
    if name == "threshold":
        return (F.softmax(teacher, 1).max(1).values >= 0.95).double()
    if name == "entropy_gap":
        return torch.where(entropy(student) < entropy(teacher), 2.0, 1.0).double()
    if name == "disagreement":
        return (F.softmax(student, 1) - F.softmax(teacher, 1)).clamp(min=0).sum(1)
    own = F.softmax(student, 1).gather(1, label.clamp(min=0)[:, None])[:, 0]
    if name == "loss_ratio":
        best = F.softmax(teacher, 1).gather(1, label.clamp(min=0)[:, None])[:, 0]
        return torch.where(label < 0, 0, 1 - (own.log() / (1e-7 - best.log())).exp())
    return torch.where(label < 0, 0, (1 - own) ** 2)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_of_the_formula_detached_and_row_by_row(name):
    given = operands(name)
    weight = weigher(name)(**given)
    assert_close(weight, plain(name, **given).detach())
    assert not weight.requires_grad
    assert (weight >= 0).all() and weight.std() > 0
    others = operands(name, seed=1)
    mixed = {key: torch.cat([value[:1], others[key][1:]]) for key, value in given.items()}
    assert_close(weigher(name)(**mixed)[0], weight[0])


@pytest.mark.parametrize("name", ALL)
def test_half_precision_gives_float32_and_nothing_is_read_on_the_host(name):
    assert weigher(name)(**operands(name, torch.bfloat16)).dtype == torch.float32
    assert run_without_values(lambda: weigher(name), operands(name, torch.float32)).shape == (6,)


def test_outside_leaves_out_what_the_judge_takes_for_one_of_the_classes():
    judge = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]], dtype=torch.float64, requires_grad=True)
    weight = weigher("outside", classes=[1])(judge=judge)
    assert weight.tolist() == [1, 0, 1] and not weight.requires_grad
    assert weigher("outside", classes=[0, 2])(judge=judge).tolist() == [0, 1, 0]
    assert run_without_values(lambda: weigher("outside", classes=[1]), {"judge": judge.detach().float()}).shape == (3,)
    with pytest.raises(ConfigError, match="lists class numbers"):
        weigher("outside", classes=[])


def test_forward_and_reverse_divergence_take_turns_where_one_side_is_surer():
    given = operands("entropy_gap")
    forward, reverse = (weigher("entropy_gap", surer=side, high=3.0) for side in ("student", "teacher"))
    assert_close(forward(**given) + reverse(**given), torch.full((6,), 4.0, dtype=torch.float64))
    swapped = {"student": given["teacher"], "teacher": given["student"]}
    assert_close(forward(**swapped), reverse(**given))
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert forward(student=sure, teacher=unsure) == 3 and reverse(student=sure, teacher=unsure) == 1
    kinds = [divergence_loss(sure, unsure, kind, 1.0) for kind in ("forward_kl", "reverse_kl")]
    assert kinds[0] > kinds[1], "where the student is surer, forward KL is what spreads it"


def test_a_scheduled_threshold_is_read_when_it_runs():
    least = torch.tensor(0.99)
    threshold = weigher("threshold", least=least)
    teacher = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert threshold(teacher).tolist() == [0.0, 0.0]
    least.fill_(0.9)
    assert threshold(teacher).tolist() == [1.0, 0.0]


def test_parameters_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="every sample would count alike"):
        weigher("entropy_gap", high=1.0)
    with pytest.raises(ConfigError, match=r"least must be in \[0, 1\]"):
        weigher("threshold", least=1.5)
    with pytest.raises(ConfigError, match="power must be above 0"):
        weigher("focal", power=0.0)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_learnt_weight_is_what_the_network_says_and_lets_its_gradient_through(shape):
    by = torch.rand(shape, dtype=torch.float64).requires_grad_()
    weight, rest = weigher("learnt")(by), weigher("learnt", complement=True)(by)
    assert weight.shape == (6,)
    assert_close(weight + rest, torch.ones(6, dtype=torch.float64))
    assert_close(weight, by.reshape(6))
    (2 * weight + rest).sum().backward()
    assert_close(by.grad, torch.ones(shape, dtype=torch.float64))  # negative control: detached, it would be None
