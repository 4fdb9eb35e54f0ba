"""Terms on feature maps: hints, activation boundaries, factors, variational information, pyramid contexts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_shapes, check_parameters
from kdbench.terms.numerics import at_least_float32, autocast_disabled, safe_divide, safe_sqrt


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of features (batch, ...) of equal shape, averaged over a sample's elements: (batch,)."""
    return (at_least_float32(student) - at_least_float32(teacher)).square().flatten(1).mean(1)


@TERMS.register("hint", space="row", version=1, features=True, adapter="conv_regressor", paper="arXiv:1412.6550")
class Hint(Term):
    """FitNets: the student's feature, through a regressor, equals the teacher's hint.

    loss = mean over elements of (regressor(student) - teacher)^2. The paper writes half the sum; the mean is that of
    RepDistiller, whose published figures use weight 100. The regressor is the student operand's adapter:
    `conv_regressor` by default; for vectors write `adapter: linear`.

    Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550.
    Shapes: student (after its adapter), teacher (batch, ...) of equal shape -> (batch,), squared units of the feature.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher)


def ab_loss(student: Tensor, teacher: Tensor, margin: Number = 1.0) -> Tensor:
    """Squared distance to the margin on the teacher's side of zero, summed over a sample's neurons: (batch,).

    Args:
        student: pre-activations (batch, ...).
        teacher: pre-activations of equal shape; only their sign is read.
        margin: m >= 0; a neuron rests once it is past +m where the teacher's is active, past -m where it is not.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    active = (teacher > 0).to(student.dtype)
    missing = active * (margin - student).clamp(min=0) + (1 - active) * (margin + student).clamp(min=0)
    return missing.square().flatten(1).sum(1)


@TERMS.register("ab", space="row", version=1, features=True, paper="arXiv:1811.03233")
class ActivationBoundaryTransfer(Term):
    """Activation boundaries: each of the student's neurons is active where the teacher's is, with a margin.

    loss = sum over neurons of (m - s)_+^2 where t > 0, and of (m + s)_+^2 elsewhere; s and t are features BEFORE the
    activation (a hook on the batch norm, or `PATH/in` of the ReLU). A sum, in the paper as in the authors' code
    (bhheo/AB_distillation) and RepDistiller, which both multiply by 3/1000 and halve the weight for each layer
    farther from the end: fold that into the weights of the edges. The student operand takes the adapter that the
    paper calls connector: a 1x1 convolution with batch norm, without ReLU (`conv1x1` with `batch_norm: true`).
    The paper initialises the student's backbone by this term alone, then trains by the labels: two stages.

    Heo, Lee, Yun and Choi, Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons,
    AAAI 2019, arXiv:1811.03233.
    Shapes: student (after its adapter), teacher (batch, ...) of equal shape -> (batch,), squared units of the feature.
    """

    def __init__(self, margin: Number = 1.0) -> None:
        super().__init__()
        check_parameters("ab", "at least 0", margin=margin)
        self.margin = margin

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("pre-activations", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ab_loss(student, teacher, self.margin)


def unit_length(features: Tensor) -> Tensor:
    """Features (batch, ...) as vectors (batch, elements) of length 1, at least float32; zeros stay zeros."""
    flat = at_least_float32(features).flatten(1)
    return safe_divide(flat, safe_sqrt(flat.square().sum(1, keepdim=True)))


def ft_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Absolute difference of factors (batch, ...) of length 1, averaged over a sample's elements: (batch,)."""
    return (unit_length(student) - unit_length(teacher)).abs().mean(1)


@TERMS.register("ft", space="row", version=1, paper="arXiv:1802.04977")
class FactorTransfer(Term):
    """Factor transfer: the student's translated feature points where the teacher's paraphrased feature points.

    loss = mean over elements of |F_s / |F_s|_2 - F_t / |F_t|_2|, each factor flattened to one vector. The paper writes
    the p-norm of this difference and takes p = 1; the mean over elements is that of the authors' L1Loss. RepDistiller
    compares channel means of squares instead, as attention transfer does: that is the term `at`, not this one.
    F_t is the output of a paraphraser's encoder, a role trained before by `reconstruction` and then frozen; F_s that
    of a translator, a trainable role or an adapter on the student's feature.

    Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
    arXiv:1802.04977.
    Shapes: student, teacher (batch, ...) of equal shape -> (batch,), without unit.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("factors", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ft_loss(student, teacher)


@TERMS.register("reconstruction", space="row", version=1, paper="arXiv:1802.04977")
class Reconstruction(Term):
    """Reconstruction: a network's output equals its target, without any adapter between them.

    loss = mean over elements of (student - teacher)^2. The paraphraser of factor transfer is trained by it: `student`
    is the paraphraser's output, `teacher` the teacher's feature that it saw. The mean is RepDistiller's; the paper
    writes the sum. Unlike `hint` it has no regressor, which would mend what the network itself is to learn.

    Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
    arXiv:1802.04977.
    Shapes: student, teacher (batch, ...) of equal shape -> (batch,), squared units of the target.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("an output and its target", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher)


MIN_VARIANCE = 1e-5


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """((target - mean)^2 / variance + log variance) / 2, averaged over a sample's elements: (batch,), in nats.

    The constant log(2 pi) / 2 is left out. variance must broadcast against the others and be above 0.
    """
    return (((mean - target).square() / variance + variance.log()) / 2).flatten(1).mean(1)


@TERMS.register("vid", space="row", version=1, features=True, injected=("shapes",), paper="arXiv:1904.05835")
class VariationalInformationDistillation(Term):
    """Variational information distillation: the student's feature tells as much as it can of the teacher's.

    loss = mean over elements of ((t - mu(s))^2 / v_c + log v_c) / 2: the negative log-likelihood of the teacher's
    feature t (without its constant, so it may be below 0), which bounds the mutual information of t and s. mu is three
    1x1 convolutions with ReLU between, as wide as the teacher; v_c = softplus(a_c) + 1e-5 one variance per teacher
    channel, learnt, 5 at first. All belong to the term and train with it. As the authors' code in RepDistiller, whose
    published figures use weight 1 over the inner layers (one edge each): the larger map is average-pooled. Vectors are
    maps of one place.

    Ahn, Hu, Damianou, Lawrence and Dai, Variational Information Distillation for Knowledge Transfer, CVPR 2019,
    arXiv:1904.05835.
    Shapes: student, teacher (batch, channels, height, width) or (batch, width), channels and sizes may differ
    -> (batch,), nats per element.
    """

    def __init__(self, shapes: dict, variance: float = 5.0) -> None:
        super().__init__()
        check_parameters("vid", "above 0", variance=variance)
        inside, outside = shapes["student"][0], shapes["teacher"][0]
        self.mean = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((outside,), math.log(math.expm1(variance))))

    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) not in (2, 4):
                raise ValueError(
                    f"reads feature maps [channels, height, width] or vectors, but the {role}'s operand is "
                    f"{list(shapes[role][1:])} per sample"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_disabled(student):
            student, teacher = _as_maps(student), _as_maps(teacher)
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = (
                values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)
                for values in (student, teacher)
            )
            variance = F.softplus(self.scale) + MIN_VARIANCE
            return gaussian_nll(self.mean(student), teacher, variance.view(1, -1, 1, 1))


def _as_maps(features: Tensor) -> Tensor:
    features = at_least_float32(features)
    return features if features.dim() == 4 else features[:, :, None, None]


PYRAMID_SIZES = (4, 2, 1)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps, and of the maps average-pooled to 4x4, 2x2 and 1x1: (batch,).

    Args:
        student: (batch, channels, height, width), or (batch, elements), which has one scale only.
        teacher: of equal shape.

    Returns:
        (batch,): the mean over the scales, each half as heavy as the one before; scales not below the map's height
        are left out.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    loss, share, shares = hint_loss(student, teacher), 1.0, 1.0
    for size in PYRAMID_SIZES if student.dim() == 4 else ():
        if size >= student.shape[2]:
            continue
        share /= 2
        shares += share
        pooled = [F.adaptive_avg_pool2d(values, (size, size)) for values in (student, teacher)]
        loss = loss + share * hint_loss(pooled[0], pooled[1])
    return loss / shares


@TERMS.register("hcl", space="row", version=1, features=True, paper="arXiv:2104.09044")
class HierarchicalContext(Term):
    """Hierarchical context loss of ReviewKD: the student's feature equals the teacher's at each of several scales.

    loss = (d(s, t) + d_4 / 2 + d_2 / 4 + d_1 / 8) / (1 + 1/2 + 1/4 + 1/8), d the mean squared difference and d_k that
    of the maps average-pooled to k x k; a scale not smaller than the map is left out and the others move up, as in the
    authors' code (dvlab-research/ReviewKD), which warms the term up over 20 epochs: give its weight a schedule. In
    ReviewKD the student operand is the output of a chain of attention based fusions (ABF) from the deepest layer to the
    shallowest; with a single layer that chain is convolution and batch norm, an adapter.

    Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.
    Shapes: student (after its adapter), teacher (batch, channels, height, width) or (batch, elements), equal
    -> (batch,), squared units of the feature.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hcl_loss(student, teacher)
