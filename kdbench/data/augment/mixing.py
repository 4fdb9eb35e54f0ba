"""Augmentations that mask or mix images: cutout, mixup, cutmix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdbench.data.augment.base import MixingAugmentation, PostNormalizeAugmentation
from kdbench.data.augment.geometric import uniform_integers
from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTATIONS


def interval_mask(length: int, low: Tensor, high: Tensor) -> Tensor:
    """Returns bool (batch, length): low <= position < high."""
    at = torch.arange(length, device=low.device)
    return (at >= low[:, None]) & (at < high[:, None])


@AUGMENTATIONS.register("cutout", version=1)
class Cutout(PostNormalizeAugmentation):
    """Sets one square of the normalised image to zero: DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552

    The centre is uniform over the image's pixels; what sticks out of the image is lost.

    Args:
        size: side of the square, in pixels (16 for CIFAR-10 and 8 for CIFAR-100 in the paper).
    """

    num_params = 2

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"cutout: size must be at least 1, got {size}")
        self.size = size

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        height, width = image.shape[2:]
        top = uniform_integers(draws[:, 0], height) - self.size // 2
        left = uniform_integers(draws[:, 1], width) - self.size // 2
        rows = interval_mask(height, top, top + self.size)
        columns = interval_mask(width, left, left + self.size)
        return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return shape[1] * shape[2]

    def variant_id(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        return uniform_integers(draws[:, 0], shape[1]) * shape[2] + uniform_integers(draws[:, 1], shape[2])


def _beta(alpha: float, samples: int, seed: int) -> Tensor:
    """Returns float32 (samples, 1) from Beta(alpha, alpha)."""
    drawn = np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha, samples)
    return torch.from_numpy(drawn).float()[:, None]


@AUGMENTATIONS.register("mixup", version=1)
class Mixup(MixingAugmentation):
    """Blends two images and their labels: Zhang et al. 2018 (ICLR), https://arxiv.org/abs/1710.09412

    x = m * x_own + (1 - m) * x_partner with m from Beta(alpha, alpha), one m per sample; the partner is the row before
    in the global batch. The batch gains `label_other` (the partner's label) and `mix` (m).

    Args:
        alpha: above 0; 0.2 for ImageNet and 1 for CIFAR in the paper.
        fraction: of the samples that are mixed, in [0, 1]; each one is with this probability, the others keep m = 1
            ("partial mixup" in the study of mixup in distillation, https://arxiv.org/abs/2211.03946).
    """

    num_params = 1

    def __init__(self, alpha: float = 1.0, fraction: float = 1.0) -> None:
        if alpha <= 0:
            raise ConfigError(f"mixup: alpha must be above 0, got {alpha}")
        if not 0 <= fraction <= 1:
            raise ConfigError(f"mixup: fraction must be in [0, 1], got {fraction}")
        self.alpha = alpha
        self.fraction = fraction

    def sample_params(self, samples: int, seed: int) -> Tensor:
        own = _beta(self.alpha, samples, seed)
        if self.fraction == 1:
            return own
        mixed = torch.rand(samples, 1, generator=torch.Generator().manual_seed(seed)) < self.fraction
        return torch.where(mixed, own, 1.0)

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        share = draws[:, 0].to(image.dtype)
        weight = share.view(-1, 1, 1, 1)
        return image * weight + partner * (1 - weight), share


@AUGMENTATIONS.register("cutmix", version=1)
class Cutmix(MixingAugmentation):
    """Pastes a box of another image: Yun et al. 2019 (ICCV), https://arxiv.org/abs/1905.04899

    The box has the share 1 - m of the area, m from Beta(alpha, alpha), its sides the proportions of the image, its
    centre uniform; what sticks out is lost. `mix` is the share of the own image that is left, counted in pixels;
    `label_other` is the label of the partner, the row before in the global batch.

    Args:
        alpha: above 0; 1 in the paper.
    """

    num_params = 3

    def __init__(self, alpha: float = 1.0) -> None:
        if alpha <= 0:
            raise ConfigError(f"cutmix: alpha must be above 0, got {alpha}")
        self.alpha = alpha

    def sample_params(self, samples: int, seed: int) -> Tensor:
        return torch.cat([_beta(self.alpha, samples, seed), super().sample_params(samples, seed)[:, 1:]], dim=1)

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[2:]
        side = (1 - draws[:, 0]).clamp(min=0).sqrt()
        half_height, half_width = (side * height).long() // 2, (side * width).long() // 2
        centre_y, centre_x = uniform_integers(draws[:, 1], height), uniform_integers(draws[:, 2], width)
        rows = interval_mask(height, centre_y - half_height, centre_y + half_height)
        columns = interval_mask(width, centre_x - half_width, centre_x + half_width)
        area = rows.sum(1) * columns.sum(1)
        box = (rows[:, :, None] & columns[:, None, :])[:, None]
        return torch.where(box, partner, image), 1 - area.to(image.dtype) / (height * width)
