"""Combiners: several operands combined to one, such as an ensemble's prediction; any term reads the result."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.errors import ConfigError
from kdbench.registry import COMBINERS
from kdbench.terms.base import check_parameters
from kdbench.terms.logits import cross_entropy_loss
from kdbench.terms.numerics import at_least_float32
from kdbench.wiring.base import Combiner


def _stack_values(values: list[Tensor]) -> Tensor:
    """Stacks the values to (batch, parts, ...), at least float32."""
    return torch.stack([at_least_float32(value) for value in values], dim=1)


def _log_mixture(log_p: Tensor, log_weights: Tensor) -> Tensor:
    """Computes the log of the weighted mean of exp(log_p): (batch, parts, classes) -> (batch, classes)."""
    return torch.logsumexp(log_p + log_weights.unsqueeze(-1), dim=1)


@COMBINERS.register("mean_logits", version=1)
class MeanLogits(Combiner):
    """Mean of the values, element by element: of logits, or of features of equal shape.

    Shape:
        values: (batch, ...) each. Returns the same shape.
    """

    def forward(self, values: list[Tensor]) -> Tensor:
        return _stack_values(values).mean(1)


@COMBINERS.register("mean_probabilities", version=1)
class MeanProbabilities(Combiner):
    """Mean of the softmaxes at a temperature, returned as logits (arXiv:1503.02531, MEAL V2).

    result = T * log(mean_i softmax(z_i / T))

    softmax(result / T) is the mean of the softmaxes: the term that reads the result needs the same temperature.

    Args:
        temperature: T > 0.

    Shape:
        values: logits (batch, classes) each. Returns (batch, classes), at most 0.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_parameters("mean_probabilities", "above 0", temperature=temperature)
        self.temperature = temperature

    def forward(self, values: list[Tensor]) -> Tensor:
        log_p = F.log_softmax(_stack_values(values) / self.temperature, dim=2)
        return self.temperature * (torch.logsumexp(log_p, dim=1) - math.log(len(values)))


@COMBINERS.register("weighted", version=1, injected=("parts",))
class WeightedMean(Combiner):
    """Weighted mean of logits or of probabilities; the weights are scaled to sum 1.

    of logits: sum_i w_i z_i
    of probabilities: T * log(sum_i w_i softmax(z_i / T)), as `mean_probabilities`

    Args:
        weights: one per value, at least 0, one of them above 0.
        of: `logits` or `probabilities`.
        temperature: T > 0 of the probabilities.

    Shape:
        values: logits (batch, classes) each; for logits any equal shapes. Returns the same shape.
    """

    normalized_weights: Tensor

    def __init__(
        self,
        parts: int,
        weights: list[float],
        of: Literal["logits", "probabilities"] = "logits",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_parameters("weighted", "above 0", temperature=temperature)
        if len(weights) != parts:
            raise ConfigError(f"weighted: weights has {len(weights)} entries for {parts} parts")
        if any(not 0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise ConfigError(f"weighted: weights must be at least 0, one above 0, got {weights}")
        self.of = of
        self.temperature = temperature
        exact_weights = torch.tensor(weights, dtype=torch.float64)
        normalized_weights = (exact_weights / exact_weights.sum()).to(torch.float32)
        self.register_buffer("normalized_weights", normalized_weights, persistent=False)

    def forward(self, values: list[Tensor]) -> Tensor:
        stacked = _stack_values(values)
        weights = self.normalized_weights.to(stacked.dtype)
        if self.of == "logits":
            return (stacked * weights.reshape(-1, *(1,) * (stacked.dim() - 2))).sum(1)
        log_p = F.log_softmax(stacked / self.temperature, dim=2)
        return self.temperature * _log_mixture(log_p, weights.log().expand(log_p.shape[:2]))


@COMBINERS.register("vote", version=1)
class MajorityVote(Combiner):
    """Majority vote: logarithm of each class's smoothed fraction of the first choices.

    result = log((1 - e) * votes_k / parts + e / classes), e = smoothing. No gradient passes.

    Args:
        smoothing: e, above 0 and at most 1.

    Shape:
        values: logits (batch, classes) each. Returns (batch, classes), at most 0; its softmax at T = 1 is the smoothed
        fractions.
    """

    def __init__(self, smoothing: float = 0.01) -> None:
        super().__init__()
        check_parameters("vote", "above 0", smoothing=smoothing)
        check_parameters("vote", "in [0, 1]", smoothing=smoothing)
        self.smoothing = smoothing

    def forward(self, values: list[Tensor]) -> Tensor:
        stacked = _stack_values(values).detach()
        first_choices = stacked.argmax(2, keepdim=True)
        fractions = torch.zeros_like(stacked).scatter(2, first_choices, 1).mean(1)
        return ((1 - self.smoothing) * fractions + self.smoothing / fractions.shape[1]).log()


@COMBINERS.register("kdcl_min_logit", version=1, operands=("label",))
class KDCLMinLogit(Combiner):
    """KDCL-MinLogit: minimum over the networks of each class's logit, relative to the label's logit.

    result_k = min_i(z_i,k - z_i,label)

    0 at the label; for every wrong class, the smallest value that any network gives. Hidden labels (negative): the mean
    of the logits. Neither code nor full text was available: this is the method as it is commonly described.

    Shape:
        values: logits (batch, classes) each. label: (batch,), int64. Returns (batch, classes).

    References:
        Guo, Wang, Wu, Yu, Liang, Hu and Luo, Online Knowledge Distillation via Collaborative Learning, CVPR 2020.
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        stacked = _stack_values(values)
        label_index = label.clamp(min=0).reshape(-1, 1, 1).expand(-1, stacked.shape[1], 1)
        min_logits = (stacked - stacked.gather(2, label_index)).min(1).values
        return torch.where((label < 0).unsqueeze(1), stacked.mean(1), min_logits)


@COMBINERS.register("kdcl_naive", version=1, operands=("label",))
class KDCLNaive(Combiner):
    """KDCL-Naive: for each sample, the logits of the network with the smallest cross-entropy.

    Hidden labels (negative): the mean of the logits. Neither code nor full text was available: this is the method as it
    is commonly described.

    Shape:
        values: logits (batch, classes) each. label: (batch,), int64. Returns (batch, classes).

    References:
        Guo, Wang, Wu, Yu, Liang, Hu and Luo, Online Knowledge Distillation via Collaborative Learning, CVPR 2020.
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        stacked = _stack_values(values)
        label_index = label.clamp(min=0).reshape(-1, 1, 1).expand(-1, stacked.shape[1], 1)
        best = F.log_softmax(stacked.detach(), dim=2).gather(2, label_index).squeeze(2).argmax(1)
        best_logits = stacked.gather(1, best.reshape(-1, 1, 1).expand(-1, 1, stacked.shape[2])).squeeze(1)
        return torch.where((label < 0).unsqueeze(1), stacked.mean(1), best_logits)


@COMBINERS.register("gate", version=1, operands=("gate",))
class GatedMean(Combiner):
    """ONE: mean of the logits, weighted by a learnt gate.

    result = sum_i g_i z_i, g = softmax(gate)

    The gate is a role on the features that the networks share; the ensemble's cross-entropy trains the same gate that
    weights the teaching ensemble. By the text; the authors' code (Lan1991Xu/ONE_NeurIPS2018) has BatchNorm and ReLU
    before the softmax.

    Shape:
        values: logits (batch, classes) each. gate: (batch, parts). Returns (batch, classes).

    Example (recipe):
        models: {gate: {model: {type: linear_head, num_classes: 3}, input: "trunk:layer2"}}
        terms: {ensemble: {type: cross_entropy, student: {combine: gate, of: [a, b, c], gate: gate}}}

    References:
        Lan, Zhu and Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, arXiv:1806.04606.
    """

    def forward(self, values: list[Tensor], gate: Tensor) -> Tensor:
        if gate.dim() != 2 or gate.shape[1] != len(values):
            raise ValueError(
                f"needs one gate value for each of {len(values)} parts, got {list(gate.shape[1:])} per sample"
            )
        weights = F.softmax(at_least_float32(gate), dim=1)
        return (weights.unsqueeze(2) * _stack_values(values)).sum(1)


@COMBINERS.register("confidence", version=1, operands=("label",))
class ConfidenceCombiner(Combiner):
    """CA-MKD for features: weight of each part per sample, by its cross-entropy with the label.

    result_e = (1 - softmax_e(CE_1 .. CE_E)) / (E - 1), the weights of the router `confidence`

    In the router the logits of the teachers decide; here the parts decide, such as the outputs of each teacher's
    classifier on the student's features. With gradient, as in the authors' code. Hidden labels (negative): 1 / E.

    Shape:
        values: logits (batch, classes) each. label: (batch,), int64. Returns (batch, parts), each row of sum 1.

    Example (recipe):
        route: {type: given, gradient: true, route: {combine: confidence, of: [a_reads, b_reads], label: train.label}}

    References:
        Zhang, Chen and Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, arXiv:2201.00007.
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        costs = torch.stack([cross_entropy_loss(value, label) for value in values], dim=1)
        return (1 - F.softmax(costs, dim=1)) / (len(values) - 1)
