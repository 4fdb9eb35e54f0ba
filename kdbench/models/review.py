"""The student's side of knowledge review: features of deeper layers flow back into those of shallower ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.registry import MODELS


@MODELS.register("review_fusion", version=1, paper="https://arxiv.org/abs/2104.09044", image=(64, 4, 4))
class ReviewFusion(nn.Module):
    """Fuses a student's feature with what deeper layers say, and takes it to the teacher's width: the ABF of ReviewKD.

    x = norm(conv1x1(feature)); with `fuse`, and y = the deeper map enlarged to x's size by nearest neighbour,
    [a, b] = sigmoid(conv1x1([x, y])), one weight per place each, and fused = a x + b y, else fused = x;
    output = norm(conv3x3(fused)). The chain begins at the deepest feature and goes up, each fusion reading the student
    and the `fused` of the one below; each output is compared with the teacher's feature of that layer by `hcl`:

        r3: {model: {type: review_fusion, channels: 64}, input: "student:layer3"}
        r2: {model: {type: review_fusion, channels: 32, fuse: true}, input: ["student:layer2", "r3:fused"]}

    Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, https://arxiv.org/abs/2104.09044. As
    in the authors' code (dvlab-research/ReviewKD), with the weights' first draw; there a size of the teacher that
    differs from the student's is met by one more enlargement, here the two must be equal.
    Shapes: (batch, channels in, height, width) and, with `fuse`, (batch, width, any height, any width) -> (batch,
    channels, height, width). A vector counts as a map of one place and gives a vector. Feature: `fused`, (width, ...).

    Args:
        channels: of the teacher's feature.
        input_shape: of one sample of the student's feature; the engine gives it.
        width: channels inside, the same along the chain; those of the student's last feature in the paper, at most 512.
        fuse: whether there is a deeper map to fuse with.
    """

    def __init__(
        self, channels: int = 64, input_shape: tuple[int, ...] = (64, 4, 4), width: int = 64, fuse: bool = False
    ) -> None:
        super().__init__()
        if len(input_shape) not in (1, 3) or channels < 1 or width < 1:
            raise ConfigError(
                f"review_fusion: reads a vector or a map, with at least 1 channel inside and out, got a feature of "
                f"{list(input_shape)}, width {width}, channels {channels}"
            )
        inside = nn.Conv2d(input_shape[0], width, 1, bias=False)
        outside = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.enter = nn.Sequential(inside, nn.BatchNorm2d(width))
        self.weights = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        self.fused = nn.Identity()
        self.leave = nn.Sequential(outside, nn.BatchNorm2d(channels))
        for convolution in (inside, outside):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None = None) -> Tensor:
        if (deeper is None) != (self.weights is None):
            raise ConfigError(
                "review_fusion: with `fuse: true` it sees two things, the student's feature and the `fused` map of a "
                "deeper one (`input: [student:layer2, r3:fused]`); without it the feature alone"
            )
        own = self.enter(feature if feature.dim() == 4 else feature[:, :, None, None])
        if deeper is not None and self.weights is not None:
            deeper = F.interpolate(deeper, own.shape[2:], mode="nearest")
            share = self.weights(torch.cat([own, deeper], dim=1))
            own = own * share[:, :1] + deeper * share[:, 1:]
        out = self.leave(self.fused(own))
        return out if feature.dim() == 4 else out.flatten(1)
