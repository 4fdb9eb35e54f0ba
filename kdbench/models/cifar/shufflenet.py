"""ShuffleNets for 32x32 images: https://arxiv.org/abs/1707.01083 (V1), https://arxiv.org/abs/1807.11164 (V2)

These variants are used in the CIFAR-100 distillation tables (CRD, https://arxiv.org/abs/1910.10699). Their first
convolution is 1x1 with stride 1, and no pooling follows it. V1 (Zhang et al. 2018) has three groups and 240, 480 and
960 channels. V2 (Ma et al. 2018) has the width of size 1 in the paper. State dicts have the parameter names of the
code released with CRD (RepDistiller).

Features for an image of 32x32 (feats[0] to feats[4] in CRD):

    path      shape per sample, V1 and V2       position in the network
    relu      24 x 32 x 32                      after the first convolution, BatchNorm and ReLU
    layer1    240 x 16 x 16    116 x 16 x 16    V1: after the last ReLU of the stage; `layer1.-1.relu3/in` is the
    layer2    480 x 8 x 8      232 x 8 x 8      pre-activation. V2: after the channel shuffle that follows this ReLU
    layer3    960 x 4 x 4      464 x 4 x 4
    pool      960              1024             mean over all positions, the input of the classifier `linear`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.models.layers import GlobalAveragePool
from kdbench.registry import MODELS


class ChannelShuffle(nn.Module):
    """Channel shuffle: transposes the channels from (groups, channels per group) to (channels per group, groups).

    Shape:
        (batch, channels, height, width) -> the same shape.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleV1Block(nn.Module):
    """Block of ShuffleNet V1: grouped 1x1, depthwise 3x3 and grouped 1x1 convolution, with shuffle and shortcut.

    The channel shuffle follows the first convolution. With stride 1, the input is added to the result of the
    convolutions. With stride 2, the average-pooled input is concatenated to this result.

    Shape:
        stride 1: (batch, inputs, h, w) -> the same shape; `outputs` must equal `inputs`.
        stride 2: (batch, inputs, h, w) -> (batch, outputs + inputs, h / 2, w / 2).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = outputs // 4
        first_groups = 1 if inputs == 24 else groups  # the first block has too few input channels for groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.shuffle1 = ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.AvgPool2d(3, stride=2, padding=1)) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle1(self.relu1(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + x if self.shortcut is None else torch.cat([out, self.shortcut(x)], dim=1))


class ShuffleNetV1(nn.Module):
    """ShuffleNet V1: a first convolution, three stages of blocks and a linear classifier."""

    def __init__(
        self,
        channels: tuple[int, int, int],
        blocks: tuple[int, int, int],
        groups: int,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        inputs = (24, *channels)
        stages = []
        for number, outputs in enumerate(channels):
            # The first block concatenates its input, so it computes only the remaining channels.
            first = ShuffleV1Block(inputs[number], outputs - inputs[number], 2, groups)
            rest = [ShuffleV1Block(outputs, outputs, 1, groups) for _ in range(blocks[number] - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(channels[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(x)))))


class ShuffleV2Block(nn.Module):
    """Block of ShuffleNet V2 with stride 1: three convolutions on half of the channels, then a channel shuffle.

    The convolutions are 1x1, depthwise 3x3 and 1x1. The second half of the channels passes through them; the first
    half stays unchanged.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        identity, branch = x.chunk(2, dim=1)
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(branch)))))
        return self.shuffle(torch.cat([identity, self.relu3(self.bn3(self.conv3(branch)))], dim=1))


class ShuffleV2DownBlock(nn.Module):
    """Block of ShuffleNet V2 with stride 2: two branches with half of the output channels each, then a shuffle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        branch1 = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        branch2 = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        branch2 = self.relu5(self.bn5(self.conv5(branch2)))
        return self.shuffle(torch.cat([branch1, branch2], dim=1))


class ShuffleNetV2(nn.Module):
    """ShuffleNet V2: a first convolution, three stages of blocks, a last convolution and a linear classifier."""

    def __init__(
        self, channels: tuple[int, int, int, int], blocks: tuple[int, int, int], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        inputs = (24, *channels)
        self.layer1, self.layer2, self.layer3 = (
            # As in the released code, `blocks` does not count the first block of a stage, which has stride 2.
            nn.Sequential(
                ShuffleV2DownBlock(inputs[i], channels[i]), *(ShuffleV2Block(channels[i]) for _ in range(blocks[i]))
            )
            for i in range(3)
        )
        self.conv2 = nn.Conv2d(channels[2], channels[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels[3])
        self.relu2 = nn.ReLU()
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(channels[3], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(self.relu2(self.bn2(self.conv2(x)))))


@MODELS.register("shufflenetv1", version=1, paper="https://arxiv.org/abs/1707.01083", image=(3, 32, 32))
def shufflenetv1(num_classes: int = 100, in_channels: int = 3) -> ShuffleNetV1:
    """ShuffleNet V1 for 32x32 images, with three groups, 949 thousand parameters with 100 classes.

    The network is `ShuffleV1` of RepDistiller (Zhang et al. 2018). Feature shapes for a 32x32 image: `relu` 24x32x32,
    `layer1` 240x16x16, `layer2` 480x8x8, `layer3` 960x4x4, `pool` 960.
    """
    return ShuffleNetV1((240, 480, 960), (4, 8, 4), 3, num_classes, in_channels)


@MODELS.register("shufflenetv2", version=1, paper="https://arxiv.org/abs/1807.11164", image=(3, 32, 32))
def shufflenetv2(num_classes: int = 100, in_channels: int = 3) -> ShuffleNetV2:
    """ShuffleNet V2 for 32x32 images, of size 1, 1.36 million parameters with 100 classes.

    The network is `ShuffleV2` of RepDistiller (Ma et al. 2018). Feature shapes for a 32x32 image: `relu` 24x32x32,
    `layer1` 116x16x16, `layer2` 232x8x8, `layer3` 464x4x4, `pool` 1024.
    """
    return ShuffleNetV2((116, 232, 464, 1024), (3, 7, 3), num_classes, in_channels)
