"""Networks that weigh the features of another network."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.attention import SelfAttention
from kdbench.models.layers import GlobalAveragePool, as_vector, vector_size
from kdbench.registry import MODELS


@MODELS.register("feature_mask", version=1, paper="https://arxiv.org/abs/2507.07015", image=(64, 4, 4))
class FeatureMask(nn.Module):
    """Multiplies each channel of a feature by a mask in (0, 1) that attention among the channels predicts.

    The MaskNet of MST-Distill (Li et al. 2025, https://arxiv.org/abs/2507.07015), as its released code has it: a map is
    reduced by a depthwise 3x3 convolution of stride 2, a 1x1 convolution, BatchNorm, ReLU and the mean over all places;
    a linear layer embeds the channels together, `hidden` values for each; multi-head attention runs over the channels;
    a linear layer and a sigmoid give each its mask. The released code writes the masked feature into the teacher with a
    hook. In a recipe the mask is a role on the teacher's feature, and the teacher's remaining modules are `same` roles
    on it.

    Shapes: (batch, channels) or (batch, channels, height, width) -> the same. Feature: `gate`, the mask (batch,
    channels). Parameters grow with channels squared times `hidden`: 133 thousand for 64 channels, where `hidden` is 30.

    Args:
        input_shape: of one sample of the feature; the engine gives it.
        heads: of the attention.
        factor: `hidden` is the largest multiple of `heads` that is at most channels / factor.
    """

    def __init__(self, input_shape: tuple[int, ...] = (64, 4, 4), heads: int = 3, factor: int = 2) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3):
            raise ConfigError(f"feature_mask: masks vectors and maps, got a feature of {list(input_shape)}")
        if heads < 1 or factor < 1:
            raise ConfigError(f"feature_mask: heads and factor must be at least 1, got {heads} and {factor}")
        channels = input_shape[0]
        hidden = channels // (factor * heads) * heads
        if hidden == 0:
            raise ConfigError(f"feature_mask: {channels} channels are too few for {heads} heads and factor {factor}")
        self.reduce = nn.Sequential()
        if len(input_shape) == 3:
            self.reduce = nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                GlobalAveragePool(),
            )
        self.embed = nn.Linear(channels, channels * hidden)
        self.attention = SelfAttention(hidden, heads)
        self.fc = nn.Linear(hidden, 1)
        self.gate = nn.Sigmoid()

    def forward(self, feature: Tensor) -> Tensor:
        embedded = self.embed(self.reduce(feature)).unflatten(1, (feature.shape[1], -1))
        mask = self.gate(self.fc(self.attention(embedded)).squeeze(-1))
        return feature * mask.reshape(mask.shape + (1,) * (feature.dim() - 2))


@MODELS.register("gate_mlp", version=1, image=(10,))
class GateMLP(nn.Module):
    """Scores for each of several ways (teachers, branches) from a sample's logits or features.

    Two published gates: MST-Distill's is two linear layers with nothing between, from the student's logits
    (`activation: none`, `hidden` twice the classes, its default here); ONE's (Lan, Zhu and Gong 2018,
    https://arxiv.org/abs/1806.04606) is one linear layer, BatchNorm and ReLU on a shared feature (`hidden: 0,
    batch_norm: true`). Both take a softmax over the ways afterwards, which routers and combiners do themselves;
    `softmax: true` does it here. A map is averaged over its places, tokens over their number.

    Shapes: (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, ways).

    Args:
        ways: how many scores.
        input_shape: of one sample of what it reads; the engine gives it.
        hidden: width of the hidden layer; 0 for none, null for twice the input's.
        activation: what stands between the two linear layers.
        batch_norm: end with BatchNorm and ReLU, as ONE does.
        softmax: give shares that sum to 1 in place of scores.
    """

    def __init__(
        self,
        ways: int = 2,
        input_shape: tuple[int, ...] = (10,),
        hidden: int | None = None,
        activation: Literal["none", "relu"] = "none",
        batch_norm: bool = False,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if ways < 2:
            raise ConfigError(f"gate_mlp: needs at least two ways, got {ways}")
        if hidden is not None and hidden < 0:
            raise ConfigError(f"gate_mlp: hidden must not be negative, got {hidden}")
        values = vector_size(input_shape, "gate_mlp")
        width = 2 * values if hidden is None else hidden
        self.layers = nn.Sequential()
        if width:
            self.layers.append(nn.Linear(values, width))
            if activation == "relu":
                self.layers.append(nn.ReLU())
        self.layers.append(nn.Linear(width or values, ways))
        if batch_norm:
            self.layers.extend([nn.BatchNorm1d(ways), nn.ReLU()])
        self.softmax = softmax

    def forward(self, feature: Tensor) -> Tensor:
        scores = self.layers(as_vector(feature))
        return torch.softmax(scores, dim=1) if self.softmax else scores
