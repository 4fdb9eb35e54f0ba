"""MobileNetV2 for 32x32 images: Sandler et al. 2018, https://arxiv.org/abs/1801.04381

This variant of MobileNetV2 is used in the CIFAR-100 distillation tables (CRD, https://arxiv.org/abs/1910.10699). It
has half the channels, expansion 6, stride 1 in the second group of blocks, and ReLU instead of ReLU6. State dicts
have the parameter names of the code released with CRD (RepDistiller).

Features for an image of 32x32 (feats[0] to feats[5] in CRD):

    path      shape per sample   position in the network
    conv1     16 x 16 x 16       after the first convolution, BatchNorm and ReLU
    blocks.1  12 x 16 x 16       after the last projection, BatchNorm and addition of a group; no ReLU follows
    blocks.2  16 x 8 x 8
    blocks.4  48 x 4 x 4
    blocks.6  160 x 2 x 2
    pool      1280               mean over all positions, the input of `classifier`
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS

GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels at full width, number of blocks, stride of the first block."""


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3 convolution and linear 1x1 projection, with a shortcut if the shape does not change.

    Shape:
        (batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.has_shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """A first convolution of stride 2, seven groups of blocks, and a last convolution with 1280 output channels.

    Args:
        width: factor by which the numbers of channels in `GROUPS` are multiplied.
        num_classes: number of outputs of the classifier.
        in_channels: channels of the image.
    """

    def __init__(self, width: float, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _conv_bn_relu(in_channels, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for expansion, full_channels, count, stride in GROUPS:
            outputs = int(full_channels * width)
            group = [InvertedResidual(channels, outputs, stride, expansion)]
            group += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(*group))
            channels = outputs
        self.conv2 = _conv_bn_relu(channels, 1280, 1, stride=1)
        self.pool = GlobalAveragePool()
        head = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(head)
        init_convolutions(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image)
        for group in self.blocks:
            x = group(x)
        return self.classifier(self.pool(self.conv2(x)))


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@MODELS.register("mobilenetv2", version=1, paper="https://arxiv.org/abs/1801.04381", image=(3, 32, 32))
def mobilenetv2(num_classes: int = 100, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2 for 32x32 images, half width, expansion 6, 813 thousand parameters with 100 classes.

    The network is `MobileNetV2` of RepDistiller (Sandler et al. 2018). Feature shapes for a 32x32 image: `conv1`
    16x16x16, `blocks.1` 12x16x16, `blocks.2` 16x8x8, `blocks.4` 48x4x4, `blocks.6` 160x2x2, `pool` 1280.
    """
    return MobileNetV2(0.5, num_classes, in_channels)
