"""Small residual networks of any depth: the whole network, and its trunk and branch as separate models.

The residual block is that of `models.cifar.resnet` (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2). The
widths do not depend on the number of blocks, so that a shallower network can load its weights from some of the blocks
of a deeper one (`rename: {layer1.2: layer1.1}`).

Features of `digits_resnet` for an image of 8x8 with width 16:

    path      shape per sample   position in the network
    relu      16 x 8 x 8         after the first convolution, BatchNorm and ReLU
    layer1    16 x 8 x 8         after the last ReLU of the stage; its blocks are `layer1.0`, `layer1.1`, ...
    layer2    32 x 4 x 4
    layer3    64 x 2 x 2
    pool      64                 mean over all positions, the input of the classifier `fc`
"""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.cifar.resnet import residual_stage
from kdbench.models.heads import feature_map_shape
from kdbench.models.layers import GlobalAveragePool, init_convolutions
from kdbench.registry import MODELS


@MODELS.register("digits_resnet", version=1, paper="https://arxiv.org/abs/1512.03385", image=(1, 8, 8))
class DigitsResNet(nn.Module):
    """Residual network for small images of any size, three stages of `blocks` basic blocks each.

    He et al. 2016, section 4.2, with `width`, 2 * width and 4 * width channels. With width 16 and one input channel: 78
    thousand parameters with one block per stage, 175 with two, 272 with three.
    Features of an 8x8 image with width 16: relu 16 x 8 x 8, layer1 16 x 8 x 8, layer2 32 x 4 x 4, layer3 64 x 2 x 2,
    pool 64.

    Shape:
        (batch, in_channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data; injected.
        in_channels: channels of the image; injected.
        blocks: blocks per stage: one number, or a list of three.
        width: channels of the first stage.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, blocks: int | list[int] = 1, width: int = 16
    ) -> None:
        super().__init__()
        depths = [blocks] * 3 if isinstance(blocks, int) else list(blocks)
        if len(depths) != 3 or min(depths) < 1:
            raise ConfigError(f"digits_resnet: blocks must be a number of at least 1, or a list of three, got {blocks}")
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
    """First stages of `digits_resnet` without classifier, as a trunk that several branches share (ONE).

    For ONE (Lan, Zhu and Gong 2018, https://arxiv.org/abs/1806.04606): one trunk, several `residual_branch` roles on
    its output, and a `gate_mlp`, which the exported branch does not need. Features: relu, layer1, layer2, with the
    shapes of `digits_resnet`. 5 thousand parameters with one stage and width 16, 19 with two.

    Shape:
        (batch, channels, height, width) -> (batch, width * 2^(stages - 1), h, w); every stage but the first halves
        height and width.

    Args:
        in_channels: channels of the image; injected.
        stages: one or two.
        blocks: blocks per stage.
        width: channels of the first stage.

    Example (recipe):
        models: {trunk: {model: {type: residual_trunk, width: 16}}}
    """

    def __init__(self, in_channels: int = 1, stages: int = 2, blocks: int = 1, width: int = 16) -> None:
        super().__init__()
        if stages not in (1, 2) or blocks < 1 or width < 1:
            raise ConfigError(
                "residual_trunk: stages must be 1 or 2, and blocks and width at least 1, got "
                f"stages {stages}, blocks {blocks}, width {width}"
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
    """Branch on a trunk's map: one stage of basic blocks, global average pooling and classifier (ONE).

    On the output of `residual_trunk` with the same `width` and `blocks` it is the remainder of `digits_resnet`.
    Features: layer3, pool, with the shapes of `digits_resnet`. 58 thousand parameters from 32 channels.

    Shape:
        (batch, channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data; injected.
        input_shape: shape of the map per sample; injected.
        blocks: number of blocks.
        widen: ratio of the stage's channels to those of the map.
        stride: stride of the first block.

    Example (recipe):
        student: {model: residual_branch, input: "trunk:logits"}
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
