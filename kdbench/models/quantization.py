"""Weight transforms for quantisation: uniform levels, learned levels, ternary weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.weight_transform import WeightParametrization, WeightTransform, straight_through
from kdbench.registry import WEIGHT_TRANSFORMS


@WEIGHT_TRANSFORMS.register("quantize", version=1, paper="https://arxiv.org/abs/1802.05668")
class UniformQuantization(WeightTransform):
    """Uniform quantisation of weights to 2^bits levels per bucket, with straight-through gradients.

    Quantised distillation of Polino, Pascanu and Alistarh (ICLR 2018) and their released code. The flattened weight of
    a layer is split into buckets; the last bucket is padded with its last value. With `scaling: linear`

        level = round((2^bits - 1) * (w - min) / (max - min)),  effective = min + (max - min) * level / (2^bits - 1)

    per bucket. The forward and the gradient use the effective weights; the optimizer updates the stored ones. The
    released scripts use buckets of 256 weights.

    With `scaling: symmetric` (the integer grid of hardware) the step size is s = max|w| / (2^(bits - 1) - 1) and the
    effective weight s * round(w / s), so that 0 stays 0 and 2 bits give three values.

    Args:
        bits: bits per weight, 1 to 16 (2 to 16 if symmetric).
        bucket: number of weights with a common scale; null uses the whole layer.
        scaling: linear or symmetric.
        modules: paths of the layers; null selects every linear layer and convolution.
        skip_first: leave the first layer unchanged, as several released scripts do.
        skip_last: leave the last layer unchanged, as several released scripts do.

    Example (recipe):
        student: {model: digits_cnn, transform: [{type: quantize, bits: 4}]}
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
        min_bits = 2 if scaling == "symmetric" else 1
        if not min_bits <= bits <= 16:
            raise ConfigError(f"quantize: bits must be from {min_bits} to 16 with scaling: {scaling}, got {bits}")
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
            quantized = (scaled * steps).round() / steps * span + low
        else:
            steps = 2 ** (self.bits - 1) - 1
            step_size = rows.abs().amax(dim=1, keepdim=True) / steps
            levels = (rows / torch.where(step_size == 0, 1, step_size)).round().clamp(-steps, steps)
            quantized = levels * step_size
        return straight_through(merge_buckets(quantized, weight), weight)


@WEIGHT_TRANSFORMS.register("learned_quantize", version=1, paper="https://arxiv.org/abs/1802.05668")
class LearnedQuantization(WeightTransform):
    """Quantisation of weights to 2^bits learned points per layer (differentiable quantisation).

    Polino, Pascanu and Alistarh (ICLR 2018), section 4. Buckets are scaled to [0, 1] as in `quantize`, and each weight
    takes the nearest point p_k of its layer. The gradient of p_k is the sum, over the weights that take it, of their
    gradient times the range of their bucket. The stored weights get no gradient and stay constant. As in the released
    code, the assignment is recomputed in every forward, and the points start at quantiles of the scaled weights.

    Args:
        bits: 2^bits points, 1 to 8 bits.
        bucket: number of weights with a common scale; null uses the whole layer.
        start: initial points: quantiles of the scaled weights, or uniform.
        modules: paths of the layers; null selects every linear layer and convolution.
        skip_first: leave the first layer unchanged.
        skip_last: leave the last layer unchanged.

    Example (recipe):
        student: {model: digits_cnn, transform: [{type: learned_quantize, bits: 2}]}
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
        uniform = torch.arange(count, device=weight.device, dtype=weight.dtype) / (count - 1)
        points = uniform
        if start == "quantiles":
            scaled = scale_to_unit_range(split_buckets(weight, bucket))[0].flatten().sort().values
            points = scaled[(uniform * (len(scaled) - 1)).round().long()]
        self.points = nn.Parameter(points)

    def forward(self, weight: Tensor) -> Tensor:
        scaled, low, span = scale_to_unit_range(split_buckets(weight.detach(), self.bucket))
        points = self.points.sort().values  # training can change their order
        borders = (points[1:] + points[:-1]).detach() / 2
        quantized = points[torch.bucketize(scaled, borders)] * span + low
        return merge_buckets(quantized, weight)


@WEIGHT_TRANSFORMS.register("ternary", version=1, paper="https://arxiv.org/abs/1605.04711")
class TernaryQuantization(WeightTransform):
    """Ternary weights -a, 0 and a with straight-through gradients (ternary weight networks, Li et al. 2016).

    A weight becomes 0 if |w| <= threshold * mean|w|; a is the mean |w| of the remaining weights, which minimises the
    distance to the stored weights for this support. The threshold 0.7 is the paper's approximation of the optimum.
    TernaryCLIP (https://arxiv.org/abs/2510.21879) trains weights {-a, 0, a} with distillation; its threshold could not
    be verified.

    Args:
        threshold: relative to the mean absolute weight; 0 keeps only exact zeros at 0.
        per: one a and one threshold per layer, or per output channel.
        modules: paths of the layers; null selects every linear layer and convolution.
        skip_first: leave the first layer unchanged.
        skip_last: leave the last layer unchanged.

    Example (recipe):
        student: {model: digits_cnn, transform: [{type: ternary, skip_first: true}]}
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
            raise ConfigError(f"ternary: threshold must be at least 0, got {threshold}")
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
        magnitude = rows.abs()
        nonzero = magnitude > self.threshold * magnitude.mean(dim=1, keepdim=True)
        scale = (magnitude * nonzero).sum(dim=1, keepdim=True) / nonzero.sum(dim=1, keepdim=True).clamp(min=1)
        ternary = (rows.sign() * nonzero * scale).reshape(weight.shape)
        return straight_through(ternary, weight)


def split_buckets(weight: Tensor, bucket: int | None) -> Tensor:
    """Splits a flattened weight into rows (rows, bucket); the last row is padded with its last value."""
    flat = weight.reshape(-1)
    if bucket is None or len(flat) <= bucket:
        return flat[None]
    padding = -len(flat) % bucket
    return torch.cat([flat, flat[-1:].expand(padding)]).reshape(-1, bucket)


def merge_buckets(rows: Tensor, reference: Tensor) -> Tensor:
    """Inverts `split_buckets`: drops the padding and restores the shape of `reference`."""
    return rows.reshape(-1)[: reference.numel()].reshape(reference.shape)


def scale_to_unit_range(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales each row to [0, 1].

    Returns:
        Scaled rows, minimum of each row (rows, 1), range of each row (rows, 1), which is 1 for a constant row.
    """
    low, high = rows.aminmax(dim=1, keepdim=True)
    span = high - low
    span = torch.where(span == 0, 1, span)
    return (rows - low) / span, low, span


def _check_bucket(name: str, bucket: int | None) -> None:
    """Raises ConfigError if the bucket size is below 1."""
    if bucket is not None and bucket < 1:
        raise ConfigError(f"{name}: bucket must be at least 1, or null for the whole layer, got {bucket}")
