"""Weight transform for magnitude pruning."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdbench.errors import ConfigError
from kdbench.models.weight_transform import (
    WeightParametrization,
    WeightTransform,
    effective_weight,
    straight_through,
)
from kdbench.registry import WEIGHT_TRANSFORMS


@WEIGHT_TRANSFORMS.register("prune", version=1, paper="https://arxiv.org/abs/1608.08710")
class Pruning(WeightTransform):
    """Magnitude pruning of a fraction of each layer: output channels by L1 norm, or single weights by magnitude.

    `unit: channel` sets the output channels with the smallest sum of absolute weights to 0, including their biases
    (structured pruning; Li et al. 2017, "Pruning Filters for Efficient ConvNets"). The shift of a following BatchNorm
    is not changed. `unit: weight` sets the weights of smallest magnitude to 0 (unstructured pruning; Han et al. 2015,
    https://arxiv.org/abs/1506.02626). The number of pruned units per layer is fraction * units, rounded down.

    The mask is computed once, from the weights at the start of the stage, and pruned units get no gradient. With
    `renew`, the mask is recomputed in every forward, pruned units get a straight-through gradient and can become
    nonzero again (Lin et al. 2020, https://arxiv.org/abs/2006.07253), and biases are not masked. For gradual pruning,
    use a sequence of stages with increasing fractions. At the end of each stage, the pruned weights replace the
    stored weights.

    Args:
        fraction: fraction of pruned units of each layer, in [0, 1).
        unit: pruned units: output channels (`channel`) or single weights (`weight`).
        renew: whether to recompute the mask in every forward.
        modules: paths of the pruned layers. null: every linear layer and convolution.
        skip_first: whether the first layer stays unchanged.
        skip_last: whether the last layer stays unchanged. The default is true, because the output channels of the
            last layer are the classes.

    Example (recipe):
        student: {model: digits_cnn, transform: [{type: prune, fraction: 0.5}]}
    """

    def __init__(
        self,
        fraction: float = 0.5,
        unit: Literal["channel", "weight"] = "channel",
        renew: bool = False,
        modules: list[str] | None = None,
        skip_first: bool = False,
        skip_last: bool = True,
    ) -> None:
        super().__init__(modules, skip_first, skip_last)
        if not 0 <= fraction < 1:
            raise ConfigError(f"prune: fraction must be at least 0 and below 1, got {fraction}")
        self.fraction, self.unit, self.renew = fraction, unit, renew

    def parametrization(self, weight: Tensor) -> nn.Module:
        if self.renew:
            return _RecomputedMask(self.fraction, self.unit)
        return _FixedMask(pruning_mask(weight, self.fraction, self.unit))

    def apply(self, model: nn.Module) -> None:
        """Registers masks on the weights of the layers to prune, in place.

        For `unit: channel` without `renew`, masks on the biases are registered too.
        """
        # Masks are computed before the weights are parametrized, so that weight and bias get the same mask.
        masks = [
            (layer, pruning_mask(effective_weight(layer), self.fraction, self.unit))
            for _, layer in self.target_layers(model)
        ]
        super().apply(model)
        for layer, mask in masks:
            if self.unit == "channel" and not self.renew and layer.bias is not None:
                parametrize.register_parametrization(layer, "bias", _FixedMask(mask.flatten()), unsafe=True)


class _FixedMask(WeightParametrization):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)


class _RecomputedMask(WeightParametrization):
    def __init__(self, fraction: float, unit: str) -> None:
        super().__init__()
        self.fraction, self.unit = fraction, unit

    def forward(self, weight: Tensor) -> Tensor:
        stored = weight.detach()
        return straight_through(torch.where(pruning_mask(stored, self.fraction, self.unit), stored, 0), weight)


def pruning_mask(weight: Tensor, fraction: float, unit: str) -> Tensor:
    """Returns a boolean mask that is False for the fraction of units (channels or weights) with the smallest L1 norm.

    Args:
        weight: weight of a layer, (outputs, ...).
        fraction: fraction of units to prune.
        unit: kind of unit, `channel` (one row of `weight`) or `weight` (one number).

    Returns:
        mask of shape (outputs, 1, ...) for `channel`, and of the shape of `weight` for `weight`.
    """
    norm = weight.abs().flatten(1).sum(dim=1) if unit == "channel" else weight.abs().flatten()
    rank = norm.argsort(stable=True).argsort()
    keep = rank >= int(fraction * len(norm))
    return keep.reshape(-1, *[1] * (weight.dim() - 1)) if unit == "channel" else keep.reshape(weight.shape)
