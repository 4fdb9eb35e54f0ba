"""Corruptions: what a student sees worse than its teacher does."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.augment.base import PostNormalizeAugmentation
from kdbench.data.augment.mixing import interval_mask
from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTATIONS

_WORD = 0xFFFFFFFF


_BITS = 23
"""A float32 holds (k + 1/2) / 2**23 exactly, so that no draw is rounded to 0 or 1."""


def _mix(word: Tensor) -> Tensor:
    """Mixes the bits of 32-bit words, held in int64; no product leaves the 63 bits."""
    word = ((word ^ (word >> 16)) * 0x45D9F3B) & _WORD
    word = ((word ^ (word >> 16)) * 0x45D9F3B) & _WORD
    return word ^ (word >> 16)


def hashed_normals(draws: Tensor, count: int) -> Tensor:
    """Returns standard normal numbers, float32 (batch, count), a function of each row's two draws alone.

    A table of all samples' pixels would be larger than the dataset. So each number is a hash of its position and of the
    sample's draws, mapped through the inverse of the normal distribution; they lie within 5.3 deviations.

    Args:
        draws: float32 (batch, 2), uniform in [0, 1).
    """
    first, second = ((draws[:, k : k + 1] * 2**24).long() for k in (0, 1))
    key = _mix(first) ^ second
    other = _mix(_mix(second) ^ first)
    position = torch.arange(count, device=draws.device) * 0x9E3779B1
    word = _mix(_mix((position + _mix(key)) & _WORD) ^ other)
    uniform = ((word >> (32 - _BITS)).float() + 0.5) / 2**_BITS
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


@AUGMENTATIONS.register("noise", version=1)
class GaussianNoise(PostNormalizeAugmentation):
    """Adds Gaussian noise to the normalised image, other noise to every pixel, sample and epoch.

    Args:
        std: of the noise, in units of the normalised image (1 is about the deviation of the dataset's pixels).
        always: evaluation adds noise too, the same every time.
    """

    num_params = 2

    def __init__(self, std: float = 0.5, always: bool = False) -> None:
        if std < 0:
            raise ConfigError(f"noise: std must not be negative, got {std}")
        self.std = std
        self.always = always

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        count = math.prod(image.shape[1:])
        return image + self.std * hashed_normals(draws, count).view(image.shape).to(image.dtype)


@AUGMENTATIONS.register("blur", version=1)
class Blur(PostNormalizeAugmentation):
    """Gaussian blur; the border repeats the outermost pixels.

    Args:
        sigma: in pixels; the kernel reaches 3 sigma to each side.
        p: probability that a sample is blurred, in [0, 1].
        always: evaluation blurs too (with probability p, the same samples every time).
    """

    num_params = 1

    def __init__(self, sigma: float = 1.0, p: float = 1.0, always: bool = False) -> None:
        if sigma <= 0:
            raise ConfigError(f"blur: sigma must be above 0, got {sigma}")
        if not 0 <= p <= 1:
            raise ConfigError(f"blur: p must be in [0, 1], got {p}")
        self.sigma = sigma
        self.p = p
        self.always = always

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        reach = math.ceil(3 * self.sigma)
        at = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
        kernel = torch.exp(-(at**2) / (2 * self.sigma**2))
        kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, -1)
        padded = F.pad(image, (reach, reach, reach, reach), mode="replicate")
        blurred = F.conv2d(padded, kernel[:, :, None, :], groups=image.shape[1])
        blurred = F.conv2d(blurred, kernel[:, :, :, None], groups=image.shape[1])
        return torch.where(draws[:, 0].view(-1, 1, 1, 1) < self.p, blurred, image)


@AUGMENTATIONS.register("low_resolution", version=1)
class LowResolution(PostNormalizeAugmentation):
    """Averages squares of pixels and repeats the mean, so that the image has fewer details and the same size.

    Evaluation does it too: a network for small images is measured on small images.

    Args:
        factor: side of the squares, in pixels; it must divide height and width.
    """

    always = True

    def __init__(self, factor: int = 2) -> None:
        if factor < 1:
            raise ConfigError(f"low_resolution: factor must be at least 1, got {factor}")
        self.factor = factor

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[1] % self.factor or shape[2] % self.factor:
            raise ConfigError(f"low_resolution: factor {self.factor} does not divide images of {shape[1]}x{shape[2]}")
        return shape

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        small = F.avg_pool2d(image, self.factor)
        return F.interpolate(small, scale_factor=float(self.factor), mode="nearest")


@AUGMENTATIONS.register("occlude", version=1)
class Occlude(PostNormalizeAugmentation):
    """Covers one rectangle of the normalised image with zeros: Zhong et al. 2020 (AAAI), https://arxiv.org/abs/1708.04896

    The rectangle lies wholly inside the image (the square of `cutout` may stick out). Its height over its width is
    log-uniform in [1 / ratio, ratio], bounded by the sides of the image. The paper draws the area too and fills with
    noise; here the area is given and the fill is the dataset's mean colour.

    Args:
        fraction: of the image's area, in (0, 1].
        ratio: largest height over width, and width over height; at least 1.
        always: evaluation occludes too, the same places every time.
    """

    num_params = 3

    def __init__(self, fraction: float = 0.25, ratio: float = 3.3, always: bool = False) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"occlude: fraction must be above 0 and up to 1, got {fraction}")
        if ratio < 1:
            raise ConfigError(f"occlude: ratio must be at least 1, got {ratio}")
        self.fraction = fraction
        self.ratio = ratio
        self.always = always

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        height, width = image.shape[2:]
        area = self.fraction * height * width
        aspect = torch.exp((2 * draws[:, 0] - 1) * math.log(self.ratio))
        # Both sides must fit: the height is at most the image's, and at least what the full width leaves to it.
        tall = (area * aspect).sqrt().clamp(min=area / width, max=height)
        rows = tall.round().clamp(min=1)
        columns = (area / rows).round().clamp(min=1, max=width)
        top = (draws[:, 1] * (height - rows + 1)).floor().clamp(min=0)
        left = (draws[:, 2] * (width - columns + 1)).floor().clamp(min=0)
        inside = interval_mask(height, top, top + rows)[:, :, None] & interval_mask(width, left, left + columns)[:, None, :]
        return image.masked_fill(inside[:, None], 0.0)


@AUGMENTATIONS.register("half", version=1)
class Half(PostNormalizeAugmentation):
    """Keeps one half of the normalised image and sets the other to 0: two halves are two modalities of one sample.

    Evaluation does it too: a network for one half is measured on that half. Of an odd number of columns or rows the
    middle one belongs to the right, and to the lower half.

    Args:
        side: which half stays.
    """

    always = True

    def __init__(self, side: Literal["left", "right", "upper", "lower"] = "left") -> None:
        self.side = side

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        along = 3 if self.side in ("left", "right") else 2
        size = image.shape[along]
        first = torch.arange(size, device=image.device) < size // 2
        hidden = ~first if self.side in ("left", "upper") else first
        return image.masked_fill(hidden if along == 3 else hidden[:, None], 0.0)
