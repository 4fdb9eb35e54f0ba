"""CNN for 8x8 images."""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS


@MODELS.register("digits_cnn", version=1, image=(1, 8, 8))
class DigitsCNN(nn.Module):
    """CNN of three 3x3 convolutions with BatchNorm for 8x8 digits, 43 thousand parameters.

    Feature shapes for an 8x8 image: `layer1` 32x8x8, `layer2` 48x4x4, `layer3` 64x4x4, `pool` 64. The first three
    features are the outputs of the ReLUs. `pool` is the mean over all positions and the input of the classifier `fc`.

    Shape:
        (batch, in_channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        in_channels: channels of the image (injected by kdbench).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.layer1 = _conv_bn_relu(in_channels, 32, stride=1)
        self.layer2 = _conv_bn_relu(32, 48, stride=2)
        self.layer3 = _conv_bn_relu(48, 64, stride=1)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(64, num_classes)
        init_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(image)))))


def _conv_bn_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
