"""Terms that compare the final logits of the student with labels, or with the logits of a teacher.

All terms of this module read logits (batch, classes) and compute in float32 or a wider type.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_logits, check_parameters
from kdbench.terms.numerics import at_least_float32, flatten_and_mask, row_weights, safe_divide, safe_sqrt


def cross_entropy_loss(student: Tensor, label: Tensor, label_smoothing: Number = 0.0) -> Tensor:
    """Computes the cross-entropy of the student's softmax with the labels, one value per row.

    Args:
        student: logits (batch, classes).
        label: class of each row, (batch,), int64. A negative label is hidden.
        label_smoothing: fraction of the target that is spread evenly over all classes, including the label.

    Returns:
        (batch,), nats. Rows with a hidden label have loss 0 and gradient 0.
    """
    log_p = F.log_softmax(at_least_float32(student), dim=1)
    log_likelihood = log_p.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        log_likelihood = (1 - label_smoothing) * log_likelihood + label_smoothing * log_p.mean(1)
    return torch.where(label < 0, 0, -log_likelihood)


def kd_loss(student: Tensor, teacher: Tensor, temperature: Number) -> Tensor:
    """Computes T^2 * KL(softmax(teacher / T) || softmax(student / T)), one value per row.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        temperature: T > 0. A higher T raises the probabilities of the wrong classes.

    Returns:
        (batch,), nats times T^2. The factor T^2 keeps the gradient on the scale of the hard-label loss when T changes
        (Hinton et al. 2015, section 2).
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


def dkd_components(student: Tensor, teacher: Tensor, label: Tensor, temperature: Number) -> tuple[Tensor, Tensor]:
    """Computes the two components of decoupled KD: TCKD (target class) and NCKD (non-target classes).

    KL(q || p) = TCKD + (1 - q_label) * NCKD, with p = softmax(student / T) and q = softmax(teacher / T). The components
    are not multiplied by T^2.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        label: class of each row, (batch,), int64. Rows with a negative (hidden) label have components 0.
        temperature: T > 0.

    Returns:
        TCKD and NCKD, (batch,) each, in nats, without the factor T^2. TCKD is KL((q_label, 1 - q_label) || (p_label,
        1 - p_label)). NCKD is the
        KL divergence of q from p over the classes except the label, after both are renormalised to sum 1.
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    hidden, index = label < 0, label.clamp(min=0).unsqueeze(1)
    is_target = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, index, True)
    # 1 - p_label is computed as a sum over the non-target classes: the difference would lose all digits when p_label is
    # close to 1.
    log_p_target, log_q_target = log_p.gather(1, index), log_q.gather(1, index)
    log_p_rest = log_p.masked_fill(is_target, -torch.inf).logsumexp(1, keepdim=True)
    log_q_rest = log_q.masked_fill(is_target, -torch.inf).logsumexp(1, keepdim=True)
    tckd = log_q_target.exp() * (log_q_target - log_p_target) + log_q_rest.exp() * (log_q_rest - log_p_rest)
    log_ratio = (log_q - log_q_rest) - (log_p - log_p_rest)
    q_non_target = (log_q - log_q_rest).masked_fill(is_target, -torch.inf).exp()
    nckd = (q_non_target * log_ratio.masked_fill(is_target, 0)).sum(1)
    return torch.where(hidden, 0, tckd.squeeze(1)), torch.where(hidden, 0, nckd)


def dkd_loss(
    student: Tensor, teacher: Tensor, label: Tensor, alpha: Number, beta: Number, temperature: Number
) -> Tensor:
    """Computes T^2 * (alpha * TCKD + beta * NCKD), one value per row; `dkd_components` defines TCKD and NCKD."""
    tckd, nckd = dkd_components(student, teacher, label, temperature)
    return temperature**2 * (alpha * tckd + beta * nckd)


def logit_mse_loss(student: Tensor, teacher: Tensor, center: bool = False) -> Tensor:
    """Computes the squared difference of student and teacher logits, averaged over the classes; returns (batch,).

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        center: whether the mean over the classes is first subtracted from the logits of each network. Softmax is
            invariant to this mean.
    """
    difference = at_least_float32(student) - at_least_float32(teacher)
    if center:
        difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean(1)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    beta: Number = 1.0,
    gamma: Number = 1.0,
    temperature: Number = 1.0,
) -> Tensor:
    """Computes the DIST loss, a scalar: T^2 * (beta * inter + gamma * intra).

    inter is 1 - Pearson correlation of the student's and the teacher's probabilities in one row, averaged over the
    rows. intra is 1 - Pearson correlation of the probabilities of one class over the batch, averaged over the
    classes.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        mask: bool (batch,), False for padded rows.
        weight: (batch,), >= 0. A row of weight 2 counts as two rows of weight 1.
        beta: weight of inter.
        gamma: weight of intra.
        temperature: T > 0 of both softmaxes.

    Returns:
        A scalar without unit, in [0, 2 * (beta + gamma) * T^2]; 0 if no row is valid.
    """
    p = F.softmax(flatten_and_mask(student, mask) / temperature, dim=1)
    q = F.softmax(flatten_and_mask(teacher, mask) / temperature, dim=1)
    weights = row_weights(p, mask, weight)
    row_correlation = _pearson_correlation(p, q, torch.ones_like(p[:1]))
    inter = safe_divide((weights * (1 - row_correlation)).sum(), weights.sum())
    class_correlation = _pearson_correlation(p.t(), q.t(), weights.unsqueeze(0))
    intra = (1 - class_correlation).mean() * (weights.sum() > 0)
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson_correlation(x: Tensor, y: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """Computes the Pearson correlation of each row of x with the same row of y.

    Args:
        x: (n, m).
        y: (n, m).
        weights: weights of the columns, (1, m).
        eps: constant that is added to the denominator.

    Returns:
        (n,).
    """
    x = x - safe_divide((weights * x).sum(1, keepdim=True), weights.sum())
    y = y - safe_divide((weights * y).sum(1, keepdim=True), weights.sum())
    norms = safe_sqrt((weights * x * x).sum(1)) * safe_sqrt((weights * y * y).sum(1))
    return (weights * x * y).sum(1) / (norms + eps)


@TERMS.register("cross_entropy", space="row", version=1, paper="arXiv:1512.00567")
class CrossEntropy(Term):
    """Cross-entropy with the labels, with label smoothing, mixup and cutmix.

    loss = -sum_k t_k * log p_k, t = (1 - e) * onehot(label) + e / classes

    p is the student's softmax and e is the label smoothing. After mixup or cutmix, the batch contains `label_other`
    (the label of the second image) and `mix` (the fraction of the first image), and the loss is

    loss = mix * CE(label) + (1 - mix) * CE(label_other)

    Args:
        label_smoothing: e, in [0, 1].

    Shape:
        student: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative, such as -100) have
            loss 0 and do not count in the mean. label_other, mix: (batch,).
        Returns (batch,), nats.

    References:
        Label smoothing: Szegedy et al. 2016, arXiv:1512.00567. Mixup: Zhang et al. 2018, arXiv:1710.09412.
    """

    def __init__(self, label_smoothing: Number = 0.0) -> None:
        super().__init__()
        check_parameters("cross_entropy", "in [0, 1]", label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])

    def forward(
        self, student: Tensor, label: Tensor, label_other: Tensor | None = None, mix: Tensor | None = None
    ) -> Tensor:
        loss = cross_entropy_loss(student, label, self.label_smoothing)
        if label_other is None or mix is None:
            return loss
        loss_other = cross_entropy_loss(student, label_other, self.label_smoothing)
        mix = mix.to(loss.dtype)
        return mix * loss + (1 - mix) * loss_other


@TERMS.register("kd", space="row", version=1, paper="arXiv:1503.02531")
class SoftTargets(Term):
    """Soft targets: KL divergence from the teacher's softened distribution, times T^2.

    loss = T^2 * KL(softmax(teacher / T) || softmax(student / T))

    The factor T^2 keeps the gradient on the scale of the hard-label loss when T changes (section 2 of the paper).

    Args:
        temperature: T > 0. A higher T raises the probabilities of the wrong classes.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), nats times T^2.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """

    def __init__(self, temperature: Number = 4.0) -> None:
        super().__init__()
        check_parameters("kd", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, self.temperature)


@TERMS.register("dkd", space="row", version=1, paper="arXiv:2203.08679")
class DecoupledKD(Term):
    """Decoupled KD: separate weights for the target-class and the non-target-class part of the KL divergence.

    loss = T^2 * (alpha * TCKD + beta * NCKD)

    p and q are the softmaxes of student / T and teacher / T. TCKD is KL((q_label, 1 - q_label) || (p_label, 1 -
    p_label)). NCKD is the KL divergence of q from p over the classes except the label, after both are renormalised to
    sum 1. The loss of the term `kd` is T^2 * (TCKD + (1 - q_label) * NCKD), so that a confident teacher lowers the
    weight of NCKD.

    The defaults are those of the authors' code (mdistiller). That code raises the weight of the loss linearly over the
    first 20 epochs: set a schedule for the weight of this term.

    Args:
        alpha: weight of TCKD, >= 0.
        beta: weight of NCKD, >= 0. The authors' code uses 2, 6 or 8, depending on teacher and student.
        temperature: T > 0.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative) have loss
            0.
        Returns (batch,), nats times T^2.

    References:
        Zhao, Cui, Song, Qiu and Liang, Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679.
    """

    def __init__(self, alpha: Number = 1.0, beta: Number = 8.0, temperature: Number = 4.0) -> None:
        super().__init__()
        check_parameters("dkd", "at least 0", alpha=alpha, beta=beta)
        check_parameters("dkd", "above 0", temperature=temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"], min_classes=2)

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        return dkd_loss(student, teacher, label, self.alpha, self.beta, self.temperature)


@TERMS.register("logit_mse", space="row", version=1, paper="arXiv:2105.08919")
class LogitMSE(Term):
    """Mean squared error between the logits of student and teacher.

    loss = 1/classes * sum_k (student_k - teacher_k)^2

    The mean over the classes follows the code of Kim et al. The paper of Kim et al. uses the sum over the classes,
    and Ba and Caruana use half the sum: include the factor in the weight of the term.

    Args:
        center: whether the mean over the classes is first subtracted from the logits of each network.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), squared logits.

    References:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, arXiv:1312.6184; Kim, Oh, Kim, Cho and Yun,
        Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, IJCAI 2021,
        arXiv:2105.08919.
    """

    def __init__(self, center: bool = False) -> None:
        super().__init__()
        self.center = center

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return logit_mse_loss(student, teacher, self.center)


@TERMS.register("dist", space="batch", version=1, paper="arXiv:2205.10536")
class DIST(Term):
    """DIST: correlation of the predictions within each sample (inter-class) and within each class (intra-class).

    loss = T^2 * (beta * mean_i(1 - r(p_i, q_i)) + gamma * mean_k(1 - r(p_.k, q_.k)))

    r is Pearson's correlation. p and q are the softmaxes of student and teacher at temperature T. i runs over the
    rows, k over the classes. The factor T^2 (not in the paper) and the constant 1e-8 in the denominator of r follow
    the authors' code (hunto/image_classification_sota).

    Args:
        beta: weight of the inter-class part, >= 0.
        gamma: weight of the intra-class part, >= 0.
        temperature: T > 0.

    Shape:
        student, teacher: logits (batch, classes), at least 2 classes.
        Returns a scalar without unit. Masked rows do not count. A row of weight 2 counts as two rows of weight 1.

    References:
        Huang, You, Wang, Qian and Xu, Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536.
    """

    def __init__(self, beta: Number = 1.0, gamma: Number = 1.0, temperature: Number = 1.0) -> None:
        super().__init__()
        check_parameters("dist", "at least 0", beta=beta, gamma=gamma)
        check_parameters("dist", "above 0", temperature=temperature)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"], min_classes=2)

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return dist_loss(student, teacher, mask, weight, beta=self.beta, gamma=self.gamma, temperature=self.temperature)


@TERMS.register(
    "joint_cross_entropy",
    space="row",
    version=1,
    injected=("num_classes",),
    operands=("kind",),
    paper="arXiv:2107.13715",
)
class JointCrossEntropy(Term):
    """HSAKD: cross-entropy over joint classes, one per pair of label and image transformation.

    loss = -log softmax(student)[label * kinds + kind]

    `kind` is the number of the transformation that was applied to the image, for example the number of quarter turns
    by the augmentation `rotate90`. The student operand comes from a head with classes * kinds outputs.

    Args:
        kinds: number of transformations, at least 2.

    Shape:
        student: logits (batch, classes * kinds). kind: (batch,), 0 to kinds - 1. label: (batch,), int64; rows with a
            hidden label (negative) have loss 0.
        Returns (batch,), nats.

    Example (recipe):
        augment: {image: [], turned: {from: image, then: [rotate90]}}
        terms: {joint: {type: joint_cross_entropy, student: head, kind: train.turned_turns}}

    References:
        Yang, An, Cai and Xu, Hierarchical Self-supervised Augmented Knowledge Distillation, IJCAI 2021,
        arXiv:2107.13715. The joint classes have the order of the authors' code (winycg/HSAKD).
    """

    def __init__(self, num_classes: int, kinds: int = 4) -> None:
        super().__init__()
        if kinds < 2:
            raise ConfigError(f"joint_cross_entropy: kinds must be at least 2, got {kinds}")
        self.num_classes, self.kinds = num_classes, kinds

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if shapes["student"][1] != self.num_classes * self.kinds:
            raise ValueError(
                f"needs one logit for each pair of {self.num_classes} classes and {self.kinds} kinds, "
                f"{self.num_classes * self.kinds} in all, but the student has {shapes['student'][1]} logits"
            )

    def forward(self, student: Tensor, kind: Tensor, label: Tensor) -> Tensor:
        return cross_entropy_loss(student, label * self.kinds + kind * (label >= 0))


def log_class_weights(counts: Tensor, beta: float) -> Tensor:
    """Computes the log-weight of each class: log(1 / E_c) up to a constant that is equal for all classes.

    E_c = (1 - beta^n_c) / (1 - beta) is the effective number of samples of class c. Returns (classes,).

    Args:
        counts: number of samples n_c of each class, (classes,). A class without samples counts as one sample.
        beta: number in [0, 1). With 0, all classes have equal weight. Near 1, the weights are close to 1 / n_c.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.log(-torch.expm1(at_least_float32(counts).clamp(min=1) * log_beta))


@TERMS.register("bkd", space="row", version=1, operands=("counts",), paper="arXiv:2104.10510")
class BalancedSoftTargets(Term):
    """Balanced KD: soft targets with a higher weight on rare classes, for teachers trained on long-tailed data.

    loss = T^2 * KL(q' || softmax(student / T))

    q'_c is proportional to w_c * softmax(teacher / T)_c. The weight w_c = (1 - beta) / (1 - beta^n_c) is 1 over the
    effective number of samples of class c (Cui et al. 2019, arXiv:1901.05555), and n_c is the number of training
    samples of class c. The authors' code (BKDLoss) adds cross-entropy with weight 1. With beta 0, the term is equal
    to the term `kd`.

    Args:
        temperature: T > 0.
        beta: number in [0, 1). A higher beta raises the weight of rare classes more.

    Shape:
        student, teacher: logits (batch, classes). counts: (classes,), number of training samples of each class, for
            example from the artifact `class_counts` of an earlier stage.
        Returns (batch,), nats times T^2.

    References:
        Zhang, Chen, Hu and Peng, Balanced Knowledge Distillation for Long-tailed Learning, 2021, arXiv:2104.10510.
    """

    def __init__(self, temperature: Number = 2.0, beta: float = 0.9999) -> None:
        super().__init__()
        check_parameters("bkd", "above 0", temperature=temperature)
        if not 0 <= beta < 1:
            raise ConfigError(f"bkd: beta must be at least 0 and below 1, got {beta}")
        self.temperature, self.beta = temperature, beta

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])
        if tuple(shapes["counts"]) != (shapes["student"][1],):
            raise ValueError(
                f"needs the number of samples of each of {shapes['student'][1]} classes, but counts has the shape "
                f"{list(shapes['counts'])}"
            )

    def forward(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        log_q = F.log_softmax(at_least_float32(teacher) / self.temperature, dim=1)
        balanced = self.temperature * (log_q + log_class_weights(counts, self.beta))
        return kd_loss(student, balanced, self.temperature)
