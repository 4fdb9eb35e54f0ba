"""Adapters: small modules that map an operand (a tensor that a loss term reads) to another shape or another scale.

A typical adapter projects a student feature to the width of the teacher feature. The constructor gets two shapes
without batch dimension: `source`, the shape of the operand, and `target`, the shape that the loss term needs. An
adapter is trained together with its loss term and is not exported with the student. The constructor raises ValueError
for unsuitable shapes and parameters. The caller adds the adapter's name and its location in the recipe to the
message.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.registry import ADAPTERS
from kdbench.terms.divergences import standardise_logits
from kdbench.terms.numerics import at_least_float32


@ADAPTERS.register("identity", version=1, injected=("source", "target"))
class IdentityAdapter(nn.Module):
    """Identity: returns its input unchanged. The shapes of input and target must be equal.

    Shape:
        (batch, ...) -> the same shape.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if tuple(source) != tuple(target):
            raise ValueError(
                f"the operand has shape {list(source)} per sample, expected {list(target)}. Use an adapter that "
                "changes the shape: linear or mlp for vectors, conv1x1 or conv_regressor for feature maps"
            )

    def forward(self, features: Tensor) -> Tensor:
        return features


@ADAPTERS.register("linear", version=1, injected=("source", "target"))
class LinearAdapter(nn.Module):
    """Linear map of the last dimension.

    Args:
        bias: whether the map has a bias.

    Shape:
        (batch, a) -> (batch, b), or (batch, tokens, a) -> (batch, tokens, b).
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], bias: bool = True) -> None:
        super().__init__()
        _check_vectors(source, target)
        self.projection = nn.Linear(source[-1], target[-1], bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


@ADAPTERS.register("mlp", version=1, injected=("source", "target"))
class MLPAdapter(nn.Module):
    """Two-layer perceptron on the last dimension: linear, ReLU, linear.

    Args:
        hidden: hidden width, at least 1. null: the width of the output.

    Shape:
        (batch, a) -> (batch, b), or (batch, tokens, a) -> (batch, tokens, b).
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], hidden: int | None = None) -> None:
        super().__init__()
        _check_vectors(source, target)
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        width = target[-1] if hidden is None else hidden
        self.projection = nn.Sequential(nn.Linear(source[-1], width), nn.ReLU(), nn.Linear(width, target[-1]))

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


@ADAPTERS.register("conv1x1", version=1, injected=("source", "target"))
class Conv1x1Adapter(nn.Module):
    """1x1 convolution: changes the number of channels and keeps height and width.

    Args:
        batch_norm: whether BatchNorm follows the convolution. In this case, the convolution has no bias.

    Shape:
        (batch, a, height, width) -> (batch, b, height, width).
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], batch_norm: bool = False) -> None:
        super().__init__()
        _check_maps(source, target)
        if tuple(source[1:]) != tuple(target[1:]):
            raise ValueError(
                f"conv1x1 cannot change height and width from {_size_text(source)} to {_size_text(target)}. "
                "Use conv_regressor, or features of equal size"
            )
        self.projection = nn.Sequential(nn.Conv2d(source[0], target[0], 1, bias=not batch_norm))
        if batch_norm:
            self.projection.append(nn.BatchNorm2d(target[0]))

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


@ADAPTERS.register("conv_regressor", version=1, injected=("source", "target"))
class ConvRegressor(nn.Module):
    """Regressor of FitNets as in RepDistiller: a convolution that matches height and width, BatchNorm and ReLU.

    The convolution depends on the sizes (height and width) of the input map and of the target map:

    - Input twice as large as the target: 3x3 convolution of stride 2.
    - Input half as large as the target: transposed 4x4 convolution of stride 2.
    - Any other input that is not smaller than the target: convolution without padding. Its kernel size is the
    difference of the two sizes plus 1, that is, 1x1 for equal sizes.

    Args:
        relu: whether to end with ReLU. Use false if the target is a feature before its activation.

    Shape:
        (batch, a, height, width) -> (batch, b, height', width').
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], relu: bool = True) -> None:
        super().__init__()
        _check_maps(source, target)
        (source_channels, *source_size), (target_channels, *target_size) = source, target
        pairs = list(zip(source_size, target_size, strict=True))
        if all(s == 2 * t for s, t in pairs):
            convolution: nn.Module = nn.Conv2d(source_channels, target_channels, kernel_size=3, stride=2, padding=1)
        elif all(2 * s == t for s, t in pairs):
            convolution = nn.ConvTranspose2d(source_channels, target_channels, kernel_size=4, stride=2, padding=1)
        elif all(s >= t for s, t in pairs):
            kernel_height, kernel_width = (1 + s - t for s, t in pairs)
            convolution = nn.Conv2d(source_channels, target_channels, kernel_size=(kernel_height, kernel_width))
        else:
            raise ValueError(
                f"conv_regressor cannot map {_size_text(source)} to {_size_text(target)}. It can shrink a map to "
                "any size, but enlarge it only to exactly twice its height and width. Use features closer in size"
            )
        self.projection = nn.Sequential(convolution, nn.BatchNorm2d(target_channels))
        if relu:
            self.projection.append(nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


def _check_vectors(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Raises ValueError unless source and target are both vectors, or both token sequences of equal length."""
    if len(source) not in (1, 2) or tuple(source[:-1]) != tuple(target[:-1]):
        advice = " Use conv1x1 or conv_regressor for maps" if len(source) == 3 else ""
        raise ValueError(
            f"this adapter maps vectors [a] to [b], or tokens [length, a] to [length, b], but the operand has shape "
            f"{list(source)} per sample and the expected shape is {list(target)}.{advice}"
        )


def _check_maps(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Raises ValueError unless source and target both have the shape [channels, height, width] of a feature map."""
    if len(source) != 3 or len(target) != 3:
        advice = " Use linear or mlp for vectors" if len(source) == len(target) <= 2 else ""
        raise ValueError(
            f"this adapter maps feature maps [channels, height, width], but the operand has shape {list(source)} per "
            f"sample and the expected shape is {list(target)}.{advice}"
        )


def _size_text(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"


@ADAPTERS.register("classes", version=1, injected=("source", "target"))
class ClassSlice(nn.Module):
    """Selects some classes of the logits, for example the old classes of a student whose number of classes grows.

    Args:
        keep: class numbers in the order of the output, each at most once.

    Shape:
        (batch, classes, ...) -> (batch, len(keep), ...).
    """

    index: Tensor

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], keep: list[int]) -> None:
        super().__init__()
        if not source:
            raise ValueError("this adapter selects classes of logits, but the operand is a single number per sample")
        invalid = [number for number in keep if not 0 <= number < source[0]]
        if invalid or not keep:
            raise ValueError(f"keep must list class numbers from 0 to {source[0] - 1}, got {invalid or keep}")
        if len(set(keep)) != len(keep):
            raise ValueError(f"keep must contain each class only once, got {keep}")
        self.shape = (len(keep), *source[1:])
        self.register_buffer("index", torch.tensor(keep), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features.index_select(1, self.index)


@ADAPTERS.register("standardise", version=1, injected=("source", "target"))
class LogitStandardisation(nn.Module):
    """Standardisation of each sample's logits to mean 0 and standard deviation 1 (arXiv:2403.01427, MIX-KD).

    Shape:
        (batch, classes) -> the same shape.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if len(source) != 1 or source[0] < 2:
            raise ValueError(
                "this adapter standardises logits over at least 2 classes, but the operand has shape "
                f"{list(source)} per sample"
            )
        self.shape = tuple(source)

    def forward(self, features: Tensor) -> Tensor:
        return standardise_logits(features)


@ADAPTERS.register("log", version=1, injected=("source", "target"))
class LogProbabilities(nn.Module):
    """Natural logarithm of stored probabilities, so that a loss term can read them as logits.

    The softmax of the output gives the stored probabilities. Probabilities are clamped to at least 1e-12, so that the
    logit of a probability 0 is finite. An example is the field `train.soft`: soft labels that are stored with the
    training images.

    Shape:
        (batch, classes) -> the same shape.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if len(source) != 1:
            raise ValueError(
                f"this adapter reads class probabilities, but the operand has shape {list(source)} per sample"
            )
        self.shape = tuple(source)

    def forward(self, features: Tensor) -> Tensor:
        return at_least_float32(features).clamp(min=1e-12).log()
