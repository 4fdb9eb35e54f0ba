"""Combiners: values and gradients by their formulas, gates, hidden labels, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_part, run_without_values
from kdbench.errors import ConfigError
from kdbench.registry import COMBINERS
from kdbench.terms.logits import kd_loss

LABEL = torch.tensor([0, 2, 1, 4, 3, 0])
PARAMS = {
    "mean_logits": {},
    "mean_probabilities": {"temperature": 3.0},
    "weighted": {"weights": [1.0, 2.0, 0.0]},
    "vote": {},
    "kdcl_min_logit": {},
    "kdcl_naive": {},
    "gate": {},
    "confidence": {},
}
every_combiner = pytest.mark.parametrize("name", list(PARAMS))


def build_combiner(name, parts=3, **params):
    return build_part(COMBINERS, name, {**PARAMS[name], **params}, parts=parts, shapes={})


def draw_operands(name, dtype=torch.float64):
    torch.manual_seed(0)
    values = [(2 * torch.randn(6, 5, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(3)]
    operands = {"values": values}
    if "label" in COMBINERS.entry(name).inputs:
        operands["label"] = LABEL
    if name == "gate":
        operands["gate"] = torch.randn(6, 3, dtype=torch.float64).to(dtype).requires_grad_()
    return operands


def test_every_combiner_is_tested_and_documented():
    assert set(PARAMS) == {name for name, entry in COMBINERS.entries.items() if entry.module.startswith("kdbench")}
    for name in PARAMS:
        assert "\nShape:\n" in COMBINERS.entry(name).doc


def reference(name, values, label=LABEL):
    """Computes the combination by its formula, one sample at a time."""
    rows = []
    for i in range(6):
        z, row_label = [value[i] for value in values], label[i]
        formulas = {
            "mean_logits": lambda z=z: sum(z) / 3,
            "mean_probabilities": lambda z=z: 3 * (sum(F.softmax(x / 3, 0) for x in z) / 3).log(),
            "weighted": lambda z=z: (z[0] + 2 * z[1]) / 3,
            "kdcl_min_logit": lambda z=z, y=row_label: torch.stack([x - x[y] for x in z]).amin(0),
            "kdcl_naive": lambda z=z, y=row_label: min(z, key=lambda x: F.cross_entropy(x, y).item()),
        }
        rows.append(formulas[name]())
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["mean_logits", "mean_probabilities", "weighted", "kdcl_min_logit", "kdcl_naive"])
def test_value_and_gradient_equal_the_formula(name):
    operands = draw_operands(name)
    values = operands["values"]
    result, expected = build_combiner(name)(**operands), reference(name, values)
    assert_close(result, expected)
    weights = torch.linspace(1, 2, 30, dtype=torch.float64).view(6, 5)
    gradients, expected_gradients = (
        torch.autograd.grad((weights * combination).sum(), values, allow_unused=True, materialize_grads=True)
        for combination in (result, expected)
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softmax_of_mean_probabilities_is_the_mean_of_the_softmaxes(temperature):
    values = draw_operands("mean_probabilities")["values"]
    result = build_combiner("mean_probabilities", temperature=temperature)(values)
    expected = sum(F.softmax(value / temperature, 1) for value in values) / 3
    assert_close(F.softmax(result / temperature, 1), expected)
    student = torch.randn(6, 5, dtype=torch.float64)
    divergence = F.kl_div((student / temperature).log_softmax(1), expected, reduction="none").sum(1)
    assert_close(kd_loss(student, result, temperature), temperature**2 * divergence)
    mean_logits = build_combiner("mean_logits")(values)
    assert not torch.allclose(F.softmax(mean_logits / temperature, 1), expected)


def test_weighted_probabilities_are_the_weighted_mean_and_weight_zero_excludes_a_value():
    values = draw_operands("weighted")["values"]
    result = build_combiner("weighted", of="probabilities", temperature=2.0)(values)
    expected = (F.softmax(values[0] / 2, 1) + 2 * F.softmax(values[1] / 2, 1)) / 3
    assert_close(F.softmax(result / 2, 1), expected)
    gradients = torch.autograd.grad(result.sum(), values)
    assert gradients[0].abs().sum() > 0 and (gradients[2] == 0).all()
    maps = [torch.full((2, 3, 4, 4), float(n)) for n in range(3)]
    assert_close(build_combiner("weighted")(maps), torch.full((2, 3, 4, 4), 2 / 3))


def test_vote_counts_first_choices():
    values = [torch.eye(3)[[0, 1, 2]] * 9, torch.eye(3)[[0, 1, 0]] * 9, torch.eye(3)[[0, 2, 1]] * 9]
    fractions = build_combiner("vote", smoothing=0.03)(values).exp()
    assert_close(fractions[0], torch.tensor([0.98, 0.01, 0.01]))
    assert_close(fractions[1], torch.tensor([0.01, 0.97 * 2 / 3 + 0.01, 0.97 / 3 + 0.01]))
    assert_close(fractions.sum(1), torch.ones(3))


def test_min_logits_are_zero_at_the_label_and_at_least_as_certain_of_it_as_every_network():
    operands = draw_operands("kdcl_min_logit")
    result = build_combiner("kdcl_min_logit")(**operands)
    assert (result.gather(1, LABEL[:, None]) == 0).all()
    label_probability = F.softmax(result, 1).gather(1, LABEL[:, None])
    for value in operands["values"]:
        assert (label_probability >= F.softmax(value, 1).gather(1, LABEL[:, None]) - 1e-12).all()


@pytest.mark.parametrize("name", ["kdcl_min_logit", "kdcl_naive"])
def test_hidden_labels_give_the_mean_of_the_logits(name):
    operands = draw_operands(name)
    result = build_combiner(name)(operands["values"], torch.where(torch.arange(6) < 3, LABEL, -100))
    assert_close(result[3:], (sum(operands["values"]) / 3)[3:])
    assert_close(result[:3], build_combiner(name)(**operands)[:3])


def test_gate_is_a_softmax_weighted_mean_and_gets_a_gradient_from_the_ensemble():
    operands = draw_operands("gate")
    result = build_combiner("gate")(**operands)
    weights = F.softmax(operands["gate"], 1)
    assert_close(result, sum(weights[:, i : i + 1] * value for i, value in enumerate(operands["values"])))
    F.cross_entropy(result, LABEL).backward()
    assert operands["gate"].grad.abs().sum() > 0
    assert all(value.grad.abs().sum() > 0 for value in operands["values"])
    certain = build_combiner("gate")(operands["values"], torch.tensor([[0.0, 99.0, 0.0]]).expand(6, 3))
    assert_close(certain, operands["values"][1])


def test_gate_of_the_wrong_width_raises():
    with pytest.raises(ValueError, match="one value for each of the 3 combined operands"):
        build_combiner("gate")(draw_operands("gate")["values"], torch.zeros(6, 2))


def test_confidence_weights_the_parts_by_their_cross_entropies_with_gradient():
    operands = draw_operands("confidence")
    result = build_combiner("confidence")(operands["values"], LABEL.where(torch.arange(6) < 5, -100))
    for i in range(5):
        costs = torch.stack([F.cross_entropy(value[i], LABEL[i]) for value in operands["values"]])
        assert_close(result[i], (1 - costs.softmax(0)) / 2)
    assert_close(result[5], torch.full((3,), 1 / 3, dtype=torch.float64), msg="hidden label")
    gradient = torch.autograd.grad(result[0, 0], operands["values"][0])[0]
    assert gradient[0, LABEL[0]] > 0 and (gradient[1:] == 0).all(), "a higher label logit raises the weight of its row"


@every_combiner
def test_half_precision_gives_float32_and_no_tensor_is_read_on_the_host(name):
    assert build_combiner(name)(**draw_operands(name, torch.bfloat16)).dtype == torch.float32
    result = run_without_values(lambda: build_combiner(name), draw_operands(name, torch.float32))
    assert result.shape == (6, 3 if name == "confidence" else 5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("weighted", {"weights": [1.0]}, "must have 3 entries, one per combined operand, got 1"),
        ("weighted", {"weights": [1.0, -1.0, 1.0]}, "at least one above 0"),
        ("weighted", {"weights": [0.0, 0.0, 0.0]}, "at least one above 0"),
        ("mean_probabilities", {"temperature": 0.0}, "temperature must be above 0"),
        ("vote", {"smoothing": 0.0}, "smoothing must be above 0"),
    ],
)
def test_parameters_out_of_range_raise(name, params, message):
    with pytest.raises(ConfigError, match=message):
        build_combiner(name, **params)
