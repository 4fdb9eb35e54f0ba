"""Terms on distributions over classes: divergences, consistency, entropy, optimal transport, interpolated targets.

The operands are logits (batch, classes), except where a docstring says otherwise. The terms compute in float32 or a
wider type.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_logits, check_parameters
from kdbench.terms.logits import kd_loss
from kdbench.terms.numerics import at_least_float32, flatten_and_mask, row_weights, safe_divide, safe_sqrt

DivergenceKind = Literal["forward_kl", "reverse_kl", "js", "soft_cross_entropy"]


def divergence_loss(student: Tensor, teacher: Tensor, kind: DivergenceKind, temperature: Number) -> Tensor:
    """Computes T^2 times the divergence `kind` of student and teacher distributions, one value per row.

    The class `Divergence` defines the kinds.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes).
        kind: name of the divergence.
        temperature: T > 0 of both softmaxes.

    Returns:
        (batch,), nats times T^2.
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    if kind == "forward_kl":
        value = _kl_divergence(log_q, log_p)
    elif kind == "reverse_kl":
        value = _kl_divergence(log_p, log_q)
    elif kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = (_kl_divergence(log_p, log_m) + _kl_divergence(log_q, log_m)) / 2
    else:
        value = -(log_q.exp() * log_p).sum(1)
    return temperature**2 * value


def _kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Computes KL(a || b) from log-probabilities log a and log b (batch, classes); returns (batch,)."""
    return (log_a.exp() * (log_a - log_b)).sum(1)


def standardise_logits(logits: Tensor) -> Tensor:
    """Computes (z - mean) / (std + 1e-7) for each row z of logits (batch, classes).

    mean and std are over the classes of the row. The variance has classes - 1 in its denominator.
    """
    logits = at_least_float32(logits)
    centered = logits - logits.mean(1, keepdim=True)
    return centered / (safe_sqrt(centered.square().sum(1, keepdim=True) / (logits.shape[1] - 1)) + 1e-7)


def shannon_entropy(probabilities: Tensor) -> Tensor:
    """Computes -sum_k p_k log p_k over the last dimension, in nats. 0 log 0 is 0, with a finite gradient."""
    return -(probabilities * torch.where(probabilities > 0, probabilities, 1).log()).sum(-1)


@TERMS.register("divergence", space="row", version=1, paper="arXiv:2103.05959")
class Divergence(Term):
    """Divergence between the softened distributions of student and teacher, times T^2. `kind` selects the divergence.

    loss = T^2 * D, with p = softmax(student / T), q = softmax(teacher / T), m = (p + q) / 2

    D depends on `kind`:

        forward_kl           KL(q || p); the loss is equal to the term `kd`
        reverse_kl           KL(p || q), as in BD-KD
        js                   KL(p || m) / 2 + KL(q || m) / 2, the Jensen-Shannon divergence as in SSLD; at most log 2
        soft_cross_entropy   -sum_k q_k log p_k, as in MEAL V2; the gradient is equal to the gradient of forward_kl, but
                             for p = q the loss is T^2 times the entropy of q, not 0

    The papers use T = 1.

    Args:
        kind: `forward_kl`, `reverse_kl`, `js` or `soft_cross_entropy`.
        temperature: T > 0.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), nats times T^2.

    References:
        Jensen-Shannon: Cui et al., SSLD, 2021, arXiv:2103.05959. Reverse KL: Amara et al., BD-KD, 2022,
        arXiv:2212.12965. Soft cross-entropy: Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453 (loss.py of its code).
    """

    def __init__(
        self,
        kind: Literal["forward_kl", "reverse_kl", "js", "soft_cross_entropy"] = "js",
        temperature: Number = 1.0,
    ) -> None:
        super().__init__()
        check_parameters("divergence", "above 0", temperature=temperature)
        self.kind: DivergenceKind = kind
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence_loss(student, teacher, self.kind, self.temperature)


@TERMS.register("probability_mse", space="row", version=1, paper="arXiv:1703.01780")
class ProbabilityMSE(Term):
    """Consistency loss: squared difference of the softmaxes of student and teacher, averaged over the classes.

    loss = 1/classes * sum_k (p_k - q_k)^2, p = softmax(student), q = softmax(teacher)

    The mean over the classes follows the authors' code (`softmax_mse_loss`). In Mean Teacher, the teacher is a moving
    average of the student's weights and sees a second augmentation of the sample. The weight of the loss rises during
    the first epochs.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), squared probability.

    References:
        Tarvainen and Valpola, Mean Teachers Are Better Role Models, NeurIPS 2017, arXiv:1703.01780.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = F.softmax(at_least_float32(student), dim=1), F.softmax(at_least_float32(teacher), dim=1)
        return (p - q).square().mean(1)


@TERMS.register("label_mse", space="row", version=1, paper="arXiv:2102.13088")
class LabelMSE(Term):
    """Brier score: squared difference of the softmax and the one-hot label, averaged over the classes.

    loss = 1/classes * sum_k (p_k - [k = label])^2, p = softmax(student)

    The self-distillation of Borup and Andersen has the target a * label + (1 - a) * q, where q is the softmax of the
    previous generation. This term with weight a and the term `probability_mse` with weight 1 - a give the same
    gradient. The mean over the classes follows the code of Borup and Andersen.

    Shape:
        student: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative) have loss 0.
        Returns (batch,), squared probability.

    References:
        Borup and Andersen, Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
        Self-Distillation, NeurIPS 2021, arXiv:2102.13088.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        p = F.softmax(at_least_float32(student), dim=1)
        one_hot = torch.zeros_like(p).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        return torch.where(label < 0, 0, (p - one_hot).square().mean(1))


@TERMS.register("standardised_kd", space="row", version=1, paper="arXiv:2403.01427")
class StandardisedKD(Term):
    """KD of standardised logits: the standard deviation of a sample's logits acts as the temperature of this sample.

    loss = T^2 * KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)), Z(z) = (z - mean) / (std + 1e-7)

    The variance has classes - 1 in its denominator, as in the authors' code. The authors use T = 2 and the weight 9.
    With T = 1, the loss is the KD loss of MIX-KD (Choi et al., ICCV 2023). MIX-KD only divides by the standard
    deviation, which gives the same softmax. For the cross-entropy of MIX-KD, use the adapter `standardise`.

    Args:
        temperature: T > 0.

    Shape:
        student, teacher: logits (batch, classes), at least 2 classes.
        Returns (batch,), nats times T^2.

    References:
        Sun, Ren, Li, Wang and Cao, Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.
    """

    def __init__(self, temperature: Number = 2.0) -> None:
        super().__init__()
        check_parameters("standardised_kd", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"], min_classes=2)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(standardise_logits(student), standardise_logits(teacher), self.temperature)


@TERMS.register("entropy", space="row", version=1, paper="arXiv:1701.06548")
class PredictionEntropy(Term):
    """Entropy of a prediction. With a negative weight, the term penalises confidence; with a positive one, uncertainty.

    loss = -sum_k p_k log p_k, p = softmax(student)

    Args:
        of: meaning of the operand `student`. `logits`: logits. `probabilities`: probabilities, for example the output
            of a gate that weights several teachers.

    Shape:
        student: logits or probabilities (batch, classes), at least 2 classes.
        Returns (batch,), nats.

    References:
        Pereyra, Tucker, Chorowski, Kaiser and Hinton, Regularizing Neural Networks by Penalizing Confident Output
        Distributions, 2017, arXiv:1701.06548. The paper uses the weight -0.1.
    """

    def __init__(self, of: Literal["logits", "probabilities"] = "logits") -> None:
        super().__init__()
        if of not in ("logits", "probabilities"):
            raise ConfigError(f"entropy: of must be logits or probabilities, got {of!r}")
        self.of = of

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)

    def forward(self, student: Tensor) -> Tensor:
        values = at_least_float32(student)
        if self.of == "probabilities":
            return shannon_entropy(values)
        log_p = F.log_softmax(values, dim=1)
        return -(log_p.exp() * log_p).sum(1)


def sinkhorn_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: Number = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Computes the cost of entropy-regularised transport from student to teacher predictions; returns a scalar.

    The class `Sinkhorn` describes the loss and the arguments.
    """
    weights = row_weights(flatten_and_mask(student, mask), mask, weight)
    p = F.softmax(flatten_and_mask(student, mask) / temperature, dim=1)
    q = F.softmax(flatten_and_mask(teacher, mask) / temperature, dim=1)
    cost = (p.unsqueeze(1) - q.unsqueeze(0)).abs().sum(2)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = safe_divide(plan, (plan * weights).sum(1, keepdim=True))
        plan = safe_divide(plan, (plan * weights.unsqueeze(1)).sum(0, keepdim=True))
    pair_weights = weights.unsqueeze(0) * weights.unsqueeze(1)
    return safe_divide((pair_weights * plan * cost).sum(), weights.sum())


@TERMS.register("sinkhorn", space="batch", version=1, paper="arXiv:2402.17110")
class Sinkhorn(Term):
    """SinKD: cost of transporting the student's predictions of a batch to the teacher's predictions.

    loss = 1/n * sum_ij P_ij C_ij, C_ij = |p_i - q_j|_1

    n is the number of rows. p_i and q_j are the softmaxes of student and teacher for the samples i and j. P is the
    transport plan: the matrix exp(-C / epsilon), whose rows and then columns are scaled to sum 1, `iterations` times.
    Gradients pass through the scaling. If student and teacher are equal, the loss is not 0, because P has some mass
    between different samples.

    The formula follows the authors' code (2018cx/SinKD, loss.py), which adds cross-entropy and KL divergence. That
    code sums over the batch and multiplies by 0.002: this is the weight 0.002 * n for this term.

    Args:
        temperature: T > 0 of both softmaxes.
        epsilon: strength of the entropy regularisation, at least 0.025. With a small epsilon, P assigns almost all mass
            of a sample to one sample. With a large epsilon, P spreads the mass evenly.
        iterations: number of scalings, at least 1.

    Shape:
        student, teacher: logits (batch, classes).
        Returns a scalar in [0, 2], without unit. Masked rows do not count. A row of weight 2 counts as two rows of
        weight 1. Memory: batch * batch * classes numbers.

    References:
        Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, COLING 2024, arXiv:2402.17110.
    """

    def __init__(self, temperature: Number = 2.0, epsilon: float = 0.1, iterations: int = 20) -> None:
        super().__init__()
        check_parameters("sinkhorn", "above 0", temperature=temperature)
        check_parameters("sinkhorn", "at least 1", iterations=iterations)
        # Costs are at most 2; below this epsilon exp(-2 / epsilon) underflows in float32.
        if not epsilon >= 0.025:
            raise ConfigError(f"sinkhorn: epsilon must be at least 0.025, got {epsilon}")
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return sinkhorn_loss(student, teacher, self.temperature, self.epsilon, self.iterations, mask, weight)


@TERMS.register("taid", space="batch", version=1, paper="arXiv:2501.16937")
class TemporallyAdaptiveInterpolation(Term):
    """TAID: the target moves from the student's to the teacher's distribution, faster while the loss falls.

    loss = mean over rows of -sum_k q_k log p_k, p = softmax(z_s), q = softmax((1 - t) z_s + t z_t)

    z_s and z_t are the logits of student and teacher. z_s in q is detached. t is a state of the term, and m is a
    running mean of the relative decrease of the loss. Each training step updates m and t:

        m <- momentum * m + (1 - momentum) * (previous loss - loss) / previous loss
        t <- t + rate * sigmoid(m) * (1 - t), clamped to [least, end]

    The formulas follow the authors' code (SakanaAI/TAID: src/distil_losses/taid.py), except that the code clamps t to
    the value of `least` in the previous step. With gradient accumulation (`accumulate`), each micro-batch counts as a
    step.

    Args:
        least: lower bound of t, in [0, 1]. The authors raise it linearly from 0.2 or 0.4 to `end` over all steps:
            `least: {type: linear, start: 0.4, end: 1, by: step}`.
        end: upper bound of t, in [0, 1].
        rate: step size of t, in [0, 1].
        momentum: weight of the previous m, in [0, 1].

    Shape:
        student, teacher: logits (batch, classes).
        Returns a scalar, nats. Masked rows do not count. A row of weight 2 counts as two rows of weight 1.

    References:
        Shing, Misaki, Bao, Yokoi and Akiba, TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
        Transfer in Language Models, ICLR 2025, arXiv:2501.16937. The paper also has experiments on images.
    """

    t: Tensor
    relative_decrease: Tensor
    previous_loss: Tensor

    def __init__(self, least: Number = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> None:
        super().__init__()
        check_parameters("taid", "in [0, 1]", least=least, end=end, rate=rate, momentum=momentum)
        if not isinstance(least, Tensor) and least > end:
            raise ConfigError(f"taid: least must be at most end, got {least} and {end}")
        self.least, self.end, self.rate, self.momentum = least, end, rate, momentum
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("relative_decrease", torch.zeros(()))  # running mean
        self.register_buffer("previous_loss", torch.full((), torch.inf))

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        student_logits, teacher_logits = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
        weights = row_weights(student_logits, mask, weight)
        t = self.t.clamp(min=self.least).clamp(max=self.end).to(student_logits.dtype)
        target = ((1 - t) * student_logits.detach() + t * teacher_logits).softmax(1)
        row_loss = -(target * student_logits.log_softmax(1)).sum(1)
        loss = safe_divide((weights * row_loss).sum(), weights.sum())
        if self.training:
            self._update_interpolation(t.to(self.t.dtype), loss.detach().to(self.t.dtype))
        return loss

    def _update_interpolation(self, t: Tensor, loss: Tensor) -> None:
        is_first_step = self.previous_loss.isinf()
        decrease = torch.where(is_first_step, 0, (self.previous_loss - loss) / (self.previous_loss + 1e-15))
        running_mean = self.momentum * self.relative_decrease + (1 - self.momentum) * decrease
        self.relative_decrease.copy_(torch.where(is_first_step, self.relative_decrease, running_mean))
        next_t = (t + self.rate * self.relative_decrease.sigmoid() * (1 - t)).clamp(max=self.end)
        self.t.copy_(torch.where(is_first_step, t, next_t))
        self.previous_loss.copy_(loss)
