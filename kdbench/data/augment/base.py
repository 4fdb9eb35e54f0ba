"""Base classes of augmentations: batched, on the device, from parameters drawn for each sample and epoch.

Each kind has a base class. `kdbench.data.augment.view` applies the kinds in this order, and augmentations of one kind
in the order of the recipe:

- `DecodeTimeAugmentation` selects the part of an image file that is decoded, for datasets that are not resident;
- `GeometricAugmentation` moves pixels. All of a view are composed into one pair of coordinate maps: one gather;
- `ColorAugmentation` changes colours in [0, 1];
- then the image is normalised;
- `PostNormalizeAugmentation` changes the normalised image (cutout, noise), before the mixing or after it, as in the
  recipe;
- `MixingAugmentation` blends a sample with another one of the batch; at most one for each view.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdbench.registry import AUGMENTATIONS

OUTSIDE = -1
"""Coordinate of a padding pixel, whose value is zero."""


class Augmentation:
    """Base of all augmentations.

    Attributes:
        num_params: random numbers for each sample and epoch.
        always: whether evaluation applies it too, with the same parameters every time.
        extra_field: field of the batch for `extra_field_values`; empty for none.
    """

    num_params = 0
    always = False
    extra_field = ""
    registered_name: str

    def sample_params(self, samples: int, seed: int) -> Tensor:
        """Draws the parameters of one epoch, float32 (samples, num_params), uniform in [0, 1) by default."""
        return torch.rand(samples, self.num_params, generator=torch.Generator().manual_seed(seed))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape (channels, height, width) of the output.

        Args:
            shape: of the input, (channels, height, width).

        Raises:
            ConfigError: the augmentation does not fit images of this shape.
        """
        return shape

    def extra_field_values(self, params: Tensor) -> Tensor:
        """Returns the values of the field `extra_field`, int64 (batch,).

        Args:
            params: float32 (batch, num_params).
        """
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        """Returns the number of different outputs for one input; None where there is no finite list of them.

        With a number, the output is a function of the input and of `variant_id`, so a network's outputs can be cached.

        Args:
            shape: of the input, (channels, height, width).
        """
        return None if self.num_params else 1

    def variant_id(self, params: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the variant that the parameters select, int64 (batch,), in [0, num_variants)."""
        return torch.zeros(len(params), dtype=torch.int64, device=params.device)


@AUGMENTATIONS.register("same", version=1)
class SameView(Augmentation):
    """Applies the augmentations of another view first, with the same parameters.

    `corrupted: {from: image, then: [noise]}` is short for `corrupted: [{type: same, view: image}, noise]`: both views
    are cropped, flipped and mixed alike, and then one of them is corrupted. Other views have parameters of their own.

    Args:
        view: the other view.
    """

    def __init__(self, view: str) -> None:
        self.view = view


class GeometricAugmentation(Augmentation):
    """Moves pixels: maps rows and columns of the output to rows and columns of the input."""

    def map_coordinates(self, ys: Tensor, xs: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Composes this move with the previous ones.

        Args:
            ys: int64 (batch, height), input row of each current row, or OUTSIDE.
            xs: int64 (batch, width), input column of each current column, or OUTSIDE.
            params: float32 (batch, num_params).

        Returns:
            The new `ys` (batch, new height) and `xs` (batch, new width).
        """
        raise NotImplementedError

    def map_evaluation_coordinates(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Composes the deterministic move of evaluation with the previous ones; none by default."""
        return ys, xs


class ColorAugmentation(Augmentation):
    """Changes colours before the image is normalised."""

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        """Returns the changed image.

        Args:
            image: (batch, channels, height, width) in [0, 1].
            params: float32 (batch, num_params).
        """
        raise NotImplementedError


class PostNormalizeAugmentation(Augmentation):
    """Changes the normalised image."""

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        """Returns the changed image.

        Args:
            image: (batch, channels, height, width), normalised.
            params: float32 (batch, num_params).
        """
        raise NotImplementedError


class MixingAugmentation(Augmentation):
    """Blends each sample with a partner of the same batch."""

    def mix(self, image: Tensor, partner: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the blend and the weight of the sample's own label, float (batch,).

        Args:
            image, partner: (batch, channels, height, width), normalised.
            params: float32 (batch, num_params).
        """
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return None


class DecodeTimeAugmentation(Augmentation):
    """Selects the part of an image file that is decoded and resized."""

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns left, upper, right, lower in pixels of an image of size `width` x `height`."""
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return None
