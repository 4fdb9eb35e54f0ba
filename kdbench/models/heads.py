"""Heads on another network's features: exits, classifiers, projectors. Each is a role of its own in a recipe."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.models.layers import GlobalAveragePool, init_convolutions, pool_to_vector, pooled_size
from kdbench.registry import MODELS


@MODELS.register("linear_head", version=1, image=(64, 4, 4))
class LinearHead(nn.Module):
    """A linear classifier on a feature; a map is averaged over its places first, tokens over their number.

    Shapes: (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, num_classes).
    Feature: `fc`.

    Args:
        num_classes: of the data; the engine gives it.
        input_shape: of one sample of the feature; the engine gives it.
        bias: whether the classifier has one.
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, ...] = (64, 4, 4), bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(pooled_size(input_shape, "linear_head"), num_classes, bias=bias)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fc(pool_to_vector(feature))


@MODELS.register("cosine_head", version=1, paper="https://arxiv.org/abs/2304.04408", image=(64, 4, 4))
class CosineHead(nn.Module):
    """A classifier by direction: each class is a proxy, and its logit the feature's cosine with it over a temperature.

    logit_c = cos(f, w_c) / temperature. That of PCR (Lin et al., CVPR 2023), as in its code; there the temperature is
    0.09. A map is averaged over its places first, tokens over their number.
    Shapes: (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, num_classes).
    Feature: `fc`, whose weight holds the proxies.

    Args:
        num_classes: of the data; the engine gives it.
        input_shape: of one sample of the feature; the engine gives it.
        temperature: what a cosine is divided by.
    """

    def __init__(
        self, num_classes: int = 10, input_shape: tuple[int, ...] = (64, 4, 4), temperature: float = 0.09
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"cosine_head: temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.fc = nn.Linear(pooled_size(input_shape, "cosine_head"), num_classes, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        direction = F.normalize(pool_to_vector(feature), dim=1)
        return F.linear(direction, F.normalize(self.fc.weight, dim=1)) / self.temperature


@MODELS.register("exit_head", version=1, paper="https://arxiv.org/abs/1905.08094", image=(32, 8, 8))
class ExitHead(nn.Module):
    """An early exit: bottleneck, mean over all places, classifier. Be Your Own Teacher (Zhang et al. 2019), BYOT.

    The bottleneck follows the public PyTorch code of the method: a 1x1 convolution to a quarter of `channels`, a
    convolution of kernel and stride `reduce` (which takes the map to the size of the deepest one), and a 1x1
    convolution to `channels`, each with BatchNorm and ReLU. With `channels` those of the deepest feature, `pool` can be
    compared with it, as the method's hint loss does.

    Shapes: (batch, channels in, height, width) -> (batch, num_classes). Features: `bottleneck` (channels, height /
    reduce, width / reduce), `pool` (channels).

    Args:
        num_classes: of the data; the engine gives it.
        input_shape: of one sample of the map; the engine gives it.
        channels: of the bottleneck's output, a multiple of 4.
        reduce: by how much the map shrinks: 8, 4 and 2 at the three exits of the paper's networks.
    """

    def __init__(
        self, num_classes: int = 10, input_shape: tuple[int, ...] = (32, 8, 8), channels: int = 64, reduce: int = 2
    ) -> None:
        super().__init__()
        inputs, height, width = feature_map_shape(input_shape, "exit_head")
        if channels < 4 or channels % 4:
            raise ConfigError(f"exit_head: channels must be a multiple of 4, got {channels}")
        if not 1 <= reduce <= min(height, width):
            raise ConfigError(f"exit_head: reduce must be from 1 to the map's size ({height}x{width}), got {reduce}")
        middle = channels // 4
        self.bottleneck = nn.Sequential(
            *conv_bn_relu(inputs, middle, 1, bias=True),
            *conv_bn_relu(middle, middle, reduce, stride=reduce, bias=True),
            *conv_bn_relu(middle, channels, 1, bias=True),
        )
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fc(self.pool(self.bottleneck(feature)))


@MODELS.register("projector", version=1, paper="https://arxiv.org/abs/2203.14001", image=(64, 4, 4))
class Projector(nn.Module):
    """Takes a student's last map to the shape of the teacher's: SimKD (Chen et al. 2022), whose head is the teacher's.

    As the released code has it: a map larger than `size` is averaged down to it; then a 1x1, a 3x3 and a 1x1
    convolution without bias, `channels / factor` in between, each with BatchNorm and ReLU. Where the student's map is
    smaller than the teacher's, the released code averages the teacher's; say `size: null` then, and compare with the
    averaged map. The teacher's own pooling and classifier follow as `reuse` roles on this one.

    Shapes: (batch, channels in, height, width) -> (batch, channels, size, size). Feature: `transfer`.

    Args:
        channels: of the teacher's map.
        size: height and width of the teacher's map; null keeps the student's.
        input_shape: of one sample of the student's map; the engine gives it.
        factor: how much narrower the middle is.
    """

    def __init__(
        self,
        channels: int = 64,
        size: int | None = None,
        input_shape: tuple[int, ...] = (64, 4, 4),
        factor: int = 2,
    ) -> None:
        super().__init__()
        inputs, height, width = feature_map_shape(input_shape, "projector")
        if factor < 1 or channels < factor:
            raise ConfigError(f"projector: factor must be from 1 to channels ({channels}), got {factor}")
        if size is not None and not 1 <= size <= min(height, width):
            raise ConfigError(
                f"projector: the map is {height}x{width} and can only shrink, but size is {size}. Leave `size` out and "
                "compare with the teacher's map averaged to this size"
            )
        self.size = size
        middle = channels // factor
        self.transfer = nn.Sequential(
            *conv_bn_relu(inputs, middle, 1),
            *conv_bn_relu(middle, middle, 3, padding=1),
            *conv_bn_relu(middle, channels, 1),
        )

    def forward(self, feature: Tensor) -> Tensor:
        return self.transfer(feature if self.size is None else F.adaptive_avg_pool2d(feature, self.size))


@MODELS.register("connector", version=1, paper="https://openreview.net/forum?id=ZzwDy_wiWv", image=(64,))
class Connector(nn.Module):
    """A linear map with BatchNorm and ReLU, from a student's feature to the width of the teacher's: SRRL.

    Yang, Martinez, Bulat and Tzimiropoulos 2021 (ICLR) put it between the student and the teacher's classifier. Where
    the feature is a map it is a 1x1 convolution, else a linear layer, both without bias.

    Shapes: (batch, values) -> (batch, channels), or (batch, values, height, width) -> (batch, channels, height, width).

    Args:
        channels: of the teacher's feature.
        input_shape: of one sample of the student's feature; the engine gives it.
    """

    def __init__(self, channels: int = 64, input_shape: tuple[int, ...] = (64,)) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3) or channels < 1:
            raise ConfigError(
                f"connector: reads a vector or a map and gives at least 1 channel, got {list(input_shape)}, {channels}"
            )
        if len(input_shape) == 3:
            self.transfer = nn.Sequential(*conv_bn_relu(input_shape[0], channels, 1))
        else:
            linear = nn.Linear(input_shape[0], channels, bias=False)
            self.transfer = nn.Sequential(linear, nn.BatchNorm1d(channels), nn.ReLU())

    def forward(self, feature: Tensor) -> Tensor:
        return self.transfer(feature)


@MODELS.register("dual_head", version=1, paper="https://arxiv.org/abs/2505.07675", image=(64, 4, 4))
class DualHeadClassifier(nn.Module):
    """Two linear classifiers on one feature, one for labels and one for the teacher, that predict together: DHO.

    Kang et al. 2025 (https://arxiv.org/abs/2505.07675): `ce` learns from labels, `kd` from the teacher, so that their
    gradients do not meet in one classifier. The prediction is the mixture of their distributions,
    alpha softmax(ce) + (1 - alpha) softmax(kd / beta), and the output its logarithm: softmax gives the mixture back.
    With `scale`, the teacher's head reads the feature divided by its Euclidean norm, times `scale` (100 in the released
    code, for a teacher of the CLIP kind). PCoreSet (ActiveKD) uses the same student, with alpha 0.5 and beta 1.

    DHKD (an auxiliary head that export drops) needs no such model: there the second head is a `linear_head` of its own.

    Shapes: (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, num_classes).
    Features: `ce`, `kd`, the logits of each head, for the terms to read.

    Args:
        num_classes: of the data; the engine gives it.
        input_shape: of one sample of the feature; the engine gives it.
        alpha: share of the label head in the prediction, from 0 to 1; the authors choose it on validation data.
        beta: temperature of the teacher's head in the prediction.
        scale: length of the feature that the teacher's head reads; null leaves it as it is.
    """

    def __init__(
        self,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (64, 4, 4),
        alpha: float = 0.5,
        beta: float = 1.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ConfigError(f"dual_head: alpha must be from 0 to 1, got {alpha}")
        if beta <= 0:
            raise ConfigError(f"dual_head: beta must be above 0, got {beta}")
        if scale is not None and scale <= 0:
            raise ConfigError(f"dual_head: scale must be above 0, got {scale}")
        values = pooled_size(input_shape, "dual_head")
        self.ce = nn.Linear(values, num_classes)
        self.kd = nn.Linear(values, num_classes)
        self.alpha, self.beta, self.scale = alpha, beta, scale

    def forward(self, feature: Tensor) -> Tensor:
        value = pool_to_vector(feature)
        labels = self.ce(value)
        taught = self.kd(value if self.scale is None else self.scale * F.normalize(value, dim=1))
        if self.alpha in (0, 1):  # the logarithm of one share alone; that of the other is not finite
            return F.log_softmax(labels if self.alpha == 1 else taught / self.beta, dim=1)
        mine = F.log_softmax(labels, dim=1) + math.log(self.alpha)
        theirs = F.log_softmax(taught / self.beta, dim=1) + math.log(1 - self.alpha)
        return torch.logaddexp(mine, theirs)


@MODELS.register("paraphraser", version=1, paper="https://arxiv.org/abs/1802.04977", image=(64, 4, 4))
class Paraphraser(nn.Module):
    """An autoencoder of a teacher's map, whose code is the factor: factor transfer, FT (Kim, Park and Kwak 2018).

    RepDistiller's form: three 3x3 convolutions narrow the map to `rate` times its channels, three transposed ones bring
    them back, each with a leaky ReLU of slope 0.1 (the last one too) and, on request, BatchNorm before it. The map
    keeps its height and width. It learns by the reconstruction of its input, first and alone.

    Shapes: (batch, channels, height, width) -> the same, the reconstruction. Feature: `encoder`, the factor (channels
    times rate, height, width).

    Args:
        input_shape: of one sample of the teacher's map; the engine gives it.
        rate: channels of the factor over those of the map, above 0.
        batch_norm: with BatchNorm; RepDistiller's default is without.
    """

    def __init__(self, input_shape: tuple[int, ...] = (64, 4, 4), rate: float = 0.5, batch_norm: bool = False) -> None:
        super().__init__()
        channels, _, _ = feature_map_shape(input_shape, "paraphraser")
        factor = int(channels * rate)
        if factor < 1:
            raise ConfigError(f"paraphraser: rate {rate} leaves none of the {channels} channels")
        self.encoder = _factor_encoder(channels, factor, batch_norm)
        self.decoder = _three_convolutions(nn.ConvTranspose2d, (factor, factor, channels, channels), batch_norm)

    def forward(self, feature: Tensor) -> Tensor:
        return self.decoder(self.encoder(feature))


@MODELS.register("translator", version=1, paper="https://arxiv.org/abs/1802.04977", image=(64, 4, 4))
class Translator(nn.Module):
    """Three convolutions from a student's map to the teacher's factor: factor transfer, FT (Kim, Park and Kwak 2018).

    RepDistiller's form, like the encoder of `paraphraser`, with BatchNorm. It learns together with the student.

    Shapes: (batch, channels in, height, width) -> (batch, channels, height, width).

    Args:
        channels: of the factor: those of the teacher's map times the paraphraser's `rate`.
        input_shape: of one sample of the student's map; the engine gives it.
        batch_norm: with BatchNorm; RepDistiller's default.
    """

    def __init__(self, channels: int = 32, input_shape: tuple[int, ...] = (64, 4, 4), batch_norm: bool = True) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"translator: channels must be at least 1, got {channels}")
        self.encoder = _factor_encoder(feature_map_shape(input_shape, "translator")[0], channels, batch_norm)

    def forward(self, feature: Tensor) -> Tensor:
        return self.encoder(feature)


def feature_map_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Channels, height and width of a map; anything else is refused."""
    if len(shape) != 3:
        raise ConfigError(f"{name}: reads a map of channels, height and width, got a feature of {list(shape)}")
    channels, height, width = shape
    return channels, height, width


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = False
) -> list[nn.Module]:
    """A convolution with BatchNorm and ReLU."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU()]


def _factor_encoder(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    return _three_convolutions(nn.Conv2d, (inputs, inputs, outputs, outputs), batch_norm)


def _three_convolutions(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: tuple[int, int, int, int], batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(kind(inputs, outputs, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


@MODELS.register("mean_output", version=1, image=(10,))
class MeanOutput(nn.Module):
    """The mean of what several networks give out: an ensemble as a role that others can see, and that can be measured.

    `ensemble: {model: mean_output, input: ["a:logits", "b:logits"], frozen: true}`. It has no parameters. A term that
    needs the mean only as its target takes `{combine: mean_logits, of: [a, b]}`, and no role.

    Shapes: any equal shapes (batch, ...) -> the same.
    """

    def forward(self, *outputs: Tensor) -> Tensor:
        return torch.stack(outputs).mean(0)


@MODELS.register("review_fusion", version=1, paper="https://arxiv.org/abs/2104.09044", image=(64, 4, 4))
class ReviewFusion(nn.Module):
    """Fuses a student's feature with what deeper layers say, and takes it to the teacher's width: the ABF of ReviewKD.

    x = norm(conv1x1(feature)); with `fuse`, and y = the deeper map enlarged to x's size by nearest neighbour,
    [a, b] = sigmoid(conv1x1([x, y])), one weight per place each, and fused = a x + b y, else fused = x;
    output = norm(conv3x3(fused)). The chain begins at the deepest feature and goes up, each fusion reading the student
    and the `fused` of the one below; each output is compared with the teacher's feature of that layer by `hcl`:

        r3: {model: {type: review_fusion, channels: 64}, input: "student:layer3"}
        r2: {model: {type: review_fusion, channels: 32, fuse: true}, input: ["student:layer2", "r3:fused"]}

    Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, https://arxiv.org/abs/2104.09044. As
    in the authors' code (dvlab-research/ReviewKD), with the weights' first draw; there a size of the teacher that
    differs from the student's is met by one more enlargement, here the two must be equal.
    Shapes: (batch, channels in, height, width) and, with `fuse`, (batch, width, any height, any width) -> (batch,
    channels, height, width). A vector counts as a map of one place and gives a vector. Feature: `fused`, (width, ...).

    Args:
        channels: of the teacher's feature.
        input_shape: of one sample of the student's feature; the engine gives it.
        width: channels inside, the same along the chain; those of the student's last feature in the paper, at most 512.
        fuse: whether there is a deeper map to fuse with.
    """

    def __init__(
        self, channels: int = 64, input_shape: tuple[int, ...] = (64, 4, 4), width: int = 64, fuse: bool = False
    ) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3) or channels < 1 or width < 1:
            raise ConfigError(
                f"review_fusion: reads a vector or a map, with at least 1 channel inside and out, got a feature of "
                f"{list(input_shape)}, width {width}, channels {channels}"
            )
        inside = nn.Conv2d(input_shape[0], width, 1, bias=False)
        outside = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.enter = nn.Sequential(inside, nn.BatchNorm2d(width))
        self.weights = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        self.fused = nn.Identity()
        self.leave = nn.Sequential(outside, nn.BatchNorm2d(channels))
        for convolution in (inside, outside):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None = None) -> Tensor:
        if (deeper is None) != (self.weights is None):
            raise ConfigError(
                "review_fusion: with `fuse: true` it sees two things, the student's feature and the `fused` map of a "
                "deeper one (`input: [student:layer2, r3:fused]`); without it the feature alone"
            )
        own = self.enter(feature if feature.dim() == 4 else feature[:, :, None, None])
        if deeper is not None and self.weights is not None:
            deeper = F.interpolate(deeper, own.shape[2:], mode="nearest")
            share = self.weights(torch.cat([own, deeper], dim=1))
            own = own * share[:, :1] + deeper * share[:, 1:]
        out = self.leave(self.fused(own))
        return out if feature.dim() == 4 else out.flatten(1)
