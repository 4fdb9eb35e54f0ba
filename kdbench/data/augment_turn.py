"""Quarter turns: the pretext task of self-supervised distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench.data.augment import Masking, whole
from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTS


@AUGMENTS.register("rotate90", version=1)
class Rotate90(Masking):
    """Turns the image by quarters: Gidaris et al. 2018 (ICLR), https://arxiv.org/abs/1803.07728

    Fixed turns make one view each, such as `turned: {from: image, then: [{type: rotate90, turns: 1}]}`, and hold in
    evaluation too. Random turns tell how far: the batch gains `turns` (0 to 3, int64); in a view that is not `image`,
    `VIEW_turns`. In evaluation random turns rest.

    Args:
        turns: quarter turns counterclockwise, 0 to 3; null draws them, all equally likely.
    """

    def __init__(self, turns: int | None = None) -> None:
        if turns is not None and not 0 <= turns <= 3:
            raise ConfigError(f"rotate90: turns must be 0, 1, 2, 3 or null, got {turns}")
        self.turns = turns
        self.columns = 1 if turns is None else 0
        self.always = turns is not None
        self.tells = "turns" if turns is None else ""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[1] != shape[2] and self.turns not in (0, 2):
            raise ConfigError(
                f"rotate90: only square images can be turned by a quarter; these are {shape[1]}x{shape[2]}"
            )
        return shape

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        if self.turns is not None:
            return torch.rot90(image, self.turns, (2, 3))
        drawn = self.told(draws).view(-1, 1, 1, 1)
        half = torch.where(drawn >= 2, image.flip(2, 3), image)
        return torch.where(drawn % 2 == 1, torch.rot90(half, 1, (2, 3)), half)

    def told(self, draws: Tensor) -> Tensor:
        return whole(draws[:, 0], 4)

    def variants(self, shape: tuple[int, ...]) -> int | None:
        return 1 if self.turns is not None else 4

    def code(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.told(draws) if self.turns is None else super().code(draws, shape)
