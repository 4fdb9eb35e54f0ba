"""Augmentations that move pixels: crop, flip, resized crop, rotation by quarter turns."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kdbench.data.augment.base import OUTSIDE, DecodeTimeAugmentation, GeometricAugmentation, PostNormalizeAugmentation
from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTATIONS


def gather_window(coordinates: Tensor, start: Tensor, length: int) -> Tensor:
    """Reads `length` entries of each row of `coordinates` (batch, n), from `start` (batch,); beyond it is OUTSIDE."""
    at = start[:, None] + torch.arange(length, device=coordinates.device)
    inside = (at >= 0) & (at < coordinates.shape[1])
    read = coordinates.gather(1, at.clamp(0, coordinates.shape[1] - 1))
    return torch.where(inside, read, OUTSIDE)


def uniform_integers(uniform: Tensor, count: int) -> Tensor:
    """Turns uniform numbers in [0, 1) into whole numbers in [0, count), all equally likely."""
    return (uniform * count).long().clamp_(max=count - 1)


@AUGMENTATIONS.register("crop", version=1)
class Crop(GeometricAugmentation):
    """Random crop of the zero-padded image, as torchvision's RandomCrop.

    The window's offset is uniform over all places in the image padded by `padding` pixels on each side. The padding is
    black (0 before normalisation). Evaluation takes the centre.

    Args:
        padding: pixels on each side.
        size: side of the square that is cut out; null keeps the image's height and width.
    """

    num_params = 2

    def __init__(self, padding: int = 4, size: int | None = None) -> None:
        if padding < 0:
            raise ConfigError(f"crop: padding must not be negative, got {padding}")
        if size is not None and size < 1:
            raise ConfigError(f"crop: size must be at least 1, got {size}")
        self.padding = padding
        self.size = size

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = shape
        room = min(height, width) + 2 * self.padding
        if self.size is not None and self.size > room:
            raise ConfigError(
                f"crop: size {self.size} is more than the padded image has ({room}); images are {height}x{width}, "
                f"padding is {self.padding}"
            )
        return (channels, self.size or height, self.size or width)

    def map_coordinates(self, ys: Tensor, xs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size or ys.shape[1], self.size or xs.shape[1]
        rows, columns = self._corners(ys.shape[1], xs.shape[1])
        top = uniform_integers(draws[:, 0], rows) - self.padding
        left = uniform_integers(draws[:, 1], columns) - self.padding
        return gather_window(ys, top, height), gather_window(xs, left, width)

    def _corners(self, height: int, width: int) -> tuple[int, int]:
        """In how many rows and in how many columns the window may begin."""
        room = 2 * self.padding + 1
        return height + room - (self.size or height), width + room - (self.size or width)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        rows, columns = self._corners(*shape[1:])
        return rows * columns

    def variant_id(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows, columns = self._corners(*shape[1:])
        return uniform_integers(draws[:, 0], rows) * columns + uniform_integers(draws[:, 1], columns)

    def map_evaluation_coordinates(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size or ys.shape[1], self.size or xs.shape[1]
        top = torch.full_like(ys[:, 0], round((ys.shape[1] - height) / 2))  # rounds as torchvision's CenterCrop
        left = torch.full_like(xs[:, 0], round((xs.shape[1] - width) / 2))
        return gather_window(ys, top, height), gather_window(xs, left, width)


@AUGMENTATIONS.register("flip", version=1)
class Flip(GeometricAugmentation):
    """Horizontal flip with probability p.

    Args:
        p: probability, in [0, 1].
    """

    num_params = 1

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"flip: p must be in [0, 1], got {p}")
        self.p = p

    def map_coordinates(self, ys: Tensor, xs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        return ys, torch.where(draws[:, :1] < self.p, xs.flip(1), xs)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return 2

    def variant_id(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (draws[:, 0] < self.p).long()


@AUGMENTATIONS.register("random_resized_crop", version=1)
class RandomResizedCrop(DecodeTimeAugmentation):
    """Reads a random part of the image and resizes it to the dataset's size, as torchvision's RandomResizedCrop.

    Area share uniform in `scale`, aspect ratio log-uniform in `ratio`; ten tries, then the centre. For datasets that
    are read from files in every epoch (`imagenet`, or `image_folder` with `resident: false`).

    Args:
        scale: least and largest share of the area.
        ratio: least and largest width / height.
    """

    def __init__(
        self, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    ) -> None:
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise ConfigError(f"random_resized_crop: {name} must be 0 < low <= high, got [{low}, {high}]")
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@AUGMENTATIONS.register("rotate90", version=1)
class Rotate90(PostNormalizeAugmentation):
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
        self.num_params = 1 if turns is None else 0
        self.always = turns is not None
        self.extra_field = "turns" if turns is None else ""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[1] != shape[2] and self.turns not in (0, 2):
            raise ConfigError(
                f"rotate90: only square images can be turned by a quarter; these are {shape[1]}x{shape[2]}"
            )
        return shape

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        if self.turns is not None:
            return torch.rot90(image, self.turns, (2, 3))
        drawn = self.extra_field_values(draws).view(-1, 1, 1, 1)
        half = torch.where(drawn >= 2, image.flip(2, 3), image)
        return torch.where(drawn % 2 == 1, torch.rot90(half, 1, (2, 3)), half)

    def extra_field_values(self, draws: Tensor) -> Tensor:
        return uniform_integers(draws[:, 0], 4)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return 1 if self.turns is not None else 4

    def variant_id(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.extra_field_values(draws) if self.turns is None else super().variant_id(draws, shape)
