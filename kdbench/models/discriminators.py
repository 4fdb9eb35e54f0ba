"""Discriminators that separate outputs of the teacher from outputs of the student, for adversarial distillation."""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.heads import feature_map_shape
from kdbench.models.layers import GlobalAveragePool
from kdbench.registry import MODELS


@MODELS.register("logit_discriminator", version=1, paper="https://arxiv.org/abs/2009.08453", image=(10,))
class LogitDiscriminator(nn.Module):
    """Discriminator of teacher and student logits (MEAL V2, Shen and Savvides 2020).

    The discriminator has three linear layers with ReLU between them. The two hidden widths are classes / factor and
    classes / factor^2. With 10 classes it has 70 parameters.

    The released code has two outputs with the targets [1, 0] for the student and [0, 1] for the teacher: use
    `outputs: 2` to reproduce these outputs. The released code also has a ReLU after the last layer. This ReLU is
    omitted, because it would stop the gradient of negative scores.

    Shape:
        (batch, classes) -> (batch, outputs), scores before a sigmoid.

    Args:
        input_shape: shape of the logits per sample (injected by kdbench).
        factor: ratio of the widths of successive layers, at least 1.
        outputs: number of scores.

    Example (recipe):
        models: {judge: {model: logit_discriminator, input: "student:logits"}}
    """

    def __init__(self, input_shape: tuple[int, ...] = (10,), factor: int = 2, outputs: int = 1) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"logit_discriminator: the input must be a vector, got shape {list(input_shape)} per sample"
            )
        if factor < 1 or outputs < 1:
            raise ConfigError(f"logit_discriminator: factor and outputs must be at least 1, got {factor} and {outputs}")
        widths = [input_shape[0], max(input_shape[0] // factor, 1), max(input_shape[0] // factor**2, 1)]
        self.layers = nn.Sequential(
            nn.Linear(widths[0], widths[1]),
            nn.ReLU(),
            nn.Linear(widths[1], widths[2]),
            nn.ReLU(),
            nn.Linear(widths[2], outputs),
        )

    def forward(self, logits: Tensor) -> Tensor:
        return self.layers(logits)


@MODELS.register("feature_discriminator", version=1, image=(64, 4, 4))
class FeatureDiscriminator(nn.Module):
    """Discriminator of teacher and student features, for adversarial feature distillation.

    For a feature map, the network consists of two 3x3 convolutions, global average pooling and a linear layer `fc`.
    For a vector, the network consists of two linear layers and `fc`. The activations are leaky ReLUs of slope 0.2.
    There is no BatchNorm, because batch statistics would let the discriminator separate a teacher batch from a
    student batch instead of the samples. The network is not from a particular paper. This network has 74 thousand
    parameters with 64 input channels and width 64.

    Shape:
        (batch, values) or (batch, channels, height, width) -> (batch, outputs), scores before a sigmoid.

    Args:
        input_shape: shape of the feature per sample (injected by kdbench).
        width: channels of the hidden layers.
        outputs: number of scores.

    Example (recipe):
        models: {judge: {model: feature_discriminator, input: "student:layer3"}}
    """

    def __init__(self, input_shape: tuple[int, ...] = (64, 4, 4), width: int = 64, outputs: int = 1) -> None:
        super().__init__()
        if width < 1 or outputs < 1:
            raise ConfigError(f"feature_discriminator: width and outputs must be at least 1, got {width} and {outputs}")
        if len(input_shape) == 1:
            first, second, pool = nn.Linear(input_shape[0], width), nn.Linear(width, width), nn.Identity()
        else:
            channels = feature_map_shape(input_shape, "feature_discriminator")[0]
            first = nn.Conv2d(channels, width, 3, padding=1)
            second = nn.Conv2d(width, width, 3, stride=2, padding=1)
            pool = GlobalAveragePool()
        self.layers = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), pool)
        self.fc = nn.Linear(width, outputs)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fc(self.layers(feature))
