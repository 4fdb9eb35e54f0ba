"""Terms on distributions of features: neuron selectivity, maximum mean discrepancy, class statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_equal_shapes, check_feature_maps, check_logits, check_parameters
from kdbench.terms.numerics import (
    at_least_float32,
    autocast_disabled,
    flatten_and_mask,
    row_weights,
    safe_divide,
    safe_sqrt,
)


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the two sets of channels: (batch,). See `NeuronSelectivity`."""
    with autocast_disabled(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        s, t = (_selectivity_patterns(values, size) for values in (student, teacher))
        return _mean_polynomial_kernel(t, t) + _mean_polynomial_kernel(s, s) - 2 * _mean_polynomial_kernel(s, t)


def _selectivity_patterns(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Each channel as a vector of length 1 over the places, (batch, channels, places), pooled to `size`."""
    if features.shape[2:] != size:
        features = F.adaptive_avg_pool2d(features, size)
    flat = features.flatten(2)
    return safe_divide(flat, safe_sqrt(flat.square().sum(2, keepdim=True)))


def _mean_polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all pairs of channels of <a_i, b_j>^2: (batch,)."""
    return (a @ b.transpose(1, 2)).square().mean((1, 2))


@TERMS.register("nst", space="row", version=1, features=True, paper="arXiv:1707.01219")
class NeuronSelectivity(Term):
    """Neuron selectivity transfer: the student's channels are spread over the places as the teacher's channels are.

    loss = mean k(t, t') + mean k(s, s') - 2 mean k(s, t) over all pairs of channels, with k(a, b) = <a, b>^2 and each
    channel scaled to length 1 over the places: the squared maximum mean discrepancy (MMD) with the polynomial kernel
    (degree 2, no constant), the best one of the paper. As in RepDistiller, whose published figures use weight 50 over
    the inner layers (one edge each), the larger map is average-pooled; the paper interpolates.

    Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv:1707.01219.
    Shapes: student, teacher (batch, channels, height, width), channels and sizes may differ -> (batch,), without unit.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_feature_maps(student=shapes["student"], teacher=shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return nst_loss(student, teacher)


def mmd_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Squared distance of the mean features of two batches; a scalar. See `MeanDiscrepancy`."""
    student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
    counts = row_weights(student, mask, weight)
    difference = safe_divide((counts.unsqueeze(1) * (student - teacher)).sum(0), counts.sum())
    return difference.square().sum()


@TERMS.register("mmd", space="batch", version=1, features=True, paper="AAAI 2019")
class MaximumMeanDiscrepancy(Term):
    """Maximum mean discrepancy with the linear kernel: the mean feature of a batch is the same on both sides.

    loss = |mean_i s_i - mean_i t_i|^2, the sum over the elements, as the text has it. Single samples may differ: of one
    network under two distortions of its input, only what the distortions do to all samples alike is taken away. There
    both sides learn (`teacher_grad: true`).
    Masked rows count nowhere; a row of weight c counts c times in both means (weights are relative).

    Xu and Liu, Data-Distortion Guided Self-Distillation for Deep Neural Networks, AAAI 2019.
    Shapes: student, teacher (batch, ...) of equal shape -> scalar, squared units of the feature.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return mmd_loss(student, teacher, mask, weight)


@TERMS.register("cmi", space="row", version=1, state=True, injected=("num_classes",), paper="arXiv:2401.08732")
class ConditionalMutualInformation(Term):
    """MCMI: how far a prediction is from the mean prediction of its class; maximised, for a better teacher.

    loss = KL(p(x) || Q_y), Q_y the mean prediction over class y: its mean over the data is the conditional mutual
    information. The teacher is fine-tuned with cross_entropy and this term at a negative weight. Gradients go through
    p only. As in the authors' code Q is a decayed mean, renormalised (decay 0.9999); there it begins as the mean over
    the training set and follows 8 further samples per class and step, here it follows the batch: a class's
    first batch sets it, so let a stage of weight near 0 precede, or a smaller decay.
    Hidden labels (negative) give 0 and count nowhere.

    Ye, Hamidi, Tan and Yang, Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional
    Mutual Information, ICLR 2024, arXiv:2401.08732.
    Shapes: student logits (batch, classes), label (batch,) -> (batch,), nats.
    """

    centroids: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, decay: float = 0.9999) -> None:
        super().__init__()
        check_parameters("cmi", "in [0, 1]", decay=decay)
        self.decay = decay
        self.register_buffer("centroids", torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if shapes["student"][1] != len(self.centroids):
            raise ValueError(
                f"knows the data's {len(self.centroids)} classes, but the student has {shapes['student'][1]}"
            )

    def forward(self, student: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        known = label >= 0 if mask is None else mask & (label >= 0)
        log_p = F.log_softmax(at_least_float32(student), dim=1)
        own = label.clamp(min=0)
        self._update_centroids(log_p.detach().exp(), own, known)
        log_q = self.centroids[own].to(log_p.dtype).clamp(min=torch.finfo(log_p.dtype).tiny).log()
        return torch.where(label < 0, 0, (log_p.exp() * (log_p - log_q)).sum(1))

    def _update_centroids(self, p: Tensor, own: Tensor, known: Tensor) -> None:
        p = torch.where(known.unsqueeze(1), p, 0)  # a padded row may hold anything, and 0 * NaN is NaN
        belongs = torch.zeros_like(p).scatter(1, own.unsqueeze(1), 1) * known.unsqueeze(1)
        with autocast_disabled(p):
            sums, counts = belongs.t() @ p, belongs.sum(0)
        mean, here = safe_divide(sums, counts.unsqueeze(1)).to(self.centroids.dtype), (counts > 0).unsqueeze(1)
        moved = torch.where(self.seen.unsqueeze(1), self.decay * self.centroids + (1 - self.decay) * mean, mean)
        moved = torch.where(here, moved, self.centroids)
        self.centroids.copy_(moved / moved.sum(1, keepdim=True))
        self.seen.logical_or_(here.squeeze(1))


@TERMS.register(
    "scar", space="row", version=1, features=True, operands=("means", "precision"), paper="arXiv:2404.12922"
)
class NearestWrongClass(Term):
    """SCAR: features of what is to be forgotten move to the nearest class that they do not belong to.

    loss = min over classes c other than the label of d_c^T P_c d_c, d_c = x / |x| - m_c / |m_c|, x the feature to the
    power `power` (Tukey's transformation), m_c the mean of such features over class c and P_c the inverse of their
    shrunk, normalised covariance. No root, as in the authors' code. There the class is chosen once, in the first epoch;
    here in every step. Features are at least 0 (behind a ReLU); what is below counts as 0.

    Bonato, Cotogni and Sabetta, Is Retain Set All You Need in Machine Unlearning?, ECCV 2024, arXiv:2404.12922.
    Shapes: student features (batch, elements), label (batch,), means (classes, elements), precision (classes, elements,
    elements) -> (batch,), without unit. Needs batch * classes * elements numbers.
    """

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        check_parameters("scar", "above 0", power=power)
        self.power = power

    def check_shapes(self, **shapes: Size) -> None:
        student = shapes["student"]
        if len(student) != 2:
            raise ValueError(f"reads a feature vector per sample, but the student's operand is {list(student[1:])}")
        for name, wanted in (("means", 1), ("precision", 2)):
            if name in shapes and tuple(shapes[name][1:]) != (student[1],) * wanted:
                raise ValueError(
                    f"needs {name} per class of size {[student[1]] * wanted}, as the features, got {list(shapes[name])}"
                )

    def forward(self, student: Tensor, label: Tensor, means: Tensor, precision: Tensor) -> Tensor:
        with autocast_disabled(student):
            x = at_least_float32(student)
            above = x > 0
            x = torch.where(above, torch.where(above, x, 1) ** self.power, 0)  # a root's gradient at 0 is infinite
            means, precision = means.to(x.dtype), precision.to(x.dtype)
            apart = _unit(x).unsqueeze(1) - _unit(means)
            distances = torch.einsum("bcd,cde,bce->bc", apart, precision, apart)
            own = torch.zeros_like(distances, dtype=torch.bool).scatter(1, label.clamp(min=0).unsqueeze(1), True)
            own = own & (label >= 0).unsqueeze(1)
            return distances.masked_fill(own, torch.inf).min(1).values


def _unit(rows: Tensor) -> Tensor:
    return safe_divide(rows, safe_sqrt(rows.square().sum(-1, keepdim=True)))
