"""Terms on distributions of features: neuron selectivity, maximum mean discrepancy, class statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import (
    Term,
    check_equal_shapes,
    check_feature_maps,
    check_logits,
    check_parameters,
)
from kdbench.terms.numerics import (
    at_least_float32,
    autocast_disabled,
    flatten_and_mask,
    row_weights,
    safe_divide,
    safe_normalize,
)


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the squared maximum mean discrepancy of two sets of channels (see `NeuronSelectivity`).

    Returns (batch,).
    """
    with autocast_disabled(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        s, t = (_selectivity_patterns(features, size) for features in (student, teacher))
        return _mean_polynomial_kernel(t, t) + _mean_polynomial_kernel(s, s) - 2 * _mean_polynomial_kernel(s, t)


def _selectivity_patterns(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Pools each channel to `size` and scales it to length 1 over the positions.

    Returns (batch, channels, positions).
    """
    if features.shape[2:] != size:
        features = F.adaptive_avg_pool2d(features, size)
    return safe_normalize(features.flatten(2))


def _mean_polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Averages <a_i, b_j>^2 over all pairs of channels i and j. Returns (batch,)."""
    return (a @ b.transpose(1, 2)).square().mean((1, 2))


@TERMS.register("nst", space="row", version=1, features=True, paper="arXiv:1707.01219")
class NeuronSelectivity(Term):
    """Neuron selectivity transfer: maximum mean discrepancy between the channels of student and teacher.

    loss = mean k(t, t') + mean k(s, s') - 2 mean k(s, t), k(a, b) = <a, b>^2

    The means are over all pairs of channels. Each channel is scaled to length 1 over the positions. k is the
    polynomial kernel of degree 2 without constant, which is the best kernel in the paper. The larger map is
    average-pooled, as in RepDistiller, whose published figures use weight 50 for each inner layer. The paper
    interpolates instead.

    Shape:
        student, teacher: (batch, channels, height, width); channels and sizes may differ.
        Returns (batch,), without unit.

    References:
        Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv:1707.01219.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_feature_maps(student=shapes["student"], teacher=shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return nst_loss(student, teacher)


def mmd_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Computes the squared distance of the mean features of two batches. Returns a scalar."""
    student, teacher = flatten_and_mask(student, mask), flatten_and_mask(teacher, mask)
    weights = row_weights(student, mask, weight)
    difference = safe_divide((weights.unsqueeze(1) * (student - teacher)).sum(0), weights.sum())
    return difference.square().sum()


@TERMS.register("mmd", space="batch", version=1, features=True, paper="AAAI 2019")
class MaximumMeanDiscrepancy(Term):
    """Maximum mean discrepancy with the linear kernel: squared distance of the mean features of a batch.

    loss = |mean_i s_i - mean_i t_i|^2

    The square is summed over the elements, as in the paper. In the paper, the two operands are features of one
    network for two distortions of its input, and gradients flow through the two operands (`teacher_grad: true`).
    Features of single samples may differ. The term only removes differences that are common to all samples.

    Shape:
        student, teacher: (batch, ...) of equal shape.
        Returns a scalar, squared units of the feature. Masked rows are left out. Only ratios of row weights matter.

    References:
        Xu and Liu, Data-Distortion Guided Self-Distillation for Deep Neural Networks, AAAI 2019.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return mmd_loss(student, teacher, mask, weight)


@TERMS.register("cmi", space="row", version=1, state=True, injected=("num_classes",), paper="arXiv:2401.08732")
class ConditionalMutualInformation(Term):
    """MCMI: KL divergence of a prediction from the mean prediction of its class.

    loss = KL(p(x) || Q_y), p = softmax(student)

    Q_y is the mean prediction over class y. The mean of the loss over the data is the conditional mutual information.
    The paper
    maximises it: the teacher is fine-tuned with `cross_entropy` and this term at a negative weight. No gradient flows
    through Q.

    As in the authors' code, Q is a renormalised moving average. In the code it starts with the mean over the training
    set and is updated with 8 additional samples per class and step. In this term, it starts with the first batch that
    contains the class and is updated with later batches. A first stage with a weight near 0, or a smaller decay,
    reduces the effect of this difference.

    Args:
        decay: weight of the previous mean, in [0, 1].

    Shape:
        student: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative) have loss 0 and
            do not change the mean.
        Returns (batch,), nats.

    References:
        Ye, Hamidi, Tan and Yang, Bayes Conditional Distribution Estimation for Knowledge Distillation Based on
        Conditional Mutual Information, ICLR 2024, arXiv:2401.08732.
    """

    centroids: Tensor
    initialised: Tensor

    def __init__(self, num_classes: int, decay: float = 0.9999) -> None:
        super().__init__()
        check_parameters("cmi", "in [0, 1]", decay=decay)
        self.decay = decay
        self.register_buffer("centroids", torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer("initialised", torch.zeros(num_classes, dtype=torch.bool))

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if shapes["student"][1] != len(self.centroids):
            raise ValueError(
                f"stores a mean prediction for each of the data's {len(self.centroids)} classes, but the student has "
                f"{shapes['student'][1]}"
            )

    def forward(self, student: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        labelled = label >= 0 if mask is None else mask & (label >= 0)
        log_p = F.log_softmax(at_least_float32(student), dim=1)
        row_class = label.clamp(min=0)
        # The batch enters the means before they are read.
        self._update_centroids(log_p.detach().exp(), row_class, labelled)
        log_q = self.centroids[row_class].to(log_p.dtype).clamp(min=torch.finfo(log_p.dtype).tiny).log()
        return torch.where(label < 0, 0, (log_p.exp() * (log_p - log_q)).sum(1))

    def _update_centroids(self, p: Tensor, row_class: Tensor, labelled: Tensor) -> None:
        p = torch.where(labelled.unsqueeze(1), p, 0)  # a padded row may contain NaN, and 0 * NaN is NaN
        membership = torch.zeros_like(p).scatter(1, row_class.unsqueeze(1), 1) * labelled.unsqueeze(1)
        with autocast_disabled(p):
            sums, counts = membership.t() @ p, membership.sum(0)
        batch_mean = safe_divide(sums, counts.unsqueeze(1)).to(self.centroids.dtype)
        in_batch = (counts > 0).unsqueeze(1)
        decayed = self.decay * self.centroids + (1 - self.decay) * batch_mean
        updated = torch.where(self.initialised.unsqueeze(1), decayed, batch_mean)
        updated = torch.where(in_batch, updated, self.centroids)
        self.centroids.copy_(updated / updated.sum(1, keepdim=True))
        self.initialised.logical_or_(in_batch.squeeze(1))


@TERMS.register(
    "scar", space="row", version=1, features=True, operands=("means", "precision"), paper="arXiv:2404.12922"
)
class NearestWrongClass(Term):
    """SCAR: squared Mahalanobis distance from a feature to the nearest wrong class, for unlearning.

    loss = min over classes c != label of d_c^T P_c d_c, d_c = x / |x| - m_c / |m_c|

    x is the feature to the power `power` (Tukey's transformation), m_c is the mean of such features over class c, and
    P_c is the inverse of their shrunk, normalised covariance. As in the authors' code, no square root is taken. The
    code chooses the nearest class once, in the first epoch. This term chooses it in every step.

    Args:
        power: exponent of the features, above 0.

    Shape:
        student: features (batch, elements) after a ReLU. Negative values count as 0.
        label: (batch,), int64. means: (classes, elements). precision: (classes, elements, elements).
        Returns (batch,), without unit. Memory: batch * classes * elements numbers.

    References:
        Bonato, Cotogni and Sabetta, Is Retain Set All You Need in Machine Unlearning?, ECCV 2024, arXiv:2404.12922.
    """

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        check_parameters("scar", "above 0", power=power)
        self.power = power

    def check_shapes(self, **shapes: Size) -> None:
        student = shapes["student"]
        if len(student) != 2:
            raise ValueError(f"reads one feature vector per sample, but the student's operand is {list(student[1:])}")
        for name, dimensions in (("means", 1), ("precision", 2)):
            if name in shapes and tuple(shapes[name][1:]) != (student[1],) * dimensions:
                raise ValueError(
                    f"needs {name} per class of size {[student[1]] * dimensions}, equal to the features, got "
                    f"{list(shapes[name])}"
                )

    def forward(self, student: Tensor, label: Tensor, means: Tensor, precision: Tensor) -> Tensor:
        with autocast_disabled(student):
            x = at_least_float32(student)
            positive = x > 0
            # The inner `where` keeps 0 out of the power: the gradient of a root at 0 is infinite.
            x = torch.where(positive, torch.where(positive, x, 1) ** self.power, 0)
            means, precision = means.to(x.dtype), precision.to(x.dtype)
            difference = safe_normalize(x).unsqueeze(1) - safe_normalize(means)
            distances = torch.einsum("bcd,cde,bce->bc", difference, precision, difference)
            is_label = torch.zeros_like(distances, dtype=torch.bool).scatter(1, label.clamp(min=0).unsqueeze(1), True)
            is_label = is_label & (label >= 0).unsqueeze(1)
            return distances.masked_fill(is_label, torch.inf).min(1).values
