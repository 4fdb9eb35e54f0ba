"""Artifact builders for tensors (class statistics, stored outputs, Fisher information) and nearest-mean models."""

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

MASKED_LOGIT = -1e4
"""Logit of a class outside `keep`, as in the model `task_logits`."""


class _ClassFeatureStatistic(ArtifactBuilder):
    """Base class for statistics of the features of each class, after a power transformation (Tukey)."""

    min_samples = 1
    """Number of labelled samples that every class must have."""

    def __init__(self, power: float = 0.5) -> None:
        if power <= 0:
            raise ConfigError(f"power must be above 0, got {power}")
        self.power = power

    def check(self, context: ArtifactContext) -> None:
        _check_feature_vector(context)

    def features_by_class(self, outputs: SampleOutputs) -> tuple[list[Tensor], dict[str, Any]]:
        """Computes max(features, 0) ** power for the samples of each class.

        Returns:
            One float64 tensor (samples of the class, elements) per class, and the artifact's summary.

        Raises:
            ConfigError: a class has fewer than `min_samples` labelled samples.
        """
        values = outputs.gather("features", "label")
        features = values["features"].double().clamp(min=0) ** self.power
        names = outputs.context.classes
        classes = [features[values["label"] == number] for number in range(len(names))]
        too_few = [name for name, rows in zip(names, classes, strict=True) if len(rows) < self.min_samples]
        if too_few:
            raise ConfigError(
                f"needs at least {self.min_samples} labelled samples of every class; too few of {', '.join(too_few)}"
            )
        return classes, {"samples": sum(len(rows) for rows in classes)}


def _check_feature_vector(context: ArtifactContext) -> None:
    """Raises ValueError if the operand `features` is not one vector per sample."""
    shape = context.shapes.get("features", (1,))
    if len(shape) != 1:
        raise ValueError(f"reads a feature vector per sample, but operand features has shape {list(shape)} per sample")


@ARTIFACTS.register("feature_means", produces="tensor", operands=("features",), labels=True)
class FeatureMeans(_ClassFeatureStatistic):
    """Mean of the power-transformed features of each class, [classes, elements]; operand of the term `scar`.

    value_c = mean over class c of max(x, 0) ** power, as in the authors' code. Bonato, Cotogni and Sabetta, Is Retain
    Set All You Need in Machine Unlearning?, ECCV 2024, arXiv:2404.12922. The term `scar` reads the means as its
    operand `means`.

    Operands:
        features: (samples, elements), after a ReLU.

    Args:
        power: exponent, above 0, which must equal the term's `power`.

    Example (recipe):
        artifacts: {means: {type: feature_means, features: "teacher:pool"}}
    """

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        classes, summary = self.features_by_class(outputs)
        return {"value": torch.stack([features.mean(0) for features in classes]).float(), "summary": summary}

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        return (len(context.classes), *context.shapes["features"])


@ARTIFACTS.register("feature_precision", produces="tensor", operands=("features",), labels=True)
class FeaturePrecision(_ClassFeatureStatistic):
    """Inverse of the shrunk covariance of each class, [classes, elements, elements]; operand of the term `scar`.

    value_c = pinv(N(H(H(S_c)))), where

        S_c      covariance of max(x, 0) ** power over class c
        H(S)     S + shrink * mean(diagonal of S) * I + shrink * mean(non-zero off-diagonal of S) * (1 - I)
        N(S)_ij  S_ij / sqrt(S_ii S_jj)

    as in the authors' code, where shrink is 3 (the paper's text has two factors, gamma1 and gamma2). Bonato, Cotogni
    and Sabetta, Is Retain Set All You Need in Machine Unlearning?, ECCV 2024, arXiv:2404.12922. The term `scar` reads
    the result as its operand `precision`.

    Operands:
        features: (samples, elements), after a ReLU; at least two samples of each class.

    Args:
        power: exponent, above 0, which must equal the term's `power`.
        shrink: shrinkage factor, at least 0.

    Example (recipe):
        artifacts: {precision: {type: feature_precision, features: "teacher:pool"}}
    """

    min_samples = 2

    def __init__(self, power: float = 0.5, shrink: float = 3.0) -> None:
        super().__init__(power)
        if shrink < 0:
            raise ConfigError(f"shrink must be at least 0, got {shrink}")
        self.shrink = shrink

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        classes, summary = self.features_by_class(outputs)
        value = torch.stack([self._precision_matrix(features) for features in classes]).float()
        return {"value": value, "summary": summary}

    def _precision_matrix(self, features: Tensor) -> Tensor:
        # Subtracting the first sample gives a constant element a variance of exactly 0 instead of rounding noise.
        covariance = self._shrink_covariance(self._shrink_covariance(torch.cov((features - features[0]).t())))
        deviation = covariance.diagonal().sqrt()
        scale = torch.outer(deviation, deviation)
        # Without shrinkage the scale of a constant element is 0; its row and column become 0 instead of NaN.
        return torch.linalg.pinv(torch.where(scale > 0, covariance / scale.where(scale > 0, torch.ones_like(scale)), 0))

    def _shrink_covariance(self, covariance: Tensor) -> Tensor:
        eye = torch.eye(len(covariance), dtype=covariance.dtype)
        off_diagonal = covariance * (1 - eye)
        mean = off_diagonal.sum() / (off_diagonal != 0).sum().clamp(min=1)
        return covariance + self.shrink * (covariance.diagonal().mean() * eye + mean * (1 - eye))

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        elements = context.shapes["features"][0]
        return (len(context.classes), elements, elements)


@ARTIFACTS.register("nearest_mean", produces="model", operands=("features",), candidates="candidates", labels=True)
class NearestMeanBuilder(ArtifactBuilder):
    """Classifier by the nearest class mean, with normalised class means of normalised features (iCaRL).

    If the source contains exemplars (the stored samples of earlier classes), the result is iCaRL's
    nearest-mean-of-exemplars classifier. Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725, algorithm 1 and
    section 2.1. A later stage uses the classifier as `model: {artifact: STAGE.NAME}` on the same features. A class
    without samples has mean 0.

    Operands:
        features: (samples, values).

    Args:
        candidates: the mapping {nearest: nearest_mean}. The model `nearest_mean` receives the class means.

    Example (recipe):
        artifacts: {nearest: {type: nearest_mean, features: "student:pool", candidates: {nearest: nearest_mean}}}
    """

    def __init__(self, candidates: dict) -> None:  # type: ignore[type-arg]
        if len(candidates) != 1:
            raise ConfigError(
                f"nearest_mean: candidates must contain one candidate, the model that receives the means, "
                f"got {len(candidates)}"
            )
        self.candidates = candidates

    def check(self, context: ArtifactContext) -> None:
        _check_feature_vector(context)

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        values = outputs.gather("features", "label")
        features = F.normalize(values["features"].double(), dim=1)
        label, classes = values["label"], len(outputs.context.classes)
        means = torch.zeros(classes, features.shape[1], dtype=features.dtype)
        for number in range(classes):
            if (label == number).any():
                means[number] = features[label == number].mean(0)
        means = F.normalize(means, dim=1)
        params = dict(next(iter(self.candidates.values())))
        model_type = params.pop("type")
        summary = {"samples": int((label >= 0).sum()), "classes": int((means != 0).any(1).sum())}
        return {"type": model_type, "params": {**params, "means": means.tolist()}, "summary": summary}


@ARTIFACTS.register("fisher", produces="tensor", operands=("weights",), labels=True)
class FisherInformation(ArtifactBuilder):
    r"""Diagonal of the Fisher information of a network's parameters, [parameters]; operand `fisher` of the term `ewc`.

    .. math:: F_i = \frac{1}{N} \sum_n \left( \frac{\partial \log p(y_n \mid x_n)}{\partial w_i} \right)^2

    with one gradient per sample, the network in eval mode, and the parameters in the order of ROLE:/weights. In a
    loop over tasks the value of the previous round is added. The penalties of all tasks are then centered at the
    newest weights, as in online EWC with factor 1 (Schwarz et al., Progress & Compress, ICML 2018, arXiv:1805.06370).

    Kirkpatrick, Pascanu, Rabinowitz et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017,
    arXiv:1612.00796.

    Operands:
        weights: parameters of the network, such as student:/weights. The network maps the field `image` to logits.

    Args:
        keep: numbers of the classes in the softmax; null: all classes.
        labels: `drawn`: y is sampled from the network's prediction, which gives the Fisher information. `own`: y is
            the label of the sample, which gives the empirical Fisher of most released code; samples without a label
            are skipped.

    Example (recipe):
        artifacts: {fisher: {type: fisher, weights: "student:/weights"}}
    """

    def __init__(self, keep: list[int] | None = None, labels: Literal["own", "drawn"] = "drawn") -> None:
        if keep is not None and (not keep or min(keep) < 0):
            raise ConfigError(f"fisher: keep must be a list of class numbers, got {keep}")
        self.keep, self.labels = keep, labels

    def check(self, context: ArtifactContext) -> None:
        if self.keep is not None and max(self.keep) >= len(context.classes):
            raise ValueError(
                f"has class {max(self.keep)} in `keep`, but the classes are 0 to {len(context.classes) - 1}"
            )

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        operand = outputs.operands["weights"]
        if operand.side != "weights" or not operand_feature(operand).is_output:
            raise ConfigError(f"fisher: weights must address a whole network, such as student:/weights, got {operand}")
        model = outputs.modules[operand.role]
        training = model.training
        model.eval()
        total, samples = self._sum_squared_gradients(model, outputs)
        model.train(training)
        value = torch.cat([total[name].reshape(-1) for name in total]).float().cpu() / max(samples, 1)
        if outputs.previous is not None:
            value = value + outputs.previous["value"]
        return {"value": value, "summary": {"samples": samples, "mean": float(value.mean())}}

    def _sum_squared_gradients(self, model: nn.Module, outputs: SampleOutputs) -> tuple[dict[str, Tensor], int]:
        """Sums squared per-sample gradients in float64. Returns parameter name -> sum, and the number of samples."""
        parameters = {name: value.detach().double() for name, value in model.named_parameters()}
        buffers = {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
        generator = torch.Generator().manual_seed(outputs.seed)
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        samples = 0

        def negative_log_likelihood(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            log_p = self._log_probabilities(model, parameters, buffers, image.unsqueeze(0))
            return F.nll_loss(log_p, label.unsqueeze(0))

        sample_gradients = vmap(grad(negative_log_likelihood), in_dims=(None, 0, 0))
        for batch in outputs.batches():
            images = batch["image"].double()
            has_label = batch["label"] >= 0
            if self.labels == "drawn":
                # Sampling on the CPU gives the same labels on every device.
                p = self._log_probabilities(model, parameters, buffers, images).exp().cpu()
                label = torch.multinomial(p, 1, generator=generator).squeeze(1).to(images.device)
            else:
                images, label = images[has_label], batch["label"][has_label]
            # Blocks of 32 bound the memory of the per-sample gradients.
            for image_block, label_block in zip(images.split(32), label.split(32), strict=True):
                for name, gradient in sample_gradients(parameters, image_block, label_block).items():
                    total[name] += gradient.square().sum(0)
            samples += len(images)
        return total, samples

    def _log_probabilities(self, model: nn.Module, parameters: Any, buffers: Any, images: Tensor) -> Tensor:
        logits = model_output(functional_call(model, (parameters, buffers), (images,)))
        if self.keep is not None:
            in_keep = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            in_keep[torch.tensor(self.keep)] = True
            logits = torch.where(in_keep, logits, MASKED_LOGIT)
        return F.log_softmax(logits, dim=1)

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        return context.shapes["weights"]


@ARTIFACTS.register("class_means", produces="tensor", operands=("features",), labels=True)
class ClassMeans(ArtifactBuilder):
    """Mean of an operand over the samples of each class, a tensor [classes, ...].

    KD++ uses the class means of the teacher as target directions of the student's features (Wang et al., Improving
    Knowledge Distillation via Regularizing Feature Direction and Norm, ECCV 2024, arXiv:2305.17007). Samples without
    a label are ignored; a class without samples has mean 0.

    Operands:
        features: (samples, ...), such as a teacher's penultimate layer.

    Example (recipe):
        artifacts: {centers: {type: class_means, features: "teacher:pool"}}
    """

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        classes = len(outputs.context.classes)
        sums: Tensor | None = None
        counts = torch.zeros(classes)
        for batch in outputs.batches():
            features, label = batch["features"].double().cpu(), batch["label"].cpu()
            has_label = label >= 0
            if sums is None:
                sums = torch.zeros(classes, *features.shape[1:], dtype=torch.float64)
            sums.index_add_(0, label[has_label], features[has_label])
            counts += torch.bincount(label[has_label], minlength=classes)
        assert sums is not None
        means = sums / counts.clamp(min=1).view(-1, *([1] * (sums.dim() - 1)))
        empty = [outputs.context.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
        return {"value": means.float(), "summary": {"samples": int(counts.sum()), "classes without samples": empty}}

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        return (len(context.classes), *context.shapes["features"])


@ARTIFACTS.register("class_counts", produces="tensor", labels=True)
class ClassCounts(ArtifactBuilder):
    """Number of samples of each class, [classes], for the class weights of long-tailed losses.

    Samples without a label are ignored.

    Example (recipe):
        artifacts: {counts: {type: class_counts}}
    """

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        label = outputs.gather("label")["label"]
        counts = torch.bincount(label[label >= 0], minlength=len(outputs.context.classes))
        return {"value": counts.float(), "summary": {"samples": int(counts.sum()), "by class": counts.tolist()}}

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        return (len(context.classes),)


@ARTIFACTS.register("outputs", produces="tensor", operands=("value",))
class StoredOutputs(ArtifactBuilder):
    """An operand's value for every sample of a split, [samples of the split, ...].

    A later stage looks up the rows of a batch by the batch's field `index`. Rows of samples that are not in the
    source are 0.

    Operands:
        value: (samples, ...), such as a teacher's logits. Later stages read the stored values instead of running the
            teacher.

    Example (recipe):
        artifacts: {logits: {type: outputs, value: "teacher:logits"}}
    """

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        values = outputs.gather("value", "index")
        value = torch.zeros(outputs.source.population, *values["value"].shape[1:], dtype=values["value"].dtype)
        value[values["index"]] = values["value"]
        return {"value": value, "summary": {"samples": len(values["index"])}}

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        return (context.population or 1, *context.shapes["value"])
