"""Adapters: small trainable modules between an operand and its term, when student and teacher differ in size.

The plan gives each the per-sample shapes (no batch) of what comes in (`source`) and what must come out (`target`).
An adapter belongs to its term: it trains with it and is dropped at export. Shapes and parameters that it cannot serve
raise ValueError in words; the plan adds the adapter's name and its place in the recipe.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.registry import ADAPTERS
from kdbench.terms.divergences import standardise_logits
from kdbench.terms.numerics import at_least_float32


@ADAPTERS.register("identity", version=1, injected=("source", "target"))
class IdentityAdapter(nn.Module):
    """Passes the operand on as it is; both shapes must agree.

    Shapes: (batch, ...) -> the same.
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
    """A linear map of the last dimension.

    Shapes: (batch, a) -> (batch, b), or (batch, tokens, a) -> (batch, tokens, b).
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], bias: bool = True) -> None:
        super().__init__()
        _check_vectors(source, target)
        self.projection = nn.Linear(source[-1], target[-1], bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


@ADAPTERS.register("mlp", version=1, injected=("source", "target"))
class MLPAdapter(nn.Module):
    """Linear, ReLU, linear over the last dimension; the hidden width is the target's when not given.

    Shapes: (batch, a) -> (batch, b), or (batch, tokens, a) -> (batch, tokens, b).
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
    """A 1x1 convolution: mixes channels, keeps height and width; with batch normalisation on request.

    Shapes: (batch, a, height, width) -> (batch, b, height, width).
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], batch_norm: bool = False) -> None:
        super().__init__()
        _check_maps(source, target)
        if tuple(source[1:]) != tuple(target[1:]):
            raise ValueError(
                f"keeps height and width, but the operand has {_size_text(source)} and {_size_text(target)} is "
                "needed. Take conv_regressor, or features of equal size"
            )
        self.projection = nn.Sequential(nn.Conv2d(source[0], target[0], 1, bias=not batch_norm))
        if batch_norm:
            self.projection.append(nn.BatchNorm2d(target[0]))

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


@ADAPTERS.register("conv_regressor", version=1, injected=("source", "target"))
class ConvRegressor(nn.Module):
    """The regressor of FitNets as RepDistiller builds it: a convolution that mends the size, batch norm, ReLU.

    A map of twice the target's height and width takes a 3x3 convolution of stride 2; one of half the size a 4x4
    transposed convolution of stride 2; any other map at least as large an unpadded convolution of just the kernel
    that makes it fit (1x1 when the sizes agree). `relu: false` suits hints taken before the activation.

    Shapes: (batch, a, height, width) -> (batch, b, height', width').
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], relu: bool = True) -> None:
        super().__init__()
        _check_maps(source, target)
        (a, *size), (b, *wanted) = source, target
        pairs = list(zip(size, wanted, strict=True))
        if all(own == 2 * want for own, want in pairs):
            convolution: nn.Module = nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1)
        elif all(2 * own == want for own, want in pairs):
            convolution = nn.ConvTranspose2d(a, b, kernel_size=4, stride=2, padding=1)
        elif all(own >= want for own, want in pairs):
            convolution = nn.Conv2d(a, b, kernel_size=(1 + size[0] - wanted[0], 1 + size[1] - wanted[1]))
        else:
            raise ValueError(
                f"cannot make {_size_text(target)} of {_size_text(source)}. A map may shrink by any "
                "amount but grow only to exactly twice its height and width; choose features nearer in size"
            )
        self.projection = nn.Sequential(convolution, nn.BatchNorm2d(b))
        if relu:
            self.projection.append(nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)


def _check_vectors(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    if len(source) not in (1, 2) or tuple(source[:-1]) != tuple(target[:-1]):
        advice = " Take conv1x1 or conv_regressor for maps" if len(source) == 3 else ""
        raise ValueError(
            f"maps vectors [a] to [b], or tokens [length, a] to [length, b], but the operand is "
            f"{list(source)} per sample and {list(target)} is needed.{advice}"
        )


def _check_maps(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    if len(source) != 3 or len(target) != 3:
        advice = " Take linear or mlp for vectors" if len(source) == len(target) <= 2 else ""
        raise ValueError(
            f"maps feature maps [channels, height, width], but the operand is {list(source)} per "
            f"sample and {list(target)} is needed.{advice}"
        )


def _size_text(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"


@ADAPTERS.register("classes", version=1, injected=("source", "target"))
class ClassSlice(nn.Module):
    """Keeps some classes of the logits, in the order given: the old ones of a growing student, for instance.

    Shapes: (batch, classes, ...) -> (batch, kept, ...).
    """

    index: Tensor

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], keep: list[int]) -> None:
        super().__init__()
        if not source:
            raise ValueError("keeps classes of logits, but the operand is a single number per sample")
        wrong = [number for number in keep if not 0 <= number < source[0]]
        if wrong or not keep:
            raise ValueError(f"keep lists class numbers from 0 to {source[0] - 1}, got {wrong or keep}")
        if len(set(keep)) != len(keep):
            raise ValueError(f"keep names a class twice: {keep}")
        self.shape = (len(keep), *source[1:])
        self.register_buffer("index", torch.tensor(keep), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features.index_select(1, self.index)


@ADAPTERS.register("standardise", version=1, injected=("source", "target"))
class LogitStandardisation(nn.Module):
    """Takes the mean off a sample's logits and divides by their standard deviation (arXiv:2403.01427, MIX-KD).

    Shapes: (batch, classes) -> the same, without unit.
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
    """The logarithm of stored probabilities, such as `train.soft`: logits whose softmax they are.

    Probabilities below 1e-12 count as that, so that 0 has finite logits.

    Shapes: (batch, classes) -> the same, nats.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if len(source) != 1:
            raise ValueError(f"reads probabilities of classes, but the operand is {list(source)} per sample")
        self.shape = tuple(source)

    def forward(self, features: Tensor) -> Tensor:
        return at_least_float32(features).clamp(min=1e-12).log()
