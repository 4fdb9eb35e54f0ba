"""Small residual networks of any depth, in parts that recipes can put together: whole, trunk, branch.

The residual block is that of `cifar_resnet` (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2). The widths
do not depend on the number of blocks, so that a shallower network takes its weights from some blocks of a deeper one
(`rename: {layer1.2: layer1.1}`).

Features of `digits_resnet` for an image of 8x8 with width 16:

    path      shape per sample   what it is
    relu      16 x 8 x 8         after the first convolution, BatchNorm and ReLU
    layer1    16 x 8 x 8         after the ReLU that ends the stage; its blocks are `layer1.0`, `layer1.1`...
    layer2    32 x 4 x 4
    layer3    64 x 2 x 2
    pool      64                 mean over all places, what the classifier `fc` reads
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.cifar.resnet import BasicBlock
from kdbench.models.heads import feature_map_shape
from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS


@MODELS.register("digits_resnet", version=1, paper="https://arxiv.org/abs/1512.03385", image=(1, 8, 8))
class DigitsResNet(nn.Module):
    """A residual network of `blocks` per stage, stages of width, twice and four times it, for small images.

    78 thousand parameters with one block a stage and width 16 for 1x8x8 images; 175 thousand with two, 272 with three.
    Takes images of any size. Features: relu, layer1 to layer3, pool; see the head of this file.

    Args:
        num_classes, in_channels: of the data; the engine gives them.
        blocks: in each stage: one number, or one for each of the three.
        width: channels of the first stage.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, blocks: int | list[int] = 1, width: int = 16
    ) -> None:
        super().__init__()
        depths = [blocks] * 3 if isinstance(blocks, int) else list(blocks)
        if len(depths) != 3 or min(depths) < 1:
            raise ConfigError(f"digits_resnet: blocks must be a number of at least 1, or three of them, got {blocks}")
        if width < 1:
            raise ConfigError(f"digits_resnet: width must be at least 1, got {width}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = residual_stage(depths[0], width, width, stride=1)
        self.layer2 = residual_stage(depths[1], width, 2 * width, stride=2)
        self.layer3 = residual_stage(depths[2], 2 * width, 4 * width, stride=2)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(4 * width, num_classes)
        init_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))))


@MODELS.register("residual_trunk", version=1, paper="https://arxiv.org/abs/1512.03385", image=(1, 8, 8))
class ResidualTrunk(nn.Module):
    """The lower stages of `digits_resnet`, without classifier: what several branches share. Its output is a map.

    For ONE (Lan, Zhu and Gong 2018, https://arxiv.org/abs/1806.04606): one trunk, several `residual_branch` roles on
    its output and a `gate_mlp`. Nothing of it is left over when one branch is exported.

    Shapes: (batch, channels, height, width) -> (batch, width * 2^(stages - 1), h, w), where each stage but the first
    halves the map. Features: relu, layer1, layer2. 5 thousand parameters with one stage and width 16, 19 with two.

    Args:
        in_channels: of the data; the engine gives it.
        stages: one or two.
        blocks: in each stage.
        width: channels of the first stage.
    """

    def __init__(self, in_channels: int = 1, stages: int = 2, blocks: int = 1, width: int = 16) -> None:
        super().__init__()
        if stages not in (1, 2) or blocks < 1 or width < 1:
            raise ConfigError(
                f"residual_trunk: needs one or two stages, and blocks and width of at least 1, got stages {stages}, "
                f"blocks {blocks}, width {width}"
            )
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = residual_stage(blocks, width, width, stride=1)
        self.layer2 = residual_stage(blocks, width, 2 * width, stride=2) if stages == 2 else nn.Identity()
        init_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.relu(self.bn1(self.conv1(image)))))


@MODELS.register("residual_branch", version=1, paper="https://arxiv.org/abs/1806.04606", image=(32, 4, 4))
class ResidualBranch(nn.Module):
    """One stage of residual blocks, mean over all places and classifier, on another network's map: a branch of ONE.

    On the output of `residual_trunk` with the same `width` and `blocks` it is the rest of `digits_resnet`. Features:
    layer3, pool.

    Shapes: (batch, channels, height, width) -> (batch, num_classes). 58 thousand parameters from 32 channels.

    Args:
        num_classes: of the data; the engine gives it.
        input_shape: of one sample of the map; the engine gives it.
        blocks: of the stage.
        widen: channels of the stage over those of the map.
        stride: by how much the first block shrinks the map.
    """

    def __init__(
        self,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (32, 4, 4),
        blocks: int = 1,
        widen: int = 2,
        stride: int = 2,
    ) -> None:
        super().__init__()
        inputs, _, _ = feature_map_shape(input_shape, "residual_branch")
        if min(blocks, widen, stride) < 1:
            raise ConfigError(
                f"residual_branch: blocks, widen and stride must be at least 1, got {blocks}, {widen}, {stride}"
            )
        self.layer3 = residual_stage(blocks, inputs, widen * inputs, stride)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(widen * inputs, num_classes)
        init_convolutions(self)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer3(feature)))


def residual_stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
