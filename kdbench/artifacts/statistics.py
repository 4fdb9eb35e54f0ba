"""Tensors that a stage leaves: class means and counts, outputs, Fisher information, nearest-mean heads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, SampleOutputs
from kdbench.engine.network.features import model_output
from kdbench.engine.network.operands import operand_feature
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS


class _ClassFeatureStatistic(ArtifactBuilder):
    """What is known of each class's features, raised to a power (Tukey's transformation)."""

    def __init__(self, power: float = 0.5) -> None:
        if power <= 0:
            raise ConfigError(f"power must be above 0, got {power}")
        self.power = power

    def check(self, facts: ArtifactContext) -> None:
        shape = facts.shapes.get("features", (1,))
        if len(shape) != 1:
            raise ValueError(f"reads a feature vector per sample, but the operand is {list(shape)}")

    def features_by_class(self, pool: SampleOutputs) -> tuple[list[Tensor], dict[str, Any]]:
        """The features of each class, float64 (samples of the class, elements), and what is told of them."""
        found = pool.gather("features", "label")
        features = found["features"].double().clamp(min=0) ** self.power
        label = found["label"]
        classes = [features[label == number] for number in range(len(pool.context.classes))]
        names = pool.context.classes
        few = [names[number] for number, own in enumerate(classes) if len(own) < self.min_samples]
        if few:
            raise ConfigError(
                f"needs at least {self.min_samples} labelled samples of every class; too few of {', '.join(few)}"
            )
        return classes, {"samples": sum(len(own) for own in classes)}

    min_samples = 1


@ARTIFACTS.register("feature_means", produces="tensor", operands=("features",), labels=True)
class FeatureMeans(_ClassFeatureStatistic):
    """The mean over each class of the features to a power, [classes, elements]: `means` of the term `scar`.

    value_c = mean over class c of max(x, 0) ** power, as in the authors' code. Bonato, Cotogni and Sabetta, Is Retain
    Set All You Need in Machine Unlearning?, ECCV 2024, arXiv:2404.12922.

    features: (samples, elements), behind a ReLU. power: the term's.
    """

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        classes, told = self.features_by_class(pool)
        return {"value": torch.stack([own.mean(0) for own in classes]).float(), "summary": told}

    def shape(self, facts: ArtifactContext) -> tuple[int, ...]:
        return (len(facts.classes), *facts.shapes["features"])


@ARTIFACTS.register("feature_precision", produces="tensor", operands=("features",), labels=True)
class FeaturePrecision(_ClassFeatureStatistic):
    """The inverse of each class's shrunk, normalised covariance, [classes, elements, elements]: `precision` of `scar`.

    value_c = pinv(N(H(H(S_c)))), S_c the covariance over class c of max(x, 0) ** power;
    H(S) = S + shrink * mean(diagonal of S) * I + shrink * mean(off-diagonal of S) * (1 - I), where only entries other
    than 0 count for the second mean; N(S)_ij = S_ij / sqrt(S_ii S_jj). As in the authors' code, where shrink is 3 (the
    text has two factors, gamma1 and gamma2). Bonato, Cotogni and Sabetta, Is Retain Set All You Need in Machine
    Unlearning?, ECCV 2024, arXiv:2404.12922.

    features: (samples, elements), behind a ReLU; at least two of each class. power: the term's.
    """

    min_samples = 2

    def __init__(self, power: float = 0.5, shrink: float = 3.0) -> None:
        super().__init__(power)
        if shrink < 0:
            raise ConfigError(f"shrink must be at least 0, got {shrink}")
        self.shrink = shrink

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        classes, told = self.features_by_class(pool)
        return {"value": torch.stack([self._precision_matrix(own) for own in classes]).float(), "summary": told}

    def _precision_matrix(self, features: Tensor) -> Tensor:
        # From the first sample on, so that what never varies has a variance of exactly 0, not one of rounding.
        covariance = self._shrink_covariance(self._shrink_covariance(torch.cov((features - features[0]).t())))
        deviation = covariance.diagonal().sqrt()
        scale = torch.outer(deviation, deviation)
        # An element that never varies while none does would divide 0 by 0; it says nothing of the class.
        return torch.linalg.pinv(torch.where(scale > 0, covariance / scale.where(scale > 0, torch.ones_like(scale)), 0))

    def _shrink_covariance(self, covariance: Tensor) -> Tensor:
        eye = torch.eye(len(covariance), dtype=covariance.dtype)
        apart = covariance * (1 - eye)
        off = apart.sum() / (apart != 0).sum().clamp(min=1)
        return covariance + self.shrink * (covariance.diagonal().mean() * eye + off * (1 - eye))

    def shape(self, facts: ArtifactContext) -> tuple[int, ...]:
        elements = facts.shapes["features"][0]
        return (len(facts.classes), elements, elements)


@ARTIFACTS.register("nearest_mean", produces="model", operands=("features",), candidates="candidates", labels=True)
class NearestMeanBuilder(ArtifactBuilder):
    """The classifier of iCaRL: each class's mean of features of length 1, itself at length 1.

    Over a source of exemplars it is the nearest mean of exemplars. Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725,
    algorithm 1 and section 2.1. A later stage takes it as `model: {artifact: STAGE.NAME}`, on the same features.

    features: (samples, values). candidates: {nearest: nearest_mean}, the model that is given the means.
    """

    def __init__(self, candidates: dict) -> None:  # type: ignore[type-arg]
        if len(candidates) != 1:
            raise ConfigError(f"nearest_mean: there is one candidate, the model of the means, got {len(candidates)}")
        self.candidates = candidates

    def check(self, facts: ArtifactContext) -> None:
        shape = facts.shapes.get("features", (1,))
        if len(shape) != 1:
            raise ValueError(f"reads a feature vector per sample, but the operand is {list(shape)}")

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        found = pool.gather("features", "label")
        features = torch.nn.functional.normalize(found["features"].double(), dim=1)
        label, classes = found["label"], len(pool.context.classes)
        means = torch.zeros(classes, features.shape[1], dtype=features.dtype)
        for number in range(classes):
            if (label == number).any():
                means[number] = features[label == number].mean(0)
        means = torch.nn.functional.normalize(means, dim=1)
        params = dict(next(iter(self.candidates.values())))
        kind = params.pop("type")
        told = {"samples": int((label >= 0).sum()), "classes": int((means != 0).any(1).sum())}
        return {"type": kind, "params": {**params, "means": means.tolist()}, "summary": told}


@ARTIFACTS.register("fisher", produces="tensor", operands=("weights",), labels=True)
class FisherInformation(ArtifactBuilder):
    """The diagonal of the Fisher information of a network's parameters, [parameters]: `fisher` of the term `ewc`.

    value_i = mean over the samples of (d log p(label) / d w_i)^2, one gradient per sample, the network in eval mode,
    its parameters in the order of ROLE:/weights. With `labels: drawn` the label is drawn from the network's own
    prediction, which is the Fisher information; `own` takes that of the sample (the empirical Fisher of most released
    code). In a loop the value of the round before is added: one penalty per task, all of them around the newest
    weights, as in online EWC (Schwarz et al., Progress & Compress, ICML 2018, arXiv:1805.06370, with factor 1).

    Kirkpatrick, Pascanu, Rabinowitz et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017,
    arXiv:1612.00796.

    weights: of the network, student:/weights. It sees the field `image`, and gives logits. keep: the classes among
    which the task decides; null: all. labels: see above.
    """

    def __init__(self, keep: list[int] | None = None, labels: Literal["own", "drawn"] = "drawn") -> None:
        if keep is not None and (not keep or min(keep) < 0):
            raise ConfigError(f"fisher: keep lists class numbers, got {keep}")
        self.keep, self.labels = keep, labels

    def check(self, facts: ArtifactContext) -> None:
        if self.keep is not None and max(self.keep) >= len(facts.classes):
            raise ValueError(f"keeps class {max(self.keep)}, but there are {len(facts.classes)} classes from 0 on")

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        operand = pool.operands["weights"]
        if operand.side != "weights" or not operand_feature(operand).is_output:
            raise ConfigError(
                f"fisher: weights must be those of a whole network, such as student:/weights, got {operand}"
            )
        model = pool.modules[operand.role]
        training = model.training
        model.eval()
        parameters = {name: value.detach().double() for name, value in model.named_parameters()}
        buffers = {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
        draws = torch.Generator().manual_seed(pool.seed)
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        samples = 0

        def surprise(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            log_p = self._log_probabilities(model, parameters, buffers, image.unsqueeze(0))
            return F.nll_loss(log_p, label.unsqueeze(0))

        each = vmap(grad(surprise), in_dims=(None, 0, 0))
        for row in pool.batches():
            images = row["image"].double()
            known = row["label"] >= 0
            if self.labels == "drawn":
                p = self._log_probabilities(model, parameters, buffers, images).exp().cpu()
                label = torch.multinomial(p, 1, generator=draws).squeeze(1).to(images.device)
            else:
                images, label = images[known], row["label"][known]
            for part, own in zip(images.split(32), label.split(32), strict=True):
                for name, gradient in each(parameters, part, own).items():
                    total[name] += gradient.square().sum(0)
            samples += len(images)
        model.train(training)
        value = torch.cat([total[name].reshape(-1) for name in parameters]).float().cpu() / max(samples, 1)
        if pool.previous is not None:
            value = value + pool.previous["value"]
        return {"value": value, "summary": {"samples": samples, "mean": float(value.mean())}}

    def _log_probabilities(self, model: nn.Module, parameters: Any, buffers: Any, images: Tensor) -> Tensor:
        logits = model_output(functional_call(model, (parameters, buffers), (images,)))
        if self.keep is not None:
            inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            inside[torch.tensor(self.keep)] = True
            logits = torch.where(inside, logits, -1e4)
        return F.log_softmax(logits, dim=1)

    def shape(self, facts: ArtifactContext) -> tuple[int, ...]:
        return facts.shapes["weights"]


@ARTIFACTS.register("class_means", produces="tensor", operands=("features",), labels=True)
class ClassMeans(ArtifactBuilder):
    """The mean of an operand over the samples of each class, [classes, ...].

    features: (samples, ...), such as a teacher's penultimate layer. KD++ takes its class means as the directions in
    which a student's features should grow (Wang et al., Improving Knowledge Distillation via Regularizing Feature
    Direction and Norm, ECCV 2024, arXiv:2305.17007). Samples without a label do not count; a class without samples has
    mean 0.
    """

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        classes = len(pool.context.classes)
        sums: Tensor | None = None
        counts = torch.zeros(classes)
        for row in pool.batches():
            features, label = row["features"].double().cpu(), row["label"].cpu()
            known = label >= 0
            if sums is None:
                sums = torch.zeros(classes, *features.shape[1:], dtype=torch.float64)
            sums.index_add_(0, label[known], features[known])
            counts += torch.bincount(label[known], minlength=classes)
        assert sums is not None
        means = sums / counts.clamp(min=1).view(-1, *([1] * (sums.dim() - 1)))
        empty = [pool.context.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
        return {"value": means.float(), "summary": {"samples": int(counts.sum()), "classes without samples": empty}}

    def shape(self, facts: ArtifactContext) -> tuple[int, ...]:
        return (len(facts.classes), *facts.shapes["features"])


@ARTIFACTS.register("class_counts", produces="tensor", labels=True)
class ClassCounts(ArtifactBuilder):
    """How many samples of each class the source gives, [classes]: what long-tailed losses weigh classes by.

    Samples without a label do not count.
    """

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        label = pool.gather("label")["label"]
        counts = torch.bincount(label[label >= 0], minlength=len(pool.context.classes))
        return {"value": counts.float(), "summary": {"samples": int(counts.sum()), "by class": counts.tolist()}}

    def shape(self, facts: ArtifactContext) -> tuple[int, ...]:
        return (len(facts.classes),)


@ARTIFACTS.register("outputs", produces="tensor", operands=("value",))
class StoredOutputs(ArtifactBuilder):
    """What a role says of every sample, [samples of the whole split, ...], addressed by the batch's `index`.

    value: (samples, ...), such as a teacher's logits, which then need no teacher any more. Rows of samples that the
    source does not give are 0.
    """

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        found = pool.gather("value", "index")
        value = torch.zeros(pool.source.population, *found["value"].shape[1:], dtype=found["value"].dtype)
        value[found["index"]] = found["value"]
        return {"value": value, "summary": {"samples": len(found["index"])}}

    def shape(self, facts: ArtifactContext) -> tuple[int, ...]:
        return (facts.population or 1, *facts.shapes["value"])
