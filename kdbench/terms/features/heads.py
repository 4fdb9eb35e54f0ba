"""Terms on the logits of auxiliary heads: exits on inner features, and a second head beside the classifier.

An auxiliary head is a role (a network of the recipe) that reads a feature of the student and is not part of the
result. The terms can also read the student's final logits.
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
        power: exponent, above 0. An exponent above 1 raises the target of the label's class, and more so for a more
            certain teacher.
        temperature: T > 0 of both softmaxes.

    Returns:
        (batch,), nats. With power 1 the loss is the cross-entropy with target q.
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
        (batch,), nats times T^2. The loss is exactly 0 if the logits are equal.
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

    q and p are the softmaxes of teacher and student at temperature T, and y is the label. As in the authors' code
    (Hao840/OFAKD) there is no factor T^2. The paper applies the loss to exit branches after every stage of the
    student and to the final logits. With power 1 the loss is the cross-entropy with target q.

    Args:
        power: exponent, above 0 (`eps` in the paper, where each branch has its own value).
        temperature: T > 0.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative) have
            loss 0.
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

    h are the logits of a second linear head on the student's penultimate feature, and z are the teacher's logits. The
    formula is BinaryKLNorm of the authors' code (penghui-yang/DHKD). That code clamps the sigmoid to [1e-8, 1 -
    1e-8]; this term computes the exact log cosh instead. If the term is applied to the classifier that is trained on
    labels, that classifier collapses.

    Args:
        temperature: T > 0 (in the authors' code 2).

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
