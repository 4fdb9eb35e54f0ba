"""Terms by which a network teaches itself: from its own earlier predictions, or from a teacher made by hand."""

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
    """PS-KD: cross-entropy with the label softened by what the model itself said of the sample an epoch ago.

    loss = -sum_k t_k log p_k, t = (1 - alpha) * onehot(label) + alpha * p_before, where p_before is the softmax that
    the sample had at its previous visit, in the previous epoch; at the first visit t is the label. Paper and authors'
    code: alpha grows linearly over the epochs to 0.8: give it a schedule.
    The store is a row per sample of the student's source. Read before it is written; where a sample comes twice in an
    epoch, the earlier visit is read. Hidden labels (negative) give 0 and are not stored. Not for mixed images, whose
    prediction belongs to two samples.

    Kim, Ji, Yoon and Hwang, Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021,
    arXiv:2006.12000.
    Shapes: student logits (batch, classes), label, index (batch,) -> (batch,), nats.
    """

    def __init__(self, samples: int, num_classes: int, alpha: Number = 0.8) -> None:
        super().__init__()
        check_parameters("self_target", "in [0, 1]", alpha=alpha)
        self.alpha = alpha
        self.bank = SampleBank(samples, num_classes)

    def check_shapes(self, **shapes: Size) -> None:
        _check_bank_classes(shapes["student"], self.bank)

    def forward(self, student: Tensor, label: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        log_p = F.log_softmax(at_least_float32(student), dim=1)
        hard = torch.zeros_like(log_p).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        before, age = self.bank.read(index)
        soft = (1 - self.alpha) * hard + self.alpha * before.to(log_p.dtype)
        target = torch.where((age >= 0).unsqueeze(1), soft, hard)
        self.bank.write(index, log_p.exp(), _rows_with_label(label, mask))
        return torch.where(label < 0, 0, -(target * log_p).sum(1))


@TERMS.register(
    "last_batch", space="row", version=1, state=True, injected=("samples", "num_classes"), paper="arXiv:2203.16172"
)
class LastMiniBatchDistillation(Term):
    """DLB: samples that were in the last mini-batch too keep the soft targets that they had there.

    loss = T^2 * KL(softmax(z_before / T) || softmax(z / T)) for samples of the previous step's batch, 0 for others.
    The order of the data must overlap: half of each batch is the fresh half of the batch before, with a new
    augmentation, half is fresh. The authors' code averages over the repeated half alone and the runner over the whole
    batch, so that their alpha is a weight of 2 * alpha here. Their cross-entropy is over both halves: `cross_entropy`.
    Under `accumulate` a step is a micro-batch.

    Shen, Xu, Yang, Li and Guo, Self-Distillation from the Last Mini-Batch for Consistency Regularization, CVPR 2022,
    arXiv:2203.16172. Formula and overlap as in the authors' code (Meta-knowledge-Lab/DLB).
    Shapes: student logits (batch, classes), index (batch,) -> (batch,), nats times T^2.
    """

    def __init__(self, samples: int, num_classes: int, temperature: Number = 3.0) -> None:
        super().__init__()
        check_parameters("last_batch", "above 0", temperature=temperature)
        self.temperature = temperature
        self.bank = SampleBank(samples, num_classes)

    def check_shapes(self, **shapes: Size) -> None:
        _check_bank_classes(shapes["student"], self.bank)

    def forward(self, student: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        before, age = self.bank.read(index)
        loss = kd_loss(student, before, self.temperature)
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
    """Temporal ensembling: a sample keeps the running mean of what the model said of it in all earlier epochs.

    loss = 1/classes * sum_k (p_k - z_k)^2, z the mean of the sample's earlier softmaxes in which each epoch counts
    `momentum` times as much as the next: Z <- momentum * Z + (1 - momentum) * p, z = Z / (1 - momentum^visits). At the
    first visit the loss is 0. Labels are not read. As in the authors' code (smlaine2/tempens), whose weight rises along
    half a bell over 80 of 300 epochs: schedule `ramp_up`; there Z moves when the epoch ends, here when the sample is
    seen, which is the same where each comes once. Not for mixed images.

    Laine and Aila, Temporal Ensembling for Semi-Supervised Learning, ICLR 2017, arXiv:1610.02242.
    Shapes: student logits (batch, classes), index (batch,) -> (batch,), squared probability.
    """

    def __init__(self, samples: int, num_classes: int, momentum: float = 0.6) -> None:
        super().__init__()
        check_parameters("temporal_ensemble", "in [0, 1]", momentum=momentum)
        if momentum == 1:
            raise ConfigError("temporal_ensemble: momentum must be below 1, or nothing is ever remembered")
        self.momentum = momentum
        self.bank = SampleBank(samples, num_classes + 1)  # the last column gathers 1 - momentum^visits

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if shapes["student"][1] != self.bank.values.shape[1] - 1:
            raise ValueError(
                f"stores predictions over the {self.bank.values.shape[1] - 1} classes of the data, but the student's "
                f"operand has {shapes['student'][1]}"
            )

    def forward(self, student: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        p = F.softmax(at_least_float32(student), dim=1)
        kept, age = self.bank.read(index)
        seen, kept = age >= 0, kept.to(p.dtype)
        target = kept[:, :-1] / torch.where(seen, kept[:, -1], 1).unsqueeze(1)
        now = torch.cat([p.detach(), torch.ones_like(p[:, :1])], 1)
        self.bank.write(index, self.momentum * kept + (1 - self.momentum) * now, mask)
        return torch.where(seen, (p - target).square().mean(1), 0)


@TERMS.register("tf_kd", space="row", version=1, paper="arXiv:1909.11723")
class TeacherFreeKD(Term):
    """Tf-KD (regularised): a virtual teacher, made by hand, that is right with probability `correct`.

    loss = KL(u || softmax(student)), u = softmax(v / T), v = `correct` at the label and (1 - correct) / (classes - 1)
    elsewhere. This is the authors' code, which puts the probabilities v where logits belong and leaves the student's
    temperature at 1 (T 20, correct 0.99); the paper softens both. Its mean over batch and classes is times
    `multiplier` 100, which on CIFAR-100 makes the sum over the classes taken here. Next to it `cross_entropy` of
    weight 1 - alpha, and alpha as this term's weight. Hidden labels (negative) give 0.

    Yuan, Tay, Li, Wang and Feng, Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020,
    arXiv:1909.11723.
    Shapes: student logits (batch, classes), label (batch,) -> (batch,), nats.
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


def _check_bank_classes(shape: Size, bank: SampleBank) -> None:
    check_logits("student", shape)
    if shape[1] != bank.values.shape[1]:
        raise ValueError(
            f"stores predictions over the {bank.values.shape[1]} classes of the data, but the student's operand has "
            f"{shape[1]}"
        )
