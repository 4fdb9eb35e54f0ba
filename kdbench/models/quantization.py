"""Quantised weights: uniform, learned points, ternary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.weight_transform import WeightParametrization, WeightTransform, straight_through
from kdbench.registry import WEIGHT_TRANSFORMS


@WEIGHT_TRANSFORMS.register("quantize", version=1, paper="https://arxiv.org/abs/1802.05668")
class UniformQuantization(WeightTransform):
    """Rounds weights to 2^bits evenly spaced levels per bucket, straight through: quantised distillation.

    Polino, Pascanu and Alistarh 2018 (ICLR), and their released code: the weights of a layer, flattened, are cut into
    buckets (the last one filled up with its last value); each bucket is scaled to [0, 1] by its least and its largest
    value (`linear`), rounded to the nearest of the levels k / (2^bits - 1), and scaled back. The forward and the
    gradient use the rounded weights, the stored ones take the step. The released scripts take buckets of 256.

    `symmetric` is the integer grid of hardware instead: a step k of size max|w| / (2^(bits - 1) - 1), k from
    -(2^(bits - 1) - 1) to as much above 0, so that 0 stays 0 and 2 bits are three values.

    Args:
        bits: of a weight, from 1 to 16 (2 to 16 where symmetric).
        bucket: weights that share a scale; null: all of a layer.
        scaling: of a bucket.
        modules, skip_first, skip_last: which layers; several released scripts leave out the first and the last.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket: int | None = 256,
        scaling: Literal["linear", "symmetric"] = "linear",
        modules: list[str] | None = None,
        skip_first: bool = False,
        skip_last: bool = False,
    ) -> None:
        super().__init__(modules, skip_first, skip_last)
        least = 2 if scaling == "symmetric" else 1
        if not least <= bits <= 16:
            raise ConfigError(f"quantize: bits must be from {least} to 16 where scaling is {scaling}, got {bits}")
        _check_bucket("quantize", bucket)
        self.bits, self.bucket, self.scaling = bits, bucket, scaling

    def parametrization(self, weight: Tensor) -> nn.Module:
        return _UniformLevels(self.bits, self.bucket, self.scaling)


class _UniformLevels(WeightParametrization):
    def __init__(self, bits: int, bucket: int | None, scaling: str) -> None:
        super().__init__()
        self.bits, self.bucket, self.scaling = bits, bucket, scaling

    def forward(self, weight: Tensor) -> Tensor:
        rows = split_buckets(weight.detach(), self.bucket)
        if self.scaling == "linear":
            scaled, low, span = scale_to_unit_range(rows)
            steps = 2**self.bits - 1
            used = (scaled * steps).round() / steps * span + low
        else:
            steps = 2 ** (self.bits - 1) - 1
            size = rows.abs().amax(dim=1, keepdim=True) / steps
            used = (rows / torch.where(size == 0, 1, size)).round().clamp(-steps, steps) * size
        return straight_through(merge_buckets(used, weight), weight)


@WEIGHT_TRANSFORMS.register("learned_quantize", version=1, paper="https://arxiv.org/abs/1802.05668")
class LearnedQuantization(WeightTransform):
    """Rounds weights to the nearest of 2^bits points per layer, and learns the points: differentiable quantisation.

    Polino, Pascanu and Alistarh 2018 (ICLR), section 4: buckets are scaled to [0, 1] as by `quantize`, each weight
    takes the nearest point p_k of its layer, and the gradient of p_k is the sum, over the weights that took it, of
    their gradients times their bucket's range. The stored weights stay as they are (they get no gradient). As in the
    released code a weight looks for its nearest point anew in every forward, and the points start at quantiles of the
    scaled weights.

    Args:
        bits: 2^bits points, from 1 to 8 bits.
        bucket: weights that share a scale; null: all of a layer.
        start: where the points start: at quantiles of the scaled weights, or evenly spaced.
        modules, skip_first, skip_last: which layers.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket: int | None = 256,
        start: Literal["quantiles", "uniform"] = "quantiles",
        modules: list[str] | None = None,
        skip_first: bool = False,
        skip_last: bool = False,
    ) -> None:
        super().__init__(modules, skip_first, skip_last)
        if not 1 <= bits <= 8:
            raise ConfigError(f"learned_quantize: bits must be from 1 to 8, got {bits}")
        _check_bucket("learned_quantize", bucket)
        self.bits, self.bucket, self.start = bits, bucket, start

    def parametrization(self, weight: Tensor) -> nn.Module:
        return _LearnedPoints(weight, self.bits, self.bucket, self.start)


class _LearnedPoints(WeightParametrization):
    def __init__(self, weight: Tensor, bits: int, bucket: int | None, start: str) -> None:
        super().__init__()
        self.bucket = bucket
        count = 2**bits
        even = torch.arange(count, device=weight.device, dtype=weight.dtype) / (count - 1)
        points = even
        if start == "quantiles":
            scaled = scale_to_unit_range(split_buckets(weight, bucket))[0].flatten().sort().values
            points = scaled[(even * (len(scaled) - 1)).round().long()]
        self.points = nn.Parameter(points)

    def forward(self, weight: Tensor) -> Tensor:
        scaled, low, span = scale_to_unit_range(split_buckets(weight.detach(), self.bucket))
        points = self.points.sort().values  # they may pass each other as they learn
        borders = (points[1:] + points[:-1]).detach() / 2
        used = points[torch.bucketize(scaled, borders)] * span + low
        return merge_buckets(used, weight)


@WEIGHT_TRANSFORMS.register("ternary", version=1, paper="https://arxiv.org/abs/1605.04711")
class TernaryQuantization(WeightTransform):
    """Makes weights one of -a, 0 and a, straight through: ternary weight networks (Li et al. 2016).

    A weight of size below `threshold` times the mean absolute weight becomes 0; a is the mean absolute value of the
    others, which is the nearest to the stored weights that these places allow. 0.7 is the paper's approximation of the
    best threshold. TernaryCLIP (https://arxiv.org/abs/2510.21879) trains weights {-a, 0, a} under distillation; its own
    threshold could not be looked up.

    Args:
        threshold: over the mean absolute weight; 0 leaves only exact zeros.
        per: whether a layer has one a and one threshold, or each of its output channels.
        modules, skip_first, skip_last: which layers.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        per: Literal["layer", "channel"] = "layer",
        modules: list[str] | None = None,
        skip_first: bool = False,
        skip_last: bool = False,
    ) -> None:
        super().__init__(modules, skip_first, skip_last)
        if threshold < 0:
            raise ConfigError(f"ternary: threshold must not be negative, got {threshold}")
        self.threshold, self.per = threshold, per

    def parametrization(self, weight: Tensor) -> nn.Module:
        return _TernaryLevels(self.threshold, self.per)


class _TernaryLevels(WeightParametrization):
    def __init__(self, threshold: float, per: str) -> None:
        super().__init__()
        self.threshold, self.per = threshold, per

    def forward(self, weight: Tensor) -> Tensor:
        stored = weight.detach()
        rows = stored.flatten(1) if self.per == "channel" else stored.reshape(1, -1)
        size = rows.abs()
        large = size > self.threshold * size.mean(dim=1, keepdim=True)
        mean = (size * large).sum(dim=1, keepdim=True) / large.sum(dim=1, keepdim=True).clamp(min=1)
        used = (rows.sign() * large * mean).reshape(weight.shape)
        return straight_through(used, weight)


def split_buckets(weight: Tensor, bucket: int | None) -> Tensor:
    """Cuts a weight into rows of `bucket` values, (rows, bucket); the last row is filled up with its last value."""
    flat = weight.reshape(-1)
    if bucket is None or len(flat) <= bucket:
        return flat[None]
    missing = -len(flat) % bucket
    return torch.cat([flat, flat[-1:].expand(missing)]).reshape(-1, bucket)


def merge_buckets(rows: Tensor, reference: Tensor) -> Tensor:
    """What `in_buckets` cut, in the shape of `like` again."""
    return rows.reshape(-1)[: reference.numel()].reshape(reference.shape)


def scale_to_unit_range(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each row scaled to [0, 1], its least value, and its range (1 where all its values are equal)."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    span = high - low
    span = torch.where(span == 0, 1, span)
    return (rows - low) / span, low, span


def _check_bucket(name: str, bucket: int | None) -> None:
    if bucket is not None and bucket < 1:
        raise ConfigError(f"{name}: bucket must be at least 1, or null for the whole layer, got {bucket}")
