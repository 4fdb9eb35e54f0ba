"""Augmentations: per sample, batched, on the device, from draws that belong to the sample and the epoch.

Each kind is one base class; `kdbench.data.augment.view` runs them in this order, the kinds in the order of the recipe:

- `Geometric` moves pixels. All of a view are composed into one pair of coordinate maps, so the image is read once;
- `Colouring` changes colours, in [0, 1];
- then the image is normalised;
- `Masking` changes the normalised image in place of pixels (cutout, noise); what stands after the mixing in the recipe
  comes after it;
- `Mixing` blends a sample with another one of the batch; at most one per view.
- `Reading` chooses what is decoded at all, and so works on datasets that are read from files in every epoch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdbench.registry import AUGMENTATIONS

OUTSIDE = -1
"""A coordinate that lies in the padding, where pixels are zero."""


class Augmentation:
    """Base of all augmentations.

    columns: how many numbers each sample draws in an epoch.
    always: whether evaluation does it too, with draws that are the same every time.
    tells: the field of the batch that `told` gives; empty for none.
    """

    num_params = 0
    always = False
    extra_field = ""
    registered_name: str

    def sample_params(self, samples: int, seed: int) -> Tensor:
        """Returns an epoch's draws, float32 (samples, columns), uniform in [0, 1) unless the class says otherwise."""
        return torch.rand(samples, self.num_params, generator=torch.Generator().manual_seed(seed))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape (channels, height, width) that comes out.

        Raises:
            ConfigError: the augmentation does not fit images of this shape.
        """
        return shape

    def extra_field_values(self, draws: Tensor) -> Tensor:
        """Returns what was drawn as the field `tells`, int64 (batch,)."""
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        """Returns how many images it can make of one sample; None where they are not counted.

        Where they are, the image that comes out is a function of the image that goes in and of `code` alone, so that
        what a network gives for it can be kept.

        Args:
            shape: that goes in, (channels, height, width).
        """
        return None if self.num_params else 1

    def variant_id(self, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns which of its `variants` the draws give, int64 (batch,), from 0; where it draws nothing, 0."""
        return torch.zeros(len(draws), dtype=torch.int64, device=draws.device)


@AUGMENTATIONS.register("same", version=1)
class SameView(Augmentation):
    """First in a view: all that another view does to the sample, with the same draws.

    `corrupted: {from: image, then: [noise]}` is short for `corrupted: [{type: same, view: image}, noise]`: both views
    are cropped and flipped (and mixed) alike, and then one of them is corrupted. Views without it draw apart.

    Args:
        view: the other view.
    """

    def __init__(self, view: str) -> None:
        self.view = view


class GeometricAugmentation(Augmentation):
    """Moves pixels: maps rows and columns of the output to those of the input."""

    def map_coordinates(self, ys: Tensor, xs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Composes this move after those before it.

        Args:
            ys: int64 (batch, height), the source row of each row so far, or OUTSIDE.
            xs: int64 (batch, width), likewise.
            draws: float32 (batch, columns).
        """
        raise NotImplementedError

    def map_evaluation_coordinates(self, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """What evaluation does in its place."""
        return ys, xs


class ColorAugmentation(Augmentation):
    """Changes colours before the image is normalised."""

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        """Args: image (batch, channels, height, width) in [0, 1]; draws float32 (batch, columns)."""
        raise NotImplementedError


class PostNormalizeAugmentation(Augmentation):
    """Changes the normalised image."""

    def apply(self, image: Tensor, draws: Tensor) -> Tensor:
        """Args: image (batch, channels, height, width); draws float32 (batch, columns)."""
        raise NotImplementedError


class MixingAugmentation(Augmentation):
    """Blends each sample with a partner of the same batch."""

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the blend and the share of the own label, float (batch,)."""
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return None


class DecodeTimeAugmentation(Augmentation):
    """Chooses the part of the undecoded image that is read."""

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns left, upper, right, lower in pixels of an image of the given size."""
        raise NotImplementedError

    def num_variants(self, shape: tuple[int, ...]) -> int | None:
        return None
