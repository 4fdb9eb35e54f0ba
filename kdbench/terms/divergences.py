"""Terms that compare two predictions as distributions, or judge one: divergences, consistency, entropy.

All take logits (batch, classes) unless said otherwise, compute in float32 at least, and return one value per sample.
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
    """T^2 times a divergence of the softened distributions of logits (batch, classes): (batch,). See `Divergence`."""
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
    return (log_a.exp() * (log_a - log_b)).sum(1)


def standardise_logits(logits: Tensor) -> Tensor:
    """Logits less their mean, over their standard deviation plus 1e-7 (n - 1 in its denominator), per sample."""
    logits = at_least_float32(logits)
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (safe_sqrt(centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)) + 1e-7)


def shannon_entropy(probabilities: Tensor) -> Tensor:
    """-sum_k p_k log p_k of the last dimension, in nats; 0 log 0 counts as 0, with a finite gradient."""
    return -(probabilities * torch.where(probabilities > 0, probabilities, 1).log()).sum(-1)


@TERMS.register("divergence", space="row", version=1, paper="arXiv:2103.05959")
class Divergence(Term):
    """A chosen divergence between the two softened distributions, times T^2: Jensen-Shannon, reverse KL and others.

    With p, q = softmax(student / T), softmax(teacher / T) and m = (p + q) / 2, loss = T^2 times
        forward_kl: KL(q || p), which is `kd`.          reverse_kl: KL(p || q), as BD-KD's teacher and student use.
        js: KL(p || m) / 2 + KL(q || m) / 2, as SSLD.   soft_cross_entropy: -sum_k q_k log p_k, as MEAL V2.

    The papers named take T = 1, where T^2 is no factor. js is symmetric and at most T^2 log 2. soft_cross_entropy
    has the gradient of forward_kl for the student, and is not 0 where the two agree but the teacher's entropy.

    Jensen-Shannon: Cui et al., SSLD, 2021, arXiv:2103.05959. Reverse KL: Amara et al., BD-KD, 2022, arXiv:2212.12965.
    Soft cross-entropy: Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453 (loss.py of its code).
    Shapes: student, teacher logits (batch, classes) -> (batch,), nats times T^2.
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
    """Consistency: squared difference of the two softmaxes, averaged over the classes.

    loss = 1/classes * sum_k (p_k - q_k)^2, the mean over the classes as in the authors' code (`softmax_mse_loss`).
    The teacher there is the student's moving average on another view of the sample, the weight ramps up.

    Tarvainen and Valpola, Mean Teachers Are Better Role Models, NeurIPS 2017, arXiv:1703.01780.
    Shapes: student, teacher logits (batch, classes) -> (batch,), squared probability.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = F.softmax(at_least_float32(student), dim=1), F.softmax(at_least_float32(teacher), dim=1)
        return (p - q).square().mean(1)


@TERMS.register("label_mse", space="row", version=1, paper="arXiv:2102.13088")
class LabelMSE(Term):
    """Squared difference of the softmax and the label, averaged over the classes: the Brier score as a loss.

    loss = 1/classes * sum_k (p_k - [k = label])^2. Beside `probability_mse` it makes the self-distillation of Borup and
    Andersen, whose target is a weighted mean of the label and the last generation's softmax: weights a and 1 - a give
    the same gradients. Mean over the classes as in their code. Hidden labels (negative) give 0.

    Borup and Andersen, Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
    Self-Distillation, NeurIPS 2021, arXiv:2102.13088.
    Shapes: student logits (batch, classes), label (batch,) -> (batch,), squared probability.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        p = F.softmax(at_least_float32(student), dim=1)
        hard = torch.zeros_like(p).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        return torch.where(label < 0, 0, (p - hard).square().mean(1))


@TERMS.register("standardised_kd", space="row", version=1, paper="arXiv:2403.01427")
class StandardisedKD(Term):
    """KD of standardised logits: each sample's own spread of logits takes the place of a shared temperature.

    loss = T^2 * KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)), Z(z) = (z - mean) / (1e-7 + std), the
    standard deviation over a sample's classes with classes - 1 below, as in the authors' code (T 2, weight 9 there).
    With T = 1 it is the KD of MIX-KD (Choi et al., ICCV 2023, row m009), which divides by the standard deviation
    alone: a softmax does not see the mean. For its cross-entropy take the adapter `standardise`.

    Sun, Ren, Li, Wang and Cao, Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.
    Shapes: student, teacher logits (batch, classes) -> (batch,), nats times T^2.
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
    """Entropy of a prediction; with a negative weight the confidence penalty, with a positive one it sharpens.

    loss = -sum_k p_k log p_k. `of: probabilities` reads the operand as probabilities, such as a router's gate.

    Pereyra, Tucker, Chorowski, Kaiser and Hinton, Regularizing Neural Networks by Penalizing Confident Output
    Distributions, 2017, arXiv:1701.06548 (weight -0.1 there).
    Shapes: student logits or probabilities (batch, classes) -> (batch,), nats.
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
    """The cost of an entropy-regularised transport between two batches of softmaxes; a scalar. See `Sinkhorn`."""
    counts = row_weights(flatten_and_mask(student, mask), mask, weight)
    p = F.softmax(flatten_and_mask(student, mask) / temperature, dim=1)
    q = F.softmax(flatten_and_mask(teacher, mask) / temperature, dim=1)
    cost = (p.unsqueeze(1) - q.unsqueeze(0)).abs().sum(2)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = safe_divide(plan, (plan * counts).sum(1, keepdim=True))
        plan = safe_divide(plan, (plan * counts.unsqueeze(1)).sum(0, keepdim=True))
    pairs = counts.unsqueeze(0) * counts.unsqueeze(1)
    return safe_divide((pairs * plan * cost).sum(), counts.sum())


@TERMS.register("sinkhorn", space="batch", version=1, paper="arXiv:2402.17110")
class Sinkhorn(Term):
    """SinKD: what it costs to move the student's predictions of a batch onto the teacher's, sample to sample.

    loss = 1/n * sum_ij P_ij C_ij, C_ij = |p_i - q_j|_1 between the softened predictions of samples i and j, P the
    matrix exp(-C / epsilon) whose rows and then columns are scaled to sum 1, `iterations` times over. Gradients go
    through the scaling. A small epsilon makes P a matching of the samples, a large one spreads it evenly.

    As in the authors' code (2018cx/SinKD, loss.py), with T 2, epsilon 0.1 and 20 iterations; there it is a sum over the
    batch times 0.002, beside CE and KL: a weight of 0.002 n here. Of equal predictions it is not 0, since P leaves
    some mass between different samples. Rows of weight c count c times in every sum.

    Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, COLING 2024, arXiv:2402.17110.
    Shapes: student, teacher logits (batch, classes) -> scalar in [0, 2]. Needs batch * batch * classes numbers.
    """

    def __init__(self, temperature: Number = 2.0, epsilon: float = 0.1, iterations: int = 20) -> None:
        super().__init__()
        check_parameters("sinkhorn", "above 0", temperature=temperature)
        check_parameters("sinkhorn", "at least 1", iterations=iterations)
        if not epsilon >= 0.025:  # costs are at most 2, and exp(-2 / 0.025) is the last that float32 can tell from 0
            raise ConfigError(f"sinkhorn: epsilon must be at least 0.025, got {epsilon}")
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return sinkhorn_loss(student, teacher, self.temperature, self.epsilon, self.iterations, mask, weight)
