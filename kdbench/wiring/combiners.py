"""Combiners: modules that compute one tensor from several, for example the prediction of an ensemble.

A loss term reads the result like the output of a network.
"""

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
    """Stacks tensors (batch, ...) to one tensor (batch, number of tensors, ...) of at least float32."""
    return torch.stack([at_least_float32(value) for value in values], dim=1)


def _log_mixture(log_p: Tensor, log_weights: Tensor) -> Tensor:
    """Computes the log of the weighted sum of exp(log_p) over the parts. `log_p` is (batch, parts, classes)."""
    return torch.logsumexp(log_p + log_weights.unsqueeze(-1), dim=1)


@COMBINERS.register("mean_logits", version=1)
class MeanLogits(Combiner):
    """Element-wise mean of several tensors of equal shape, for example of logits or features.

    Shape:
        values: (batch, ...) each. Returns the same shape.
    """

    def forward(self, values: list[Tensor]) -> Tensor:
        return _stack_values(values).mean(1)


@COMBINERS.register("mean_probabilities", version=1)
class MeanProbabilities(Combiner):
    """Mean of the softmaxes of several networks at a temperature T, returned as logits (arXiv:1503.02531, MEAL V2).

        result = T * log(mean_i softmax(z_i / T))

    softmax(result / T) is therefore the mean of the softmaxes. A loss term that reads the result must use the same T.

    Args:
        temperature: T, above 0.

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
    """Weighted mean of logits or of probabilities. The weights are scaled to sum 1.

        of logits: sum_i w_i z_i
        of probabilities: T * log(sum_i w_i softmax(z_i / T))

    Args:
        weights: one weight per tensor in `values`, at least 0. At least one weight is above 0.
        of: averaged quantity, `logits` or `probabilities`.
        temperature: T, above 0. Only used if `of` is `probabilities`.

    Shape:
        values: logits (batch, classes) each. If `of` is `logits`, any tensors of equal shape. Returns the same shape.
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
            raise ConfigError(
                f"weighted: weights must have {parts} entries, one per combined operand, got {len(weights)}"
            )
        if any(not 0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise ConfigError(f"weighted: weights must be at least 0, and at least one above 0, got {weights}")
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
    """Majority vote: logarithm of the smoothed fraction of networks that predict each class.

        result_k = log((1 - e) * votes_k / networks + e / classes), where e is `smoothing`

    votes_k is the number of networks whose largest logit is that of class k. No gradient flows through the result.

    Args:
        smoothing: e, above 0 and at most 1.

    Shape:
        values: logits (batch, classes) each. Returns (batch, classes), at most 0. The softmax of the result gives the
        smoothed fractions.
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
    """KDCL-MinLogit: for each class, the minimum over the networks of the class's logit minus the label's logit.

        result_k = min_i(z_i,k - z_i,label)

    The result is 0 for the label. If the label of a sample is hidden (negative), the result is the mean of the
    logits. Neither the code nor the full text of the paper was available. The implementation follows common
    descriptions of the method.

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
    """KDCL-Naive: for each sample, the logits of the network with the smallest cross-entropy with the label.

    If the label of a sample is hidden (negative), the result is the mean of the logits. Neither the code nor the full
    text of the paper was available. The implementation follows common descriptions of the method.

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
    """ONE: mean of the logits of several branches, weighted by a learnt gate.

        result = sum_i g_i z_i, g = softmax(gate)

    The gate is a separate network on the features that all branches share. The cross-entropy of the ensemble trains
    the gate, and the same gate weights the ensemble that teaches the branches. The formula follows the paper. The
    authors' code (Lan1991Xu/ONE_NeurIPS2018) also has BatchNorm and ReLU before the softmax.

    Shape:
        values: logits (batch, classes) each. gate: (batch, branches). Returns (batch, classes).

    Example (recipe):
        models: {gate: {model: {type: linear_head, num_classes: 3}, input: "trunk:layer2"}}
        terms: {ensemble: {type: cross_entropy, student: {combine: gate, of: [a, b, c], gate: gate}}}

    References:
        Lan, Zhu and Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, arXiv:1806.04606.
    """

    def forward(self, values: list[Tensor], gate: Tensor) -> Tensor:
        if gate.dim() != 2 or gate.shape[1] != len(values):
            raise ValueError(
                f"the gate must have one value for each of the {len(values)} combined operands, got shape "
                f"{list(gate.shape[1:])} per sample"
            )
        weights = F.softmax(at_least_float32(gate), dim=1)
        return (weights.unsqueeze(2) * _stack_values(values)).sum(1)


@COMBINERS.register("confidence", version=1, operands=("label",))
class ConfidenceCombiner(Combiner):
    """CA-MKD for features: one weight per teacher and sample, computed from cross-entropies with the label.

        weight_e = (1 - softmax_e(CE_1 .. CE_E)) / (E - 1)

    CE_e is the cross-entropy of the logits in `values`, for example the outputs of teacher e's classifier on the
    student's features. If the label of a sample is hidden (negative), all weights are 1 / E. As in the authors' code,
    the weights are not detached. The router `confidence` has the same formula for the logits of the teachers, without
    gradient.

    Shape:
        values: logits (batch, classes) each. label: (batch,), int64. Returns the weights (batch, E), each row of sum
            1.

    Example (recipe):
        route: {type: given, gradient: true, route: {combine: confidence, of: [a_reads, b_reads], label: train.label}}

    References:
        Zhang, Chen and Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, arXiv:2201.00007.
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        costs = torch.stack([cross_entropy_loss(value, label) for value in values], dim=1)
        return (1 - F.softmax(costs, dim=1)) / (len(values) - 1)
