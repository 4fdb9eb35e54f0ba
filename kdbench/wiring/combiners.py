"""Several operands made one: what an ensemble says, as values that any term reads like logits."""

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
    """(batch, parts, ...), at least float32."""
    return torch.stack([at_least_float32(value) for value in values], dim=1)


def _log_mixture(log_p: Tensor, log_shares: Tensor) -> Tensor:
    """Log of the weighted mean over the parts of exp(log_p), (batch, parts, classes) -> (batch, classes)."""
    return torch.logsumexp(log_p + log_shares.unsqueeze(-1), dim=1)


@COMBINERS.register("mean_logits", version=1)
class MeanLogits(Combiner):
    """The mean of the parts, element by element: logits, or features of equal shape.

    Shapes: parts (batch, ...) -> the same.
    """

    def forward(self, values: list[Tensor]) -> Tensor:
        return _stack_values(values).mean(1)


@COMBINERS.register("mean_probabilities", version=1)
class MeanProbabilities(Combiner):
    """The mean of the parts' softmaxes at a temperature, given out as logits (arXiv:1503.02531, MEAL V2).

    result = T * log(mean_i softmax(z_i / T)), so that softmax(result / T) is the mean of the softmaxes: the term that
    reads it must have the same temperature.

    Shapes: logits (batch, classes) each -> (batch, classes), at most 0.
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
    """A weighted mean of the parts, of logits or of probabilities; the weights are scaled to sum to 1.

    of logits: sum_i w_i z_i. of probabilities: T * log(sum_i w_i softmax(z_i / T)), as `mean_probabilities`.

    Shapes: logits (batch, classes) each (of logits: any equal shapes) -> the same.
    """

    shares: Tensor

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
        shares = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("shares", (shares / shares.sum()).to(torch.float32), persistent=False)

    def forward(self, values: list[Tensor]) -> Tensor:
        stacked = _stack_values(values)
        shares = self.shares.to(stacked.dtype)
        if self.of == "logits":
            return (stacked * shares.reshape(-1, *(1,) * (stacked.dim() - 2))).sum(1)
        log_p = F.log_softmax(stacked / self.temperature, dim=2)
        return self.temperature * _log_mixture(log_p, shares.log().expand(log_p.shape[:2]))


@COMBINERS.register("vote", version=1)
class MajorityVote(Combiner):
    """Majority vote: the log of each class's share of the parts' first choices, smoothed.

    result = log((1 - e) * votes_k / parts + e / classes), e = `smoothing`. No gradient flows through it.

    Shapes: logits (batch, classes) each -> (batch, classes), at most 0; softmax at T = 1 gives the shares.
    """

    def __init__(self, smoothing: float = 0.01) -> None:
        super().__init__()
        check_parameters("vote", "above 0", smoothing=smoothing)
        check_parameters("vote", "in [0, 1]", smoothing=smoothing)
        self.smoothing = smoothing

    def forward(self, values: list[Tensor]) -> Tensor:
        stacked = _stack_values(values).detach()
        choices = stacked.argmax(2, keepdim=True)
        shares = torch.zeros_like(stacked).scatter(2, choices, 1).mean(1)
        return ((1 - self.smoothing) * shares + self.smoothing / shares.shape[1]).log()


@COMBINERS.register("kdcl_min_logit", version=1, operands=("label",))
class KDCLMinLogit(Combiner):
    """KDCL-MinLogit: each class's least logit among the parts, after the label's own logit is taken off.

    result_k = min_i(z_i,k - z_i,label), 0 at the label: of every wrong class, the least that any network gives it.
    Hidden labels (negative): the mean of the logits. No code was found, and the text was not at hand: the method as it
    is known.

    Guo, Wang, Wu, Yu, Liang, Hu and Luo, Online Knowledge Distillation via Collaborative Learning, CVPR 2020.
    Shapes: logits (batch, classes) each, label (batch,) -> (batch, classes).
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        stacked = _stack_values(values)
        own = label.clamp(min=0).reshape(-1, 1, 1).expand(-1, stacked.shape[1], 1)
        least = (stacked - stacked.gather(2, own)).min(1).values
        return torch.where((label < 0).unsqueeze(1), stacked.mean(1), least)


@COMBINERS.register("kdcl_naive", version=1, operands=("label",))
class KDCLNaive(Combiner):
    """KDCL-Naive: for each sample, the logits of the part with the least cross-entropy.

    Hidden labels (negative): the mean of the logits. No code was found, and the text was not at hand: the method as it
    is known.

    Guo, Wang, Wu, Yu, Liang, Hu and Luo, Online Knowledge Distillation via Collaborative Learning, CVPR 2020.
    Shapes: logits (batch, classes) each, label (batch,) -> (batch, classes).
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        stacked = _stack_values(values)
        own = label.clamp(min=0).reshape(-1, 1, 1).expand(-1, stacked.shape[1], 1)
        best = F.log_softmax(stacked.detach(), dim=2).gather(2, own).squeeze(2).argmax(1)
        chosen = stacked.gather(1, best.reshape(-1, 1, 1).expand(-1, 1, stacked.shape[2])).squeeze(1)
        return torch.where((label < 0).unsqueeze(1), stacked.mean(1), chosen)


@COMBINERS.register("gate", version=1, operands=("gate",))
class GatedMean(Combiner):
    """ONE: the parts' logits weighted by a learnt gate.

    result = sum_i g_i z_i, g = softmax(gate). The gate is a role on the features that the parts share, so that the
    cross-entropy of the ensemble trains the very gate by which it teaches:
        models: {gate: {model: {type: linear_head, num_classes: 3}, input: "trunk:layer2"}}
        student: {combine: gate, of: [a, b, c], gate: gate}
    By the text; the authors' code (Lan1991Xu/ONE_NeurIPS2018) has BatchNorm and ReLU before the softmax.

    Lan, Zhu and Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, arXiv:1806.04606.
    Shapes: logits (batch, classes) each, gate (batch, parts) -> (batch, classes).
    """

    def forward(self, values: list[Tensor], gate: Tensor) -> Tensor:
        if gate.dim() != 2 or gate.shape[1] != len(values):
            raise ValueError(
                f"needs one gate value for each of {len(values)} parts, got {list(gate.shape[1:])} per sample"
            )
        shares = F.softmax(at_least_float32(gate), dim=1)
        return (shares.unsqueeze(2) * _stack_values(values)).sum(1)


@COMBINERS.register("confidence", version=1, operands=("label",))
class ConfidenceCombiner(Combiner):
    """CA-MKD, for features: how much each part counts for a sample, by how well it predicts the label.

    result_e = (1 - softmax_e(CE_1 .. CE_E)) / (E - 1), the weights of the router `confidence`. There the teachers' own
    logits decide; here the parts do, such as what each teacher's classifier makes of the student's features:
        route: {type: given, gradient: true, route: {combine: confidence, of: [a_reads, b_reads], label: train.label}}
    With gradient, as in the authors' code. Hidden labels (negative): 1 / E.

    Zhang, Chen and Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, arXiv:2201.00007.
    Shapes: logits (batch, classes) each, label (batch,) -> (batch, parts), each row of sum 1.
    """

    def forward(self, values: list[Tensor], label: Tensor) -> Tensor:
        costs = torch.stack([cross_entropy_loss(value, label) for value in values], dim=1)
        return (1 - F.softmax(costs, dim=1)) / (len(values) - 1)
