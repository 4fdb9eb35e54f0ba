"""Terms on feature maps: hints, activation boundaries, factors, variational information, hierarchical context."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_shapes, check_parameters
from kdbench.terms.numerics import at_least_float32, autocast_disabled, safe_normalize


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Averages the squared difference of features (batch, ...) of equal shape over the elements. Returns (batch,)."""
    return (at_least_float32(student) - at_least_float32(teacher)).square().flatten(1).mean(1)


@TERMS.register("hint", space="row", version=1, features=True, adapter="conv_regressor", paper="arXiv:1412.6550")
class Hint(Term):
    """FitNets: mean squared error between the student's feature, after a regressor, and the teacher's hint.

    loss = mean over elements of (regressor(student) - teacher)^2

    The paper has half of the sum. The mean over elements is that of RepDistiller, whose published figures use weight
    100. The
    regressor is the adapter of the student operand. Its default is `conv_regressor`; vectors need `adapter: linear`.

    Shape:
        student (after its adapter), teacher: (batch, ...) of equal shape.
        Returns (batch,), squared units of the feature.

    References:
        Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep Nets, ICLR 2015,
        arXiv:1412.6550.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher)


def ab_loss(student: Tensor, teacher: Tensor, margin: Number = 1.0) -> Tensor:
    """Computes the activation boundary loss: squared distances to a margin, summed over neurons. Returns (batch,).

    Args:
        student: pre-activations (batch, ...).
        teacher: pre-activations of equal shape, of which only the sign is used.
        margin: m >= 0. A neuron has loss 0 if the student's value is above m and the teacher's neuron is active, or
            if the value is below -m and the teacher's neuron is inactive.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    active = (teacher > 0).to(student.dtype)
    missing = active * (margin - student).clamp(min=0) + (1 - active) * (margin + student).clamp(min=0)
    return missing.square().flatten(1).sum(1)


@TERMS.register("ab", space="row", version=1, features=True, paper="arXiv:1811.03233")
class ActivationBoundaryTransfer(Term):
    """Activation boundaries: squared hinge loss that activates each student neuron where the teacher's is active.

    loss = sum over neurons of (m - s)_+^2 where t > 0, and (m + s)_+^2 elsewhere

    s and t are features before the activation (the output of the batch norm, or `PATH/in` of the ReLU). The sum over
    neurons is that
    of the paper, the authors' code (bhheo/AB_distillation) and RepDistiller. The authors' code and RepDistiller
    multiply by 3/1000 and
    halve the weight for each layer farther from the output; a recipe does this with the weights of the terms. The
    student operand has
    an adapter, in the paper called connector: a 1x1 convolution with batch norm and without ReLU (`conv1x1` with
    `batch_norm: true`). The paper initialises the student's backbone by this term alone, and then trains on the
    labels.

    Args:
        margin: m >= 0.

    Shape:
        student (after its adapter), teacher: (batch, ...) of equal shape.
        Returns (batch,), squared units of the feature.

    References:
        Heo, Lee, Yun and Choi, Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons,
        AAAI 2019, arXiv:1811.03233.
    """

    def __init__(self, margin: Number = 1.0) -> None:
        super().__init__()
        check_parameters("ab", "at least 0", margin=margin)
        self.margin = margin

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("pre-activations", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ab_loss(student, teacher, self.margin)


def ft_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Averages the absolute difference of two factors (batch, ...), scaled to length 1, over the elements.

    Returns (batch,).
    """
    student, teacher = at_least_float32(student).flatten(1), at_least_float32(teacher).flatten(1)
    return (safe_normalize(student) - safe_normalize(teacher)).abs().mean(1)


@TERMS.register("ft", space="row", version=1, paper="arXiv:1802.04977")
class FactorTransfer(Term):
    """Factor transfer: absolute difference of the student's translated and the teacher's paraphrased feature.

    loss = mean over elements of |F_s / |F_s|_2 - F_t / |F_t|_2|, each factor flattened to one vector

    F_t is the output of the encoder of a paraphraser, a network that is first trained with the term `reconstruction`
    and then frozen. F_s is the output of a translator: a trainable network or an adapter on the student's feature.
    The paper has the 1-norm of this difference. The authors' code has the mean over elements instead (L1Loss), as
    this term does.
     RepDistiller's
    version of factor transfer compares channel means of squares instead, as the term `at` does.

    Shape:
        student, teacher: (batch, ...) of equal shape.
        Returns (batch,), without unit.

    References:
        Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
        arXiv:1802.04977.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("factors", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ft_loss(student, teacher)


@TERMS.register("reconstruction", space="row", version=1, paper="arXiv:1802.04977")
class Reconstruction(Term):
    """Reconstruction: mean squared error between a network's output and its target, without an adapter.

    loss = mean over elements of (student - teacher)^2

    This term trains the paraphraser of factor transfer: `student` is the paraphraser's output, and `teacher` is its
    input, a feature of the teacher. The mean over elements is that of RepDistiller; the paper has the sum. The term
    `hint` is not suitable, because its default regressor would learn a part of the mapping that the paraphraser is to
    learn.

    Shape:
        student, teacher: (batch, ...) of equal shape.
        Returns (batch,), squared units of the target.

    References:
        Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
        arXiv:1802.04977.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("an output and its target", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher)


MIN_VARIANCE = 1e-5


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Averages ((target - mean)^2 / variance + log variance) / 2 over the elements. Returns (batch,), in nats.

    The constant log(2 pi) / 2 of the negative log-likelihood is left out.

    Args:
        mean: (batch, ...).
        target: values of the shape of `mean`.
        variance: variances above 0, broadcastable to `mean`.
    """
    return (((mean - target).square() / variance + variance.log()) / 2).flatten(1).mean(1)


@TERMS.register("vid", space="row", version=1, features=True, injected=("shapes",), paper="arXiv:1904.05835")
class VariationalInformationDistillation(Term):
    """VID: negative log-likelihood of the teacher's feature, given the student's feature.

    loss = mean over elements of ((t - mu(s))^2 / v_c + log v_c) / 2, without the constant (it may be below 0)

    The loss bounds the mutual information of the teacher's feature t and the student's feature s. mu consists of
    three 1x1 convolutions with ReLU between them, with the teacher's number of channels. v_c = softplus(a_c) + 1e-5
    is one learnt variance per teacher channel. mu and a are parameters of the term and are trained with it. The
    larger map is average-pooled, as in the authors' code in RepDistiller, whose published figures use weight 1 for
    each inner layer. A vector is treated as a map of size 1 x 1.

    Args:
        variance: initial value of v_c, above 0.

    Shape:
        student, teacher: (batch, channels, height, width) or (batch, width); channels and sizes may differ.
        Returns (batch,), nats per element.

    References:
        Ahn, Hu, Damianou, Lawrence and Dai, Variational Information Distillation for Knowledge Transfer, CVPR 2019,
        arXiv:1904.05835.
    """

    def __init__(self, shapes: dict, variance: float = 5.0) -> None:
        super().__init__()
        check_parameters("vid", "above 0", variance=variance)
        student_channels, teacher_channels = shapes["student"][0], shapes["teacher"][0]
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance))))

    def check_shapes(self, **shapes: Size) -> None:
        for role in ("student", "teacher"):
            if len(shapes[role]) not in (2, 4):
                raise ValueError(
                    f"reads feature maps [channels, height, width] or vectors, but the {role}'s operand has the shape "
                    f"{list(shapes[role][1:])} per sample"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_disabled(student):
            student, teacher = _as_maps(student), _as_maps(teacher)
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = (
                features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)
                for features in (student, teacher)
            )
            variance = F.softplus(self.scale) + MIN_VARIANCE
            return gaussian_nll(self.mean(student), teacher, variance.view(1, -1, 1, 1))


def _as_maps(features: Tensor) -> Tensor:
    """Returns feature maps (batch, channels, height, width). Vectors are converted to maps of size 1 x 1."""
    features = at_least_float32(features)
    return features if features.dim() == 4 else features[:, :, None, None]


PYRAMID_SIZES = (4, 2, 1)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Averages the squared difference of two maps over the scales of a pyramid. Returns (batch,).

    Args:
        student: (batch, channels, height, width), or (batch, elements), which has one scale only.
        teacher: of equal shape.

    Returns:
        (batch,): weighted mean over the map itself and the map average-pooled to 4x4, 2x2 and 1x1. Each scale has half
        the weight of the previous one. Scales that are not below the map's height are left out.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    loss, scale_weight, weight_sum = hint_loss(student, teacher), 1.0, 1.0
    for size in PYRAMID_SIZES if student.dim() == 4 else ():
        if size >= student.shape[2]:
            continue
        scale_weight /= 2
        weight_sum += scale_weight
        pooled = [F.adaptive_avg_pool2d(features, (size, size)) for features in (student, teacher)]
        loss = loss + scale_weight * hint_loss(pooled[0], pooled[1])
    return loss / weight_sum


@TERMS.register("hcl", space="row", version=1, features=True, paper="arXiv:2104.09044")
class HierarchicalContext(Term):
    """Hierarchical context loss of ReviewKD: mean squared error of the features at several scales.

    loss = (d(s, t) + d_4 / 2 + d_2 / 4 + d_1 / 8) / (1 + 1/2 + 1/4 + 1/8)

    d is the mean squared difference of the maps, and d_k that of the maps after average pooling to k x k. As in the
    authors' code (dvlab-research/ReviewKD), a scale that is not smaller than the map is left out, and the smaller
    scales take the larger weights. The code increases the term's weight over 20 epochs, which a recipe does with a
    schedule. In ReviewKD the student operand is the output of a chain of attention-based fusions (ABF) from the
    deepest layer to the shallowest. For a single layer the chain is a convolution with batch norm, that is, an
    adapter.

    Shape:
        student (after its adapter), teacher: (batch, channels, height, width) or (batch, elements), of equal shape.
        Returns (batch,), squared units of the feature.

    References:
        Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_shapes("features", shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hcl_loss(student, teacher)
