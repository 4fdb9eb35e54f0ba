"""Several networks as one role."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.registry import MODELS


@MODELS.register("mean_output", version=1, image=(10,))
class MeanOutput(nn.Module):
    """The mean of what several networks give out: an ensemble as a role that others can see, and that can be measured.

    `ensemble: {model: mean_output, input: ["a:logits", "b:logits"], frozen: true}`. It has no parameters. A term that
    needs the mean only as its target takes `{combine: mean_logits, of: [a, b]}`, and no role.

    Shapes: any equal shapes (batch, ...) -> the same.
    """

    def forward(self, *outputs: Tensor) -> Tensor:
        return torch.stack(outputs).mean(0)
