"""Sample weights: one weight per sample of a term.

All are detached except `learnt`, so that no network lowers its loss through its weights.
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
    """Returns the probability of the label: (batch,); 0 where the label is hidden."""
    label_probability = probabilities.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(label < 0, 0, label_probability)


@SAMPLE_WEIGHTS.register("confidence", version=1)
class ConfidenceWeight(SampleWeight):
    """Probability that the teacher gives the label of the sample.

    weight = softmax(teacher)[label] ** power

    Args:
        power: above 0.

    Shape:
        teacher: logits (batch, classes). label: (batch,), int64; hidden labels (negative) give 0.
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
    """Confidence threshold: 1 where the teacher's largest probability is at least `least`, else 0.

    The mask of FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685; 0.95 there). The runner divides by all rows of
    the batch, as FixMatch does.

    Args:
        least: threshold, in [0, 1].
        temperature: of the teacher's softmax, above 0.

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
    """Entropy gap: `high` where one side has the lower entropy, else `low`; balances the KL divergences of BD-KD.

    weight = high where the entropy of the side `surer` is below that of the opposite side, else low

    BD-KD raises forward KL, which spreads, where the student is more certain than the teacher, and reverse KL, which
    sharpens, where the teacher is. The abstract and the available text say this; the values of the weights were not
    available, the defaults are ours.

    Args:
        surer: side that gets `high` where it has the lower entropy: `student` or `teacher`.
        high: at least 0.
        low: at least 0, different from `high`.

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
            raise ConfigError(f"entropy_gap: high and low are both {high}, so all samples would have the same weight")
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
    """Total variation distance between the softmaxes of student and teacher.

    weight = 1/2 sum_k |p_k - q_k|: 0 for equal predictions, 1 for predictions without a common class

    Shape:
        student, teacher: logits (batch, classes). Returns (batch,), in [0, 1].
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (_detached_softmax(student) - _detached_softmax(teacher)).abs().sum(1) / 2


@SAMPLE_WEIGHTS.register("focal", version=1)
class FocalWeight(SampleWeight):
    """Factor of the focal loss: a lower weight for samples that the student classifies correctly.

    weight = (1 - p_label) ** power, p = softmax(student)

    The weight is detached; the focal loss has its gradient too.

    Args:
        power: above 0.

    Shape:
        student: logits (batch, classes). label: (batch,), int64; hidden labels (negative) give 0.
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
    """WSLD: weight of a soft label by the ratio of the cross-entropies of student and teacher.

    weight = 1 - exp(-CE(student) / (CE(teacher) + 1e-7))

    Near 0 where the student has learnt the label and the soft label would only add bias, 1 - 1/e at equal
    cross-entropies, 1 where the teacher knows the label far better.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64; hidden labels (negative) give 0.
        Returns (batch,), in [0, 1].

    References:
        Zhou, Song, Chen, Zhou, Wang, Yuan and Zhang, Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
        Tradeoff Perspective, ICLR 2021, arXiv:2102.00650; 1e-7 as in the authors' code
        (bellymonster/Weighted-Soft-Label-Distillation).
    """

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        student_loss, teacher_loss = (cross_entropy_loss(logits.detach(), label) for logits in (student, teacher))
        return 1 - torch.exp(-student_loss / (teacher_loss + 1e-7))


@SAMPLE_WEIGHTS.register("outside", version=1, operands=("judge",))
class OutsideClassesWeight(SampleWeight):
    """0 for samples that a network assigns to one of the listed classes, else 1.

    SCAR leaves out the images that the old network assigns to a class to be forgotten (authors' code). The runner
    divides by all rows of the batch.

    Args:
        classes: class numbers.

    Shape:
        judge: logits of that network (batch, classes). Returns (batch,), 0 or 1.
    """

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        if not classes or min(classes) < 0:
            raise ConfigError(f"outside: classes lists class numbers, got {classes}")
        self.classes = tuple(classes)

    def forward(self, judge: Tensor) -> Tensor:
        prediction = judge.detach().argmax(1)
        inside = torch.zeros_like(prediction, dtype=torch.bool)
        for number in self.classes:
            inside = inside | (prediction == number)
        return 1 - inside.to(at_least_float32(judge.detach()).dtype)


@SAMPLE_WEIGHTS.register("learnt", version=1, operands=("by",))
class LearntWeight(SampleWeight):
    """Output of a network as weight, with gradient.

    weight = by, or 1 - by with `complement`, so that one term gains what the other loses

    Nothing is detached. A network that trains on the loss with its own weights would set them all to 0: train it in an
    update with `inner_step`.

    Args:
        complement: use 1 minus the output.

    Shape:
        by: (batch,) or (batch, 1); the network ensures that weights are at least 0. Returns (batch,).
    """

    def __init__(self, complement: bool = False) -> None:
        super().__init__()
        self.complement = complement

    def forward(self, by: Tensor) -> Tensor:
        weight = by.squeeze(1) if by.dim() == 2 else by
        return 1 - weight if self.complement else weight
