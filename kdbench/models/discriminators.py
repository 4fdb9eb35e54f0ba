"""Discriminators between teacher and student, for adversarial distillation."""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.heads import feature_map_shape
from kdbench.models.layers import GlobalAveragePool
from kdbench.registry import MODELS


@MODELS.register("logit_discriminator", version=1, paper="https://arxiv.org/abs/2009.08453", image=(10,))
class LogitDiscriminator(nn.Module):
    """Discriminator of teacher and student logits (MEAL V2, Shen and Savvides 2020).

    Three linear layers with ReLU in between, each a `factor`-th as wide as the previous one. Differences from the
    released code: there the layers are 1x1 convolutions with two outputs ([1, 0] for the student, [0, 1] for the
    teacher; use `outputs: 2`) and a ReLU follows the last layer too, which would stop the gradient of negative scores.
    70 parameters with 10 classes.

    Shape:
        (batch, classes) -> (batch, outputs), scores before a sigmoid.

    Args:
        input_shape: shape of the logits per sample; injected.
        factor: ratio of the widths of successive layers, at least 1.
        outputs: number of scores.

    Example (recipe):
        models: {judge: {model: logit_discriminator, input: "student:logits"}}
    """

    def __init__(self, input_shape: tuple[int, ...] = (10,), factor: int = 2, outputs: int = 1) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"logit_discriminator: expected a vector per sample, got a feature of {list(input_shape)}"
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

    Two 3x3 convolutions and the mean over all positions on a map, or two linear layers on a vector; then a linear layer
    `fc`. Leaky ReLUs of slope 0.2 and no BatchNorm, whose batch statistics would separate the batches instead of the
    samples. Not the network of a particular paper. 74 thousand parameters with 64 input channels and width 64.

    Shape:
        (batch, values) or (batch, channels, height, width) -> (batch, outputs), scores before a sigmoid.

    Args:
        input_shape: shape of the feature per sample; injected.
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
