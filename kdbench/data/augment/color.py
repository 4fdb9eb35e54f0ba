"""Colour augmentations, which are applied before the image is normalised."""

from __future__ import annotations

from torch import Tensor

from kdbench.data.augment.base import ColorAugmentation
from kdbench.errors import ConfigError
from kdbench.registry import AUGMENTATIONS


@AUGMENTATIONS.register("color", version=1)
class Color(ColorAugmentation):
    """Changes brightness, contrast and saturation at random, in this order, like torchvision's ColorJitter.

    Each factor is drawn uniformly from [max(0, 1 - x), 1 + x], where x is `brightness`, `contrast` or `saturation`.
    Results are clamped to [0, 1]. The saturation of grey images is not changed.

    Args:
        brightness: range x of the factor that multiplies all pixels.
        contrast: range x of the factor that multiplies the difference from the image's mean grey value.
        saturation: range x of the factor that multiplies the difference from each pixel's grey value.
    """

    num_params = 3

    def __init__(self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if value < 0:
                raise ConfigError(f"color: {name} must not be negative, got {value}")
        self.strengths = (brightness, contrast, saturation)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] not in (1, 3):
            raise ConfigError(f"color: needs images of 1 or 3 channels, these have {shape[0]}")
        return shape

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        brightness, contrast, saturation = (
            (low + params[:, k] * (1 + strength - low)).to(image.dtype).view(-1, 1, 1, 1)
            for k, strength in enumerate(self.strengths)
            for low in (max(0.0, 1 - strength),)
        )
        image = (image * brightness).clamp(0, 1)
        image = _blend(image, _gray(image).mean((1, 2, 3), keepdim=True), contrast)
        return image if image.shape[1] == 1 else _blend(image, _gray(image), saturation)


def _blend(image: Tensor, gray: Tensor, factor: Tensor) -> Tensor:
    return (factor * image + (1 - factor) * gray).clamp(0, 1)


def _gray(image: Tensor) -> Tensor:
    """Converts images to grey, (batch, 1, height, width), by the luma weights of ITU-R 601."""
    if image.shape[1] == 1:
        return image
    red, green, blue = image.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue
