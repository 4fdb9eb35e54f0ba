"""Base classes of augmentations, which change a batch of images on the device.

Random parameters are drawn for each sample and epoch. Each kind of augmentation has a base class.
`kdbench.data.augment.view` applies the kinds in this order, and augmentations of one kind in the order of the recipe:

- `DecodeTimeAugmentation` selects the part of an image file that is decoded, for datasets that are not held in
  memory;
- `GeometricAugmentation` moves pixels. All augmentations of this kind in a view are composed into one gather
  operation;
- `ColorAugmentation` changes colours in [0, 1];
- then the image is normalised;
- `PostNormalizeAugmentation` changes the normalised image (cutout, noise), before or after mixing, as the recipe
  orders them;
- `MixingAugmentation` blends a sample with another sample of the batch. A view has at most one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdbench.registry import AUGMENTATIONS

OUTSIDE = -1
"""Row or column number of a pixel outside the image. The value of such a pixel is zero."""


class Augmentation:
    """Base class of all augmentations.

    Attributes:
        num_params: number of random parameters per sample and epoch.
        always: whether the augmentation is also applied in evaluation, with equal parameters every time.
        extra_field: name of a field that the augmentation adds to the batch (see `extra_field_values`); empty: no
            field.
    """

    num_params = 0
    always = False
    extra_field = ""
    registered_name: str

    def sample_params(self, samples: int, seed: int) -> Tensor:
        """Draws the random parameters of one epoch, float32 (samples, num_params). By default, uniform in [0, 1)."""
        return torch.rand(samples, self.num_params, generator=torch.Generator().manual_seed(seed))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape (channels, height, width) of the output.

        Args:
            shape: shape of the input, (channels, height, width).

        Raises:
            ConfigError: the augmentation does not fit images of this shape.
        """
        return shape

    def extra_field_values(self, params: Tensor) -> Tensor:
        """Returns the values of the batch field `extra_field`, such as the number of quarter turns, int64 (batch,).

        Args:
            params: random parameters, float32 (batch, num_params).
        """
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        """Returns the number of different outputs for one input, or None if it is infinite or unknown.

        If it is a number, the output depends only on the input and on `variant_id`. The outputs of a network on this
        augmentation can then be cached.

        Args:
            shape: shape of the input, (channels, height, width).
        """
        return None if self.num_params else 1

    def variant_id(self, params: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns, for each sample, the number of the output (variant) that the parameters produce, int64 (batch,).

        Args:
            params: random parameters, float32 (batch, num_params).
            shape: shape of the input, (channels, height, width).

        Returns:
            Numbers in [0, num_variants).
        """
        return torch.zeros(len(params), dtype=torch.int64, device=params.device)


@AUGMENTATIONS.register("same", version=1)
class SameView(Augmentation):
    """First applies all augmentations of another view, with the same random parameters.

    `corrupted: {from: image, then: [noise]}` is short for `corrupted: [{type: same, view: image}, noise]`. The views
    `image` and `corrupted` are then cropped, flipped and mixed in the same way, and noise is added to `corrupted`.
    Without `same`, each view draws its own random parameters.

    Args:
        view: name of the view whose augmentations are applied.
    """

    def __init__(self, view: str) -> None:
        self.view = view


class GeometricAugmentation(Augmentation):
    """Base class of augmentations that move pixels.

    A subclass maps the rows and columns of the output to rows and columns of the input.
    """

    def map_coordinates(self, ys: Tensor, xs: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Composes the coordinate maps of the previous augmentations with the map of this augmentation.

        Args:
            ys: int64 (batch, height), row of the stored image for each row before this augmentation, or OUTSIDE.
            xs: int64 (batch, width), column of the stored image for each column before this augmentation, or OUTSIDE.
            params: random parameters, float32 (batch, num_params).

        Returns:
            `ys` (batch, new height) and `xs` (batch, new width) after this augmentation.
        """
        raise NotImplementedError

    def map_evaluation_coordinates(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Like `map_coordinates`, but for evaluation, without random parameters. By default, no pixel is moved."""
        return ys, xs


class ColorAugmentation(Augmentation):
    """Base class of augmentations that change colours before the image is normalised."""

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        """Returns the image with changed colours.

        Args:
            image: (batch, channels, height, width) in [0, 1].
            params: random parameters, float32 (batch, num_params).
        """
        raise NotImplementedError


class PostNormalizeAugmentation(Augmentation):
    """Base class of augmentations that change the image after its normalisation, such as cutout and noise."""

    def apply(self, image: Tensor, params: Tensor) -> Tensor:
        """Returns the changed image.

        Args:
            image: (batch, channels, height, width), normalised.
            params: random parameters, float32 (batch, num_params).
        """
        raise NotImplementedError


class MixingAugmentation(Augmentation):
    """Base class of augmentations that blend each sample with another sample of the same batch, its partner."""

    def mix(self, image: Tensor, partner: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Blends each sample with its partner.

        Args:
            image, partner: images of the samples and of their partners, (batch, channels, height, width), normalised.
            params: random parameters, float32 (batch, num_params).

        Returns:
            The blend, and the weight of the sample's own label, float (batch,).
        """
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return None


class DecodeTimeAugmentation(Augmentation):
    """Base class of augmentations that select the part of an image file to decode and resize."""

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Selects a box (left, upper, right, lower) in pixels of an image.

        Args:
            width, height: size of the image in pixels.
            rng: random generator of the sample.
        """
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return None
