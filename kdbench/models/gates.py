"""Gates: networks that predict weights per sample, per teacher or per channel."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.models.layers import GlobalAveragePool, SelfAttention, pool_to_vector, pooled_size
from kdbench.registry import MODELS


@MODELS.register("fusion_gate", version=1, paper="https://arxiv.org/abs/2312.15112", image=(10,))
class FusionGate(nn.Module):
    """Gate that predicts the weight of the soft target for each sample, from student, teacher and label (TGeo-KD).

    The gate is that of Hu et al., ICLR 2024, in the form of the latest released code. An MLP with leaky ReLUs reads

        [S, T, G, M, (M-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (M-G)^2]

    and a sigmoid of the MLP's output is the weight. S and T are the softmax of student and teacher, G is the one-hot
    label, M is the mean of T over all samples with the same label, and the squares are element-wise. In training
    mode, M is updated as a cumulative mean. If the teacher does not change, M is the mean over the training set after
    one epoch. The inputs get no gradient, so that the student cannot lower its loss by changing the weight. Samples
    without a label (negative label) have G = M = 0.

    Feature: `net`, the value before the sigmoid.

    Shape:
        student logits (batch, classes), teacher logits (batch, classes), label (batch,) -> weight (batch, 1), in (0,
        1).

    Args:
        input_shape: shape of the student's logits per sample (injected by kdbench).
        hidden: widths of the hidden layers.

    Example (recipe):
        models: {gate: {model: fusion_gate, input: ["student:logits", "teacher:logits", train.label]}}
    """

    mean: Tensor
    count: Tensor

    def __init__(self, input_shape: tuple[int, ...] = (10,), hidden: tuple[int, ...] = (32, 16)) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"fusion_gate: the first input must be logits (a vector), got shape {list(input_shape)} per sample"
            )
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"fusion_gate: hidden must list one or more widths of at least 1, got {list(hidden)}")
        classes = input_shape[0]
        self.register_buffer("mean", torch.zeros(classes, classes))
        self.register_buffer("count", torch.zeros(classes))
        sizes = [9 * classes, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        dtype = self.mean.dtype
        s, t = (F.softmax(logits.detach().to(dtype), 1) for logits in (student, teacher))
        g = F.one_hot(label.clamp(min=0), self.mean.shape[0]).to(dtype) * (label >= 0).unsqueeze(1)
        if self.training:
            self._update_class_means(t.detach(), g)
        m = g @ self.mean
        pairs = ((m, s), (g, s), (t, s), (t, g), (m, g))
        return torch.sigmoid(self.net(torch.cat([s, t, g, m, *((a - b).square() for a, b in pairs)], 1)))

    @torch.no_grad()
    def _update_class_means(self, t: Tensor, g: Tensor) -> None:
        """Updates the running class means of the teacher's probabilities.

        Args:
            t: teacher probabilities (batch, classes).
            g: one-hot labels (batch, classes).
        """
        batch_count = g.sum(0)
        self.count += batch_count
        self.mean += (g.T @ t - batch_count.unsqueeze(1) * self.mean) / self.count.clamp(min=1).unsqueeze(1)


@MODELS.register("feature_mask", version=1, paper="https://arxiv.org/abs/2507.07015", image=(64, 4, 4))
class FeatureMask(nn.Module):
    """Channel attention mask (MST-Distill): multiplies each channel of a feature by a predicted value in (0, 1).

    The module is the MaskNet of Li et al. 2025 (https://arxiv.org/abs/2507.07015), as in the released code. A feature
    map is first reduced to one value per channel: depthwise 3x3 convolution of stride 2, 1x1 convolution, BatchNorm,
    ReLU, global average pooling. A linear layer maps all channel values to one embedding of `hidden` values per
    channel. Multi-head attention runs over the channels. A linear layer and a sigmoid compute the mask.

    The released code writes the masked feature into the teacher with a hook. In a recipe, the mask is a separate role
    (a named network) on the teacher's feature. Further roles with the key `reuse` apply the remaining modules of the
    teacher to the masked feature.

    Feature: `gate`, the mask (batch, channels). The number of parameters grows with channels^2 * hidden: 133 thousand
    for 64 channels, where hidden is 30.

    Shape:
        (batch, channels) or (batch, channels, height, width) -> the same shape.

    Args:
        input_shape: shape of the feature per sample (injected by kdbench).
        heads: number of attention heads.
        factor: divisor of the number of channels for the embedding. `hidden` is the largest multiple of `heads` that
            is at most channels / factor.

    Example (recipe):
        models: {mask: {model: feature_mask, input: "teacher:layer1"}}
    """

    def __init__(self, input_shape: tuple[int, ...] = (64, 4, 4), heads: int = 3, factor: int = 2) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3):
            raise ConfigError(
                f"feature_mask: the input must be a vector or a feature map, got shape {list(input_shape)} per sample"
            )
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
    """Gate that predicts one score per teacher or branch from the logits or features of a sample.

    Two published gates are special cases. The gate of MST-Distill (the default) has two linear layers without
    activation on the student's logits, with twice as many hidden units as classes. The gate of ONE (Lan, Zhu and Gong
    2018, https://arxiv.org/abs/1806.04606) has one linear layer, BatchNorm and ReLU on a feature that all branches
    share: use `hidden: 0, batch_norm: true`.

    The combiner `gate` (weighted mean of several logits) applies a softmax to the scores. The router `given` (weights
    of several teachers) does not: use `softmax: true` for this router. A feature map is averaged over its positions,
    a token sequence over its tokens.

    Shape:
        (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, ways).

    Args:
        ways: number of teachers or branches, at least 2.
        input_shape: shape of the input per sample (injected by kdbench).
        hidden: width of the hidden layer. 0: no hidden layer. null: twice the width of the input.
        activation: activation between the two linear layers.
        batch_norm: whether BatchNorm and ReLU follow the last linear layer, as in ONE.
        softmax: whether to return weights that sum to 1 instead of scores.

    Example (recipe):
        models: {gate: {model: {type: gate_mlp, ways: 3}, input: "student:logits"}}
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
            raise ConfigError(f"gate_mlp: ways must be at least 2, got {ways}")
        if hidden is not None and hidden < 0:
            raise ConfigError(f"gate_mlp: hidden must be at least 0, got {hidden}")
        values = pooled_size(input_shape, "gate_mlp")
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
        scores = self.layers(pool_to_vector(feature))
        return torch.softmax(scores, dim=1) if self.softmax else scores
