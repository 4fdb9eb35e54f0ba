"""Adapters without parameters: they change what a term sees of an operand, so that any term can be narrowed.

`shape` is what such an adapter gives out, per sample: it need not be the other operand's shape.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.registry import ADAPTERS
from kdbench.terms.divergences import standardised
from kdbench.terms.numerics import at_least_float32


@ADAPTERS.register("classes", version=1, injected=("source", "target"))
class Classes(nn.Module):
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
class Standardise(nn.Module):
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
        return standardised(features)


@ADAPTERS.register("log", version=1, injected=("source", "target"))
class Log(nn.Module):
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
