"""VGG with BatchNorm for 32x32 images: Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556

This variant of VGG is used in the CIFAR-100 distillation tables (CRD, https://arxiv.org/abs/1910.10699). It has five
blocks of convolutions (with bias, although BatchNorm follows) and one linear classifier instead of three linear
layers. A pooling between the last two blocks exists only for images with at least 64 rows. State dicts have the
parameter names of the code released with CRD (RepDistiller).

Features for an image of 32x32 (feats[0] to feats[5] in CRD):

    path      shape per sample   position in the network
    block0    64 x 32 x 32       after the last ReLU of the block; the input of this ReLU is `block0.-1/in`
    block1    128 x 16 x 16
    block2    256 x 8 x 8
    block3    512 x 4 x 4
    block4    512 x 4 x 4
    pool      512                mean over all positions, the input of `classifier`
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG with BatchNorm: five blocks of `convolutions` 3x3 convolutions each, and one linear classifier."""

    def __init__(self, convolutions: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        inputs = (in_channels, *CHANNELS)
        self.block0 = _block(convolutions, inputs[0], inputs[1])
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(convolutions, inputs[1], inputs[2])
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(convolutions, inputs[2], inputs[3])
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(convolutions, inputs[3], inputs[4])
        self.pool3 = nn.MaxPool2d(2)
        self.block4 = _block(convolutions, inputs[4], inputs[5])
        self.pool = GlobalAveragePool()
        self.classifier = nn.Linear(CHANNELS[-1], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool0(self.block0(image))
        x = self.pool1(self.block1(x))
        x = self.pool2(self.block2(x))
        x = self.block3(x)
        if image.shape[2] >= 64:
            x = self.pool3(x)
        return self.classifier(self.pool(self.block4(x)))


def _block(convolutions: int, inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


@MODELS.register("vgg8", version=1, paper="https://arxiv.org/abs/1409.1556", image=(3, 32, 32))
def vgg8(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """VGG-8 with BatchNorm for 32x32 images, 3.97 million parameters with 100 classes.

    The network is `vgg8` of RepDistiller (Simonyan and Zisserman 2014; one convolution per block). Feature shapes for
    a 32x32 image: `block0` 64x32x32, `block1` 128x16x16, `block2` 256x8x8, `block3` 512x4x4, `block4` 512x4x4, `pool`
    512.
    """
    return VGG(1, num_classes, in_channels)


@MODELS.register("vgg13", version=1, paper="https://arxiv.org/abs/1409.1556", image=(3, 32, 32))
def vgg13(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """VGG-13 with BatchNorm for 32x32 images, 9.46 million parameters with 100 classes.

    The network is `vgg13` of RepDistiller (Simonyan and Zisserman 2014; two convolutions per block). Feature shapes
    for a 32x32 image: `block0` 64x32x32, `block1` 128x16x16, `block2` 256x8x8, `block3` 512x4x4, `block4` 512x4x4,
    `pool` 512.
    """
    return VGG(2, num_classes, in_channels)
