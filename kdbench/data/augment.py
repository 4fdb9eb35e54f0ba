"""Augmentations: per sample, batched, on the device, from draws that belong to the sample and the epoch.

Each kind is one base class; `kdbench.data.view` runs them in this order, the kinds in the order of the recipe:

- `Geometric` moves pixels. All of a view are composed into one pair of coordinate maps, so the image is read once;
- `Colouring` changes colours, in [0, 1];
- then the image is normalised;
- `Masking` changes the normalised image in place of pixels (cutout, noise); what stands after the mixing in the recipe
  comes after it;
- `Mixing` blends a sample with another one of the batch; at most one per view.
- `Reading` chooses what is decoded at all, and so works on datasets that are read from files in every epoch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTS

OUTSIDE = -1
"""A coordinate that lies in the padding, where pixels are zero."""


class Augment:
    """Base of all augmentations.

    columns: how many numbers each sample draws in an epoch.
    always: whether evaluation does it too, with draws that are the same every time.
    tells: the field of the batch that `told` gives; empty for none.
    """

    columns = 0
    always = False
    tells = ""
    registered_name: str

    def table(self, samples: int, seed: int) -> Tensor:
        """Returns an epoch's draws, float32 (samples, columns), uniform in [0, 1) unless the class says otherwise."""
        return torch.rand(samples, self.columns, generator=torch.Generator().manual_seed(seed))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape (channels, height, width) that comes out.

        Raises:
            ConfigError: the augmentation does not fit images of this shape.
        """
        return shape

    def told(self, draws: Tensor) -> Tensor:
        """Returns what was drawn as the field `tells`, int64 (batch,)."""
        raise NotImplementedError

    def variants(self, shape: tuple[int, ...]) -> int | None:
        """Returns how many images it can make of one sample; None where they are not counted.

        Where they are, the image that comes out is a function of the image that goes in and of `code` alone, so that
        what a network gives for it can be kept.

        Args:
            shape: that goes in, (channels, height, width).
        """
        return None if self.columns else 1

    def code(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns which of its `variants` the draws give, int64 (batch,), from 0; where it draws nothing, 0."""
        return torch.zeros(len(draws), dtype=torch.int64, device=draws.device)


@AUGMENTS.register("same", version=1)
class Same(Augment):
    """First in a view: all that another view does to the sample, with the same draws.

    `corrupted: {from: image, then: [noise]}` is short for `corrupted: [{type: same, view: image}, noise]`: both views
    are cropped and flipped (and mixed) alike, and then one of them is corrupted. Views without it draw apart.

    Args:
        view: the other view.
    """

    def __init__(self, view: str) -> None:
        self.view = view


class Geometric(Augment):
    """Moves pixels: maps rows and columns of the output to those of the input."""

    def maps(self, ys: Tensor, xs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Composes this move after those before it.

        Args:
            ys: int64 (batch, height), the source row of each row so far, or OUTSIDE.
            xs: int64 (batch, width), likewise.
            draws: float32 (batch, columns).
        """
        raise NotImplementedError

    def fixed(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """What evaluation does in its place."""
        return ys, xs


class Colouring(Augment):
    """Changes colours before the image is normalised."""

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        """Args: image (batch, channels, height, width) in [0, 1]; draws float32 (batch, columns)."""
        raise NotImplementedError


class Masking(Augment):
    """Changes the normalised image."""

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        """Args: image (batch, channels, height, width); draws float32 (batch, columns)."""
        raise NotImplementedError


class Mixing(Augment):
    """Blends each sample with a partner of the same batch."""

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the blend and the share of the own label, float (batch,)."""
        raise NotImplementedError

    def variants(self, shape: tuple[int, ...]) -> int | None:
        return None


class Reading(Augment):
    """Chooses the part of the undecoded image that is read."""

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns left, upper, right, lower in pixels of an image of the given size."""
        raise NotImplementedError

    def variants(self, shape: tuple[int, ...]) -> int | None:
        return None


def window(coordinates: Tensor, start: Tensor, length: int) -> Tensor:
    """Reads `length` entries of each row of `coordinates` (batch, n), from `start` (batch,); beyond it is OUTSIDE."""
    at = start[:, None] + torch.arange(length, device=coordinates.device)
    inside = (at >= 0) & (at < coordinates.shape[1])
    read = coordinates.gather(1, at.clamp(0, coordinates.shape[1] - 1))
    return torch.where(inside, read, OUTSIDE)


def whole(uniform: Tensor, count: int) -> Tensor:
    """Turns uniform numbers in [0, 1) into whole numbers in [0, count), all equally likely."""
    return (uniform * count).long().clamp_(max=count - 1)


@AUGMENTS.register("crop", version=1)
class Crop(Geometric):
    """Random crop of the zero-padded image, as torchvision's RandomCrop.

    The window's offset is uniform over all places in the image padded by `padding` pixels on each side. The padding is
    black (0 before normalisation). Evaluation takes the centre.

    Args:
        padding: pixels on each side.
        size: side of the square that is cut out; null keeps the image's height and width.
    """

    columns = 2

    def __init__(self, padding: int = 4, size: int | None = None) -> None:
        if padding < 0:
            raise ConfigError(f"crop: padding must not be negative, got {padding}")
        if size is not None and size < 1:
            raise ConfigError(f"crop: size must be at least 1, got {size}")
        self.padding = padding
        self.size = size

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = shape
        room = min(height, width) + 2 * self.padding
        if self.size is not None and self.size > room:
            raise ConfigError(
                f"crop: size {self.size} is more than the padded image has ({room}); images are {height}x{width}, "
                f"padding is {self.padding}"
            )
        return (channels, self.size or height, self.size or width)

    def maps(self, ys: Tensor, xs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size or ys.shape[1], self.size or xs.shape[1]
        rows, columns = self._corners(ys.shape[1], xs.shape[1])
        top = whole(draws[:, 0], rows) - self.padding
        left = whole(draws[:, 1], columns) - self.padding
        return window(ys, top, height), window(xs, left, width)

    def _corners(self, height: int, width: int) -> tuple[int, int]:
        """In how many rows and in how many columns the window may begin."""
        room = 2 * self.padding + 1
        return height + room - (self.size or height), width + room - (self.size or width)

    def variants(self, shape: tuple[int, ...]) -> int | None:
        rows, columns = self._corners(*shape[1:])
        return rows * columns

    def code(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows, columns = self._corners(*shape[1:])
        return whole(draws[:, 0], rows) * columns + whole(draws[:, 1], columns)

    def fixed(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size or ys.shape[1], self.size or xs.shape[1]
        top = torch.full_like(ys[:, 0], round((ys.shape[1] - height) / 2))  # rounds as torchvision's CenterCrop
        left = torch.full_like(xs[:, 0], round((xs.shape[1] - width) / 2))
        return window(ys, top, height), window(xs, left, width)


@AUGMENTS.register("flip", version=1)
class Flip(Geometric):
    """Horizontal flip with probability p.

    Args:
        p: probability, in [0, 1].
    """

    columns = 1

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"flip: p must be in [0, 1], got {p}")
        self.p = p

    def maps(self, ys: Tensor, xs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        return ys, torch.where(draws[:, :1] < self.p, xs.flip(1), xs)

    def variants(self, shape: tuple[int, ...]) -> int | None:
        return 2

    def code(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (draws[:, 0] < self.p).long()


def between(length: int, low: Tensor, high: Tensor) -> Tensor:
    """Returns bool (batch, length): low <= position < high."""
    at = torch.arange(length, device=low.device)
    return (at >= low[:, None]) & (at < high[:, None])


@AUGMENTS.register("cutout", version=1)
class Cutout(Masking):
    """Sets one square of the normalised image to zero: DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552

    The centre is uniform over the image's pixels; what sticks out of the image is lost.

    Args:
        size: side of the square, in pixels (16 for CIFAR-10 and 8 for CIFAR-100 in the paper).
    """

    columns = 2

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"cutout: size must be at least 1, got {size}")
        self.size = size

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        height, width = image.shape[2:]
        top = whole(draws[:, 0], height) - self.size // 2
        left = whole(draws[:, 1], width) - self.size // 2
        rows = between(height, top, top + self.size)
        columns = between(width, left, left + self.size)
        return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def variants(self, shape: tuple[int, ...]) -> int | None:
        return shape[1] * shape[2]

    def code(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        return whole(draws[:, 0], shape[1]) * shape[2] + whole(draws[:, 1], shape[2])


def _beta(alpha: float, samples: int, seed: int) -> Tensor:
    """Returns float32 (samples, 1) from Beta(alpha, alpha)."""
    drawn = np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha, samples)
    return torch.from_numpy(drawn).float()[:, None]


@AUGMENTS.register("mixup", version=1)
class Mixup(Mixing):
    """Blends two images and their labels: Zhang et al. 2018 (ICLR), https://arxiv.org/abs/1710.09412

    x = m * x_own + (1 - m) * x_partner with m from Beta(alpha, alpha), one m per sample; the partner is the row before
    in the global batch. The batch gains `label_other` (the partner's label) and `mix` (m).

    Args:
        alpha: above 0; 0.2 for ImageNet and 1 for CIFAR in the paper.
        share: of the samples that are mixed, in [0, 1]; each one is with this probability, the others keep m = 1
            ("partial mixup" in the study of mixup in distillation, https://arxiv.org/abs/2211.03946).
    """

    columns = 1

    def __init__(self, alpha: float = 1.0, share: float = 1.0) -> None:
        if alpha <= 0:
            raise ConfigError(f"mixup: alpha must be above 0, got {alpha}")
        if not 0 <= share <= 1:
            raise ConfigError(f"mixup: share must be in [0, 1], got {share}")
        self.alpha = alpha
        self.share = share

    def table(self, samples: int, seed: int) -> Tensor:
        own = _beta(self.alpha, samples, seed)
        if self.share == 1:
            return own
        mixed = torch.rand(samples, 1, generator=torch.Generator().manual_seed(seed)) < self.share
        return torch.where(mixed, own, 1.0)

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        share = draws[:, 0].to(image.dtype)
        weight = share.view(-1, 1, 1, 1)
        return image * weight + partner * (1 - weight), share


@AUGMENTS.register("cutmix", version=1)
class Cutmix(Mixing):
    """Pastes a box of another image: Yun et al. 2019 (ICCV), https://arxiv.org/abs/1905.04899

    The box has the share 1 - m of the area, m from Beta(alpha, alpha), its sides the proportions of the image, its
    centre uniform; what sticks out is lost. `mix` is the share of the own image that is left, counted in pixels;
    `label_other` is the label of the partner, the row before in the global batch.

    Args:
        alpha: above 0; 1 in the paper.
    """

    columns = 3

    def __init__(self, alpha: float = 1.0) -> None:
        if alpha <= 0:
            raise ConfigError(f"cutmix: alpha must be above 0, got {alpha}")
        self.alpha = alpha

    def table(self, samples: int, seed: int) -> Tensor:
        return torch.cat([_beta(self.alpha, samples, seed), super().table(samples, seed)[:, 1:]], dim=1)

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[2:]
        side = (1 - draws[:, 0]).clamp(min=0).sqrt()
        half_height, half_width = (side * height).long() // 2, (side * width).long() // 2
        centre_y, centre_x = whole(draws[:, 1], height), whole(draws[:, 2], width)
        rows = between(height, centre_y - half_height, centre_y + half_height)
        columns = between(width, centre_x - half_width, centre_x + half_width)
        area = rows.sum(1) * columns.sum(1)
        box = (rows[:, :, None] & columns[:, None, :])[:, None]
        return torch.where(box, partner, image), 1 - area.to(image.dtype) / (height * width)


@AUGMENTS.register("random_resized_crop", version=1)
class RandomResizedCrop(Reading):
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
