"""Heads: small networks on a feature of another network, such as classifiers, early exits and projectors.

A recipe declares a head as a separate role, that is, as a named network with its own weights.
"""

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
    """Linear classifier on a feature.

    A feature map is averaged over its positions, a token sequence over its tokens. The linear layer is `fc`. The head
    has 650 parameters for 64 channels and 10 classes.

    Shape:
        (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        input_shape: shape of the feature per sample (injected by kdbench).
        bias: whether the linear layer has a bias.

    Example (recipe):
        models: {probe: {model: linear_head, input: "student:layer2"}}
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, ...] = (64, 4, 4), bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(pooled_size(input_shape, "linear_head"), num_classes, bias=bias)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fc(pool_to_vector(feature))


@MODELS.register("cosine_head", version=1, paper="https://arxiv.org/abs/2304.04408", image=(64, 4, 4))
class CosineHead(nn.Module):
    """Cosine classifier with one proxy per class: logit_c = cos(f, w_c) / temperature (PCR, Lin et al., CVPR 2023).

    f is the feature, and the proxy w_c is the weight of class c in the layer `fc`. The code of PCR has the same
    classifier with temperature 0.09. A feature map is averaged over its positions, a token sequence over its tokens.
    The head has 640 parameters for 64 channels and 10 classes.

    Shape:
        (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        input_shape: shape of the feature per sample (injected by kdbench).
        temperature: divisor of the cosine, above 0.

    Example (recipe):
        student: {model: cosine_head, input: "body:layer2"}
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
    """Early exit: bottleneck, global average pooling and classifier (Be Your Own Teacher, BYOT, Zhang et al. 2019).

    The bottleneck follows the public PyTorch code of the method. A 1x1 convolution maps to a quarter of `channels`, a
    convolution with kernel size and stride `reduce` shrinks the map to the size of the network's last map, and a 1x1
    convolution maps to `channels`. BatchNorm and ReLU follow each convolution. If `channels` equals the channels of
    the network's last map, the feature `pool` can be compared with the pooled last map, as in the hint loss of the
    method.

    Features: `bottleneck` (channels, height / reduce, width / reduce), `pool` (channels). The head has 3 thousand
    parameters for a map of 32 channels.

    Shape:
        (batch, input channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        input_shape: shape of the map per sample (injected by kdbench).
        channels: output channels of the bottleneck, a multiple of 4.
        reduce: downsampling factor of the bottleneck: 8, 4 and 2 at the three exits of the networks in the paper.

    Example (recipe):
        models: {exit1: {model: {type: exit_head, channels: 64, reduce: 2}, input: "student:layer1"}}
    """

    def __init__(
        self, num_classes: int = 10, input_shape: tuple[int, ...] = (32, 8, 8), channels: int = 64, reduce: int = 2
    ) -> None:
        super().__init__()
        inputs, height, width = feature_map_shape(input_shape, "exit_head")
        if channels < 4 or channels % 4:
            raise ConfigError(f"exit_head: channels must be a multiple of 4, got {channels}")
        if not 1 <= reduce <= min(height, width):
            raise ConfigError(
                f"exit_head: reduce must be from 1 to the size of the input ({height}x{width}), got {reduce}"
            )
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
    """Projector from a student's last map to the shape of the teacher's last map (SimKD, Chen et al. 2022).

    As in the released code, a map larger than `size` is average-pooled to `size`. A 1x1, a 3x3 and a 1x1 convolution
    without bias follow, each with BatchNorm and ReLU. The inner width is channels / factor. If the student's map is
    smaller than the teacher's map, the released code pools the teacher's map. In this case, use `size: null` and
    compare the output with the pooled map of the teacher. In a recipe, roles (named networks) with the key `reuse`
    apply the teacher's pooling and classifier to the output.

    The convolutions are the module `transfer`. This module has 14 thousand parameters for 64 input and 64 output
    channels.

    Shape:
        (batch, input channels, height, width) -> (batch, channels, size, size).

    Args:
        channels: channels of the teacher's map.
        size: height and width of the teacher's map. null: the output keeps the size of the student's map.
        input_shape: shape of the student's map per sample (injected by kdbench).
        factor: ratio of `channels` to the inner channels.

    Example (recipe):
        models: {projector: {model: {type: projector, channels: 64}, input: "student:layer3"}}
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
            raise ConfigError(f"projector: factor must be from 1 to the value of `channels` ({channels}), got {factor}")
        if size is not None and not 1 <= size <= min(height, width):
            raise ConfigError(
                f"projector: size must be from 1 to the size of the input ({height}x{width}), got {size}. If the "
                "teacher's map is larger, remove `size` and compare the output with the pooled map of the teacher"
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
    """Linear map with BatchNorm and ReLU from a student's feature to the width of the teacher's feature (SRRL).

    Yang, Martinez, Bulat and Tzimiropoulos (ICLR 2021) apply the teacher's classifier to the output of the connector.
    The linear map has no bias. It is a 1x1 convolution for a feature map and a linear layer for a vector. The module
    `transfer` contains the map, BatchNorm and ReLU.

    Shape:
        (batch, values) -> (batch, channels), or (batch, values, height, width) -> (batch, channels, height, width).

    Args:
        channels: width of the teacher's feature.
        input_shape: shape of the student's feature per sample (injected by kdbench).

    Example (recipe):
        models: {connector: {model: {type: connector, channels: 64}, input: "student:pool"}}
    """

    def __init__(self, channels: int = 64, input_shape: tuple[int, ...] = (64,)) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3) or channels < 1:
            raise ConfigError(
                "connector: the input must be a vector or a feature map, and channels at least 1, got input shape "
                f"{list(input_shape)} per sample and channels {channels}"
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
    """Two linear classifiers on one feature, `ce` for labels and `kd` for the teacher; the output is a mixture (DHO).

    Kang et al. 2025 (https://arxiv.org/abs/2505.07675) train the classifier `ce` on labels and the classifier `kd` on
    the teacher, so that the two gradients do not conflict in one classifier. The output is log(p) of the mixture

        p = alpha softmax(ce) + (1 - alpha) softmax(kd / beta)

    The softmax of the output is therefore p. With `scale`, the classifier `kd` reads scale * f / |f| instead of the
    feature f (the released code has scale 100 for CLIP teachers). PCoreSet (ActiveKD) uses the same model with alpha
    0.5 and beta 1. DHKD does not need this model: it removes the second classifier after the training, so use a
    separate `linear_head`.

    Features: `ce` and `kd`, the logits of the two classifiers. The classifiers have 1300 parameters for 64 channels
    and 10 classes.

    Shape:
        (batch, values), (batch, tokens, values) or (batch, channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        input_shape: shape of the feature per sample (injected by kdbench).
        alpha: weight of `ce` in the mixture, in [0, 1]. The authors select alpha on validation data.
        beta: temperature of `kd` in the mixture, above 0.
        scale: length to which the feature is scaled for `kd`. null: the feature is not scaled.

    Example (recipe):
        student: {model: dual_head, input: "body:layer2"}
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
        label_logits = self.ce(value)
        teacher_logits = self.kd(value if self.scale is None else self.scale * F.normalize(value, dim=1))
        if self.alpha in (0, 1):  # the logarithm of the other head's weight, 0, is not defined
            return F.log_softmax(label_logits if self.alpha == 1 else teacher_logits / self.beta, dim=1)
        label_part = F.log_softmax(label_logits, dim=1) + math.log(self.alpha)
        teacher_part = F.log_softmax(teacher_logits / self.beta, dim=1) + math.log(1 - self.alpha)
        return torch.logaddexp(label_part, teacher_part)


@MODELS.register("paraphraser", version=1, paper="https://arxiv.org/abs/1802.04977", image=(64, 4, 4))
class Paraphraser(nn.Module):
    """Autoencoder of a teacher's map; the code is the factor of factor transfer (FT, Kim, Park and Kwak 2018).

    As in RepDistiller, three 3x3 convolutions reduce the number of channels by the factor `rate`, and three
    transposed 3x3 convolutions restore this number. A leaky ReLU of slope 0.1 follows each convolution, including the
    last, with an optional BatchNorm before the ReLU. Height and width do not change. The paraphraser is trained alone
    in a first stage, by the reconstruction error of the teacher's map.

    Feature: `encoder`, the factor (channels * rate, height, width). The autoencoder has 129 thousand parameters for
    64 channels.

    Shape:
        (batch, channels, height, width) -> reconstruction of the same shape.

    Args:
        input_shape: shape of the teacher's map per sample (injected by kdbench).
        rate: ratio of the factor's channels to the map's channels, above 0.
        batch_norm: whether to add BatchNorm. The default is that of RepDistiller.

    Example (recipe):
        models: {paraphraser: {model: paraphraser, input: "teacher:layer3"}}
    """

    def __init__(self, input_shape: tuple[int, ...] = (64, 4, 4), rate: float = 0.5, batch_norm: bool = False) -> None:
        super().__init__()
        channels, _, _ = feature_map_shape(input_shape, "paraphraser")
        factor = int(channels * rate)
        if factor < 1:
            raise ConfigError(
                f"paraphraser: rate times the {channels} input channels must be at least 1, got rate {rate}"
            )
        self.encoder = _factor_encoder(channels, factor, batch_norm)
        self.decoder = _three_convolutions(nn.ConvTranspose2d, (factor, factor, channels, channels), batch_norm)

    def forward(self, feature: Tensor) -> Tensor:
        return self.decoder(self.encoder(feature))


@MODELS.register("translator", version=1, paper="https://arxiv.org/abs/1802.04977", image=(64, 4, 4))
class Translator(nn.Module):
    """Three convolutions from a student's map to the teacher's factor (factor transfer, FT, Kim, Park and Kwak 2018).

    As in RepDistiller, the layers are those of the encoder of `paraphraser`, with BatchNorm. The translator is
    trained together with the student. It has 65 thousand parameters for 64 input and 32 output channels.

    Shape:
        (batch, input channels, height, width) -> (batch, channels, height, width).

    Args:
        channels: channels of the factor, that is, channels of the teacher's map times `rate` of the paraphraser.
        input_shape: shape of the student's map per sample (injected by kdbench).
        batch_norm: whether to add BatchNorm. The default is that of RepDistiller.

    Example (recipe):
        models: {translator: {model: {type: translator, channels: 32}, input: "student:layer3"}}
    """

    def __init__(self, channels: int = 32, input_shape: tuple[int, ...] = (64, 4, 4), batch_norm: bool = True) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"translator: channels must be at least 1, got {channels}")
        self.encoder = _factor_encoder(feature_map_shape(input_shape, "translator")[0], channels, batch_norm)

    def forward(self, feature: Tensor) -> Tensor:
        return self.encoder(feature)


def feature_map_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Returns channels, height and width from the shape of a feature map per sample.

    Args:
        shape: shape per sample.
        name: name of the model in the error message.

    Raises:
        ConfigError: `shape` does not have three dimensions.
    """
    if len(shape) != 3:
        raise ConfigError(f"{name}: the input must be a feature map, got shape {list(shape)} per sample")
    channels, height, width = shape
    return channels, height, width


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = False
) -> list[nn.Module]:
    """Builds a convolution, a BatchNorm and a ReLU; returns them as a list."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU()]


def _factor_encoder(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    return _three_convolutions(nn.Conv2d, (inputs, inputs, outputs, outputs), batch_norm)


def _three_convolutions(
    convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: tuple[int, int, int, int], batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(convolution(inputs, outputs, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


@MODELS.register("mean_output", version=1, image=(10,))
class MeanOutput(nn.Module):
    """Mean of the outputs of several networks: an ensemble that can be evaluated and can be the input of a network.

    The module has no parameters. If the mean is only the target of a loss term, write `{combine: mean_logits, of: [a,
    b]}` in this term instead.

    Shape:
        any number of tensors (batch, ...) of equal shape -> the same shape.

    Example (recipe):
        models: {ensemble: {model: mean_output, input: ["student:logits", "teacher:logits"], frozen: true}}
    """

    def forward(self, *outputs: Tensor) -> Tensor:
        return torch.stack(outputs).mean(0)


@MODELS.register("review_fusion", version=1, paper="https://arxiv.org/abs/2104.09044", image=(64, 4, 4))
class ReviewFusion(nn.Module):
    """Attention-based fusion (ABF) of a student feature with a deeper feature, for ReviewKD.

    Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, https://arxiv.org/abs/2104.09044:

        x = norm(conv1x1(feature)), y = deeper map, upsampled to the size of x by nearest neighbour
        a, b = sigmoid(conv1x1([x, y])), one value of a and one of b per position
        fused = a x + b y (fused = x if `fuse` is false),  output = norm(conv3x3(fused))

    A chain of fusions starts at the deepest feature. Every further fusion reads the student's feature of its layer
    and the map `fused` of the next deeper fusion. The term `hcl` compares the output of each fusion with the
    teacher's feature of the same layer:

        r3: {model: {type: review_fusion, channels: 64}, input: "student:layer3"}
        r2: {model: {type: review_fusion, channels: 32, fuse: true}, input: ["student:layer2", "r3:fused"]}

    The initialisation is that of the authors' code (dvlab-research/ReviewKD). The authors also upsample the output if
    the teacher's map has another size; kdbench requires student and teacher maps of equal size. A vector is treated
    as a map with one position, and the output for a vector is a vector.

    Feature: `fused` (width, height, width).

    Shape:
        feature (batch, input channels, height, width) and, with `fuse`, deeper map (batch, width, any height, any
        width) -> (batch, channels, height, width).

    Args:
        channels: channels of the teacher's feature.
        input_shape: shape of the student's feature per sample (injected by kdbench).
        width: channels of `fused`, equal for all fusions of a chain. The paper uses the channels of the student's
            last feature, but at most 512.
        fuse: whether the fusion has a second input, the map `fused` of a deeper fusion.

    Example (recipe):
        models: {r3: {model: {type: review_fusion, channels: 64}, input: "student:layer3"}}
    """

    def __init__(
        self, channels: int = 64, input_shape: tuple[int, ...] = (64, 4, 4), width: int = 64, fuse: bool = False
    ) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3) or channels < 1 or width < 1:
            raise ConfigError(
                "review_fusion: the input must be a vector or a feature map, and width and channels at least 1, got "
                f"input shape {list(input_shape)} per sample, width {width}, channels {channels}"
            )
        input_conv = nn.Conv2d(input_shape[0], width, 1, bias=False)
        output_conv = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.enter = nn.Sequential(input_conv, nn.BatchNorm2d(width))
        self.weights = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        self.fused = nn.Identity()
        self.leave = nn.Sequential(output_conv, nn.BatchNorm2d(channels))
        for convolution in (input_conv, output_conv):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None = None) -> Tensor:
        if (deeper is None) != (self.weights is None):
            raise ConfigError(
                "review_fusion: with `fuse: true` the inputs are the student's feature and the `fused` map of a deeper "
                "fusion (`input: [student:layer2, r3:fused]`). Without `fuse`, the only input is the student's feature"
            )
        fused = self.enter(feature if feature.dim() == 4 else feature[:, :, None, None])
        if deeper is not None and self.weights is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            weights = self.weights(torch.cat([fused, deeper], dim=1))
            fused = fused * weights[:, :1] + deeper * weights[:, 1:]
        output = self.leave(self.fused(fused))
        return output if feature.dim() == 4 else output.flatten(1)
