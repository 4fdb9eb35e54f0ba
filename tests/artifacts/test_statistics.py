"""Statistics for SCAR, iCaRL and EWC against loops in float64."""

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


def sample_outputs(values: dict[str, Tensor], classes: tuple[str, ...] = CLASSES, **overrides: Any) -> SampleOutputs:
    def make_batches(epoch: int | None) -> Iterator[dict[str, Tensor]]:
        for rows in torch.arange(len(values["label"])).split(16):
            yield {name: value[rows] for name, value in values.items()}

    source: Any = SimpleNamespace(population=len(values["label"]), num_samples=len(values["label"]))
    settings = {
        "seed": 1,
        "device": torch.device("cpu"),
        "context": ArtifactContext(classes=classes),
        "make_batches": make_batches,
    }
    return SampleOutputs(source, **{**settings, **overrides})


def build(artifact_type: str, values: dict[str, Tensor], **params: Any) -> dict[str, Any]:
    return ARTIFACTS.build(artifact_type, params)(sample_outputs(values))


def random_features() -> dict[str, Tensor]:
    """Positive features of 60 samples in three classes; the first six samples have no label."""
    generator = torch.Generator().manual_seed(0)
    values = {"features": torch.randn(60, 5, generator=generator).relu() + 0.1, "label": torch.arange(60) % 3}
    values["features"][values["label"] == 1] *= 3
    values["label"][:6] = -100
    return values


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_feature_means_are_means_of_transformed_features(power):
    values = random_features()
    means = build("feature_means", values, power=power)["value"]
    for c in range(3):
        expected = (values["features"][values["label"] == c].double() ** power).mean(0).float()
        torch.testing.assert_close(means[c], expected)


def test_precision_is_the_inverse_of_the_twice_shrunk_and_normalised_covariance():
    values = random_features()
    precision = build("feature_precision", values)["value"]
    for c in range(3):
        x = np.sqrt(values["features"][values["label"] == c].double().numpy())
        s = np.cov(x, rowvar=False)
        for _ in range(2):
            off_diagonal = s[~np.eye(5, dtype=bool)].mean()
            s = s + 3 * s.diagonal().mean() * np.eye(5) + 3 * off_diagonal * (1 - np.eye(5))
        s = s / np.sqrt(np.outer(s.diagonal(), s.diagonal()))
        torch.testing.assert_close(precision[c].double(), torch.from_numpy(np.linalg.inv(s)), rtol=1e-5, atol=1e-5)


def test_constant_features_leave_the_precision_finite():
    values = random_features()
    values["features"][:, 2] = 0
    assert torch.isfinite(build("feature_precision", values)["value"]).all()
    values["features"][:] = 0.25  # its square root is exact, so that every element is constant
    assert (build("feature_precision", values, shrink=0)["value"] == 0).all()


def test_statistics_are_the_operands_of_the_term_scar():
    values = random_features()
    means = build("feature_means", values)["value"]
    precision = build("feature_precision", values)["value"]
    class_b_feature = (means[1] ** 2).unsqueeze(0)
    term = TERMS.build("scar", {})
    loss_as_b = term(class_b_feature, torch.tensor([1]), means, precision)
    loss_as_a = term(class_b_feature, torch.tensor([0]), means, precision)
    assert loss_as_a < 1e-6 < loss_as_b


@pytest.mark.parametrize("name", ["feature_means", "feature_precision"])
def test_class_statistics_reject_maps_bad_powers_and_missing_classes(name):
    with pytest.raises(ValueError, match="reads a feature vector"):
        ARTIFACTS.build(name, {}).check(ArtifactContext(CLASSES, shapes={"features": (4, 2, 2)}))
    with pytest.raises(ConfigError, match="power must be above 0"):
        ARTIFACTS.build(name, {"power": 0})
    values = random_features()
    values["label"][values["label"] == 2] = 1
    with pytest.raises(ConfigError, match="too few of c"):
        build(name, values)
    context = ArtifactContext(CLASSES, shapes={"features": (5,)})
    assert tuple(build(name, random_features())["value"].shape) == ARTIFACTS.build(name, {}).output_shape(context)


# Nearest mean


def test_nearest_mean_contains_the_unit_means_of_unit_features():
    values = random_features()
    values["label"][values["label"] == 2] = -100
    content = build("nearest_mean", values, candidates={"nearest": {"type": "nearest_mean"}})
    assert content["type"] == "nearest_mean" and content["summary"] == {"samples": 36, "classes": 2}
    for c in (0, 1):
        features = values["features"][values["label"] == c].double()
        mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(torch.tensor(content["params"]["means"][c]).double(), mean / mean.norm())
    assert not any(content["params"]["means"][2])
    with pytest.raises(ConfigError, match="must contain one candidate"):
        ARTIFACTS.build("nearest_mean", {"candidates": {}})


# Fisher information


def trained_network() -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a small network in training mode whose BatchNorm has moving averages, and 20 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10))
    model(torch.randn(50, 1, 8, 8))
    return model, {"image": torch.randn(20, 1, 8, 8), "label": torch.arange(20) % 10}


def fisher(model: nn.Module, values: dict[str, Tensor], previous: Any = None, **params: Any) -> Tensor:
    operand = OperandConfig(role="student", side="weights")
    outputs = sample_outputs(
        values, tuple("0123456789"), modules={"student": model}, operands={"weights": operand}, previous=previous
    )
    return ARTIFACTS.build("fisher", params)(outputs)["value"]


def squared_gradient(model: nn.Module, image: Tensor, label: int, keep: list[int]) -> Tensor:
    """Computes the squared gradient of one sample's log probability for every parameter, (parameters,)."""
    log_p = model(image.unsqueeze(0))[:, keep].log_softmax(1)[0, keep.index(label)]
    gradients = torch.autograd.grad(log_p, list(model.parameters()), allow_unused=True)
    return torch.cat([g.reshape(-1) ** 2 for g in gradients if g is not None])


@pytest.mark.parametrize("keep", [None, [0, 1, 2, 5]])
def test_fisher_is_the_mean_of_squared_gradients(keep):
    model, values = trained_network()
    classes = keep or list(range(10))
    if keep:
        values["label"] = torch.tensor(keep)[values["label"] % 4]
    computed = fisher(model, values, keep=keep, labels="own").double()
    reference = trained_network()[0].double().eval()
    pairs = zip(values["image"].double(), values["label"].tolist(), strict=True)
    expected = torch.stack([squared_gradient(reference, image, label, classes) for image, label in pairs]).mean(0)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-12)


def test_drawn_labels_give_the_expectation_over_the_prediction():
    model, values = trained_network()
    values = {"image": values["image"][:1].repeat(2000, 1, 1, 1), "label": torch.full((2000,), 3)}
    computed = fisher(model, values).double()
    model.double().eval()
    p = model(values["image"][:1].double()).softmax(1)[0].detach()
    classes = list(range(10))
    expected = sum(p[c] * squared_gradient(model, values["image"][0].double(), c, classes) for c in classes)
    assert isinstance(expected, Tensor)
    assert float((computed - expected).norm() / expected.norm()) < 0.1
    model.float()
    empirical = fisher(model, values, labels="own").double()
    assert float((empirical - expected).norm() / expected.norm()) > 0.2, "control: labels of the samples"


def test_a_later_round_adds_its_fisher_and_leaves_the_network_unchanged():
    model, values = trained_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = fisher(model, values, labels="own")
    second = fisher(model, values, previous={"value": first}, labels="own")
    torch.testing.assert_close(second, 2 * first)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first.dtype == torch.float32 and len(first) == sum(p.numel() for p in model.parameters())


def test_fisher_rejects_unknown_and_empty_classes():
    with pytest.raises(ValueError, match="has class 12 in `keep`, but the classes are 0 to 2"):
        ARTIFACTS.build("fisher", {"keep": [12]}).check(ArtifactContext(CLASSES))
    with pytest.raises(ConfigError, match="class numbers"):
        ARTIFACTS.build("fisher", {"keep": []})
