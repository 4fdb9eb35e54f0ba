"""Adapters: small modules between an operand and its term, for example where student and teacher differ in width.

The constructor gets the shapes per sample (without batch) of the operand (`source`) and of the result (`target`). An
adapter belongs to its term: it trains with it and is not exported. Unsuitable shapes and parameters raise ValueError;
the caller adds the adapter's name and its location in the recipe.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.registry import ADAPTERS
from kdbench.terms.divergences import standardise_logits
from kdbench.terms.numerics import at_least_float32


@ADAPTERS.register("identity", version=1, injected=("source", "target"))
class IdentityAdapter(nn.Module):
    """Identity: returns the operand unchanged; source and target shape must be equal.

    Shape:
        (batch, ...) -> the same.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if tuple(source) != tuple(target):
            raise ValueError(
                f"the operand is {list(source)} per sample, but {list(target)} is needed. "
                "Name an adapter that changes the shape: linear or mlp for vectors, conv1x1 or conv_regressor for maps"
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
        hidden: hidden width, at least 1; by default the width of the target.

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
    """1x1 convolution: maps the channels; height and width stay.

    Args:
        batch_norm: adds batch normalisation; the convolution then has no bias.

    Shape:
        (batch, a, height, width) -> (batch, b, height, width).
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], batch_norm: bool = False) -> None:
        super().__init__()
        _check_maps(source, target)
        if tuple(source[1:]) != tuple(target[1:]):
            raise ValueError(
                f"keeps height and width, but the operand has {_size_text(source)} and {_size_text(target)} is "
                "needed. Use conv_regressor, or features of equal size"
            )
        self.projection = nn.Sequential(nn.Conv2d(source[0], target[0], 1, bias=not batch_norm))
        if batch_norm:
            self.projection.append(nn.BatchNorm2d(target[0]))

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


@ADAPTERS.register("conv_regressor", version=1, injected=("source", "target"))
class ConvRegressor(nn.Module):
    """Regressor of FitNets as in RepDistiller: a convolution that matches the size, batch norm, ReLU.

    A map of twice the target's height and width gets a 3x3 convolution of stride 2; one of half the size a 4x4
    transposed convolution of stride 2; any other map at least as large an unpadded convolution with the kernel size
    that gives the target's size (1x1 for equal sizes).

    Args:
        relu: whether to end with ReLU; false suits hints from before the activation.

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
                f"cannot map {_size_text(source)} to {_size_text(target)}. A map may shrink by any "
                "amount but grow only to exactly twice its height and width; choose features closer in size"
            )
        self.projection = nn.Sequential(convolution, nn.BatchNorm2d(target_channels))
        if relu:
            self.projection.append(nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


def _check_vectors(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Raises ValueError unless source and target are vectors, or tokens of equal length."""
    if len(source) not in (1, 2) or tuple(source[:-1]) != tuple(target[:-1]):
        advice = " Use conv1x1 or conv_regressor for maps" if len(source) == 3 else ""
        raise ValueError(
            f"maps vectors [a] to [b], or tokens [length, a] to [length, b], but the operand is "
            f"{list(source)} per sample and {list(target)} is needed.{advice}"
        )


def _check_maps(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Raises ValueError unless source and target are feature maps [channels, height, width]."""
    if len(source) != 3 or len(target) != 3:
        advice = " Use linear or mlp for vectors" if len(source) == len(target) <= 2 else ""
        raise ValueError(
            f"maps feature maps [channels, height, width], but the operand is {list(source)} per "
            f"sample and {list(target)} is needed.{advice}"
        )


def _size_text(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"


@ADAPTERS.register("classes", version=1, injected=("source", "target"))
class ClassSlice(nn.Module):
    """Selects classes of the logits, such as the old classes of a growing student.

    Args:
        keep: class numbers in the order of the result, each at most once.

    Shape:
        (batch, classes, ...) -> (batch, len(keep), ...).
    """

    index: Tensor

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], keep: list[int]) -> None:
        super().__init__()
        if not source:
            raise ValueError("selects classes of logits, but the operand is a single number per sample")
        invalid = [number for number in keep if not 0 <= number < source[0]]
        if invalid or not keep:
            raise ValueError(f"keep lists class numbers from 0 to {source[0] - 1}, got {invalid or keep}")
        if len(set(keep)) != len(keep):
            raise ValueError(f"keep names a class twice: {keep}")
        self.shape = (len(keep), *source[1:])
        self.register_buffer("index", torch.tensor(keep), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features.index_select(1, self.index)


@ADAPTERS.register("standardise", version=1, injected=("source", "target"))
class LogitStandardisation(nn.Module):
    """Standardisation of each sample's logits to mean 0 and standard deviation 1 (arXiv:2403.01427, MIX-KD).

    Shape:
        (batch, classes) -> the same, without unit.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if len(source) != 1 or source[0] < 2:
            raise ValueError(
                f"standardises logits over at least 2 classes, but the operand is {list(source)} per sample"
            )
        self.shape = tuple(source)

    def forward(self, features: Tensor) -> Tensor:
        return standardise_logits(features)


@ADAPTERS.register("log", version=1, injected=("source", "target"))
class LogProbabilities(nn.Module):
    """Logarithm of stored probabilities, such as `train.soft`; their softmax is the probabilities.

    Probabilities are clamped to at least 1e-12, so that 0 has a finite logit.

    Shape:
        (batch, classes) -> the same, nats.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if len(source) != 1:
            raise ValueError(f"reads probabilities of classes, but the operand is {list(source)} per sample")
        self.shape = tuple(source)

    def forward(self, features: Tensor) -> Tensor:
        return at_least_float32(features).clamp(min=1e-12).log()
