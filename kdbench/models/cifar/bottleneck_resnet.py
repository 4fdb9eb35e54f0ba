"""ResNet-50 for 32x32 images: He, Zhang, Ren and Sun 2016, https://arxiv.org/abs/1512.03385

This variant of ResNet-50 is used in the CIFAR-100 distillation tables (CRD, https://arxiv.org/abs/1910.10699). It
differs from the ImageNet network in the first convolution, which is 3x3 with stride 1, and has no pooling after this
convolution. State dicts have the parameter names of the code released with CRD (RepDistiller).

Features for an image of 32x32 (feats[0] to feats[5] in CRD):

    path      shape per sample   position in the network
    relu      64 x 32 x 32       after the first convolution, BatchNorm and ReLU
    layer1    256 x 32 x 32      after the last ReLU of the stage; `layer1.-1.relu3/in` is the pre-activation, after the
    layer2    512 x 16 x 16      addition and before this ReLU
    layer3    1024 x 8 x 8
    layer4    2048 x 4 x 4
    pool      2048               mean over all positions, the input of the classifier `linear`
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS


class Bottleneck(nn.Module):
    """Bottleneck of 1x1, 3x3, 1x1 convolutions: (batch, inputs, h, w) -> (batch, 4 width, h / stride, w / stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + shortcut)


class BottleneckResNet(nn.Module):
    """ResNet of a first convolution, four stages of bottleneck blocks, average pooling and a linear classifier."""

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _bottleneck_stage(blocks[0], 64, 64, stride=1)
        self.layer2 = _bottleneck_stage(blocks[1], 256, 128, stride=2)
        self.layer3 = _bottleneck_stage(blocks[2], 512, 256, stride=2)
        self.layer4 = _bottleneck_stage(blocks[3], 1024, 512, stride=2)
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(2048, num_classes)
        init_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.pool(x))


def _bottleneck_stage(blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


@MODELS.register("resnet50", version=1, paper="https://arxiv.org/abs/1512.03385", image=(3, 32, 32))
def resnet50(num_classes: int = 100, in_channels: int = 3) -> BottleneckResNet:
    """ResNet-50 for 32x32 images, 23.71 million parameters with 100 classes.

    The network is `ResNet50` of RepDistiller (He et al. 2016). Feature shapes for a 32x32 image: `relu` 64x32x32,
    `layer1` 256x32x32, `layer2` 512x16x16, `layer3` 1024x8x8, `layer4` 2048x4x4, `pool` 2048.
    """
    return BottleneckResNet((3, 4, 6, 3), num_classes, in_channels)
