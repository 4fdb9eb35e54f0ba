"""Terms on the logits of auxiliary heads: exits on inner features, and a second head beside the classifier.

An auxiliary head is a role with the student's feature as input; it is not exported. The terms also accept the student's
final logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_parameters
from kdbench.terms.numerics import at_least_float32


def ofa_loss(student: Tensor, teacher: Tensor, label: Tensor, power: Number, temperature: Number) -> Tensor:
    """Computes -sum_k ((q_k + [k = label])^power - [k = label]) * log p_k, one value per row.

    Args:
        student: logits (batch, classes) of p.
        teacher: logits (batch, classes) of q.
        label: classes (batch,), int64. The loss is 0 where it is negative (hidden).
        power: above 0. Above 1 it raises the target of the label's class, more for a more certain teacher.
        temperature: T > 0 of both softmaxes.

    Returns:
        (batch,), nats. With power 1 it is the cross-entropy with q.
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    q = F.softmax(at_least_float32(teacher) / temperature, dim=1)
    one_hot = torch.zeros_like(q).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
    loss = -(((q + one_hot) ** power - one_hot) * log_p).sum(1)
    return torch.where(label < 0, 0, loss)


def dhkd_loss(student: Tensor, teacher: Tensor, temperature: Number) -> Tensor:
    """Computes T^2 * sum_k KL(Bernoulli(1/2) || Bernoulli(sigmoid((student_k - teacher_k) / T))), one value per row.

    Args:
        student: logits (batch, classes) of the auxiliary head.
        teacher: logits (batch, classes).
        temperature: T > 0.

    Returns:
        (batch,), nats times T^2; exactly 0 where the logits are equal.
    """
    gap = (at_least_float32(student) - at_least_float32(teacher)) / temperature
    # The divergence is log cosh(gap / 2), in a form that cannot overflow and is exactly 0 at 0.
    half = gap.abs() / 2
    divergence = half + torch.log1p(torch.expm1(-2 * half) / 2)
    return temperature**2 * divergence.sum(1)


@TERMS.register("ofa", space="row", version=1, paper="arXiv:2310.19444")
class AdaptiveTargetEnhancement(Term):
    """OFA-KD: soft targets of a different architecture, with the probability of the label raised by a power.

    loss = -sum_k ((q_k + [k = y])^power - [k = y]) * log p_k

    q and p are the softmaxes of teacher and student at temperature T, y is the label. As in the authors' code
    (Hao840/OFAKD) there is no T^2. The paper has the term on exit branches at every stage of the student, one edge
    each, and on the final logits. With power 1 it is the cross-entropy with q.

    Args:
        power: above 0; `eps` in the paper, chosen per branch, 1 by default.
        temperature: T > 0, 1 by default.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64; hidden labels (negative) give 0.
        Returns (batch,), nats.

    References:
        Hao, Guo, Han, Tang, Hu, Wang and Xu, One-for-All: Bridge the Gap Between Heterogeneous Architectures in
        Knowledge Distillation, NeurIPS 2023, arXiv:2310.19444.
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
    """Dual-head KD: an auxiliary head matches the teacher's logits class by class; the classifier does not.

    loss = T^2 * sum_k KL(Bernoulli(1/2) || Bernoulli(sigmoid((h_k - z_k) / T)))

    h are the logits of a second linear head on the student's penultimate feature (a role that is not exported), z those
    of the teacher. The form is BinaryKLNorm of the authors' code (penghui-yang/DHKD), which clamps the sigmoid to
    [1e-8, 1 - 1e-8]; the exact log cosh here has no such plateau. On the classifier itself, beside the labels, the term
    makes the head collapse.

    Args:
        temperature: T > 0; 2 in the authors' code.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), nats times T^2.

    References:
        Yang, Zong, Huang, Feng and An, Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary
        Head, 2024, arXiv:2411.08937.
    """

    def __init__(self, temperature: Number = 2.0) -> None:
        super().__init__()
        check_parameters("dhkd", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return dhkd_loss(student, teacher, self.temperature)
