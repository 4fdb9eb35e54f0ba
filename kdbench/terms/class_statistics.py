"""Terms that compare a sample with what its class, or another one, is like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, logits_of, require
from kdbench.terms.numerics import at_least_float32, full_precision, ratio, safe_sqrt


@TERMS.register("cmi", space="sample", version=1, state=True, injected=("num_classes",), paper="arXiv:2401.08732")
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
        require("cmi", "in [0, 1]", decay=decay)
        self.decay = decay
        self.register_buffer("centroids", torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def check_shapes(self, **shapes: Size) -> None:
        logits_of("student", shapes["student"])
        if shapes["student"][1] != len(self.centroids):
            raise ValueError(
                f"knows the data's {len(self.centroids)} classes, but the student has {shapes['student'][1]}"
            )

    def forward(self, student: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        known = label >= 0 if mask is None else mask & (label >= 0)
        log_p = F.log_softmax(at_least_float32(student), dim=1)
        own = label.clamp(min=0)
        self._follow(log_p.detach().exp(), own, known)
        log_q = self.centroids[own].to(log_p.dtype).clamp(min=torch.finfo(log_p.dtype).tiny).log()
        return torch.where(label < 0, 0, (log_p.exp() * (log_p - log_q)).sum(1))

    def _follow(self, p: Tensor, own: Tensor, known: Tensor) -> None:
        p = torch.where(known.unsqueeze(1), p, 0)  # a padded row may hold anything, and 0 * NaN is NaN
        belongs = torch.zeros_like(p).scatter(1, own.unsqueeze(1), 1) * known.unsqueeze(1)
        with full_precision(p):
            sums, counts = belongs.t() @ p, belongs.sum(0)
        mean, here = ratio(sums, counts.unsqueeze(1)).to(self.centroids.dtype), (counts > 0).unsqueeze(1)
        moved = torch.where(self.seen.unsqueeze(1), self.decay * self.centroids + (1 - self.decay) * mean, mean)
        moved = torch.where(here, moved, self.centroids)
        self.centroids.copy_(moved / moved.sum(1, keepdim=True))
        self.seen.logical_or_(here.squeeze(1))


@TERMS.register(
    "scar", space="sample", version=1, features=True, operands=("means", "precision"), paper="arXiv:2404.12922"
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
        require("scar", "above 0", power=power)
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
        with full_precision(student):
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
    return ratio(rows, safe_sqrt(rows.square().sum(-1, keepdim=True)))
