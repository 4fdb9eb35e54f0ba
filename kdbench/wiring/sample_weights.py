"""Sample weights: modules that compute one weight per sample for a loss term.

All weights except `learnt` are detached, so that no network can lower its loss by changing its weights.
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
    """Returns the probability of each sample's label, (batch,). It is 0 if the label is hidden (negative)."""
    label_probability = probabilities.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(label < 0, 0, label_probability)


@SAMPLE_WEIGHTS.register("confidence", version=1)
class ConfidenceWeight(SampleWeight):
    """Sample weight: probability that the teacher assigns to the label, raised to a power.

    weight = softmax(teacher)[label] ** power

    Args:
        power: exponent, above 0.

    Shape:
        teacher: logits (batch, classes). label: (batch,), int64. Samples with a hidden label (negative) get weight 0.
        Returns (batch,), in [0, 1].
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        check_parameters("confidence", "above 0", power=power)
        self.power = power

    def forward(self, teacher: Tensor, label: Tensor) -> Tensor:
        return _label_probability(_detached_softmax(teacher), label) ** self.power


@SAMPLE_WEIGHTS.register("threshold", version=1)
class ThresholdWeight(SampleWeight):
    """Sample weight: 1 if the teacher's largest probability is at least `least`, otherwise 0.

    This is the confidence mask of FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685), which has threshold 0.95.
    As in FixMatch, the loss is divided by the number of all samples of the batch, including samples of weight 0.

    Args:
        least: threshold, in [0, 1].
        temperature: temperature of the teacher's softmax, above 0.

    Shape:
        teacher: logits (batch, classes). Returns (batch,), 0 or 1.
    """

    def __init__(self, least: Number = 0.95, temperature: float = 1.0) -> None:
        super().__init__()
        check_parameters("threshold", "in [0, 1]", least=least)
        check_parameters("threshold", "above 0", temperature=temperature)
        self.least = least
        self.temperature = temperature

    def forward(self, teacher: Tensor) -> Tensor:
        confidence = _detached_softmax(teacher, self.temperature).amax(1)
        return (confidence >= self.least).to(confidence.dtype)


@SAMPLE_WEIGHTS.register("entropy_gap", version=1)
class EntropyGapWeight(SampleWeight):
    """Sample weight: `high` if the network `surer` has the lower entropy, otherwise `low` (BD-KD).

    BD-KD increases the weight of forward KL for samples on which the student has a lower entropy than the teacher,
    and the weight of reverse KL for samples on which the teacher has the lower entropy. The abstract and the
    available part of the text contain this rule, but no values. The default values are a choice of kdbench.

    Args:
        surer: network that must have the lower entropy for the weight `high`: `student` or `teacher`.
        high: weight of samples on which `surer` has the lower entropy, at least 0.
        low: weight of all other samples, at least 0 and different from `high`.

    Shape:
        student, teacher: logits (batch, classes). Returns (batch,), `high` or `low`.

    Example (recipe):
        forward: {type: divergence, kind: forward_kl, sample_weight: {type: entropy_gap, surer: student, high: 2}}
        reverse: {type: divergence, kind: reverse_kl, sample_weight: {type: entropy_gap, surer: teacher, high: 2}}

    References:
        Amara, Sepahvand, Meyer, Gross and Clark, BD-KD, 2022, arXiv:2212.12965.
    """

    def __init__(self, surer: Literal["student", "teacher"] = "student", high: Number = 2.0, low: Number = 1.0) -> None:
        super().__init__()
        check_parameters("entropy_gap", "at least 0", high=high, low=low)
        if not isinstance(high, Tensor) and not isinstance(low, Tensor) and high == low:
            raise ConfigError(f"entropy_gap: high and low must differ, got {high} for each of them")
        self.surer = surer
        self.high = high
        self.low = low

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student_entropy, teacher_entropy = (shannon_entropy(_detached_softmax(side)) for side in (student, teacher))
        is_surer = student_entropy < teacher_entropy if self.surer == "student" else teacher_entropy < student_entropy
        is_surer = is_surer.to(student_entropy.dtype)
        return self.high * is_surer + self.low * (1 - is_surer)


@SAMPLE_WEIGHTS.register("disagreement", version=1)
class DisagreementWeight(SampleWeight):
    """Sample weight: total variation distance between the softmaxes of student and teacher.

    weight = 1/2 sum_k |p_k - q_k|, where p and q are the two softmaxes

    The weight is 0 for equal predictions and 1 if no class has a positive probability in both.

    Shape:
        student, teacher: logits (batch, classes). Returns (batch,), in [0, 1].
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (_detached_softmax(student) - _detached_softmax(teacher)).abs().sum(1) / 2


@SAMPLE_WEIGHTS.register("focal", version=1)
class FocalWeight(SampleWeight):
    """Sample weight: factor of the focal loss, which is lower for samples that the student classifies correctly.

    weight = (1 - p_label) ** power, p = softmax(student)

    The weight is detached. In the focal loss of the paper, a gradient also flows through this factor.

    Args:
        power: exponent, above 0.

    Shape:
        student: logits (batch, classes). label: (batch,), int64. Samples with a hidden label (negative) get weight 0.
        Returns (batch,), in [0, 1].

    References:
        Lin, Goyal, Girshick, He and Dollar, Focal Loss for Dense Object Detection, ICCV 2017, arXiv:1708.02002.
    """

    def __init__(self, power: Number = 2.0) -> None:
        super().__init__()
        check_parameters("focal", "above 0", power=power)
        self.power = power

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        error_probability = 1 - _label_probability(_detached_softmax(student), label)
        return torch.where(label < 0, 0, error_probability**self.power)


@SAMPLE_WEIGHTS.register("loss_ratio", version=1)
class LossRatioWeight(SampleWeight):
    """WSLD: weight of each sample's distillation loss, from the ratio of the cross-entropies of student and teacher.

    weight = 1 - exp(-CE(student) / (CE(teacher) + 1e-7))

    The weight is near 0 if the student has learnt the label, because the soft label would then only add bias. The
    weight is 1 - 1/e at equal cross-entropies, and near 1 if the cross-entropy of the teacher is far lower.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64. Samples with a hidden label (negative) get
        weight 0. Returns (batch,), in [0, 1].

    References:
        Zhou, Song, Chen, Zhou, Wang, Yuan and Zhang, Rethinking Soft Labels for Knowledge Distillation: A
        Bias-Variance Tradeoff Perspective, ICLR 2021, arXiv:2102.00650. The constant 1e-7 is that of the authors'
        code (bellymonster/Weighted-Soft-Label-Distillation).
    """

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        student_loss, teacher_loss = (cross_entropy_loss(logits.detach(), label) for logits in (student, teacher))
        return 1 - torch.exp(-student_loss / (teacher_loss + 1e-7))


@SAMPLE_WEIGHTS.register("outside", version=1, operands=("judge",))
class OutsideClassesWeight(SampleWeight):
    """Sample weight: 0 if the network `judge` predicts one of the listed classes, otherwise 1.

    In the authors' code of SCAR (machine unlearning), samples are excluded in this way if the old network predicts a
    class that is to be forgotten. The loss is divided by the number of all samples of the batch, including samples of
    weight 0.

    Args:
        classes: class numbers for which the weight is 0.

    Shape:
        judge: logits of a network (batch, classes). Returns (batch,), 0 or 1.
    """

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        if not classes or min(classes) < 0:
            raise ConfigError(f"outside: classes must list at least one class number, got {classes}")
        self.classes = tuple(classes)

    def forward(self, judge: Tensor) -> Tensor:
        prediction = judge.detach().argmax(1)
        inside = torch.zeros_like(prediction, dtype=torch.bool)
        for number in self.classes:
            inside = inside | (prediction == number)
        return 1 - inside.to(at_least_float32(judge.detach()).dtype)


@SAMPLE_WEIGHTS.register("learnt", version=1, operands=("by",))
class LearntWeight(SampleWeight):
    """Sample weight: output of a network, with gradient.

    weight = by, or 1 - by with `complement`, where `by` is the output of the network

    With one loss term of weight `by` and a second one of weight 1 - `by`, the network divides each sample between the
    two losses. The weight is not detached: a network that minimised the weighted loss directly would set all weights
    to
    0. Train the network in an update with the key `inner_step` instead (bilevel optimisation).

    Args:
        complement: whether the weight is 1 minus the output.

    Shape:
        by: (batch,) or (batch, 1), at least 0 (the network must ensure this). Returns (batch,).
    """

    def __init__(self, complement: bool = False) -> None:
        super().__init__()
        self.complement = complement

    def forward(self, by: Tensor) -> Tensor:
        weight = by.squeeze(1) if by.dim() == 2 else by
        return 1 - weight if self.complement else weight
