"""What SCAR and EWC are told of a network, against loops in float64."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdbench.artifacts.base import ArtifactContext, SampleOutputs
from kdbench.config.schema import OperandConfig
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS, TERMS

CLASSES = ("a", "b", "c")


def pool(rows: dict[str, Tensor], classes: tuple[str, ...] = CLASSES, **more: Any) -> SampleOutputs:
    def batches(epoch: int | None) -> Iterator[dict[str, Tensor]]:
        for part in torch.arange(len(rows["label"])).split(16):
            yield {name: value[part] for name, value in rows.items()}

    source: Any = SimpleNamespace(population=len(rows["label"]), num_samples=len(rows["label"]))
    settings = {"seed": 1, "device": torch.device("cpu"), "context": ArtifactContext(classes=classes), "make_batches": batches}
    return SampleOutputs(source, **{**settings, **more})


def features() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    rows = {"features": torch.randn(60, 5, generator=drawn).relu() + 0.1, "label": torch.arange(60) % 3}
    rows["features"][rows["label"] == 1] *= 3
    rows["label"][:6] = -100
    return rows


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_feature_means_are_those_of_the_transformed_features(power):
    rows = features()
    made = ARTIFACTS.build("feature_means", {"power": power})(pool(rows))["value"]
    for c in range(3):
        torch.testing.assert_close(made[c], (rows["features"][rows["label"] == c].double() ** power).mean(0).float())


def test_precision_is_the_inverse_of_the_twice_shrunk_and_normalised_covariance():
    rows = features()
    made = ARTIFACTS.build("feature_precision", {})(pool(rows))["value"]
    for c in range(3):
        x = np.sqrt(rows["features"][rows["label"] == c].double().numpy())
        s = np.cov(x, rowvar=False)
        for _ in range(2):
            off = s[~np.eye(5, dtype=bool)].mean()
            s = s + 3 * s.diagonal().mean() * np.eye(5) + 3 * off * (1 - np.eye(5))
        s = s / np.sqrt(np.outer(s.diagonal(), s.diagonal()))
        torch.testing.assert_close(made[c].double(), torch.from_numpy(np.linalg.inv(s)), rtol=1e-5, atol=1e-5)


def test_dead_features_leave_the_precision_finite():
    rows = features()
    rows["features"][:, 2] = 0
    made = ARTIFACTS.build("feature_precision", {})(pool(rows))["value"]
    assert torch.isfinite(made).all()
    rows["features"][:] = 0.25  # its root is exact, so that nothing varies
    assert (ARTIFACTS.build("feature_precision", {"shrink": 0})(pool(rows))["value"] == 0).all()


def test_the_statistics_are_what_the_term_reads():
    rows = features()
    means = ARTIFACTS.build("feature_means", {})(pool(rows))["value"]
    precision = ARTIFACTS.build("feature_precision", {})(pool(rows))["value"]
    near = (means[1] ** 2).unsqueeze(0)  # a sample that looks like class b, whatever its label
    term = TERMS.build("scar", {})
    own = term(near, torch.tensor([1]), means, precision)
    other = term(near, torch.tensor([0]), means, precision)
    assert other < 1e-6 < own


@pytest.mark.parametrize("kind", ["feature_means", "feature_precision"])
def test_statistics_refuse_what_they_cannot_be_made_of(kind):
    with pytest.raises(ValueError, match="reads a feature vector"):
        ARTIFACTS.build(kind, {}).check(ArtifactContext(CLASSES, shapes={"features": (4, 2, 2)}))
    with pytest.raises(ConfigError, match="power must be above 0"):
        ARTIFACTS.build(kind, {"power": 0})
    rows = features()
    rows["label"][rows["label"] == 2] = 1
    with pytest.raises(ConfigError, match="too few of c"):
        ARTIFACTS.build(kind, {})(pool(rows))
    facts = ArtifactContext(CLASSES, shapes={"features": (5,)})
    assert tuple(ARTIFACTS.build(kind, {})(pool(features()))["value"].shape) == ARTIFACTS.build(kind, {}).shape(facts)


# The nearest mean


def test_nearest_mean_has_the_unit_means_of_unit_features():
    rows = features()
    rows["label"][rows["label"] == 2] = -100
    made = ARTIFACTS.build("nearest_mean", {"candidates": {"nearest": {"type": "nearest_mean"}}})(pool(rows))
    assert made["type"] == "nearest_mean" and made["summary"] == {"samples": 36, "classes": 2}
    for c in (0, 1):
        unit = rows["features"][rows["label"] == c].double()
        mean = (unit / unit.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(torch.tensor(made["params"]["means"][c]).double(), mean / mean.norm())
    assert not any(made["params"]["means"][2])
    with pytest.raises(ConfigError, match="one candidate"):
        ARTIFACTS.build("nearest_mean", {"candidates": {}})


# Fisher information


def network() -> tuple[nn.Module, dict[str, Tensor]]:
    """A small network whose BatchNorm has seen something, in training mode, and 20 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10))
    model(torch.randn(50, 1, 8, 8))
    return model, {"image": torch.randn(20, 1, 8, 8), "label": torch.arange(20) % 10}


def fisher(model: nn.Module, rows: dict[str, Tensor], previous: Any = None, **params: Any) -> Tensor:
    operand = OperandConfig(role="student", side="weights")
    on = pool(rows, tuple("0123456789"), modules={"student": model}, operands={"weights": operand}, previous=previous)
    return ARTIFACTS.build("fisher", params)(on)["value"]


def squares(model: nn.Module, image: Tensor, label: int, keep: list[int]) -> Tensor:
    """The squared gradient of one sample's log probability, parameter by parameter."""
    log_p = model(image.unsqueeze(0))[:, keep].log_softmax(1)[0, keep.index(label)]
    found = torch.autograd.grad(log_p, list(model.parameters()), allow_unused=True)
    return torch.cat([g.reshape(-1) ** 2 for g in found if g is not None])


@pytest.mark.parametrize("keep", [None, [0, 1, 2, 5]])
def test_fisher_is_the_mean_of_squared_gradients(keep):
    model, rows = network()
    classes = keep or list(range(10))
    if keep:
        rows["label"] = torch.tensor(keep)[rows["label"] % 4]
    found = fisher(model, rows, keep=keep, labels="own").double()
    reference = network()[0].double().eval()
    pairs = zip(rows["image"].double(), rows["label"].tolist(), strict=True)
    expected = torch.stack([squares(reference, image, label, classes) for image, label in pairs]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_drawn_labels_give_the_expectation_over_the_networks_own_prediction():
    model, rows = network()
    rows = {"image": rows["image"][:1].repeat(2000, 1, 1, 1), "label": torch.full((2000,), 3)}
    found = fisher(model, rows).double()
    model.double().eval()
    p = model(rows["image"][:1].double()).softmax(1)[0].detach()
    every = list(range(10))
    expected = sum(p[c] * squares(model, rows["image"][0].double(), c, every) for c in every)
    assert isinstance(expected, Tensor)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    model.float()
    assert float((fisher(model, rows, labels="own").double() - expected).norm() / expected.norm()) > 0.2


def test_a_later_round_adds_its_own_and_the_network_stays_as_it_was():
    model, rows = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = fisher(model, rows, labels="own")
    second = fisher(model, rows, previous={"value": first}, labels="own")
    torch.testing.assert_close(second, 2 * first)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first.dtype == torch.float32 and len(first) == sum(p.numel() for p in model.parameters())


def test_fisher_refuses_classes_that_there_are_not():
    with pytest.raises(ValueError, match="keeps class 12"):
        ARTIFACTS.build("fisher", {"keep": [12]}).check(ArtifactContext(CLASSES))
    with pytest.raises(ConfigError, match="class numbers"):
        ARTIFACTS.build("fisher", {"keep": []})
