"""Augmentations that move pixels: crop, flip, resized crop, rotation by quarter turns."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kdbench.data.augment.base import (
    OUTSIDE,
    DecodeTimeAugmentation,
    GeometricAugmentation,
    PostNormalizeAugmentation,
)
from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTATIONS


def gather_window(coordinates: Tensor, start: Tensor, length: int) -> Tensor:
    """Gathers `length` consecutive entries of each row, beginning at `start`. Entries beyond the row are OUTSIDE.

    Args:
        coordinates: int64 (batch, n).
        start: int64 (batch,), first position in each row; may be negative.
        length: number of entries per row.

    Returns:
        int64 (batch, length).
    """
    at = start[:, None] + torch.arange(length, device=coordinates.device)
    inside = (at >= 0) & (at < coordinates.shape[1])
    entries = coordinates.gather(1, at.clamp(0, coordinates.shape[1] - 1))
    return torch.where(inside, entries, OUTSIDE)


def uniform_integers(uniform: Tensor, count: int) -> Tensor:
    """Converts uniform numbers in [0, 1) to uniform integers in [0, count)."""
    return (uniform * count).long().clamp_(max=count - 1)


@AUGMENTATIONS.register("crop", version=1)
class Crop(GeometricAugmentation):
    """Crops the zero-padded image at a random offset, like torchvision's RandomCrop.

    The offset is uniform over all positions in the image padded by `padding` pixels on each side. The padding is 0
    before normalisation (black). In evaluation the center is cropped.

    Args:
        padding: number of padded pixels on each side.
        size: side of the square crop in pixels; null: the crop has the height and width of the image.
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
        padded_size = min(height, width) + 2 * self.padding
        if self.size is not None and self.size > padded_size:
            raise ConfigError(
                f"crop: size {self.size} is larger than the padded image ({padded_size}); images are "
                f"{height}x{width}, padding is {self.padding}"
            )
        return (channels, self.size or height, self.size or width)

    def map_coordinates(self, ys: Tensor, xs: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size or ys.shape[1], self.size or xs.shape[1]
        num_rows, num_columns = self._offset_counts(ys.shape[1], xs.shape[1])
        y0 = uniform_integers(params[:, 0], num_rows) - self.padding
        x0 = uniform_integers(params[:, 1], num_columns) - self.padding
        return gather_window(ys, y0, height), gather_window(xs, x0, width)

    def _offset_counts(self, height: int, width: int) -> tuple[int, int]:
        """Returns the number of possible vertical offsets and the number of possible horizontal offsets of the crop."""
        slack = 2 * self.padding + 1
        return height + slack - (self.size or height), width + slack - (self.size or width)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        num_rows, num_columns = self._offset_counts(*shape[1:])
        return num_rows * num_columns

    def variant_id(self, params: Tensor, shape: tuple[int, ...]) -> Tensor:
        num_rows, num_columns = self._offset_counts(*shape[1:])
        return uniform_integers(params[:, 0], num_rows) * num_columns + uniform_integers(params[:, 1], num_columns)

    def map_evaluation_coordinates(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size or ys.shape[1], self.size or xs.shape[1]
        y0 = torch.full_like(ys[:, 0], round((ys.shape[1] - height) / 2))  # rounded as in torchvision's CenterCrop
        x0 = torch.full_like(xs[:, 0], round((xs.shape[1] - width) / 2))
        return gather_window(ys, y0, height), gather_window(xs, x0, width)


@AUGMENTATIONS.register("flip", version=1)
class Flip(GeometricAugmentation):
    """Flips the image horizontally with probability p.

    Args:
        p: probability, in [0, 1].
    """

    num_params = 1

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"flip: p must be in [0, 1], got {p}")
        self.p = p

    def map_coordinates(self, ys: Tensor, xs: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return ys, torch.where(params[:, :1] < self.p, xs.flip(1), xs)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return 2

    def variant_id(self, params: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (params[:, 0] < self.p).long()


@AUGMENTATIONS.register("random_resized_crop", version=1)
class RandomResizedCrop(DecodeTimeAugmentation):
    """Crops a random part of the image and resizes it to the dataset's size, like torchvision's RandomResizedCrop.

    The fraction of the area is uniform in `scale`, and the aspect ratio is log-uniform in `ratio`. If ten drawn boxes
    do not fit into the image, the center is cropped. Only datasets that are decoded in every epoch (`imagenet`, or
    `image_folder` with `resident: false`) can use this augmentation.

    Args:
        scale: smallest and largest fraction of the area.
        ratio: smallest and largest width / height.
    """

    def __init__(
        self, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    ) -> None:
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise ConfigError(
                    f"random_resized_crop: {name} must be [low, high] with 0 < low <= high, got [{low}, {high}]"
                )
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return x, y, x + w, y + h
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        x, y = (width - w) // 2, (height - h) // 2
        return x, y, x + w, y + h


@AUGMENTATIONS.register("rotate90", version=1)
class Rotate90(PostNormalizeAugmentation):
    """Rotates the image by quarter turns: Gidaris et al. 2018 (ICLR), https://arxiv.org/abs/1803.07728

    A fixed number of turns, such as `turned: {from: image, then: [{type: rotate90, turns: 1}]}`, is also applied in
    evaluation. Random turns are not applied in evaluation. They add their number (0 to 3, int64) to the batch, as the
    field `turns` for the view `image` and as the field `VIEW_turns` for any other view.

    Args:
        turns: number of quarter turns counterclockwise, 0 to 3; null: drawn uniformly.
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
                f"rotate90: only square images can be turned by a quarter, but these are {shape[1]}x{shape[2]}"
            )
        return shape

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        if self.turns is not None:
            return torch.rot90(image, self.turns, (2, 3))
        turns = self.extra_field_values(params).view(-1, 1, 1, 1)
        half_turned = torch.where(turns >= 2, image.flip(2, 3), image)
        return torch.where(turns % 2 == 1, torch.rot90(half_turned, 1, (2, 3)), half_turned)

    def extra_field_values(self, params: Tensor) -> Tensor:
        return uniform_integers(params[:, 0], 4)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return 1 if self.turns is not None else 4

    def variant_id(self, params: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.extra_field_values(params) if self.turns is None else super().variant_id(params, shape)
