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
    """Uniform quantisation of weights to 2^bits levels per bucket of weights, with straight-through gradients.

    This is the quantised distillation of Polino, Pascanu and Alistarh (ICLR 2018), as in their released code. The
    flattened weight of a layer is split into buckets of equal size. Each bucket has its own scale. The forward and
    the gradient use the effective (quantised) weights; the optimizer updates the stored weights.

    With `scaling: linear`, min and max of the bucket give the effective weight:

        level = round((2^bits - 1) * (w - min) / (max - min))

        effective = min + (max - min) * level / (2^bits - 1)

    With `scaling: symmetric` (the integer grid of hardware), 0 stays 0, and 2 bits give three levels:

        s = max|w| / (2^(bits - 1) - 1)

        effective = s * round(w / s)

    Args:
        bits: bits per weight, 1 to 16 for `linear`, 2 to 16 for `symmetric`.
        bucket: number of weights in a bucket (256 in the released scripts). null: all weights of the layer.
        scaling: `linear` or `symmetric`.
        modules: paths of the quantised layers. null: every linear layer and convolution.
        skip_first: whether the first layer stays unchanged, as in several released scripts.
        skip_last: whether the last layer stays unchanged, as in several released scripts.

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
            raise ConfigError(f"quantize: bits must be from {min_bits} to 16 with `scaling: {scaling}`, got {bits}")
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

    The method is that of Polino, Pascanu and Alistarh (ICLR 2018), section 4. The weights of a layer are split into
    buckets, and each bucket is scaled to [0, 1]. Each scaled weight is replaced by the nearest point p_k of its layer
    and scaled back. The gradient of p_k is a sum over the weights that p_k replaces: each summand is the gradient of
    the weight times the range (max - min) of its bucket. The original weights get no gradient and stay constant. As
    in the released code, every forward assigns the weights to points again, and the points start at quantiles of the
    scaled weights.

    Args:
        bits: logarithm to base 2 of the number of points, 1 to 8.
        bucket: number of weights in a bucket. null: all weights of the layer.
        start: initial points, `quantiles` of the scaled weights or `uniform`.
        modules: paths of the quantised layers. null: every linear layer and convolution.
        skip_first: whether the first layer stays unchanged.
        skip_last: whether the last layer stays unchanged.

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
        points = self.points.sort().values  # training can change the order of the points
        borders = (points[1:] + points[:-1]).detach() / 2
        quantized = points[torch.bucketize(scaled, borders)] * span + low
        return merge_buckets(quantized, weight)


@WEIGHT_TRANSFORMS.register("ternary", version=1, paper="https://arxiv.org/abs/1605.04711")
class TernaryQuantization(WeightTransform):
    """Quantisation of weights to -a, 0 and a, with straight-through gradients (TWN, Li et al. 2016).

    A weight w becomes 0 if |w| <= threshold * mean|w|. The scale a is the mean |w| of all other weights; this a
    minimises the squared distance to the original weights for the given zeros. The threshold 0.7 is the approximation
    of the optimum in Ternary Weight Networks (TWN). TernaryCLIP (https://arxiv.org/abs/2510.21879) trains weights
    {-a, 0, a} with distillation. The threshold of TernaryCLIP could not be verified.

    Args:
        threshold: threshold relative to the mean absolute weight. With 0, only weights that are exactly 0 become 0.
        per: range of weights that share a and the threshold, `layer` or (output) `channel`.
        modules: paths of the quantised layers. null: every linear layer and convolution.
        skip_first: whether the first layer stays unchanged.
        skip_last: whether the last layer stays unchanged.

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
    """Splits the flattened weight into rows of `bucket` numbers, (rows, bucket).

    If `bucket` is None or the weight is smaller than one bucket, the result is one row with all numbers. The last row
    is padded with copies of the weight's last number.
    """
    flat = weight.reshape(-1)
    if bucket is None or len(flat) <= bucket:
        return flat[None]
    padding = -len(flat) % bucket
    return torch.cat([flat, flat[-1:].expand(padding)]).reshape(-1, bucket)


def merge_buckets(rows: Tensor, reference: Tensor) -> Tensor:
    """Restores a weight of the shape of `reference` from the rows of `split_buckets`, without their padding."""
    return rows.reshape(-1)[: reference.numel()].reshape(reference.shape)


def scale_to_unit_range(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales each row to [0, 1].

    Returns:
        the scaled rows, the minimum of each row (rows, 1), and the range max - min of each row (rows, 1). For a
        constant row, the returned range is 1.
    """
    low, high = rows.aminmax(dim=1, keepdim=True)
    span = high - low
    span = torch.where(span == 0, 1, span)
    return (rows - low) / span, low, span


def _check_bucket(name: str, bucket: int | None) -> None:
    """Raises ConfigError if the bucket size is below 1. None is valid."""
    if bucket is not None and bucket < 1:
        raise ConfigError(f"{name}: bucket must be at least 1, or null for the whole layer, got {bucket}")
