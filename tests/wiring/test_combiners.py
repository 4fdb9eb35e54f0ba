"""Combiners: what an ensemble says is what the formula says, in values that a term reads like logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_part, run_without_values
from kdbench.errors import ConfigError
from kdbench.registry import COMBINERS
from kdbench.terms.logits import kd_loss

LABEL = torch.tensor([0, 2, 1, 4, 3, 0])
ALL = {
    "mean_logits": {},
    "mean_probabilities": {"temperature": 3.0},
    "weighted": {"weights": [1.0, 2.0, 0.0]},
    "vote": {},
    "kdcl_min_logit": {},
    "kdcl_naive": {},
    "gate": {},
    "confidence": {},
}
every_combiner = pytest.mark.parametrize("name", list(ALL))


def combiner(name, parts=3, **params):
    return build_part(COMBINERS, name, {**ALL[name], **params}, parts=parts, shapes={})


def operands(name, dtype=torch.float64):
    torch.manual_seed(0)
    given = {"values": [(2 * torch.randn(6, 5, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(3)]}
    if "label" in COMBINERS.entry(name).inputs:
        given["label"] = LABEL
    if name == "gate":
        given["gate"] = torch.randn(6, 3, dtype=torch.float64).to(dtype).requires_grad_()
    return given


def test_every_combiner_is_tested_and_documented():
    assert set(ALL) == {name for name, entry in COMBINERS.entries.items() if entry.module.startswith("kdbench")}
    for name in ALL:
        assert "Shapes:" in COMBINERS.entry(name).doc


def plain(name, values, label=LABEL):
    """What each sample's combination should be, from its formula, one sample at a time."""
    rows = []
    for i in range(6):
        z = [value[i] for value in values]
        own = label[i]
        rows.append(
            {
                "mean_logits": lambda z=z: sum(z) / 3,
                "mean_probabilities": lambda z=z: 3 * (sum(F.softmax(x / 3, 0) for x in z) / 3).log(),
                "weighted": lambda z=z: (z[0] + 2 * z[1]) / 3,
                "kdcl_min_logit": lambda z=z, own=own: torch.stack([x - x[own] for x in z]).amin(0),
                "kdcl_naive": lambda z=z, own=own: min(z, key=lambda x: F.cross_entropy(x, own).item()),
            }[name]()
        )
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["mean_logits", "mean_probabilities", "weighted", "kdcl_min_logit", "kdcl_naive"])
def test_value_and_gradient_are_those_of_the_formula(name):
    given = operands(name)
    result, expected = combiner(name)(**given), plain(name, given["values"])
    assert_close(result, expected)
    shares = torch.linspace(1, 2, 30, dtype=torch.float64).view(6, 5)
    ours = torch.autograd.grad((shares * result).sum(), given["values"], allow_unused=True)
    theirs = torch.autograd.grad((shares * expected).sum(), given["values"], allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(
            torch.zeros(6, 5).double() if one is None else one, torch.zeros(6, 5).double() if other is None else other
        )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_softmax_of_mean_probabilities_is_the_mean_of_the_softmaxes(temperature):
    values = operands("mean_probabilities")["values"]
    result = combiner("mean_probabilities", temperature=temperature)(values)
    expected = sum(F.softmax(value / temperature, 1) for value in values) / 3
    assert_close(F.softmax(result / temperature, 1), expected)
    student = torch.randn(6, 5, dtype=torch.float64)
    by_hand = temperature**2 * F.kl_div((student / temperature).log_softmax(1), expected, reduction="none").sum(1)
    assert_close(kd_loss(student, result, temperature), by_hand)
    of_logits = combiner("mean_logits")(values)
    assert not torch.allclose(F.softmax(of_logits / temperature, 1), expected)


def test_weighted_probabilities_are_the_weighted_mean_and_a_weight_of_zero_leaves_a_part_out():
    values = operands("weighted")["values"]
    result = combiner("weighted", of="probabilities", temperature=2.0)(values)
    expected = (F.softmax(values[0] / 2, 1) + 2 * F.softmax(values[1] / 2, 1)) / 3
    assert_close(F.softmax(result / 2, 1), expected)
    gradients = torch.autograd.grad(result.sum(), values)
    assert gradients[0].abs().sum() > 0 and (gradients[2] == 0).all()
    maps = [torch.full((2, 3, 4, 4), float(n)) for n in range(3)]
    assert_close(combiner("weighted")(maps), torch.full((2, 3, 4, 4), 2 / 3))


def test_a_vote_counts_first_choices():
    values = [torch.eye(3)[[0, 1, 2]] * 9, torch.eye(3)[[0, 1, 0]] * 9, torch.eye(3)[[0, 2, 1]] * 9]
    shares = combiner("vote", smoothing=0.03)(values).exp()
    assert_close(shares[0], torch.tensor([0.98, 0.01, 0.01]))
    assert_close(shares[1], torch.tensor([0.01, 0.97 * 2 / 3 + 0.01, 0.97 / 3 + 0.01]))
    assert_close(shares.sum(1), torch.ones(3))


def test_the_least_logits_have_the_label_at_zero_and_are_never_surer_of_a_wrong_class_than_any_part():
    given = operands("kdcl_min_logit")
    result = combiner("kdcl_min_logit")(**given)
    assert (result.gather(1, LABEL[:, None]) == 0).all()
    own = F.softmax(result, 1).gather(1, LABEL[:, None])
    for value in given["values"]:
        assert (own >= F.softmax(value, 1).gather(1, LABEL[:, None]) - 1e-12).all()


@pytest.mark.parametrize("name", ["kdcl_min_logit", "kdcl_naive"])
def test_hidden_labels_take_the_mean_of_the_logits(name):
    given = operands(name)
    hidden = combiner(name)(given["values"], torch.where(torch.arange(6) < 3, LABEL, -100))
    assert_close(hidden[3:], (sum(given["values"]) / 3)[3:])
    assert_close(hidden[:3], combiner(name)(**given)[:3])


def test_a_gate_mixes_by_its_softmax_and_learns_from_what_the_ensemble_says():
    given = operands("gate")
    result = combiner("gate")(**given)
    shares = F.softmax(given["gate"], 1)
    assert_close(result, sum(shares[:, i : i + 1] * value for i, value in enumerate(given["values"])))
    F.cross_entropy(result, LABEL).backward()
    assert given["gate"].grad.abs().sum() > 0
    assert all(value.grad.abs().sum() > 0 for value in given["values"])
    sure = combiner("gate")(given["values"], torch.tensor([[0.0, 99.0, 0.0]]).expand(6, 3))
    assert_close(sure, given["values"][1])
    with pytest.raises(ValueError, match="one gate value for each of 3 parts"):
        combiner("gate")(given["values"], torch.zeros(6, 2))


def test_confidence_weighs_the_parts_by_their_cross_entropies_with_gradient():
    given = operands("confidence")
    result = combiner("confidence")(given["values"], LABEL.where(torch.arange(6) < 5, -100))
    for i in range(5):
        shares = torch.stack([F.cross_entropy(value[i], LABEL[i]) for value in given["values"]]).softmax(0)
        assert_close(result[i], (1 - shares) / 2)
    assert_close(result[5], torch.full((3,), 1 / 3, dtype=torch.float64), msg="hidden label")
    gradient = torch.autograd.grad(result[0, 0], given["values"][0])[0]
    assert gradient[0, LABEL[0]] > 0 and (gradient[1:] == 0).all(), "surer of the label: counts more, in its own row"


@every_combiner
def test_half_precision_gives_float32_and_nothing_is_read_on_the_host(name):
    assert combiner(name)(**operands(name, torch.bfloat16)).dtype == torch.float32
    result = run_without_values(lambda: combiner(name), operands(name, torch.float32))
    assert result.shape == (6, 3 if name == "confidence" else 5)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("weighted", {"weights": [1.0]}, "1 entries for 3 parts"),
        ("weighted", {"weights": [1.0, -1.0, 1.0]}, "at least 0, one above 0"),
        ("weighted", {"weights": [0.0, 0.0, 0.0]}, "at least 0, one above 0"),
        ("mean_probabilities", {"temperature": 0.0}, "temperature must be above 0"),
        ("vote", {"smoothing": 0.0}, "smoothing must be above 0"),
    ],
)
def test_parameters_out_of_range_are_refused(name, params, words):
    with pytest.raises(ConfigError, match=words):
        combiner(name, **params)
