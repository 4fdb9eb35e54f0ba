"""ResNets for 32x32 images: He, Zhang, Ren and Sun 2016 (https://arxiv.org/abs/1512.03385), section 4.2.

These variants are used in the CIFAR-100 distillation tables (CRD, https://arxiv.org/abs/1910.10699). If the shape
changes, the shortcut is a 1x1 convolution with BatchNorm. Networks with `x4` in their name have a first convolution
with 32 channels, and four times the width in the stages after it. State dicts have the parameter names of the code
released with CRD (RepDistiller).

Features for an image of 32x32 (feats[0] to feats[4] in CRD). The channels C0, C1, C2, C3 are 16, 16, 32, 64, or 32,
64, 128, 256 in the `x4` networks:

    path      shape per sample   position in the network
    relu      C0 x 32 x 32       after the first convolution, BatchNorm and ReLU
    layer1    C1 x 32 x 32       after the last ReLU of the stage; `layer1.-1.relu2/in` is the pre-activation, after the
    layer2    C2 x 16 x 16       addition and before this ReLU
    layer3    C3 x 8 x 8
    pool      C3                 mean over all positions, the input of the classifier `fc`
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: (batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet of a first convolution, three stages of (depth - 2) / 6 basic blocks each, and a linear classifier.

    Args:
        depth: number of layers, 6n + 2.
        widths: channels of the first convolution and of the three stages.
        num_classes: number of outputs of the classifier.
        in_channels: channels of the image.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        assert depth == 6 * blocks + 2
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = residual_stage(blocks, widths[0], widths[1], stride=1)
        self.layer2 = residual_stage(blocks, widths[1], widths[2], stride=2)
        self.layer3 = residual_stage(blocks, widths[2], widths[3], stride=2)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x))


def residual_stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Builds a stage of a ResNet from basic blocks. The first block changes the channels and has stride `stride`."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


NARROW = (16, 16, 32, 64)


WIDE = (32, 64, 128, 256)


@MODELS.register("resnet20", version=1, paper="https://arxiv.org/abs/1512.03385", image=(3, 32, 32))
def resnet20(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-20 for 32x32 images, 278 thousand parameters with 100 classes.

    The network is `resnet20` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image: `relu`
    16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return CifarResNet(20, NARROW, num_classes, in_channels)


@MODELS.register("resnet32", version=1, paper="https://arxiv.org/abs/1512.03385", image=(3, 32, 32))
def resnet32(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-32 for 32x32 images, 473 thousand parameters with 100 classes.

    The network is `resnet32` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image: `relu`
    16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return CifarResNet(32, NARROW, num_classes, in_channels)


@MODELS.register("resnet44", version=1, paper="https://arxiv.org/abs/1512.03385", image=(3, 32, 32))
def resnet44(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-44 for 32x32 images, 667 thousand parameters with 100 classes.

    The network is `resnet44` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image: `relu`
    16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return CifarResNet(44, NARROW, num_classes, in_channels)


@MODELS.register("resnet56", version=1, paper="https://arxiv.org/abs/1512.03385", image=(3, 32, 32))
def resnet56(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-56 for 32x32 images, 862 thousand parameters with 100 classes.

    The network is `resnet56` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image: `relu`
    16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return CifarResNet(56, NARROW, num_classes, in_channels)


@MODELS.register("resnet110", version=1, paper="https://arxiv.org/abs/1512.03385", image=(3, 32, 32))
def resnet110(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-110 for 32x32 images, 1.74 million parameters with 100 classes.

    The network is `resnet110` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image: `relu`
    16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return CifarResNet(110, NARROW, num_classes, in_channels)


@MODELS.register("resnet8x4", version=1, paper="https://arxiv.org/abs/1910.10699", image=(3, 32, 32))
def resnet8x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-8 of four times the width for 32x32 images, 1.23 million parameters with 100 classes.

    The network is `resnet8x4` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image: `relu`
    32x32x32, `layer1` 64x32x32, `layer2` 128x16x16, `layer3` 256x8x8, `pool` 256.
    """
    return CifarResNet(8, WIDE, num_classes, in_channels)


@MODELS.register("resnet32x4", version=1, paper="https://arxiv.org/abs/1910.10699", image=(3, 32, 32))
def resnet32x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-32 of four times the width for 32x32 images, 7.43 million parameters with 100 classes.

    The network is `resnet32x4` of RepDistiller (He et al. 2016, section 4.2). Feature shapes for a 32x32 image:
    `relu` 32x32x32, `layer1` 64x32x32, `layer2` 128x16x16, `layer3` 256x8x8, `pool` 256.
    """
    return CifarResNet(32, WIDE, num_classes, in_channels)
