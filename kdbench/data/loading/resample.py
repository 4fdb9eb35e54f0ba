"""Cropping and resizing a batch of images of different sizes at once, on the device.

Resizing is linear and separable, so a crop that is resized is two matrix products with the image: one weighs its
columns, one its rows. The weights are those of PIL's bilinear filter, wider where an image shrinks (antialiasing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.data.sampling.order import to_device

GROUP_ELEMENTS = 2**25
"""Images are padded to one size in groups of at most so many values (128 MiB of float32); a larger one is alone."""


@dataclass(frozen=True)
class CropRegion:
    """What is read of an image: a box of its pixels, resized to `out_height` x `out_width`, and of that a square.

    top, left, height, width: the box. down, right: where in the resized box the square begins.
    """

    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int
    offset_y: int = 0
    offset_x: int = 0


def resample_crops(images: Sequence[Tensor], regions: Sequence[CropRegion], size: int) -> Tensor:
    """Reads a region of each image.

    The values are PIL's `crop`, `resize(BILINEAR)` and `crop`, up to one level of 255: PIL rounds its weights.

    Args:
        images: uint8 (3, height, width) each, all on one device.
        regions: one for each image.
        size: side of the squares.

    Returns:
        uint8 (images, 3, size, size), on their device.
    """
    device = images[0].device
    result = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
    cut = [i[:, r.top : r.top + r.height, r.left : r.left + r.width] for i, r in zip(images, regions, strict=True)]
    for members in _padding_groups(regions):
        height = max(regions[number].height for number in members)
        width = max(regions[number].width for number in members)
        padded = torch.zeros(len(members), 3, height, width, dtype=torch.uint8, device=device)
        for row, number in enumerate(members):
            own = regions[number]
            padded[row, :, : own.height, : own.width].copy_(cut[number])
        facts = [(r.height, r.width, r.out_height, r.out_width, r.offset_y, r.offset_x) for r in (regions[n] for n in members)]
        heights, widths, out_heights, out_widths, down, right = to_device(torch.tensor(facts), device).unbind(1)
        rows = filter_weights(heights, out_heights, down, size, height)
        columns = filter_weights(widths, out_widths, right, size, width)
        # Columns first, and whole levels in between, as PIL does it.
        between = (padded.float() @ columns.transpose(1, 2)[:, None]).round_().clamp_(0, 255)
        read = (rows[:, None] @ between).round_().clamp_(0, 255).to(torch.uint8)
        for row, number in enumerate(members):
            result[number].copy_(read[row])
    return result


def filter_weights(lengths: Tensor, outs: Tensor, starts: Tensor, size: int, padded: int) -> Tensor:
    """How much each pixel of a line counts in each pixel of the resized line.

    Args:
        lengths: int64 (batch,), pixels of each line. outs: of the resized line. starts: where the read part begins.
        size: pixels that are read of the resized line.
        padded: length to which all lines are padded; what lies beyond a line's own counts nothing.

    Returns:
        float32 (batch, size, padded); each row sums to 1.
    """
    scale = lengths.double() / outs.double()
    support = scale.clamp(min=1.0)[:, None, None]
    at = torch.arange(size, device=lengths.device)
    centre = ((at + starts[:, None]).double() + 0.5) * scale[:, None]
    pixel = torch.arange(padded, device=lengths.device)
    distance = (pixel.double() + 0.5 - centre[:, :, None]).abs_() / support
    found = (1.0 - distance).clamp_(min=0.0)
    found = torch.where(pixel < lengths[:, None, None], found, 0.0)
    return (found / found.sum(2, keepdim=True)).float()


def _padding_groups(regions: Sequence[CropRegion]) -> list[list[int]]:
    """Which images are padded to one size: of the smaller ones many, of a very large one that alone."""
    order = sorted(range(len(regions)), key=lambda number: regions[number].height * regions[number].width)
    groups: list[list[int]] = []
    for number in order:
        members = [*groups[-1], number] if groups else []
        height = max((regions[n].height for n in members), default=0)
        width = max((regions[n].width for n in members), default=0)
        if members and 3 * len(members) * height * width <= GROUP_ELEMENTS:
            groups[-1] = members
        else:
            groups.append([number])
    return groups
