"""Small residual networks of any depth: a complete network, and its first and last stages as separate networks.

The residual block is that of `models.cifar.resnet` (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2).
The number of channels does not depend on the number of blocks. A shallow network can therefore load its weights from
some blocks of a deeper network; in the recipe, `rename: {layer1.2: layer1.1}` assigns the blocks.

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
    """Residual network for small images of any size: three stages of `blocks` basic blocks each.

    The blocks are those of He et al. 2016, section 4.2. The stages have `width`, 2 * width and 4 * width channels.
    With width 16 and one input channel, the network has 78 thousand parameters with one block per stage, 175 thousand
    with two blocks and 272 thousand with three blocks.

    Feature shapes for an 8x8 image with width 16: `relu` 16x8x8, `layer1` 16x8x8, `layer2` 32x4x4, `layer3` 64x2x2,
    `pool` 64.

    Shape:
        (batch, in_channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        in_channels: channels of the image (injected by kdbench).
        blocks: number of blocks per stage: one number for all stages, or a list of three numbers.
        width: channels of the first stage.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, blocks: int | list[int] = 1, width: int = 16
    ) -> None:
        super().__init__()
        depths = [blocks] * 3 if isinstance(blocks, int) else list(blocks)
        if len(depths) != 3 or min(depths) < 1:
            raise ConfigError(
                f"digits_resnet: blocks must be at least 1: one number, or a list of three numbers, got {blocks}"
            )
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
    """Trunk for several branches: the first stages of the network `digits_resnet`, without classifier (ONE).

    ONE (Lan, Zhu and Gong 2018, https://arxiv.org/abs/1806.04606) needs one trunk, several branches
    (`residual_branch`) on the output of the trunk, and a gate (`gate_mlp`). The exported student consists of the
    trunk and one branch, without the gate.

    Features: `relu`, `layer1` and `layer2`, with the shapes of `digits_resnet`. With width 16, the trunk has 5
    thousand parameters for one stage and 19 thousand for two stages.

    Shape:
        (batch, channels, height, width) -> (batch, width * 2^(stages - 1), h, w). Every stage after the first halves
        the height and the width.

    Args:
        in_channels: channels of the image (injected by kdbench).
        stages: number of stages, 1 or 2.
        blocks: number of blocks per stage.
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
    """Branch after a shared trunk: one stage of basic blocks, global average pooling and linear classifier (ONE).

    With the default `widen` and `stride`, a branch and the trunk `residual_trunk` together form the network
    `digits_resnet`, if branch and trunk have the same number of blocks per stage. Features: `layer3` and `pool`, with
    the shapes of `digits_resnet`. For a map with 32 channels, the branch has 58 thousand parameters.

    Shape:
        (batch, channels, height, width) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        input_shape: shape of the trunk's output per sample (injected by kdbench).
        blocks: number of blocks.
        widen: ratio of output channels to input channels of the stage.
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
                "residual_branch: blocks, widen and stride must be at least 1, got "
                f"blocks {blocks}, widen {widen}, stride {stride}"
            )
        self.layer3 = residual_stage(blocks, inputs, widen * inputs, stride)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(widen * inputs, num_classes)
        init_convolutions(self)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer3(feature)))
