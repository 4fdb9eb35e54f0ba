"""Decodes image files in worker processes: with PIL, or with torchvision and the crop and resize on the device."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.data.augment.base import DecodeTimeAugmentation
from kdbench.data.datasets.image_files import (
    ImageListing,
    center_crop_geometry,
    read_image,
    resize_and_crop,
    to_channels_first,
)
from kdbench.data.loading.resample import CropRegion, resample_crops
from kdbench.data.sampling.order import to_device
from kdbench.errors import DataError

EVALUATION_IMAGE = ""
"""Key of the image that evaluation uses, and all views without a `DecodeTimeAugmentation`."""


DecodeCrops = Mapping[str, tuple[DecodeTimeAugmentation, np.random.Generator]]
"""View -> its decode-time augmentation, with the sample's random generator."""


class ImageReader:
    """Decodes one image at a time with PIL; small enough to be pickled for worker processes.

    `read` and `collect` run in a worker, `to_device` in the training process.

    Args:
        listing: the files.
        resize: length of the shorter side after resizing.
        size: side of the central square that is cropped after resizing.
    """

    def __init__(self, listing: ImageListing, resize: int, size: int) -> None:
        # An array, not a list of strings: workers share its memory instead of copying it page by page.
        self.paths = np.array([os.fsencode(listing.folder / path) for path in listing.paths])
        self.resize = resize
        self.size = size

    def path(self, index: int) -> str:
        """Returns the path of a sample's file."""
        return os.fsdecode(self.paths[index])

    def prepare(self, device: torch.device, notice: Callable[[str], None]) -> None:
        """Checks what the device can decode, before the workers start."""

    def read(self, index: int, crops: DecodeCrops, with_evaluation_image: bool) -> Any:
        """Decodes one file once.

        Returns:
            uint8 (3, size, size) for each key of `crops`, and the resized central square under EVALUATION_IMAGE.

        Raises:
            DataError: the file cannot be read.
        """
        image = read_image(self.path(index))
        images = {}
        for name, (augmentation, rng) in crops.items():
            crop = image.crop(augmentation.box(*image.size, rng))
            images[name] = _to_tensor(crop.resize((self.size, self.size), Image.Resampling.BILINEAR))
        if with_evaluation_image:
            images[EVALUATION_IMAGE] = _to_tensor(resize_and_crop(image, self.resize, self.size))
        return images

    def collect(self, samples: Sequence[Any]) -> Any:
        """Joins samples of `read` to what is sent to the training process."""
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def to_device(self, batch: Any, device: torch.device, notice: Callable[[str], None]) -> dict[str, Tensor]:
        """Copies a batch of `collect` to the device; returns key -> uint8 (batch, 3, size, size)."""
        return {key: to_device(value, device) for key, value in batch.items()}


@dataclass(frozen=True)
class _FileSample:
    """One file of a batch.

    data: decoded pixels, uint8 (3, height, width), or the bytes of a JPEG that the GPU decodes, uint8 (n,).
    pil_reason: why PIL decoded it; empty if PIL did not.
    """

    index: int
    data: Tensor
    regions: dict[str, CropRegion]
    pil_reason: str = ""


@dataclass
class FileBatch:
    """Files of a batch in one tensor: one transfer between processes, and one copy to the device.

    data: uint8, all files one after the other.
    shapes: of each file in `data`.
    pil_reason: a file that PIL decoded, and why; empty without.
    """

    data: Tensor
    shapes: list[tuple[int, ...]]
    indices: list[int]
    regions: dict[str, list[CropRegion]]
    pil_reason: str = ""

    def pin_memory(self) -> FileBatch:
        """Pins `data`; the DataLoader calls this."""
        self.data = self.data.pin_memory()
        return self

    def split_files(self, data: Tensor) -> list[Tensor]:
        """Splits `data`, here or on a device, into the tensors of the files."""
        files = data.split([int(np.prod(shape)) for shape in self.shapes])
        return [file.view(shape) for file, shape in zip(files, self.shapes, strict=True)]


class TorchvisionReader(ImageReader):
    """Decodes JPEGs with torchvision, and crops and resizes batches on the device.

    On CUDA, if torchvision has nvJPEG, workers read the files and the GPU decodes them; otherwise the workers decode.
    PIL decodes other files in the worker (PNG, CMYK, and on the GPU progressive JPEGs); a notice says so once.
    """

    gpu = False
    pil_noticed = False
    prepared = False

    def prepare(self, device: torch.device, notice: Callable[[str], None]) -> None:
        if self.prepared:
            return
        self.prepared = True
        jpeg_decoder()  # raises if torchvision has none
        if device.type == "cuda":
            problem = nvjpeg_problem(device)
            self.gpu = problem is None
            if problem is not None:
                notice(f"decode: torchvision cannot decode on {device} ({problem}); the workers decode on the CPU.")

    def read(self, index: int, crops: DecodeCrops, with_evaluation_image: bool) -> _FileSample:
        data, width, height, pil_reason = self._read_file(self.path(index))
        regions = {}
        for name, (augmentation, rng) in crops.items():
            x0, y0, x1, y1 = augmentation.box(width, height, rng)
            regions[name] = CropRegion(y0, x0, y1 - y0, x1 - x0, self.size, self.size)
        if with_evaluation_image:
            (out_width, out_height), x0, y0 = center_crop_geometry(width, height, self.resize, self.size)
            regions[EVALUATION_IMAGE] = CropRegion(0, 0, height, width, out_height, out_width, y0, x0)
        return _FileSample(index, data, regions, pil_reason)

    def _read_file(self, path: str) -> tuple[Tensor, int, int, str]:
        """Returns the file's tensor, its width and height, and why PIL decoded it (empty if PIL did not)."""
        reason = ""
        try:
            with Image.open(path) as image:  # reads the header only
                width, height = image.size
                reason = _pil_reason(image, self.gpu)
            if not reason:
                data = torch.from_numpy(np.fromfile(path, np.uint8))
                return (data if self.gpu else jpeg_decoder()(data, mode="RGB")), width, height, ""
        except Exception as error:  # any type; PIL then reads the file, or raises a DataError that names it
            reason = reason or f"a JPEG that torchvision cannot decode ({_one_line(error)})"
        pixels = _to_tensor(read_image(path))
        return pixels, pixels.shape[2], pixels.shape[1], f"{path} is {reason}"

    def collect(self, samples: Sequence[_FileSample]) -> FileBatch:
        return FileBatch(
            torch.cat([sample.data.flatten() for sample in samples]),
            [tuple(sample.data.shape) for sample in samples],
            [sample.index for sample in samples],
            {key: [sample.regions[key] for sample in samples] for key in samples[0].regions},
            next((sample.pil_reason for sample in samples if sample.pil_reason), ""),
        )

    def to_device(self, batch: FileBatch, device: torch.device, notice: Callable[[str], None]) -> dict[str, Tensor]:
        if batch.pil_reason and not self.pil_noticed:
            self.pil_noticed = True
            notice(f"{batch.pil_reason}: PIL decodes this file and others like it on the CPU, which is slower.")
        is_jpeg = [len(shape) == 1 for shape in batch.shapes]
        if any(is_jpeg):
            images = self._decode_on_gpu(batch, is_jpeg, device, notice)
        else:
            images = batch.split_files(to_device(batch.data, device))
        return {key: resample_crops(images, regions, self.size) for key, regions in batch.regions.items()}

    def _decode_on_gpu(
        self, batch: FileBatch, is_jpeg: list[bool], device: torch.device, notice: Callable[[str], None]
    ) -> list[Tensor]:
        """Decodes the JPEGs of a batch on the GPU, and copies the other files to it."""
        files = batch.split_files(batch.data)
        jpegs = [file for file, encoded in zip(files, is_jpeg, strict=True) if encoded]
        try:
            decoded = iter(jpeg_decoder()(jpegs, mode="RGB", device=device))
        except RuntimeError as error:  # does not name the file; PIL does, in a DataError
            indices = [index for index, encoded in zip(batch.indices, is_jpeg, strict=True) if encoded]
            images = [to_device(_to_tensor(read_image(self.path(index))), device) for index in indices]
            notice(f"the GPU could not decode a batch of JPEGs ({_one_line(error)}); PIL decoded it on the CPU.")
            decoded = iter(images)
        return [next(decoded) if e else to_device(file, device) for file, e in zip(files, is_jpeg, strict=True)]


READERS: dict[str, type[ImageReader]] = {"pil": ImageReader, "torchvision": TorchvisionReader}
"""Values of the parameter `decode` of datasets of image files."""


def jpeg_decoder() -> Callable[..., Any]:
    """Returns torchvision's `decode_jpeg`, without its deprecation warning.

    Raises:
        DataError: this torchvision has none.
    """
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        raise DataError(
            "`decode: torchvision` needs torchvision.io.decode_jpeg, which this torchvision does not have; remove it"
        ) from None

    def decode(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decode_jpeg(*args, **kwargs)

    return decode


def nvjpeg_problem(device: torch.device) -> str | None:
    """Returns why JPEGs cannot be decoded on a GPU, or None if they can; decodes a small one there."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    try:
        jpeg_decoder()([torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)], mode="RGB", device=device)
    except RuntimeError as error:
        return _one_line(error)
    return None


def _pil_reason(image: Image.Image, gpu: bool) -> str:
    """Returns why PIL has to decode an image, empty if torchvision decodes it to the same pixels."""
    if image.format != "JPEG":
        return f"no JPEG but {image.format}"
    if image.mode not in ("RGB", "L"):
        return f"a JPEG in {image.mode}"
    return "a progressive JPEG" if gpu and image.info.get("progressive") else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(to_channels_first(image).copy())
