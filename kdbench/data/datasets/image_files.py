"""Class folders of image files: listing, decoding, resizing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageListing:
    """The images of one split's folder.

    classes: names of the class folders, sorted.
    paths: relative to the folder, with `/`; by class, then by name.
    labels: the class of each path.
    """

    folder: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def absolute_path(self, number: int) -> Path:
        return self.folder / self.paths[number]

    def fingerprint(self, *, times: bool = True) -> str:
        """Returns a digest of names, sizes and (unless times is False) modification times; no file is opened."""
        digest = hashlib.sha256()
        for path in self.paths:
            status = os.stat(self.folder / path)
            digest.update(
                f"{path}\0{status.st_size}\0{status.st_mtime_ns if times else ''}\n".encode("utf-8", "replace")
            )
        return digest.hexdigest()


def class_folder_names(folder: Path) -> list[str]:
    """Returns the names of the class folders in `folder`, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def list_folder(folder: Path) -> ImageListing:
    """Lists the images of `folder`/<class>/**.

    Raises:
        DataError: there is no class folder, or one without images.
    """
    classes = class_folder_names(folder)
    if not classes:
        raise DataError(f"{folder} has no class folders; images are expected in {folder}/<class>/")
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = sorted(_images(folder / name, name))
        if not found:
            empty.append(name)
        paths += found
        labels += [label] * len(found)
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"{folder}: no images in class {shown}; put some there or remove the folder. "
            f"Files that are read end in {', '.join(SUFFIXES)}."
        )
    return ImageListing(folder, classes, paths, labels)


def _images(folder: Path, prefix: str) -> list[str]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _images(Path(entry.path), f"{prefix}/{entry.name}")
            elif entry.name.lower().endswith(SUFFIXES):
                found.append(f"{prefix}/{entry.name}")
    return found


def read_image(path: Path | str) -> Image.Image:
    """Returns the image, decoded, as RGB.

    Raises:
        DataError: it cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read as an image ({reason}). Replace it or remove it.") from None


def resize_and_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resizes the shorter side to `resize` (bilinear, antialiased), then cuts out the central square of side `size`.

    The same pixels as torchvision's Resize and CenterCrop on PIL images, for size <= resize.
    """
    (width, height), left, top = center_crop_geometry(*image.size, resize, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) == (size, size):
        return image
    return image.crop((left, top, left + size, top + size))


def center_crop_geometry(width: int, height: int, resize: int, size: int) -> tuple[tuple[int, int], int, int]:
    """Returns the width and height of an image whose shorter side is resized, and where its central square begins.

    Rounded as torchvision's Resize and CenterCrop.
    """
    if min(width, height) != resize:
        if width <= height:
            width, height = resize, int(resize * height / width)
        else:
            width, height = int(resize * width / height), resize
    return (width, height), round((width - size) / 2.0), round((height - size) / 2.0)


def to_channels_first(image: Image.Image) -> np.ndarray:
    """Returns uint8 (3, height, width)."""
    return np.asarray(image).transpose(2, 0, 1)


def decode_images(listing: ImageListing, convert: Callable[[Image.Image, Path], Image.Image], size: int) -> Tensor:
    """Decodes every image of the listing; returns uint8 (samples, 3, size, size).

    Args:
        convert: brings an image (and its path, for messages) to size x size.

    Raises:
        DataError: a file cannot be read.
    """
    images = np.empty((len(listing), 3, size, size), np.uint8)

    def fill(number: int) -> None:
        path = listing.absolute_path(number)
        images[number] = to_channels_first(convert(read_image(path), path))

    # PIL decodes in parallel, but on small files the threads only wait for each other.
    small = os.path.getsize(listing.absolute_path(0)) < 32768
    with ThreadPoolExecutor(1 if small else min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(len(listing))):
            pass  # raises the first error
    return torch.from_numpy(images)
