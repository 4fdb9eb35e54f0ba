"""Pruned weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdbench.errors import ConfigError
from kdbench.models.weight_transform import WeightParametrization, WeightTransform, effective_weight, straight_through
from kdbench.registry import WEIGHT_TRANSFORMS


@WEIGHT_TRANSFORMS.register("prune", version=1, paper="https://arxiv.org/abs/1608.08710")
class Pruning(WeightTransform):
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
        fraction: float = 0.5,
        unit: Literal["channel", "weight"] = "channel",
        renew: bool = False,
        modules: list[str] | None = None,
        skip_first: bool = False,
        skip_last: bool = True,
    ) -> None:
        super().__init__(modules, skip_first, skip_last)
        if not 0 <= fraction < 1:
            raise ConfigError(f"prune: fraction must be from 0 to below 1, got {fraction}")
        self.fraction, self.unit, self.renew = fraction, unit, renew

    def parametrization(self, weight: Tensor) -> nn.Module:
        return _RecomputedMask(self.fraction, self.unit) if self.renew else _FixedMask(pruning_mask(weight, self.fraction, self.unit))

    def apply(self, model: nn.Module) -> None:
        """Puts the masks on the weights of the chosen layers, and on the bias of a layer whose channels are pruned."""
        masks = [(layer, pruning_mask(effective_weight(layer), self.fraction, self.unit)) for _, layer in self.target_layers(model)]
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
    """True where a unit stays: all but the `share` of least norm. Shaped to multiply the weight."""
    size = weight.abs().flatten(1).sum(dim=1) if unit == "channel" else weight.abs().flatten()
    rank = size.argsort(stable=True).argsort()
    kept = rank >= int(fraction * len(size))
    return kept.reshape(-1, *[1] * (weight.dim() - 1)) if unit == "channel" else kept.reshape(weight.shape)
