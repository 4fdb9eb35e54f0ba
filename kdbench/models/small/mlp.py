"""MLP for 8x8 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.registry import MODELS


@MODELS.register("digits_mlp", version=1, image=(1, 8, 8))
class DigitsMLP(nn.Module):
    """MLP with two hidden layers for 8x8 digits, 6 thousand parameters.

    Features: `layer1` and `layer2`, the hidden layers after the ReLU, each with `hidden` values per sample. The
    classifier is `fc`.

    Shape:
        (batch, in_channels, image_size, image_size) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        in_channels: channels of the image (injected by kdbench).
        hidden: number of units of each hidden layer.
        image_size: height and width of the image (injected by kdbench).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, hidden: int = 48, image_size: int = 8) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(in_channels * image_size**2, hidden), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(torch.flatten(image, 1))))
