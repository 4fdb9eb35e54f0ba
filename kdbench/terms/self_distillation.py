"""Terms of self-distillation: targets from a network's own earlier predictions, or from a virtual teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_logits, check_parameters
from kdbench.terms.logits import kd_loss
from kdbench.terms.numerics import at_least_float32
from kdbench.terms.sample_bank import SampleBank


def _rows_with_label(label: Tensor, mask: Tensor | None) -> Tensor:
    return label >= 0 if mask is None else (label >= 0) & mask


@TERMS.register(
    "self_target", space="row", version=1, state=True, injected=("samples", "num_classes"), paper="arXiv:2006.12000"
)
class ProgressiveSelfKD(Term):
    """PS-KD: cross-entropy with a mixture of the label and the model's own prediction of the previous epoch.

    loss = -sum_k t_k log p_k, t = (1 - alpha) * onehot(label) + alpha * p_previous, p = softmax(student)

    p_previous is the softmax at the previous visit of the sample, usually in the previous epoch. At the first visit,
    t is the one-hot label. The term stores the last softmax of each training sample, and reads the stored softmax
    before it stores the new softmax. If a sample comes twice in an epoch, the second visit therefore reads the
    softmax of the first visit. Do not use the term with mixup or cutmix: the prediction of a mixed image belongs to
    two samples.

    Args:
        alpha: weight of the previous prediction, in [0, 1]. Paper and authors' code raise alpha linearly over the
            epochs to 0.8: use a schedule.

    Shape:
        student: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative) have loss 0 and
            are not stored. index: (batch,), int64.
        Returns (batch,), nats.

    References:
        Kim, Ji, Yoon and Hwang, Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021,
        arXiv:2006.12000.
    """

    def __init__(self, samples: int, num_classes: int, alpha: Number = 0.8) -> None:
        super().__init__()
        check_parameters("self_target", "in [0, 1]", alpha=alpha)
        self.alpha = alpha
        self.bank = SampleBank(samples, num_classes)

    def check_shapes(self, **shapes: Size) -> None:
        _check_bank_classes(shapes["student"], self.bank.values.shape[1])

    def forward(self, student: Tensor, label: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        log_p = F.log_softmax(at_least_float32(student), dim=1)
        one_hot = torch.zeros_like(log_p).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        p_previous, age = self.bank.read(index)
        soft = (1 - self.alpha) * one_hot + self.alpha * p_previous.to(log_p.dtype)
        target = torch.where((age >= 0).unsqueeze(1), soft, one_hot)
        self.bank.write(index, log_p.exp(), _rows_with_label(label, mask))
        return torch.where(label < 0, 0, -(target * log_p).sum(1))


@TERMS.register(
    "last_batch", space="row", version=1, state=True, injected=("samples", "num_classes"), paper="arXiv:2203.16172"
)
class LastMiniBatchDistillation(Term):
    """DLB: soft targets from the previous mini-batch, for the samples that are in both mini-batches.

    loss = T^2 * KL(softmax(z_previous / T) || softmax(z / T)) for samples of the previous step's batch, 0 for all
    others

    z are the student's logits in this step, and z_previous its logits of the same sample in the previous step.
    Consecutive batches must overlap: one half of each batch repeats the new samples of the previous batch with a new
    augmentation, and the other half is new. The authors' code averages the loss over the repeated half, kdbench over
    the whole batch: the authors' alpha corresponds to a term weight of 2 * alpha. The authors also train by
    cross-entropy on both halves: add the term `cross_entropy`. With gradient accumulation (`accumulate`), each
    micro-batch counts as a step.

    Args:
        temperature: T > 0.

    Shape:
        student: logits (batch, classes). index: (batch,), int64.
        Returns (batch,), nats times T^2.

    References:
        Shen, Xu, Yang, Li and Guo, Self-Distillation from the Last Mini-Batch for Consistency Regularization, CVPR
        2022, arXiv:2203.16172. Formula and overlap as in the authors' code (Meta-knowledge-Lab/DLB).
    """

    def __init__(self, samples: int, num_classes: int, temperature: Number = 3.0) -> None:
        super().__init__()
        check_parameters("last_batch", "above 0", temperature=temperature)
        self.temperature = temperature
        self.bank = SampleBank(samples, num_classes)

    def check_shapes(self, **shapes: Size) -> None:
        _check_bank_classes(shapes["student"], self.bank.values.shape[1])

    def forward(self, student: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        previous, age = self.bank.read(index)
        loss = kd_loss(student, previous, self.temperature)
        self.bank.write(index, at_least_float32(student), mask)
        return torch.where(age == 0, loss, 0)


@TERMS.register(
    "temporal_ensemble",
    space="row",
    version=1,
    state=True,
    injected=("samples", "num_classes"),
    paper="arXiv:1610.02242",
)
class TemporalEnsembling(Term):
    """Temporal ensembling: squared difference of a prediction and the running mean of the sample's earlier predictions.

    loss = 1/classes * sum_k (p_k - z_k)^2, p = softmax(student)
    Z <- momentum * Z + (1 - momentum) * p, z = Z / (1 - momentum^visits)

    z is the weighted mean of the sample's earlier softmaxes: each visit has `momentum` times the weight of the next
    visit. At the first visit the loss is 0. Labels are not read. The formula follows the authors' code
    (smlaine2/tempens). The authors raise the weight of the loss along half a bell curve over the first 80 of 300
    epochs: use the schedule `ramp_up`. Their code updates Z at the end of the epoch, this term at each visit. The
    results are equal if each sample comes once per epoch. Do not use the term with mixup or cutmix: the prediction of a
    mixed image belongs to two samples.

    Args:
        momentum: weight of the previous mean, at least 0 and below 1.

    Shape:
        student: logits (batch, classes). index: (batch,), int64.
        Returns (batch,), squared probability.

    References:
        Laine and Aila, Temporal Ensembling for Semi-Supervised Learning, ICLR 2017, arXiv:1610.02242.
    """

    def __init__(self, samples: int, num_classes: int, momentum: float = 0.6) -> None:
        super().__init__()
        check_parameters("temporal_ensemble", "in [0, 1]", momentum=momentum)
        if momentum == 1:
            raise ConfigError("temporal_ensemble: momentum must be below 1: with 1 no prediction would enter the mean")
        self.momentum = momentum
        self.bank = SampleBank(samples, num_classes + 1)  # the last column is 1 - momentum^visits

    def check_shapes(self, **shapes: Size) -> None:
        _check_bank_classes(shapes["student"], self.bank.values.shape[1] - 1)

    def forward(self, student: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        p = F.softmax(at_least_float32(student), dim=1)
        stored, age = self.bank.read(index)
        visited, stored = age >= 0, stored.to(p.dtype)
        target = stored[:, :-1] / torch.where(visited, stored[:, -1], 1).unsqueeze(1)
        update = torch.cat([p.detach(), torch.ones_like(p[:, :1])], 1)
        self.bank.write(index, self.momentum * stored + (1 - self.momentum) * update, mask)
        return torch.where(visited, (p - target).square().mean(1), 0)


@TERMS.register("tf_kd", space="row", version=1, paper="arXiv:1909.11723")
class TeacherFreeKD(Term):
    """Tf-KD (regularised): KL divergence from a virtual teacher that gives the label a fixed probability.

    loss = KL(u || softmax(student)), u = softmax(v / T)

    v is `correct` at the label and (1 - correct) / (classes - 1) at every other class. As in the authors' code, v are
    probabilities that are used as logits, and the student's temperature is 1. The paper divides the logits of teacher
    and student by T. The code averages over batch and classes and multiplies by `multiplier` 100. On CIFAR-100, this
    is the same as the sum over the classes that this term computes. The complete method has two terms:
    `cross_entropy` with weight 1 - alpha, and this term with weight alpha.

    Args:
        correct: probability v of the label, in [0, 1] and above 1 / classes.
        temperature: T > 0 of the virtual teacher.

    Shape:
        student: logits (batch, classes), at least 2 classes. label: (batch,), int64; rows with a hidden label
            (negative) have loss 0.
        Returns (batch,), nats.

    References:
        Yuan, Tay, Li, Wang and Feng, Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020,
        arXiv:1909.11723.
    """

    def __init__(self, correct: float = 0.99, temperature: Number = 20.0) -> None:
        super().__init__()
        check_parameters("tf_kd", "in [0, 1]", correct=correct)
        check_parameters("tf_kd", "above 0", temperature=temperature)
        self.correct = correct
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)
        if self.correct <= 1 / shapes["student"][1]:
            raise ValueError(
                f"has a virtual teacher that is right with probability {self.correct}, no better than chance over "
                f"{shapes['student'][1]} classes; raise `correct`"
            )

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        log_p = F.log_softmax(at_least_float32(student), dim=1)
        rest = (1 - self.correct) / (log_p.shape[1] - 1)
        virtual = torch.full_like(log_p, rest).scatter(1, label.clamp(min=0).unsqueeze(1), self.correct)
        log_u = F.log_softmax(virtual / self.temperature, dim=1)
        return torch.where(label < 0, 0, (log_u.exp() * (log_u - log_p)).sum(1))


def _check_bank_classes(shape: Size, classes: int) -> None:
    """Raises ValueError unless an operand is logits over as many classes as the stored predictions have."""
    check_logits("student", shape)
    if shape[1] != classes:
        raise ValueError(
            f"stores predictions over the {classes} classes of the data, but the student's operand has {shape[1]} "
            "classes"
        )
