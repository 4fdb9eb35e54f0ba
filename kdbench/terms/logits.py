"""Terms that compare what networks finally say: logits against labels, logits against logits.

All take logits (batch, classes), compute in float32 at least, and return nats (divergences) or squared logits.
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
    """-log p(label), one value per sample.

    Args:
        student: logits (batch, classes).
        label: classes (batch,), int64. A negative label is a hidden one.
        label_smoothing: share e of the target that is spread evenly over all classes, the own one included.

    Returns:
        (batch,), nats; 0 with zero gradient where the label is hidden.
    """
    log_p = F.log_softmax(at_least_float32(student), dim=1)
    own = log_p.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        own = (1 - label_smoothing) * own + label_smoothing * log_p.mean(1)
    return torch.where(label < 0, 0, -own)


def kd_loss(student: Tensor, teacher: Tensor, temperature: Number) -> Tensor:
    """T^2 * KL(teacher || student) of the softened distributions, one value per sample.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        temperature: T > 0; a higher T gives the wrong classes more say.

    Returns:
        (batch,), nats times T^2. The square keeps the gradient on the scale of the hard-label loss when T changes
        (section 2 of the paper).
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


def dkd_components(student: Tensor, teacher: Tensor, label: Tensor, temperature: Number) -> tuple[Tensor, Tensor]:
    """The two parts of KL(teacher || student), with KL = TCKD + (1 - q_label) * NCKD. No T^2 here.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        label: classes (batch,), int64. Where it is negative (hidden), both parts are 0.
        temperature: T > 0.

    Returns:
        (batch,) each, in nats. TCKD: KL between (q_label, 1 - q_label) and (p_label, 1 - p_label).
        NCKD: KL between the distributions over the other classes, each renormalised to 1.
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    hidden, index = label < 0, label.clamp(min=0).unsqueeze(1)
    own = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, index, True)
    # 1 - p_label as a sum over the other classes: the difference would lose all digits of a confident network.
    log_p_own, log_p_rest = log_p.gather(1, index), log_p.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    log_q_own, log_q_rest = log_q.gather(1, index), log_q.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    target = log_q_own.exp() * (log_q_own - log_p_own) + log_q_rest.exp() * (log_q_rest - log_p_rest)
    log_ratio = (log_q - log_q_rest) - (log_p - log_p_rest)
    other = ((log_q - log_q_rest).masked_fill(own, -torch.inf).exp() * log_ratio.masked_fill(own, 0)).sum(1)
    return torch.where(hidden, 0, target.squeeze(1)), torch.where(hidden, 0, other)


def dkd_loss(
    student: Tensor, teacher: Tensor, label: Tensor, alpha: Number, beta: Number, temperature: Number
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD), one value (batch,) per sample; see `dkd_components` for the arguments."""
    target, other = dkd_components(student, teacher, label, temperature)
    return temperature**2 * (alpha * target + beta * other)


def logit_mse_loss(student: Tensor, teacher: Tensor, centre: bool = False) -> Tensor:
    """Squared difference of logits (batch, classes), averaged over the classes: (batch,).

    centre: removes each network's own mean over the classes first; no softmax can see that mean.
    """
    difference = at_least_float32(student) - at_least_float32(teacher)
    if centre:
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
    """T^2 * (beta * inter + gamma * intra), a scalar that couples the rows.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        mask: bool (batch,), False for rows that do not count.
        weight: (batch,), >= 0, relative: a row of weight 2 counts as two rows of weight 1 in both means.
        beta: weight of inter: 1 - Pearson correlation of a sample's two distributions, averaged over the samples.
        gamma: weight of intra: 1 - Pearson correlation of a class's two columns, averaged over the classes.
        temperature: T > 0 of both softmaxes.

    Returns:
        A scalar without unit, in [0, 2 * (beta + gamma) * T^2]; 0 when no row counts.
    """
    p = F.softmax(flatten_and_mask(student, mask) / temperature, dim=1)
    q = F.softmax(flatten_and_mask(teacher, mask) / temperature, dim=1)
    counts = row_weights(p, mask, weight)
    inter = safe_divide((counts * (1 - _pearson_correlation(p, q, torch.ones_like(p[:1])))).sum(), counts.sum())
    intra = (1 - _pearson_correlation(p.t(), q.t(), counts.unsqueeze(0))).mean() * (counts.sum() > 0)
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson_correlation(x: Tensor, y: Tensor, counts: Tensor, eps: float = 1e-8) -> Tensor:
    """Correlation of each row of x with the same row of y (n, m); entry j counts `counts[0, j]` times."""
    x = x - safe_divide((counts * x).sum(1, keepdim=True), counts.sum())
    y = y - safe_divide((counts * y).sum(1, keepdim=True), counts.sum())
    lengths = safe_sqrt((counts * x * x).sum(1)) * safe_sqrt((counts * y * y).sum(1))
    return (counts * x * y).sum(1) / (lengths + eps)


@TERMS.register("cross_entropy", space="row", version=1, paper="arXiv:1512.00567")
class CrossEntropy(Term):
    """Cross-entropy with the labels, with label smoothing, mixup and cutmix.

    loss = -sum_k t_k * log p_k, with t = (1 - e) * onehot(label) + e / classes.
    After mixup or cutmix the batch carries `label_other` and `mix`: mix * CE(label) + (1 - mix) * CE(label_other).
    Hidden labels (negative, -100) give 0; the runner leaves their rows out of the mean.

    Label smoothing: Szegedy et al. 2016, arXiv:1512.00567. Mixup: Zhang et al. 2018, arXiv:1710.09412.
    Shapes: student logits (batch, classes), label (batch,) -> (batch,), nats.
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
        other = cross_entropy_loss(student, label_other, self.label_smoothing)
        mix = mix.to(loss.dtype)
        return mix * loss + (1 - mix) * other


@TERMS.register("kd", space="row", version=1, paper="arXiv:1503.02531")
class SoftTargets(Term):
    """Soft targets: KL divergence from the teacher's softened distribution, times T^2.

    loss = T^2 * KL(softmax(teacher / T) || softmax(student / T)); T^2 always, also for T = 1.

    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    Shapes: student, teacher logits (batch, classes) -> (batch,), nats times T^2.
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
    """Decoupled KD: the target class and the others are weighed apart, where kd ties them to the teacher's confidence.

    loss = T^2 * (alpha * TCKD + beta * NCKD); kd is TCKD + (1 - q_label) * NCKD, q the teacher's distribution.
    alpha, beta and T as in the authors' code (mdistiller), which warms the term up over 20 epochs: give the
    term's weight a schedule. beta there is 2, 6 or 8, by the pair. Hidden labels (negative) give 0.

    Zhao, Cui, Song, Qiu and Liang, Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679.
    Shapes: student, teacher logits (batch, classes), label (batch,) -> (batch,), nats times T^2.
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
    """Mean squared error between the logits themselves.

    loss = 1/classes * sum_k (student_k - teacher_k)^2, the mean as in the code that Kim et al. released. Their
    paper writes the sum (classes times as much), Ba and Caruana half the sum: fold the factor into the weight.
    `centre: true` compares logits after each network's mean over the classes is taken off.

    Ba and Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, arXiv:1312.6184; Kim, Oh, Kim, Cho and Yun,
    Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, IJCAI 2021,
    arXiv:2105.08919.
    Shapes: student, teacher logits (batch, classes) -> (batch,), squared logits.
    """

    def __init__(self, centre: bool = False) -> None:
        super().__init__()
        self.centre = centre

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return logit_mse_loss(student, teacher, self.centre)


@TERMS.register("dist", space="batch", version=1, paper="arXiv:2205.10536")
class DIST(Term):
    """DIST: correlation instead of equality, within each sample (inter-class) and within each class over the batch.

    loss = T^2 * (beta * mean_i(1 - r(p_i, q_i)) + gamma * mean_k(1 - r(p_.k, q_.k))), r Pearson's correlation,
    p and q the softmaxes at temperature T. The paper prints no T^2; the authors' code
    (hunto/image_classification_sota) multiplies by it, as here; so do its 1e-8 below the fraction.
    Rows that the mask leaves out count nowhere; a row of weight 2 counts as if it stood in the batch twice.

    Huang, You, Wang, Qian and Xu, Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536.
    Shapes: student, teacher logits (batch, classes) -> scalar without unit.
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
    """HSAKD: cross-entropy with class and transformation together, one joint class for each pair of them.

    loss = -log softmax(student)[label * kinds + kind]. `kind` says which transformation the image went through, such as
    the quarter turns that a random `rotate90` tells: with `turned: {from: image, then: [rotate90]}`,
    `kind: train.turned_turns`. The student is a head with `num_classes: CLASSES * KINDS`. Hidden labels (negative): 0.

    Yang, An, Cai and Xu, Hierarchical Self-supervised Augmented Knowledge Distillation, IJCAI 2021, arXiv:2107.13715;
    the order of the joint classes as in the authors' code (winycg/HSAKD).
    Shapes: student logits (batch, classes * kinds), kind (batch,) of 0 to kinds - 1, label (batch,) -> (batch,), nats.
    """

    def __init__(self, num_classes: int, kinds: int = 4) -> None:
        super().__init__()
        if kinds < 2:
            raise ConfigError(f"joint_cross_entropy: kinds must be at least 2, got {kinds}")
        self.classes, self.kinds = num_classes, kinds

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if shapes["student"][1] != self.classes * self.kinds:
            raise ValueError(
                f"needs a value for each pair of {self.classes} classes and {self.kinds} kinds, "
                f"{self.classes * self.kinds} in all, but the student has {shapes['student'][1]}"
            )

    def forward(self, student: Tensor, kind: Tensor, label: Tensor) -> Tensor:
        return cross_entropy_loss(student, label * self.kinds + kind * (label >= 0))


def log_class_weights(counts: Tensor, beta: float) -> Tensor:
    """log of 1 / E_c, E_c = (1 - beta^n_c) / (1 - beta) the effective number of samples of class c, up to a constant.

    Args:
        counts: (classes,), n_c; a class without samples counts as one of a single sample.
        beta: in [0, 1); 0 makes all classes equal, near 1 the weights are 1 / n_c.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.log(-torch.expm1(at_least_float32(counts).clamp(min=1) * log_beta))


@TERMS.register("bkd", space="row", version=1, operands=("counts",), paper="arXiv:2104.10510")
class BalancedSoftTargets(Term):
    """BKD: soft targets in which rare classes count more, for a teacher that learnt from long-tailed data.

    loss = T^2 * KL(q' || softmax(student / T)), q'_c in proportion to w_c softmax(teacher / T)_c, with w_c one over the
    effective number of class c: (1 - beta) / (1 - beta^n_c) (Cui et al. 2019, arXiv:1901.05555). As in the authors'
    code (BKDLoss), where plain cross-entropy stands beside it with weight 1. With beta 0 it is `kd`.

    Zhang, Chen, Hu and Peng, Balanced Knowledge Distillation for Long-tailed Learning, 2021, arXiv:2104.10510.
    Shapes: student, teacher logits (batch, classes), counts (classes,), such as what the maker `class_counts` made ->
    (batch,), nats times T^2.
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
                f"weighs {shapes['student'][1]} classes by how many samples each has, but counts is "
                f"{list(shapes['counts'])}"
            )

    def forward(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        log_q = F.log_softmax(at_least_float32(teacher) / self.temperature, dim=1)
        balanced = self.temperature * (log_q + log_class_weights(counts, self.beta))
        return kd_loss(student, balanced, self.temperature)


@TERMS.register("taid", space="batch", version=1, paper="arXiv:2501.16937")
class TemporallyAdaptiveInterpolation(Term):
    """TAID: the target lies between the student's own distribution and the teacher's, nearer to it as the loss falls.

    loss = mean of -sum_k q_k log p_k, q = softmax((1 - t) z_s + t z_t) with the student's logits z_s held constant, p
    its softmax. After each step m <- momentum * m + (1 - momentum) (before - loss) / before, t <- t + rate * sigmoid(m)
    (1 - t), never below `least` and never above `end`. The authors' least value rises in a line from 0.2 or 0.4 to
    `end` over all steps: `least: {type: linear, start: 0.4, end: 1, by: step}`. As in their code (SakanaAI/TAID:
    src/distil_losses/taid.py), which reads the linear value of the step before. Under `accumulate` a step is a
    micro-batch. Masked rows do not count; rows count by weight in the mean (weights are relative).

    Shing, Misaki, Bao, Yokoi and Akiba, TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
    Transfer in Language Models, ICLR 2025, arXiv:2501.16937 (on images too).
    Shapes: student, teacher logits (batch, classes) -> scalar, nats.
    """

    t: Tensor
    drift: Tensor
    before: Tensor

    def __init__(self, least: Number = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> None:
        super().__init__()
        check_parameters("taid", "in [0, 1]", least=least, end=end, rate=rate, momentum=momentum)
        if not isinstance(least, Tensor) and least > end:
            raise ConfigError(f"taid: least must be at most end, got {least} and {end}")
        self.least, self.end, self.rate, self.momentum = least, end, rate, momentum
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("drift", torch.zeros(()))  # the running relative fall of the loss
        self.register_buffer("before", torch.full((), torch.inf))  # the loss of the step before

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        own, theirs = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        counts = row_weights(own, mask, weight)
        t = self.t.clamp(min=self.least).clamp(max=self.end).to(own.dtype)
        target = ((1 - t) * own.detach() + t * theirs).softmax(1)
        rows = -(target * own.log_softmax(1)).sum(1)
        loss = safe_divide((counts * rows).sum(), counts.sum())
        if self.training:
            self._update_interpolation(t.to(self.t.dtype), loss.detach().to(self.t.dtype))
        return loss

    def _update_interpolation(self, t: Tensor, loss: Tensor) -> None:
        first = self.before.isinf()
        fall = torch.where(first, 0, (self.before - loss) / (self.before + 1e-15))
        drift = self.momentum * self.drift + (1 - self.momentum) * fall
        self.drift.copy_(torch.where(first, self.drift, drift))
        self.t.copy_(torch.where(first, t, (t + self.rate * self.drift.sigmoid() * (1 - t)).clamp(max=self.end)))
        self.before.copy_(loss)
