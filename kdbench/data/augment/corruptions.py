"""Corruptions: augmentations that degrade the images of a view, usually the student's view."""

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

_WORD_MASK = 0xFFFFFFFF


_UNIFORM_BITS = 23
"""Number of random bits of a uniform number (k + 1/2) / 2**23, which float32 represents without rounding to 0 or 1."""


def _hash_words(words: Tensor) -> Tensor:
    """Hashes 32-bit words that are stored as int64. No intermediate product exceeds 63 bits."""
    words = ((words ^ (words >> 16)) * 0x45D9F3B) & _WORD_MASK
    words = ((words ^ (words >> 16)) * 0x45D9F3B) & _WORD_MASK
    return words ^ (words >> 16)


def hashed_normals(params: Tensor, count: int) -> Tensor:
    """Returns standard normal numbers, float32 (batch, count), as a deterministic function of two numbers per row.

    Stored noise would need more memory than the dataset. Therefore each number is a hash of its position and of the
    row's parameters, mapped by the inverse of the normal distribution function. Numbers are within 5.3 standard
    deviations.

    Args:
        params: float32 (batch, 2), uniform in [0, 1).
        count: number of values per row.
    """
    first, second = ((params[:, k : k + 1] * 2**24).long() for k in (0, 1))
    key = _hash_words(first) ^ second
    second_key = _hash_words(_hash_words(second) ^ first)
    position = torch.arange(count, device=params.device) * 0x9E3779B1
    words = _hash_words(_hash_words((position + _hash_words(key)) & _WORD_MASK) ^ second_key)
    uniform = ((words >> (32 - _UNIFORM_BITS)).float() + 0.5) / 2**_UNIFORM_BITS
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


@AUGMENTATIONS.register("noise", version=1)
class GaussianNoise(PostNormalizeAugmentation):
    """Adds Gaussian noise to the normalised image. The noise is independent for every pixel, sample and epoch.

    Args:
        std: standard deviation of the noise, in units of the normalised image. (Pixels of a normalised dataset have a
            standard deviation of about 1.)
        always: whether noise is also added in evaluation. Every evaluation then adds the same noise.
    """

    num_params = 2

    def __init__(self, std: float = 0.5, always: bool = False) -> None:
        if std < 0:
            raise ConfigError(f"noise: std must not be negative, got {std}")
        self.std = std
        self.always = always

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        count = math.prod(image.shape[1:])
        return image + self.std * hashed_normals(params, count).view(image.shape).to(image.dtype)


@AUGMENTATIONS.register("blur", version=1)
class Blur(PostNormalizeAugmentation):
    """Blurs the normalised image with a Gaussian kernel. Border pixels are repeated outside the image.

    Args:
        sigma: standard deviation of the kernel in pixels. The kernel extends 3 sigma to each side.
        p: probability that a sample is blurred, in [0, 1].
        always: whether images are also blurred in evaluation. Every evaluation then blurs the same samples.
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

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        reach = math.ceil(3 * self.sigma)
        at = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
        kernel = torch.exp(-(at**2) / (2 * self.sigma**2))
        kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, -1)
        padded = F.pad(image, (reach, reach, reach, reach), mode="replicate")
        blurred = F.conv2d(padded, kernel[:, :, None, :], groups=image.shape[1])
        blurred = F.conv2d(blurred, kernel[:, :, :, None], groups=image.shape[1])
        return torch.where(params[:, 0].view(-1, 1, 1, 1) < self.p, blurred, image)


@AUGMENTATIONS.register("low_resolution", version=1)
class LowResolution(PostNormalizeAugmentation):
    """Replaces squares of pixels by their mean. The image loses detail but keeps its size.

    The augmentation is also applied in evaluation, so that a network trained on low resolution is evaluated on it.

    Args:
        factor: side of the squares in pixels. It must divide height and width.
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

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        small = F.avg_pool2d(image, self.factor)
        return F.interpolate(small, scale_factor=float(self.factor), mode="nearest")


@AUGMENTATIONS.register("occlude", version=1)
class Occlude(PostNormalizeAugmentation):
    """Covers one rectangle of the normalised image with zeros: Zhong et al. 2020 (AAAI), https://arxiv.org/abs/1708.04896

    The rectangle is entirely inside the image, unlike the square of `cutout`. Its height divided by its width is
    log-uniform in [1 / ratio, ratio], limited by the size of the image. Differences from the paper: the area is a
    parameter (in the paper it is random), and the rectangle is filled with the dataset's mean colour (in the paper
    with noise).

    Args:
        fraction: fraction of the image's area that is covered, in (0, 1].
        ratio: maximum of height / width and of width / height, at least 1.
        always: whether images are also occluded in evaluation. Every evaluation then covers the same rectangles.
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

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        height, width = image.shape[2:]
        area = self.fraction * height * width
        aspect = torch.exp((2 * params[:, 0] - 1) * math.log(self.ratio))
        # The height is at least area / width, because the rectangle cannot be wider than the image.
        exact_height = (area * aspect).sqrt().clamp(min=area / width, max=height)
        rows = exact_height.round().clamp(min=1)
        columns = (area / rows).round().clamp(min=1, max=width)
        y0 = (params[:, 1] * (height - rows + 1)).floor().clamp(min=0)
        x0 = (params[:, 2] * (width - columns + 1)).floor().clamp(min=0)
        row_mask, column_mask = interval_mask(height, y0, y0 + rows), interval_mask(width, x0, x0 + columns)
        return image.masked_fill((row_mask[:, :, None] & column_mask[:, None, :])[:, None], 0.0)


@AUGMENTATIONS.register("half", version=1)
class Half(PostNormalizeAugmentation):
    """Keeps one half of the normalised image and sets the other half to 0, so that two halves serve as two modalities.

    The augmentation is also applied in evaluation, so that a network for one half is evaluated on that half. If the
    number of columns or rows is odd, the middle one belongs to the right or lower half.

    Args:
        side: half that is kept.
    """

    always = True

    def __init__(self, side: Literal["left", "right", "upper", "lower"] = "left") -> None:
        self.side = side

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        dim = 3 if self.side in ("left", "right") else 2
        size = image.shape[dim]
        first_half = torch.arange(size, device=image.device) < size // 2
        mask = ~first_half if self.side in ("left", "upper") else first_half
        return image.masked_fill(mask if dim == 3 else mask[:, None], 0.0)
