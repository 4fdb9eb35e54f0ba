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
    """Returns a mask, bool (batch, length), that is True at the positions with low <= position < high.

    Args:
        length: number of positions.
        low, high: bounds for each row, (batch,).
    """
    at = torch.arange(length, device=low.device)
    return (at >= low[:, None]) & (at < high[:, None])


@AUGMENTATIONS.register("cutout", version=1)
class Cutout(PostNormalizeAugmentation):
    """Sets one square of the normalised image to zero: DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552

    The center is uniform over the image's pixels. A square that exceeds the image is cut off at the border.

    Args:
        size: side of the square in pixels. The paper uses 16 for CIFAR-10 and 8 for CIFAR-100.
    """

    num_params = 2

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"cutout: size must be at least 1, got {size}")
        self.size = size

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        height, width = image.shape[2:]
        y0 = uniform_integers(params[:, 0], height) - self.size // 2
        x0 = uniform_integers(params[:, 1], width) - self.size // 2
        rows = interval_mask(height, y0, y0 + self.size)
        columns = interval_mask(width, x0, x0 + self.size)
        return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return shape[1] * shape[2]

    def variant_id(self, params: Tensor, shape: tuple[int, ...]) -> Tensor:
        return uniform_integers(params[:, 0], shape[1]) * shape[2] + uniform_integers(params[:, 1], shape[2])


def _sample_beta(alpha: float, samples: int, seed: int) -> Tensor:
    """Draws from the distribution Beta(alpha, alpha), float32 (samples, 1)."""
    values = np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha, samples)
    return torch.from_numpy(values).float()[:, None]


@AUGMENTATIONS.register("mixup", version=1)
class Mixup(MixingAugmentation):
    r"""Blends two images and their labels: Zhang et al. 2018 (ICLR), https://arxiv.org/abs/1710.09412

    .. math:: x = m \, x_\text{own} + (1 - m) \, x_\text{partner}, \quad m \sim \mathrm{Beta}(\alpha, \alpha)

    Each sample has its own m. Its partner is the preceding row of the global batch. The fields `label_other` (the
    partner's label) and `mix` (m) are added to the batch.

    Args:
        alpha: parameter of the Beta distribution, above 0. The paper uses 0.2 for ImageNet and 1 for CIFAR.
        fraction: probability that a sample is mixed, in [0, 1]. Unmixed samples have m = 1 ("partial mixup" in the
            study of mixup in distillation, https://arxiv.org/abs/2211.03946).
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
        weights = _sample_beta(self.alpha, samples, seed)
        if self.fraction == 1:
            return weights
        mixed = torch.rand(samples, 1, generator=torch.Generator().manual_seed(seed)) < self.fraction
        return torch.where(mixed, weights, 1.0)

    def mix(self, image: Tensor, partner: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        label_weight = params[:, 0].to(image.dtype)
        weight = label_weight.view(-1, 1, 1, 1)
        return image * weight + partner * (1 - weight), label_weight


@AUGMENTATIONS.register("cutmix", version=1)
class Cutmix(MixingAugmentation):
    """Pastes a box of another image: Yun et al. 2019 (ICCV), https://arxiv.org/abs/1905.04899

    The box covers the fraction 1 - m of the area, where m is drawn from Beta(alpha, alpha). It has the image's aspect
    ratio and a uniform center, and is cut off at the image's border. The other image (partner) is the preceding row
    of the global batch. Two fields are added to the batch: `mix` (the fraction of the sample's own pixels that
    remain) and `label_other` (the partner's label).

    Args:
        alpha: parameter of the Beta distribution, above 0. The paper uses 1.
    """

    num_params = 3

    def __init__(self, alpha: float = 1.0) -> None:
        if alpha <= 0:
            raise ConfigError(f"cutmix: alpha must be above 0, got {alpha}")
        self.alpha = alpha

    def sample_params(self, samples: int, seed: int) -> Tensor:
        centers = super().sample_params(samples, seed)[:, 1:]
        return torch.cat([_sample_beta(self.alpha, samples, seed), centers], dim=1)

    def mix(self, image: Tensor, partner: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[2:]
        side = (1 - params[:, 0]).clamp(min=0).sqrt()
        half_height, half_width = (side * height).long() // 2, (side * width).long() // 2
        center_y, center_x = uniform_integers(params[:, 1], height), uniform_integers(params[:, 2], width)
        rows = interval_mask(height, center_y - half_height, center_y + half_height)
        columns = interval_mask(width, center_x - half_width, center_x + half_width)
        area = rows.sum(1) * columns.sum(1)
        box = (rows[:, :, None] & columns[:, None, :])[:, None]
        return torch.where(box, partner, image), 1 - area.to(image.dtype) / (height * width)
