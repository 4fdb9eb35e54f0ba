"""Sample weights: values by their formulas, detached (except `learnt`), and one row at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_part, run_without_values
from kdbench.errors import ConfigError
from kdbench.registry import SAMPLE_WEIGHTS
from kdbench.terms.divergences import divergence_loss

LABEL = torch.tensor([0, 2, 1, 4, 3, -100])
NAMES = ["confidence", "threshold", "entropy_gap", "disagreement", "focal", "loss_ratio"]


def build_weight(name, **params):
    return build_part(SAMPLE_WEIGHTS, name, params)


def draw_operands(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    student, teacher = (3 * torch.randn(2, 6, 5, dtype=torch.float64)).to(dtype)
    operands = {
        "student": student.clone().requires_grad_(),
        "teacher": teacher.clone().requires_grad_(),
        "label": LABEL,
    }
    return {key: value for key, value in operands.items() if key in SAMPLE_WEIGHTS.entry(name).inputs}


def test_every_sample_weight_is_tested_and_documented():
    names = {name for name, entry in SAMPLE_WEIGHTS.entries.items() if entry.module.startswith("kdbench")}
    assert {*NAMES, "outside", "learnt"} == names
    for name in names:
        assert "\nShape:\n" in SAMPLE_WEIGHTS.entry(name).doc


def entropy(logits):
    p = F.softmax(logits, 1)
    return -(p * p.log()).sum(1)


def label_probability(logits, label):
    return F.softmax(logits, 1).gather(1, label.clamp(min=0)[:, None])[:, 0]


def reference(name, student=None, teacher=None, label=None):
    if name == "confidence":
        return torch.where(label < 0, 0, label_probability(teacher, label))
    if name == "threshold":
        return (F.softmax(teacher, 1).max(1).values >= 0.95).double()
    if name == "entropy_gap":
        return torch.where(entropy(student) < entropy(teacher), 2.0, 1.0).double()
    if name == "disagreement":
        return (F.softmax(student, 1) - F.softmax(teacher, 1)).clamp(min=0).sum(1)
    p_student = label_probability(student, label)
    if name == "loss_ratio":
        p_teacher = label_probability(teacher, label)
        return torch.where(label < 0, 0, 1 - (p_student.log() / (1e-7 - p_teacher.log())).exp())
    return torch.where(label < 0, 0, (1 - p_student) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_formula_are_detached_and_depend_on_their_row_only(name):
    operands = draw_operands(name)
    weight = build_weight(name)(**operands)
    assert_close(weight, reference(name, **operands).detach())
    assert not weight.requires_grad
    assert (weight >= 0).all() and weight.std() > 0
    different = draw_operands(name, seed=1)
    mixed = {key: torch.cat([value[:1], different[key][1:]]) for key, value in operands.items()}
    assert_close(build_weight(name)(**mixed)[0], weight[0])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_float32_and_no_tensor_is_read_on_the_host(name):
    assert build_weight(name)(**draw_operands(name, torch.bfloat16)).dtype == torch.float32
    assert run_without_values(lambda: build_weight(name), draw_operands(name, torch.float32)).shape == (6,)


def test_outside_gives_zero_to_samples_assigned_to_one_of_the_classes():
    judge = torch.eye(5, dtype=torch.float64)[[0, 3, 1, 3, 4]].requires_grad_()
    weight = build_weight("outside", classes=[3, 4])(judge=judge)
    assert weight.tolist() == [1, 0, 1, 0, 0] and not weight.requires_grad
    assert build_weight("outside", classes=[0, 1])(judge=judge).tolist() == [0, 1, 0, 1, 1]
    fake_weight = run_without_values(lambda: build_weight("outside", classes=[1]), {"judge": judge.detach().float()})
    assert fake_weight.shape == (5,)


@pytest.mark.parametrize("classes", [[], [-1]])
def test_outside_without_valid_class_numbers_raises(classes):
    with pytest.raises(ConfigError, match="must list at least one class number"):
        build_weight("outside", classes=classes)


def test_entropy_gap_balances_forward_and_reverse_divergence():
    operands = draw_operands("entropy_gap")
    forward, reverse = (build_weight("entropy_gap", surer=side, high=3.0) for side in ("student", "teacher"))
    assert_close(forward(**operands) + reverse(**operands), torch.full((6,), 4.0, dtype=torch.float64))
    swapped = {"student": operands["teacher"], "teacher": operands["student"]}
    assert_close(forward(**swapped), reverse(**operands))
    certain, uncertain = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert forward(student=certain, teacher=uncertain) == 3 and reverse(student=certain, teacher=uncertain) == 1
    forward_kl, reverse_kl = (divergence_loss(certain, uncertain, k, 1.0) for k in ("forward_kl", "reverse_kl"))
    assert forward_kl > reverse_kl, "forward KL spreads a student that is more certain than the teacher"


def test_scheduled_threshold_is_read_in_every_step():
    least = torch.tensor(0.99)
    threshold = build_weight("threshold", least=least)
    teacher = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert threshold(teacher).tolist() == [0.0, 0.0]
    least.fill_(0.9)
    assert threshold(teacher).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("entropy_gap", {"high": 1.0}, "high and low must differ"),
        ("threshold", {"least": 1.5}, r"least must be in \[0, 1\]"),
        ("focal", {"power": 0.0}, "power must be above 0"),
    ],
)
def test_parameters_out_of_range_raise(name, params, message):
    with pytest.raises(ConfigError, match=message):
        build_weight(name, **params)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_learnt_weight_is_the_output_of_the_network_with_gradient(shape):
    by = torch.rand(shape, dtype=torch.float64).requires_grad_()
    weight, complement = build_weight("learnt")(by), build_weight("learnt", complement=True)(by)
    assert weight.shape == (6,)
    assert_close(weight + complement, torch.ones(6, dtype=torch.float64))
    assert_close(weight, by.reshape(6))
    (2 * weight + complement).sum().backward()
    assert_close(by.grad, torch.ones(shape, dtype=torch.float64))  # a detached weight would give no gradient
