"""Networks that say of each sample how its losses are to be weighed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.registry import MODELS


@MODELS.register("fusion_gate", version=1, paper="https://arxiv.org/abs/2312.15112", image=(10,))
class FusionGate(nn.Module):
    """How far a sample's soft target counts, from the geometry of student, teacher, label and the class's teacher.

    TGeo-KD (Hu et al., ICLR 2024), in the form of the last released code: with S and T the softmax of student and
    teacher, G the one-hot label and M the mean of T over the samples of the label's class, an MLP reads
    [S, T, G, M, (M-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (M-G)^2], each a vector over the classes and each square taken
    element by element, and a sigmoid gives the share of the soft target. The layers have a leaky ReLU between them.

    M is the mean over all samples shown in training mode so far: after one epoch, with a teacher and samples that do
    not change, the mean over the training set. Nothing upstream gets a gradient: no student lowers its loss by its
    share. Hidden labels (negative) have G = M = 0.

    Inputs: student's logits, teacher's logits (batch, classes), label (batch,). Shapes: -> (batch, 1), in (0, 1).
    Feature: `net`, before the sigmoid.

    Args:
        input_shape: of one sample of the student's logits; the engine gives it.
        hidden: widths of the hidden layers.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, input_shape: tuple[int, ...] = (10,), hidden: tuple[int, ...] = (32, 16)) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"fusion_gate: reads logits, one number per class, but what it sees is {list(input_shape)}"
            )
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"fusion_gate: hidden lists one or more widths, each at least 1, got {list(hidden)}")
        classes = input_shape[0]
        self.register_buffer("mean", torch.zeros(classes, classes))
        self.register_buffer("count", torch.zeros(classes))
        sizes = [9 * classes, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        dtype = self.mean.dtype
        s, t = (F.softmax(logits.detach().to(dtype), 1) for logits in (student, teacher))
        g = F.one_hot(label.clamp(min=0), self.mean.shape[0]).to(dtype) * (label >= 0).unsqueeze(1)
        if self.training:
            self._remember(t.detach(), g)
        m = g @ self.mean
        pairs = ((m, s), (g, s), (t, s), (t, g), (m, g))
        return torch.sigmoid(self.net(torch.cat([s, t, g, m, *((a - b).square() for a, b in pairs)], 1)))

    @torch.no_grad()
    def _remember(self, t: Tensor, g: Tensor) -> None:
        """Takes a batch into the means of the classes."""
        rows = g.sum(0)
        self.count += rows
        self.mean += (g.T @ t - rows.unsqueeze(1) * self.mean) / self.count.clamp(min=1).unsqueeze(1)
