"""Crops and resizes a batch of images of different sizes on the device, in a few operations.

Resizing is linear and separable, so a resized crop is the product of the image with two matrices, one for rows and
one for columns. The matrices contain the weights of PIL's bilinear filter. The filter is wider if an image shrinks
(antialiasing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.data.sampling.order import to_device

GROUP_ELEMENTS = 2**25
"""Maximum number of values in a group of images that are padded to one size (128 MiB of float32).

A larger image is a group by itself."""


@dataclass(frozen=True)
class CropRegion:
    """A region of an image: a box that is resized to `out_height` x `out_width`, and a square that is then cropped.

    Attributes:
        y, x, height, width: position and size of the box, in pixels of the image.
        out_height, out_width: size of the box after resizing.
        offset_y, offset_x: upper left corner of the square, in pixels of the resized box.
    """

    y: int
    x: int
    height: int
    width: int
    out_height: int
    out_width: int
    offset_y: int = 0
    offset_x: int = 0


def resample_crops(images: Sequence[Tensor], regions: Sequence[CropRegion], size: int) -> Tensor:
    """Crops and resizes one region of each image.

    The values differ by at most one level of 255 from PIL's `crop`, `resize(BILINEAR)` and `crop` in this order,
    because PIL rounds the weights of its filter.

    Args:
        images: images on one device, each uint8 (3, height, width).
        regions: region of each image.
        size: side of the cropped squares in pixels.

    Returns:
        Cropped squares, uint8 (images, 3, size, size), on the device of the images.
    """
    device = images[0].device
    result = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
    boxes = [i[:, r.y : r.y + r.height, r.x : r.x + r.width] for i, r in zip(images, regions, strict=True)]
    for numbers in _padding_groups(regions):
        group = [regions[number] for number in numbers]
        height, width = max(region.height for region in group), max(region.width for region in group)
        padded = torch.zeros(len(group), 3, height, width, dtype=torch.uint8, device=device)
        for row, (number, region) in enumerate(zip(numbers, group, strict=True)):
            padded[row, :, : region.height, : region.width].copy_(boxes[number])
        sizes = torch.tensor([(r.height, r.width, r.out_height, r.out_width, r.offset_y, r.offset_x) for r in group])
        heights, widths, out_heights, out_widths, offsets_y, offsets_x = to_device(sizes, device).unbind(1)
        row_weights = filter_weights(heights, out_heights, offsets_y, size, height)
        column_weights = filter_weights(widths, out_widths, offsets_x, size, width)
        # Columns first, rounded to integers before the rows, as in PIL.
        resized_columns = (padded.float() @ column_weights.transpose(1, 2)[:, None]).round_().clamp_(0, 255)
        resized = (row_weights[:, None] @ resized_columns).round_().clamp_(0, 255).to(torch.uint8)
        for row, number in enumerate(numbers):
            result[number].copy_(resized[row])
    return result


def filter_weights(lengths: Tensor, out_lengths: Tensor, offsets: Tensor, size: int, padded: int) -> Tensor:
    """Computes matrices that resize lines of pixels: the weight of each input pixel in each resized pixel.

    Args:
        lengths: int64 (batch,), number of pixels of each line.
        out_lengths: int64 (batch,), number of pixels of each line after resizing.
        offsets: int64 (batch,), index (in the resized line) of the first pixel that is computed.
        size: number of resized pixels that are computed.
        padded: length to which all input lines are padded. Padding has weight 0.

    Returns:
        Matrices, float32 (batch, size, padded). Each row sums to 1.
    """
    scale = lengths.double() / out_lengths.double()
    support = scale.clamp(min=1.0)[:, None, None]
    at = torch.arange(size, device=lengths.device)
    center = ((at + offsets[:, None]).double() + 0.5) * scale[:, None]
    pixel = torch.arange(padded, device=lengths.device)
    distance = (pixel.double() + 0.5 - center[:, :, None]).abs_() / support
    weights = (1.0 - distance).clamp_(min=0.0)
    weights = torch.where(pixel < lengths[:, None, None], weights, 0.0)
    return (weights / weights.sum(2, keepdim=True)).float()


def _padding_groups(regions: Sequence[CropRegion]) -> list[list[int]]:
    """Splits the numbers of the images into groups that are padded to one size, smallest images first."""
    order = sorted(range(len(regions)), key=lambda number: regions[number].height * regions[number].width)
    groups: list[list[int]] = []
    for number in order:
        candidate = [*groups[-1], number] if groups else []
        height = max((regions[n].height for n in candidate), default=0)
        width = max((regions[n].width for n in candidate), default=0)
        if candidate and 3 * len(candidate) * height * width <= GROUP_ELEMENTS:
            groups[-1] = candidate
        else:
            groups.append([number])
    return groups
