"""Image files in class folders: listing, decoding, resizing."""

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
    """The list of images in the folder of one split.

    Attributes:
        folder: folder of the split, which contains one folder per class.
        classes: names of the class folders, sorted.
        paths: paths of the images relative to `folder`, with `/`, sorted by class and name.
        labels: class number of each path.
    """

    folder: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def absolute_path(self, index: int) -> Path:
        """Returns the path of the image with this index, including the folder."""
        return self.folder / self.paths[index]

    def fingerprint(self, *, times: bool = True) -> str:
        """Returns a digest of names and sizes of the files. No file is opened.

        Args:
            times: whether modification times are also included.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            status = os.stat(self.folder / path)
            digest.update(
                f"{path}\0{status.st_size}\0{status.st_mtime_ns if times else ''}\n".encode("utf-8", "replace")
            )
        return digest.hexdigest()


def class_folder_names(folder: Path) -> list[str]:
    """Returns the sorted names of the class folders in `folder`.

    Raises:
        DataError: a name is not valid UTF-8, so it cannot be written into results and figures.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _target(entry).is_dir())
    for name in names:
        printable = name.encode("utf-8", "backslashreplace").decode()
        if printable != name:
            raise DataError(f"{folder}: the name of the folder {printable} is not valid UTF-8; rename it")
    return names


def list_folder(folder: Path) -> ImageListing:
    """Lists the images in the class folders of `folder`, including their subfolders.

    Raises:
        DataError: there is no class folder, a class folder has no images, or an image is not a regular file.
    """
    classes = class_folder_names(folder)
    if not classes:
        raise DataError(f"{folder} has no class folders; images are expected in {folder}/<class>/")
    paths: list[str] = []
    labels: list[int] = []
    empty_classes = []
    for label, name in enumerate(classes):
        class_paths = sorted(_list_images(folder / name, name, (_inode(folder),)))
        if not class_paths:
            empty_classes.append(name)
        paths += class_paths
        labels += [label] * len(class_paths)
    if empty_classes:
        names = ", ".join(empty_classes[:5])
        names += f" and {len(empty_classes) - 5} more" if len(empty_classes) > 5 else ""
        raise DataError(
            f"{folder}: no images in class {names}; add some or remove the folder. "
            f"Image files end in {', '.join(SUFFIXES)}."
        )
    return ImageListing(folder, classes, paths, labels)


def _list_images(folder: Path, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> list[str]:
    """Lists the images of a folder and its subfolders, as paths that begin with `prefix`.

    Args:
        ancestors: inodes of the parent folders, by which a loop of links is detected.
    """
    inode = _inode(folder)
    if inode in ancestors:
        raise DataError(f"{folder} is a link to a folder that contains it; remove the link")
    paths = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            target = _target(entry)
            if target.is_dir():
                paths += _list_images(Path(entry.path), f"{prefix}/{entry.name}", (*ancestors, inode))
            elif entry.name.lower().endswith(SUFFIXES):
                # A named pipe must not be opened: that waits for a writer.
                if not target.is_file():
                    kind = "not a regular file" if os.path.exists(entry.path) else "a link without a target"
                    raise DataError(f"{entry.path} is {kind}; replace it or remove it")
                paths.append(f"{prefix}/{entry.name}")
    return paths


def _target(entry: os.DirEntry[str]) -> os.DirEntry[str] | Path:
    """Returns an object with `is_dir` and `is_file` for a directory entry: the entry, or a Path for a symbolic link.

    For a link to itself these methods of a Path return False, whereas those of `os.DirEntry` raise OSError.
    """
    return Path(entry.path) if entry.is_symlink() else entry


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def read_image(path: Path | str) -> Image.Image:
    """Reads an image file and converts the image to RGB.

    Raises:
        DataError: the file cannot be read. The message names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read as an image ({reason}). Replace it or remove it.") from None


def resize_and_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resizes the shorter side to `resize` (bilinear, antialiased), then crops the central square of side `size`.

    For size <= resize, the pixels equal those of torchvision's Resize and CenterCrop on PIL images.
    """
    (width, height), x0, y0 = center_crop_geometry(*image.size, resize, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) == (size, size):
        return image
    return image.crop((x0, y0, x0 + size, y0 + size))


def center_crop_geometry(width: int, height: int, resize: int, size: int) -> tuple[tuple[int, int], int, int]:
    """Computes an image's size after its shorter side is resized, and the corner of the central square to crop.

    Numbers are rounded as in torchvision's Resize and CenterCrop.

    Args:
        width, height: size of the image.
        resize: length of the shorter side after resizing.
        size: side of the central square.

    Returns:
        Size (width, height) after resizing, x and y of the square's upper left corner.
    """
    if min(width, height) != resize:
        if width <= height:
            width, height = resize, int(resize * height / width)
        else:
            width, height = int(resize * width / height), resize
    return (width, height), round((width - size) / 2.0), round((height - size) / 2.0)


def to_channels_first(image: Image.Image) -> np.ndarray:
    """Converts an RGB image to an array, uint8 (3, height, width)."""
    return np.asarray(image).transpose(2, 0, 1)


def decode_images(listing: ImageListing, convert: Callable[[Image.Image, Path], Image.Image], size: int) -> Tensor:
    """Decodes all images of a listing into one tensor, uint8 (samples, 3, size, size).

    Args:
        listing: list of the image files.
        convert: function of a decoded image and its path. Returns the image with size x size pixels; may raise an
            error that names the path.
        size: height and width of the converted images.

    Raises:
        DataError: a file cannot be read.
    """
    images = np.empty((len(listing), 3, size, size), np.uint8)

    def decode(index: int) -> None:
        path = listing.absolute_path(index)
        images[index] = to_channels_first(convert(read_image(path), path))

    # PIL releases the interpreter lock while it decodes; on small files threads cost more than they gain.
    is_small = os.path.getsize(listing.absolute_path(0)) < 32768
    with ThreadPoolExecutor(1 if is_small else min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(len(listing))):
            pass  # raises the first error
    return torch.from_numpy(images)
