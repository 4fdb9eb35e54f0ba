"""What is done to a network's weights in every forward: fewer bits, three values, fewer channels.

A transform stands between a weight that is stored and the weight that the layer uses (a parametrisation of torch.nn).
The stored one trains in full precision; where the function between them is flat, its gradient goes straight through.
`bake` makes the used weights the stored ones and takes the transform away: the names of the state dict are again those
of the plain network. Several transforms work on one weight in the order in which they were applied; baking bakes all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdbench.errors import ConfigError, nearest
from kdbench.registry import TRANSFORMS

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What has its weight changed. Output channels come first in all of them (in transposed convolutions they do not)."""


class Transform:
    """Base of all transforms: chooses the layers, puts the parametrisation on their weights, bakes it in.

        @TRANSFORMS.register("quantize", version=1)

    Apply it to a network that has the weights to start from: some transforms choose their levels or masks by them.

    Args:
        modules: paths of layers, or of modules whose layers are all meant; None: every linear layer and convolution
            (transposed ones excepted).
        skip_first, skip_last: leave out the first, the last of all the network's layers, in the order of their paths.
    """

    def __init__(self, modules: list[str] | None = None, skip_first: bool = False, skip_last: bool = False) -> None:
        self.modules = modules
        self.skip_first = skip_first
        self.skip_last = skip_last

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields path and module of each layer whose weight the transform changes.

        Raises:
            ConfigError: a path that names no layer, or nothing left to change.
        """
        every = [(path, module) for path, module in model.named_modules() if isinstance(module, LAYERS)]
        left_out = {path for path, _ in (every[:1] if self.skip_first else []) + (every[-1:] if self.skip_last else [])}
        for wanted in self.modules or ():
            if not any(_inside(path, wanted) for path, _ in every):
                paths = [path for path, _ in model.named_modules() if path]
                raise ConfigError(f"modules: {wanted!r} names no layer with weights.{nearest(wanted, paths)}")
        chosen = [
            (path, module)
            for path, module in every
            if path not in left_out and (not self.modules or any(_inside(path, wanted) for wanted in self.modules))
        ]
        if not chosen:
            raise ConfigError(f"no layer is left to change: the network has {len(every)}, all of them left out")
        yield from chosen

    def function(self, weight: Tensor) -> nn.Module:
        """Makes the module from the stored to the used weight, for a layer with this stored weight."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Puts the transform on the chosen layers of `model`, in place."""
        for _, layer in self.layers(model):
            # `unsafe` leaves out torch's own trial of the function, which would cost a pass over every weight.
            parametrize.register_parametrization(layer, "weight", self.function(weight_of(layer)), unsafe=True)

    def bake(self, model: nn.Module) -> None:
        """Stores the weights that the forward used, and takes this and every other transform off `model`, in place."""
        for _, module in list(model.named_modules()):
            if not parametrize.is_parametrized(module):
                continue
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name, functions in list(module.parametrizations.items()):
                if any(isinstance(function, WeightFunction) for function in functions.children()):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def used_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `bake` would leave; the model stays as it is.

    A copy cannot be baked in its place: torch gives both the same class, and takes the weight off that class.
    """
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, functions in module.parametrizations.items():
            if any(isinstance(function, WeightFunction) for function in functions.children()):
                before = f"{path}.parametrizations.{name}.".lstrip(".")
                state = {key: value for key, value in state.items() if not key.startswith(before)}
                state[f"{path}.{name}".lstrip(".")] = getattr(module, name).detach().clone()
    return state


class WeightFunction(nn.Module):
    """From a stored weight to the used one. The base marks what a transform put there: a model may have others."""


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that a layer uses, as it is now."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def straight_through(used: Tensor, stored: Tensor) -> Tensor:
    """`used`, to the bit, with the gradient of `stored`."""
    return used.detach() + (stored - stored.detach())


@TRANSFORMS.register("quantize", version=1, paper="https://arxiv.org/abs/1802.05668")
class Quantize(Transform):
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

    def function(self, weight: Tensor) -> nn.Module:
        return _Quantized(self.bits, self.bucket, self.scaling)


class _Quantized(WeightFunction):
    def __init__(self, bits: int, bucket: int | None, scaling: str) -> None:
        super().__init__()
        self.bits, self.bucket, self.scaling = bits, bucket, scaling

    def forward(self, weight: Tensor) -> Tensor:
        rows = in_buckets(weight.detach(), self.bucket)
        if self.scaling == "linear":
            scaled, low, span = scale_linearly(rows)
            steps = 2**self.bits - 1
            used = (scaled * steps).round() / steps * span + low
        else:
            steps = 2 ** (self.bits - 1) - 1
            size = rows.abs().amax(dim=1, keepdim=True) / steps
            used = (rows / torch.where(size == 0, 1, size)).round().clamp(-steps, steps) * size
        return straight_through(out_of_buckets(used, weight), weight)


@TRANSFORMS.register("learned_quantize", version=1, paper="https://arxiv.org/abs/1802.05668")
class LearnedQuantize(Transform):
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

    def function(self, weight: Tensor) -> nn.Module:
        return _LearnedPoints(weight, self.bits, self.bucket, self.start)


class _LearnedPoints(WeightFunction):
    def __init__(self, weight: Tensor, bits: int, bucket: int | None, start: str) -> None:
        super().__init__()
        self.bucket = bucket
        count = 2**bits
        even = torch.arange(count, device=weight.device, dtype=weight.dtype) / (count - 1)
        points = even
        if start == "quantiles":
            scaled = scale_linearly(in_buckets(weight, bucket))[0].flatten().sort().values
            points = scaled[(even * (len(scaled) - 1)).round().long()]
        self.points = nn.Parameter(points)

    def forward(self, weight: Tensor) -> Tensor:
        scaled, low, span = scale_linearly(in_buckets(weight.detach(), self.bucket))
        points = self.points.sort().values  # they may pass each other as they learn
        borders = (points[1:] + points[:-1]).detach() / 2
        used = points[torch.bucketize(scaled, borders)] * span + low
        return out_of_buckets(used, weight)


@TRANSFORMS.register("ternary", version=1, paper="https://arxiv.org/abs/1605.04711")
class Ternary(Transform):
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

    def function(self, weight: Tensor) -> nn.Module:
        return _Ternary(self.threshold, self.per)


class _Ternary(WeightFunction):
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


@TRANSFORMS.register("prune", version=1, paper="https://arxiv.org/abs/1608.08710")
class Prune(Transform):
    """Sets a share of each layer's weights to 0: whole output channels by their L1 norm, or single weights by size.

    Structured (`unit: channel`): the channels with the least sum of absolute weights (Li et al. 2017, "Pruning Filters
    for Efficient ConvNets"), their bias with them; a BatchNorm behind the layer keeps its shift. Unstructured (`unit:
    weight`): the weights of least magnitude (Han et al. 2015, https://arxiv.org/abs/1506.02626). The number is the
    layer's share, rounded down.

    The mask is chosen once, by the weights at the time of `apply`, and what is pruned gets no gradient. With `renew` it
    is chosen anew in every forward and the gradient goes straight through to what is pruned, so that it may return
    (Lin et al. 2020, https://arxiv.org/abs/2006.07253). A share that grows with training is a sequence of stages, each
    of which prunes what the one before left; stages bake their transforms.

    Args:
        share: of the units of each layer, from 0 to below 1.
        unit: what is pruned: output channels, or single weights.
        renew: choose the mask in every forward.
        modules, skip_first, skip_last: which layers; the last one is left out unless said, since its output channels
            are the classes.
    """

    def __init__(
        self,
        share: float = 0.5,
        unit: Literal["channel", "weight"] = "channel",
        renew: bool = False,
        modules: list[str] | None = None,
        skip_first: bool = False,
        skip_last: bool = True,
    ) -> None:
        super().__init__(modules, skip_first, skip_last)
        if not 0 <= share < 1:
            raise ConfigError(f"prune: share must be from 0 to below 1, got {share}")
        self.share, self.unit, self.renew = share, unit, renew

    def function(self, weight: Tensor) -> nn.Module:
        return _Renewed(self.share, self.unit) if self.renew else _Masked(pruning_mask(weight, self.share, self.unit))

    def apply(self, model: nn.Module) -> None:
        """Puts the masks on the weights of the chosen layers, and on the bias of a layer whose channels are pruned."""
        masks = [(layer, pruning_mask(weight_of(layer), self.share, self.unit)) for _, layer in self.layers(model)]
        super().apply(model)
        for layer, mask in masks:
            if self.unit == "channel" and not self.renew and layer.bias is not None:
                parametrize.register_parametrization(layer, "bias", _Masked(mask.flatten()), unsafe=True)


class _Masked(WeightFunction):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)


class _Renewed(WeightFunction):
    def __init__(self, share: float, unit: str) -> None:
        super().__init__()
        self.share, self.unit = share, unit

    def forward(self, weight: Tensor) -> Tensor:
        stored = weight.detach()
        return straight_through(torch.where(pruning_mask(stored, self.share, self.unit), stored, 0), weight)


def pruning_mask(weight: Tensor, share: float, unit: str) -> Tensor:
    """True where a unit stays: all but the `share` of least norm. Shaped to multiply the weight."""
    size = weight.abs().flatten(1).sum(dim=1) if unit == "channel" else weight.abs().flatten()
    rank = size.argsort(stable=True).argsort()
    kept = rank >= int(share * len(size))
    return kept.reshape(-1, *[1] * (weight.dim() - 1)) if unit == "channel" else kept.reshape(weight.shape)


def in_buckets(weight: Tensor, bucket: int | None) -> Tensor:
    """Cuts a weight into rows of `bucket` values, (rows, bucket); the last row is filled up with its last value."""
    flat = weight.reshape(-1)
    if bucket is None or len(flat) <= bucket:
        return flat[None]
    missing = -len(flat) % bucket
    return torch.cat([flat, flat[-1:].expand(missing)]).reshape(-1, bucket)


def out_of_buckets(rows: Tensor, like: Tensor) -> Tensor:
    """What `in_buckets` cut, in the shape of `like` again."""
    return rows.reshape(-1)[: like.numel()].reshape(like.shape)


def scale_linearly(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each row scaled to [0, 1], its least value, and its range (1 where all its values are equal)."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    span = high - low
    span = torch.where(span == 0, 1, span)
    return (rows - low) / span, low, span


def _inside(path: str, wanted: str) -> bool:
    return path == wanted or path.startswith(f"{wanted}.")


def _check_bucket(name: str, bucket: int | None) -> None:
    if bucket is not None and bucket < 1:
        raise ConfigError(f"{name}: bucket must be at least 1, or null for the whole layer, got {bucket}")
