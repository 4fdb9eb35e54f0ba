"""Logit terms made for auxiliary heads: exits on inner features, and a second head beside the classifier.

Such a head is a role fed by the student's feature; it is not exported. The terms also work on the student's own logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_parameters
from kdbench.terms.numerics import at_least_float32


def ofa_loss(student: Tensor, teacher: Tensor, label: Tensor, power: Number, temperature: Number) -> Tensor:
    """-sum_k ((q_k + [k = label])^power - [k = label]) * log p_k, one value per sample.

    Args:
        student: logits (batch, classes) of p.
        teacher: logits (batch, classes) of q.
        label: classes (batch,), int64. Where it is negative (hidden), the loss is 0.
        power: > 0; above 1 the label's class gains on the others, the more the surer the teacher is of it.
        temperature: T > 0 of both softmaxes.

    Returns:
        (batch,), nats; with power 1 it is the cross-entropy with q.
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    q = F.softmax(at_least_float32(teacher) / temperature, dim=1)
    own = torch.zeros_like(q).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
    loss = -(((q + own) ** power - own) * log_p).sum(1)
    return torch.where(label < 0, 0, loss)


def dhkd_loss(student: Tensor, teacher: Tensor, temperature: Number) -> Tensor:
    """T^2 * sum_k KL(Bernoulli(1/2) || Bernoulli(sigmoid((student_k - teacher_k) / T))), one value per sample.

    Args:
        student: logits (batch, classes) of the auxiliary head.
        teacher: logits (batch, classes).
        temperature: T > 0.

    Returns:
        (batch,), nats times T^2; 0 exactly where the logits are equal.
    """
    gap = (at_least_float32(student) - at_least_float32(teacher)) / temperature
    half = gap.abs() / 2  # the divergence is log cosh(gap / 2), written so that it cannot overflow and is 0 at 0
    divergence = half + torch.log1p(torch.expm1(-2 * half) / 2)
    return temperature**2 * divergence.sum(1)


@TERMS.register("ofa", space="row", version=1, paper="arXiv:2310.19444")
class AdaptiveTargetEnhancement(Term):
    """OFA-KD: soft targets of another kind of network, with the label's class raised by a power.

    loss = -sum_k ((q_k + [k = y])^power - [k = y]) * log p_k, q and p the softmaxes of teacher and student at
    temperature T; as in the authors' code (Hao840/OFAKD) there is no T^2, and T is 1 by default. The paper puts it on
    exit branches at every stage of the student, one edge each, and on its final logits; `power` (their eps) is chosen
    per branch, 1 by default: then this is the cross-entropy with q. Hidden labels (negative) give 0.

    Hao, Guo, Han, Tang, Hu, Wang and Xu, One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
    Distillation, NeurIPS 2023, arXiv:2310.19444.
    Shapes: student, teacher logits (batch, classes), label (batch,) -> (batch,), nats.
    """

    def __init__(self, power: Number = 1.0, temperature: Number = 1.0) -> None:
        super().__init__()
        check_parameters("ofa", "above 0", power=power, temperature=temperature)
        self.power = power
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        return ofa_loss(student, teacher, label, self.power, self.temperature)


@TERMS.register("dhkd", space="row", version=1, paper="arXiv:2411.08937")
class DualHeadKD(Term):
    """Dual-head KD: an auxiliary head matches the teacher's logits class by class, so that the classifier need not.

    loss = T^2 * sum_k KL(Bernoulli(1/2) || Bernoulli(sigmoid((h_k - z_k) / T))), h the logits of a second linear head
    on the student's penultimate feature (a role that is dropped at export), z the teacher's. T is 2 and the form is
    BinaryKLNorm of the authors' code (penghui-yang/DHKD), which clamps the sigmoid to [1e-8, 1 - 1e-8]; here the
    exact log cosh has no such plateau. Put on the classifier itself, beside the labels, it makes the head collapse.

    Yang, Zong, Huang, Feng and An, Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary
    Head, 2024, arXiv:2411.08937.
    Shapes: student, teacher logits (batch, classes) -> (batch,), nats times T^2.
    """

    def __init__(self, temperature: Number = 2.0) -> None:
        super().__init__()
        check_parameters("dhkd", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return dhkd_loss(student, teacher, self.temperature)
