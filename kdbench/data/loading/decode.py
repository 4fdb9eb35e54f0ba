"""Decodes image files in worker processes, with PIL or with torchvision."""

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
"""Key of the resized central square, for evaluation and for views without a `DecodeTimeAugmentation`."""


DecodeCrops = Mapping[str, tuple[DecodeTimeAugmentation, np.random.Generator]]
"""View -> (augmentation that selects the crop of an image file, random generator of the sample)."""


class ImageReader:
    """Decodes one image at a time with PIL. A reader is small, so it can be pickled for worker processes.

    The methods `read` and `collect` run in a worker, and `to_device` runs in the training process.

    Args:
        listing: list of the image files.
        resize: length of the shorter side after resizing.
        size: side of the central square that is cropped after resizing.
    """

    def __init__(self, listing: ImageListing, resize: int, size: int) -> None:
        # An array, not a list of strings: workers share its memory instead of copying it page by page.
        self.paths = np.array([os.fsencode(listing.folder / path) for path in listing.paths])
        self.resize = resize
        self.size = size

    def path(self, index: int) -> str:
        """Returns the path of the image file with this index."""
        return os.fsdecode(self.paths[index])

    def prepare(self, device: torch.device, notice: Callable[[str], None]) -> None:
        """Checks which files the device can decode. Must be called before the DataLoader workers start."""

    def read(self, index: int, crops: DecodeCrops, with_evaluation_image: bool) -> Any:
        """Decodes one image file and computes all its crops.

        Args:
            index: index of the image file.
            crops: view -> augmentation that selects the crop, with the random generator of the sample.
            with_evaluation_image: whether the resized central square is also computed.

        Returns:
            Key -> image, uint8 (3, size, size). Each key of `crops` has its random crop. The key EVALUATION_IMAGE has
            the central square.

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
        """Combines the results of `read` for one batch into the object that is sent to the training process."""
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def to_device(self, batch: Any, device: torch.device, notice: Callable[[str], None]) -> dict[str, Tensor]:
        """Copies the result of `collect` to the device.

        Returns:
            Key -> images, uint8 (batch, 3, size, size). The keys are those of `read`.
        """
        return {key: to_device(value, device) for key, value in batch.items()}


@dataclass(frozen=True)
class _FileSample:
    """One image file of a batch, decoded or as JPEG bytes.

    Attributes:
        data: decoded pixels, uint8 (3, height, width), or the bytes of a JPEG that the GPU will decode, uint8 (n,).
        regions: key of an output image -> region of the file's image that is cropped.
        pil_reason: reason why PIL decoded the file; empty if PIL did not decode it.
    """

    index: int
    data: Tensor
    regions: dict[str, CropRegion]
    pil_reason: str = ""


@dataclass
class FileBatch:
    """The image files of a batch, concatenated into one tensor, so that one copy to the device suffices.

    Attributes:
        data: content of all files, uint8, concatenated.
        shapes: shape of each file's tensor.
        indices: index of each file.
        regions: key of an output image -> region to crop in each file's image.
        pil_reason: name of a file that PIL decoded, with the reason; empty if PIL decoded no file.
    """

    data: Tensor
    shapes: list[tuple[int, ...]]
    indices: list[int]
    regions: dict[str, list[CropRegion]]
    pil_reason: str = ""

    def pin_memory(self) -> FileBatch:
        """Pins the memory of `data` and returns this batch. The DataLoader calls this method."""
        self.data = self.data.pin_memory()
        return self

    def split_files(self, data: Tensor) -> list[Tensor]:
        """Splits the concatenated tensor `data` into one tensor per file. `data` is on the CPU or on the GPU."""
        files = data.split([int(np.prod(shape)) for shape in self.shapes])
        return [file.view(shape) for file, shape in zip(files, self.shapes, strict=True)]


class TorchvisionReader(ImageReader):
    """Decodes JPEGs with torchvision, and crops and resizes whole batches on the device.

    On CUDA, if torchvision has nvJPEG, the workers only read the files and the GPU decodes them. Otherwise the
    workers decode the files. PIL decodes files that torchvision cannot decode (PNG, CMYK, and on the GPU progressive
    JPEGs); the user is notified once.
    """

    gpu = False
    pil_noticed = False
    prepared = False

    def prepare(self, device: torch.device, notice: Callable[[str], None]) -> None:
        if self.prepared:
            return
        self.prepared = True
        jpeg_decoder()  # raises if torchvision has no decoder
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
        """Reads a file, and decodes it unless the GPU will decode it.

        Returns:
            Tensor of pixels or JPEG bytes, width, height, and the reason why PIL decoded the file (empty if PIL did
            not).
        """
        reason = ""
        try:
            with Image.open(path) as image:  # reads the header only
                width, height = image.size
                reason = _pil_reason(image, self.gpu)
            if not reason:
                data = torch.from_numpy(np.fromfile(path, np.uint8))
                return (data if self.gpu else jpeg_decoder()(data, mode="RGB")), width, height, ""
        except Exception as error:  # any type; PIL then reads the file or raises a DataError with its name
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
        """Decodes the JPEGs of a batch on the GPU and copies the images that workers decoded to the GPU."""
        files = batch.split_files(batch.data)
        jpegs = [file for file, encoded in zip(files, is_jpeg, strict=True) if encoded]
        try:
            decoded = iter(jpeg_decoder()(jpegs, mode="RGB", device=device))
        except RuntimeError as error:  # the error does not name the file; PIL raises a DataError with its name
            indices = [index for index, encoded in zip(batch.indices, is_jpeg, strict=True) if encoded]
            images = [to_device(_to_tensor(read_image(self.path(index))), device) for index in indices]
            notice(f"the GPU could not decode a batch of JPEGs ({_one_line(error)}); PIL decoded it on the CPU.")
            decoded = iter(images)
        return [next(decoded) if e else to_device(file, device) for file, e in zip(files, is_jpeg, strict=True)]


READERS: dict[str, type[ImageReader]] = {"pil": ImageReader, "torchvision": TorchvisionReader}
"""Name of a decoder (the dataset parameter `decode`) -> reader class."""


def jpeg_decoder() -> Callable[..., Any]:
    """Returns torchvision's function `decode_jpeg`, wrapped so that it shows no warnings.

    Raises:
        DataError: the installed torchvision does not have `decode_jpeg`.
    """
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        raise DataError(
            "`decode: torchvision` needs torchvision.io.decode_jpeg, which the installed torchvision does not have; "
            "remove `decode`"
        ) from None

    def decode(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decode_jpeg(*args, **kwargs)

    return decode


def nvjpeg_problem(device: torch.device) -> str | None:
    """Tests whether the GPU decodes a small JPEG. Returns None if it does, otherwise the reason why it does not."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    try:
        jpeg_decoder()([torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)], mode="RGB", device=device)
    except RuntimeError as error:
        return _one_line(error)
    return None


def _pil_reason(image: Image.Image, gpu: bool) -> str:
    """Returns the reason why PIL has to decode an image, or "" if torchvision decodes it to the same pixels as PIL."""
    if image.format != "JPEG":
        return f"not a JPEG but {image.format}"
    if image.mode not in ("RGB", "L"):
        return f"a JPEG in {image.mode}"
    return "a progressive JPEG" if gpu and image.info.get("progressive") else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(to_channels_first(image).copy())
