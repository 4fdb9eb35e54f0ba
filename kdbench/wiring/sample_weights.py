"""How much each sample of a term counts.

All weights but those of `learnt` are detached: no network can lower its loss through them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.errors import ConfigError
from kdbench.registry import SAMPLE_WEIGHTS
from kdbench.terms.base import Number, check_parameters
from kdbench.terms.divergences import shannon_entropy
from kdbench.terms.logits import cross_entropy_loss
from kdbench.terms.numerics import at_least_float32
from kdbench.wiring.base import SampleWeight


def _detached_softmax(logits: Tensor, temperature: Number = 1.0) -> Tensor:
    return F.softmax(at_least_float32(logits.detach()) / temperature, dim=1)


def _label_probability(probabilities: Tensor, label: Tensor) -> Tensor:
    """The probability of the label; 0 where it is hidden."""
    own = probabilities.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(label < 0, 0, own)


@SAMPLE_WEIGHTS.register("confidence", version=1)
class ConfidenceWeight(SampleWeight):
    """A sample counts by the probability that the teacher gives its label.

    weight = softmax(teacher)[label] ** power. Hidden labels (negative): 0.

    Shapes: teacher logits (batch, classes), label (batch,) -> (batch,), in [0, 1].
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        check_parameters("confidence", "above 0", power=power)
        self.power = power

    def forward(self, teacher: Tensor, label: Tensor) -> Tensor:
        return _label_probability(_detached_softmax(teacher), label) ** self.power


@SAMPLE_WEIGHTS.register("threshold", version=1)
class ThresholdWeight(SampleWeight):
    """Only samples of which the teacher is sure count: 1 where its largest probability reaches `least`, else 0.

    The mask of FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685; 0.95 there). The runner still divides by all
    rows of the batch, as FixMatch does.

    Shapes: teacher logits (batch, classes) -> (batch,), 0 or 1.
    """

    def __init__(self, least: Number = 0.95, temperature: float = 1.0) -> None:
        super().__init__()
        check_parameters("threshold", "in [0, 1]", least=least)
        check_parameters("threshold", "above 0", temperature=temperature)
        self.least = least
        self.temperature = temperature

    def forward(self, teacher: Tensor) -> Tensor:
        sure = _detached_softmax(teacher, self.temperature).amax(1)
        return (sure >= self.least).to(sure.dtype)


@SAMPLE_WEIGHTS.register("entropy_gap", version=1)
class EntropyGapWeight(SampleWeight):
    """Samples where one side is the surer one count more: what balances forward and reverse KL in BD-KD.

    weight = `high` where the entropy of the side `surer` is below the other's, else `low`. BD-KD raises forward KL,
    which spreads, where the student is surer than the teacher, and reverse KL, which sharpens, where the teacher is:
        forward: {type: divergence, kind: forward_kl, sample_weight: {type: entropy_gap, surer: student, high: 2}}
        reverse: {type: divergence, kind: reverse_kl, sample_weight: {type: entropy_gap, surer: teacher, high: 2}}
    The abstract and the text found of it say this; the values of the weights were not found, the defaults are ours.

    Amara, Sepahvand, Meyer, Gross and Clark, BD-KD, 2022, arXiv:2212.12965.
    Shapes: student, teacher logits (batch, classes) -> (batch,), `high` or `low`.
    """

    def __init__(self, surer: Literal["student", "teacher"] = "student", high: Number = 2.0, low: Number = 1.0) -> None:
        super().__init__()
        check_parameters("entropy_gap", "at least 0", high=high, low=low)
        if not isinstance(high, Tensor) and not isinstance(low, Tensor) and high == low:
            raise ConfigError(f"entropy_gap: high and low are both {high}, so that every sample would count alike")
        self.surer = surer
        self.high = high
        self.low = low

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = shannon_entropy(_detached_softmax(student)), shannon_entropy(_detached_softmax(teacher))
        surer = ours < theirs if self.surer == "student" else theirs < ours
        surer = surer.to(ours.dtype)
        return self.high * surer + self.low * (1 - surer)


@SAMPLE_WEIGHTS.register("disagreement", version=1)
class DisagreementWeight(SampleWeight):
    """A sample counts by how far student and teacher are apart: the total variation distance of their softmaxes.

    weight = 1/2 sum_k |p_k - q_k|: 0 where they agree, 1 where they share no class.

    Shapes: student, teacher logits (batch, classes) -> (batch,), in [0, 1].
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (_detached_softmax(student) - _detached_softmax(teacher)).abs().sum(1) / 2


@SAMPLE_WEIGHTS.register("focal", version=1)
class FocalWeight(SampleWeight):
    """Samples that the student has right count less: (1 - p_label) ** power, the factor of the focal loss.

    The weight is detached, where the focal loss differentiates it too. Hidden labels (negative): 0.

    Lin, Goyal, Girshick, He and Dollar, Focal Loss for Dense Object Detection, ICCV 2017, arXiv:1708.02002.
    Shapes: student logits (batch, classes), label (batch,) -> (batch,), in [0, 1].
    """

    def __init__(self, power: Number = 2.0) -> None:
        super().__init__()
        check_parameters("focal", "above 0", power=power)
        self.power = power

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        rest = 1 - _label_probability(_detached_softmax(student), label)
        return torch.where(label < 0, 0, rest**self.power)


@SAMPLE_WEIGHTS.register("loss_ratio", version=1)
class LossRatioWeight(SampleWeight):
    """WSLD: a sample's soft label counts less the better the student has its hard label already, beside the teacher.

    weight = 1 - exp(-CE(student) / (CE(teacher) + 1e-7)): near 0 where the student has learnt the label and soft labels
    would only bias it, 1 - 1/e where both are alike, 1 where the teacher knows it far better. Hidden labels
    (negative): 0.

    Zhou, Song, Chen, Zhou, Wang, Yuan and Zhang, Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
    Tradeoff Perspective, ICLR 2021, arXiv:2102.00650; the small number as in the authors' code
    (bellymonster/Weighted-Soft-Label-Distillation).
    Shapes: student, teacher logits (batch, classes), label (batch,) -> (batch,), in [0, 1].
    """

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        ours, theirs = (cross_entropy_loss(logits.detach(), label) for logits in (student, teacher))
        return 1 - torch.exp(-ours / (theirs + 1e-7))


@SAMPLE_WEIGHTS.register("outside", version=1, operands=("judge",))
class OutsideClassesWeight(SampleWeight):
    """Only samples that a network takes for none of some classes count: 1 where its first choice is another, else 0.

    SCAR so leaves out images that look to the old network like what is to be forgotten (authors' code). The runner
    still divides by all rows of the batch.

    Shapes: judge logits (batch, classes) -> (batch,), 0 or 1.
    """

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        if not classes or min(classes) < 0:
            raise ConfigError(f"outside: classes lists class numbers, got {classes}")
        self.classes = tuple(classes)

    def forward(self, judge: Tensor) -> Tensor:
        first = judge.detach().argmax(1)
        inside = torch.zeros_like(first, dtype=torch.bool)
        for number in self.classes:
            inside = inside | (first == number)
        return 1 - inside.to(at_least_float32(judge.detach()).dtype)


@SAMPLE_WEIGHTS.register("learnt", version=1, operands=("by",))
class LearntWeight(SampleWeight):
    """A sample counts by what a network says of it, and the network learns by what its weights lead to.

    weight = the output, or with `complement` 1 minus it: what the one term gains, the other loses. Nothing is detached
    here. A network that its own weights' loss trained would weigh everything 0: let an update with `inner_step` move it.

    Shapes: by (batch,) or (batch, 1) -> (batch,). The network sees to it that weights are at least 0.
    """

    def __init__(self, complement: bool = False) -> None:
        super().__init__()
        self.complement = complement

    def forward(self, by: Tensor) -> Tensor:
        weight = by.squeeze(1) if by.dim() == 2 else by
        return 1 - weight if self.complement else weight
