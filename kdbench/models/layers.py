"""Small modules that several networks share."""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.errors import ConfigError


class GlobalAveragePool(nn.Module):
    """Mean over all places: (batch, channels, height, width) -> (batch, channels), for any height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def init_convolutions(model: nn.Module) -> None:
    """Draws every convolution from N(0, 2 / fan_out) with zero bias (He et al. 2015); norms start as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def vector_size(shape: tuple[int, ...], name: str) -> int:
    """How many values `as_vector` leaves of one sample of this shape."""
    if len(shape) not in (1, 2, 3):
        raise ConfigError(f"{name}: reads vectors, tokens or maps, got a feature of {list(shape)}")
    return shape[-1] if len(shape) == 2 else shape[0]


def as_vector(feature: Tensor) -> Tensor:
    """One vector per sample: a map averaged over its places, tokens over their number, a vector as it is."""
    if feature.dim() == 4:
        return feature.mean(dim=(2, 3))
    return feature.mean(dim=1) if feature.dim() == 3 else feature
