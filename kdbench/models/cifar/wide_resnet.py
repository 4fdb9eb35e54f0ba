"""Wide ResNets for 32x32 images: Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146

The blocks are pre-activation blocks (BatchNorm and ReLU before each convolution) without dropout, as in the CIFAR-100
distillation tables (CRD, https://arxiv.org/abs/1910.10699). To load a checkpoint of the code released with CRD
(RepDistiller), a recipe needs `rename: {block1.layer: layer1, block2.layer: layer2, block3.layer: layer3}`.

Features for an image of 32x32 (feats[0] to feats[4] in CRD). The channels C1, C2, C3 are 16, 32, 64 times the width
factor:

    path      shape per sample   position in the network
    conv1     16 x 32 x 32       after the first convolution, before any BatchNorm and ReLU
    layer1    C1 x 32 x 32       after the last addition of the stage, before the next BatchNorm and ReLU
    layer2    C2 x 16 x 16
    layer3    C3 x 8 x 8
    pool      C3                 mean over all positions after the last BatchNorm and ReLU, the input of the classifier
                                 `fc`

The features between the next BatchNorm and its ReLU (feats of layer1, layer2 and layer3 with `preact` in CRD) are
`layer2.0.bn1`, `layer3.0.bn1` and `bn1`.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS


class WideBlock(nn.Module):
    """Pre-activation residual block: BatchNorm, ReLU and 3x3 convolution, twice.

    If the number of channels changes, the shortcut is a 1x1 convolution after the first BatchNorm and ReLU. Otherwise
    the shortcut is the input of the block.

    Shape:
        (batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        # The released checkpoints have this name.
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """Wide ResNet of a first convolution, three stages of (depth - 4) / 6 blocks each, and a linear classifier.

    Args:
        depth: number of layers, 6n + 4.
        width: factor by which the channels of the stages (16, 32 and 64) are multiplied.
        num_classes: number of outputs of the classifier.
        in_channels: channels of the image.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _wide_stage(blocks, 16, 16 * width, stride=1)
        self.layer2 = _wide_stage(blocks, 16 * width, 32 * width, stride=2)
        self.layer3 = _wide_stage(blocks, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(image))))
        return self.fc(self.pool(self.relu(self.bn1(x))))


def _wide_stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = WideBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


@MODELS.register("wrn_16_1", version=1, paper="https://arxiv.org/abs/1605.07146", image=(3, 32, 32))
def wrn_16_1(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Wide ResNet WRN-16-1 for 32x32 images, 181 thousand parameters with 100 classes.

    The network is `wrn_16_1` of RepDistiller (Zagoruyko and Komodakis 2016; 16 layers, width factor 1). Feature
    shapes for a 32x32 image: `conv1` 16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return WideResNet(16, 1, num_classes, in_channels)


@MODELS.register("wrn_16_2", version=1, paper="https://arxiv.org/abs/1605.07146", image=(3, 32, 32))
def wrn_16_2(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Wide ResNet WRN-16-2 for 32x32 images, 703 thousand parameters with 100 classes.

    The network is `wrn_16_2` of RepDistiller (Zagoruyko and Komodakis 2016; 16 layers, width factor 2). Feature
    shapes for a 32x32 image: `conv1` 16x32x32, `layer1` 32x32x32, `layer2` 64x16x16, `layer3` 128x8x8, `pool` 128.
    """
    return WideResNet(16, 2, num_classes, in_channels)


@MODELS.register("wrn_40_1", version=1, paper="https://arxiv.org/abs/1605.07146", image=(3, 32, 32))
def wrn_40_1(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Wide ResNet WRN-40-1 for 32x32 images, 570 thousand parameters with 100 classes.

    The network is `wrn_40_1` of RepDistiller (Zagoruyko and Komodakis 2016; 40 layers, width factor 1). Feature
    shapes for a 32x32 image: `conv1` 16x32x32, `layer1` 16x32x32, `layer2` 32x16x16, `layer3` 64x8x8, `pool` 64.
    """
    return WideResNet(40, 1, num_classes, in_channels)


@MODELS.register("wrn_40_2", version=1, paper="https://arxiv.org/abs/1605.07146", image=(3, 32, 32))
def wrn_40_2(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Wide ResNet WRN-40-2 for 32x32 images, 2.26 million parameters with 100 classes.

    The network is `wrn_40_2` of RepDistiller (Zagoruyko and Komodakis 2016; 40 layers, width factor 2). Feature
    shapes for a 32x32 image: `conv1` 16x32x32, `layer1` 32x32x32, `layer2` 64x16x16, `layer3` 128x8x8, `pool` 128.
    """
    return WideResNet(40, 2, num_classes, in_channels)
