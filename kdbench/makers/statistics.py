"""What a trained network's features are like in each class, for terms that compare a sample with a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdbench.errors import ConfigError
from kdbench.makers.base import Facts, Maker, Pool
from kdbench.registry import MAKERS


class _PerClass(Maker):
    """What is known of each class's features, raised to a power (Tukey's transformation)."""

    def __init__(self, power: float = 0.5) -> None:
        if power <= 0:
            raise ConfigError(f"power must be above 0, got {power}")
        self.power = power

    def check(self, facts: Facts) -> None:
        shape = facts.shapes.get("features", (1,))
        if len(shape) != 1:
            raise ValueError(f"reads a feature vector per sample, but the operand is {list(shape)}")

    def features(self, pool: Pool) -> tuple[list[Tensor], dict[str, Any]]:
        """The features of each class, float64 (samples of the class, elements), and what is told of them."""
        found = pool.gathered("features", "label")
        features = found["features"].double().clamp(min=0) ** self.power
        label = found["label"]
        classes = [features[label == number] for number in range(len(pool.facts.classes))]
        names = pool.facts.classes
        few = [names[number] for number, own in enumerate(classes) if len(own) < self.least]
        if few:
            raise ConfigError(
                f"needs at least {self.least} labelled samples of every class; too few of {', '.join(few)}"
            )
        return classes, {"samples": sum(len(own) for own in classes)}

    least = 1


@MAKERS.register("feature_means", makes="tensor", operands=("features",), labels=True)
class FeatureMeans(_PerClass):
    """The mean over each class of the features to a power, [classes, elements]: `means` of the term `scar`.

    value_c = mean over class c of max(x, 0) ** power, as in the authors' code. Bonato, Cotogni and Sabetta, Is Retain
    Set All You Need in Machine Unlearning?, ECCV 2024, arXiv:2404.12922.

    features: (samples, elements), behind a ReLU. power: the term's.
    """

    def __call__(self, pool: Pool) -> dict[str, Any]:
        classes, told = self.features(pool)
        return {"value": torch.stack([own.mean(0) for own in classes]).float(), "told": told}

    def shape(self, facts: Facts) -> tuple[int, ...]:
        return (len(facts.classes), *facts.shapes["features"])


@MAKERS.register("feature_precision", makes="tensor", operands=("features",), labels=True)
class FeaturePrecision(_PerClass):
    """The inverse of each class's shrunk, normalised covariance, [classes, elements, elements]: `precision` of `scar`.

    value_c = pinv(N(H(H(S_c)))), S_c the covariance over class c of max(x, 0) ** power;
    H(S) = S + shrink * mean(diagonal of S) * I + shrink * mean(off-diagonal of S) * (1 - I), where only entries other
    than 0 count for the second mean; N(S)_ij = S_ij / sqrt(S_ii S_jj). As in the authors' code, where shrink is 3 (the
    text has two factors, gamma1 and gamma2). Bonato, Cotogni and Sabetta, Is Retain Set All You Need in Machine
    Unlearning?, ECCV 2024, arXiv:2404.12922.

    features: (samples, elements), behind a ReLU; at least two of each class. power: the term's.
    """

    least = 2

    def __init__(self, power: float = 0.5, shrink: float = 3.0) -> None:
        super().__init__(power)
        if shrink < 0:
            raise ConfigError(f"shrink must be at least 0, got {shrink}")
        self.shrink = shrink

    def __call__(self, pool: Pool) -> dict[str, Any]:
        classes, told = self.features(pool)
        return {"value": torch.stack([self._precision(own) for own in classes]).float(), "told": told}

    def _precision(self, own: Tensor) -> Tensor:
        # From the first sample on, so that what never varies has a variance of exactly 0, not one of rounding.
        covariance = self._shrunk(self._shrunk(torch.cov((own - own[0]).t())))
        deviation = covariance.diagonal().sqrt()
        scale = torch.outer(deviation, deviation)
        # An element that never varies while none does would divide 0 by 0; it says nothing of the class.
        return torch.linalg.pinv(torch.where(scale > 0, covariance / scale.where(scale > 0, torch.ones_like(scale)), 0))

    def _shrunk(self, covariance: Tensor) -> Tensor:
        eye = torch.eye(len(covariance), dtype=covariance.dtype)
        apart = covariance * (1 - eye)
        off = apart.sum() / (apart != 0).sum().clamp(min=1)
        return covariance + self.shrink * (covariance.diagonal().mean() * eye + off * (1 - eye))

    def shape(self, facts: Facts) -> tuple[int, ...]:
        elements = facts.shapes["features"][0]
        return (len(facts.classes), elements, elements)


@MAKERS.register("nearest_mean", makes="model", operands=("features",), candidates="candidates", labels=True)
class NearestMeanMaker(Maker):
    """The classifier of iCaRL: each class's mean of features of length 1, itself at length 1.

    Over a source of exemplars it is the nearest mean of exemplars. Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725,
    algorithm 1 and section 2.1. A later stage takes it as `model: {made: STAGE.NAME}`, on the same features.

    features: (samples, values). candidates: {nearest: nearest_mean}, the model that is given the means.
    """

    def __init__(self, candidates: dict) -> None:  # type: ignore[type-arg]
        if len(candidates) != 1:
            raise ConfigError(f"nearest_mean: there is one candidate, the model of the means, got {len(candidates)}")
        self.candidates = candidates

    def check(self, facts: Facts) -> None:
        shape = facts.shapes.get("features", (1,))
        if len(shape) != 1:
            raise ValueError(f"reads a feature vector per sample, but the operand is {list(shape)}")

    def __call__(self, pool: Pool) -> dict[str, Any]:
        found = pool.gathered("features", "label")
        features = torch.nn.functional.normalize(found["features"].double(), dim=1)
        label, classes = found["label"], len(pool.facts.classes)
        means = torch.zeros(classes, features.shape[1], dtype=features.dtype)
        for number in range(classes):
            if (label == number).any():
                means[number] = features[label == number].mean(0)
        means = torch.nn.functional.normalize(means, dim=1)
        params = dict(next(iter(self.candidates.values())))
        kind = params.pop("type")
        told = {"samples": int((label >= 0).sum()), "classes": int((means != 0).any(1).sum())}
        return {"type": kind, "params": {**params, "means": means.tolist()}, "told": told}
