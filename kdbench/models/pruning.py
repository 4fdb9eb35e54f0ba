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

    `unit: channel` sets the output channels with the smallest sum of absolute weights and their bias to 0 (structured;
    Li et al. 2017, "Pruning Filters for Efficient ConvNets"); the shift of a following BatchNorm stays. `unit: weight`
    sets the weights of smallest magnitude to 0 (unstructured; Han et al. 2015, https://arxiv.org/abs/1506.02626). The
    number of pruned units per layer is fraction * units, rounded down.

    The mask is computed once, from the weights at `apply`; pruned units get no gradient. With `renew` the mask is
    recomputed in every forward and pruned units get a straight-through gradient, so that they can recover (Lin et al.
    2020, https://arxiv.org/abs/2006.07253). For gradual pruning use a sequence of stages with increasing fractions;
    each stage bakes its transforms.

    Args:
        fraction: fraction of pruned units of each layer, in [0, 1).
        unit: output channels or single weights.
        renew: recompute the mask in every forward.
        modules: paths of the layers; null selects every linear layer and convolution.
        skip_first: leave the first layer unchanged.
        skip_last: leave the last layer unchanged; the default is true because its output channels are the classes.

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
            raise ConfigError(f"prune: fraction must be in [0, 1), got {fraction}")
        self.fraction, self.unit, self.renew = fraction, unit, renew

    def parametrization(self, weight: Tensor) -> nn.Module:
        if self.renew:
            return _RecomputedMask(self.fraction, self.unit)
        return _FixedMask(pruning_mask(weight, self.fraction, self.unit))

    def apply(self, model: nn.Module) -> None:
        """Registers the masks on the weights of the target layers, and on the bias of pruned channels."""
        # Computed before the weights are parametrized, so that weight and bias get the same mask.
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
    """Returns a boolean mask, True where a unit is kept: all but the `fraction` with the smallest norm.

    Args:
        weight: (outputs, ...).
        fraction: fraction of pruned units.
        unit: `channel` or `weight`.

    Returns:
        (outputs, 1, ...) for channels, otherwise the shape of the weight.
    """
    norm = weight.abs().flatten(1).sum(dim=1) if unit == "channel" else weight.abs().flatten()
    rank = norm.argsort(stable=True).argsort()
    keep = rank >= int(fraction * len(norm))
    return keep.reshape(-1, *[1] * (weight.dim() - 1)) if unit == "channel" else keep.reshape(weight.shape)
