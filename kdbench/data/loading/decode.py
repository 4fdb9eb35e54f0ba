"""Reading image files on CPU workers: with PIL alone, or with torchvision and the crop and resize on the device."""

from __future__ import annotations

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
"""Key of the image as evaluation reads it, which all views without a `Reading` share."""


DecodeCrops = Mapping[str, tuple[DecodeTimeAugmentation, np.random.Generator]]


class ImageReader:
    """Decodes one image at a time with PIL; small enough to be sent to worker processes.

    `read` and `collect` run in a worker, `to_device` in the process that trains.

    Args:
        listing: the files.
        resize: the shorter side is resized to this...
        size: ...and the central square of this side is cut out.
    """

    def __init__(self, listing: ImageListing, resize: int, size: int) -> None:
        # One array instead of a list of strings: workers share its memory instead of copying it page by page.
        self.paths = np.array([os.fsencode(listing.folder / path) for path in listing.paths])
        self.resize = resize
        self.size = size

    def path(self, number: int) -> str:
        return os.fsdecode(self.paths[number])

    def prepare(self, device: torch.device, say: Callable[[str], None]) -> None:
        """Finds out, before any worker begins, what can be done on the device."""

    def read(self, number: int, readings: DecodeCrops, whole: bool) -> Any:
        """Decodes the file once; returns uint8 (3, size, size) for each reading, and under WHOLE the plain image.

        Raises:
            DataError: the file cannot be read.
        """
        image = read_image(self.path(number))
        found = {}
        for name, (reading, rng) in readings.items():
            part = image.crop(reading.box(*image.size, rng))
            found[name] = _tensor(part.resize((self.size, self.size), Image.Resampling.BILINEAR))
        if whole:
            found[EVALUATION_IMAGE] = _tensor(resize_and_crop(image, self.resize, self.size))
        return found

    def collect(self, samples: Sequence[Any]) -> Any:
        """Puts samples together into what is sent to the process that trains."""
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def to_device(self, batch: Any, device: torch.device, say: Callable[[str], None]) -> dict[str, Tensor]:
        """Returns key -> uint8 (batch, 3, size, size), on the device."""
        return {key: to_device(value, device) for key, value in batch.items()}


@dataclass(frozen=True)
class _Sample:
    """One file: its decoded pixels (3, height, width), or as `data` (n,) the bytes of a JPEG that the GPU decodes."""

    number: int
    data: Tensor
    regions: dict[str, CropRegion]
    odd: str = ""


@dataclass
class FileBatch:
    """Files of a batch in one piece of memory: one tensor goes from process to process, and one copy to the device.

    shapes: of each file's tensor in `data`. odd: a file that torchvision does not decode as it is, and why.
    """

    data: Tensor
    shapes: list[tuple[int, ...]]
    numbers: list[int]
    regions: dict[str, list[CropRegion]]
    pil_reason: str = ""

    def pin_memory(self) -> FileBatch:
        """Called by the loader."""
        self.data = self.data.pin_memory()
        return self

    def split_files(self, data: Tensor) -> list[Tensor]:
        parts = data.split([int(np.prod(shape)) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class TorchvisionReader(ImageReader):
    """Decodes JPEGs with torchvision, and crops and resizes a batch at once on the device.

    On CUDA, where torchvision has nvJPEG, workers only read the files and the GPU decodes them; else they decode too.
    What is no plain JPEG (PNG, CMYK, and on the GPU progressive ones) PIL decodes in the worker, and a notice says so.
    """

    gpu = False
    told = False
    settled = False

    def prepare(self, device: torch.device, say: Callable[[str], None]) -> None:
        if self.settled:
            return
        self.settled = True
        jpeg_decoder()
        if device.type == "cuda":
            reason = nvjpeg_problem(device)
            self.gpu = reason is None
            if reason is not None:
                say(f"decode: torchvision cannot decode on {device} ({reason}); the workers decode on the CPU.")

    def read(self, number: int, readings: DecodeCrops, whole: bool) -> _Sample:
        data, width, height, odd = self._file(self.path(number))
        regions = {}
        for name, (reading, rng) in readings.items():
            left, top, right, bottom = reading.box(width, height, rng)
            regions[name] = CropRegion(top, left, bottom - top, right - left, self.size, self.size)
        if whole:
            (out_width, out_height), left, top = center_crop_geometry(width, height, self.resize, self.size)
            regions[EVALUATION_IMAGE] = CropRegion(0, 0, height, width, out_height, out_width, top, left)
        return _Sample(number, data, regions, odd)

    def _file(self, path: str) -> tuple[Tensor, int, int, str]:
        """The file's tensor, its width and height, and in words why PIL decoded it; empty where it did not."""
        kind = ""
        try:
            with Image.open(path) as image:  # reads the header alone
                width, height = image.size
                kind = _odd(image, self.gpu)
            if not kind:
                data = torch.from_numpy(np.fromfile(path, np.uint8))
                return (data if self.gpu else jpeg_decoder()(data, mode="RGB")), width, height, ""
        except Exception as error:  # PIL has the last word: it reads the file, or says what is wrong with it
            kind = kind or f"one that torchvision refuses ({_line(error)})"
        decoded = _tensor(read_image(path))
        return decoded, decoded.shape[2], decoded.shape[1], f"{path} is {kind}"

    def collect(self, samples: Sequence[_Sample]) -> FileBatch:
        return FileBatch(
            torch.cat([sample.data.flatten() for sample in samples]),
            [tuple(sample.data.shape) for sample in samples],
            [sample.number for sample in samples],
            {key: [sample.regions[key] for sample in samples] for key in samples[0].regions},
            next((sample.odd for sample in samples if sample.odd), ""),
        )

    def to_device(self, batch: FileBatch, device: torch.device, say: Callable[[str], None]) -> dict[str, Tensor]:
        if batch.pil_reason and not self.told:
            self.told = True
            say(f"{batch.pil_reason}: PIL decodes it on the CPU, and others of its kind; they are slower.")
        encoded = [len(shape) == 1 for shape in batch.shapes]
        images = self._decoded(batch, encoded, device, say) if any(encoded) else batch.split_files(to_device(batch.data, device))
        return {key: resample_crops(images, regions, self.size) for key, regions in batch.regions.items()}

    def _decoded(
        self, batch: FileBatch, encoded: list[bool], device: torch.device, say: Callable[[str], None]
    ) -> list[Tensor]:
        """Decodes on the GPU what is not decoded yet."""
        files = batch.split_files(batch.data)
        waiting = [file for file, is_encoded in zip(files, encoded, strict=True) if is_encoded]
        try:
            found = iter(jpeg_decoder()(waiting, mode="RGB", device=device))
        except RuntimeError as error:  # one of them, and it is not told which
            numbers = [n for n, is_encoded in zip(batch.numbers, encoded, strict=True) if is_encoded]
            read = [to_device(_tensor(read_image(self.path(number))), device) for number in numbers]  # raises DataError
            say(f"the GPU could not decode a batch of JPEGs ({_line(error)}); PIL did, on the CPU.")
            found = iter(read)
        return [next(found) if e else to_device(file, device) for file, e in zip(files, encoded, strict=True)]


READERS: dict[str, type[ImageReader]] = {"pil": ImageReader, "torchvision": TorchvisionReader}
"""What `decode` may be."""


def jpeg_decoder() -> Callable[..., Any]:
    """Returns torchvision's `decode_jpeg`, without the notice that a later torchvision may leave it out.

    Raises:
        DataError: it is not there.
    """
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        raise DataError(
            "decode: torchvision needs torchvision.io.decode_jpeg, which is not there; leave it out"
        ) from None

    def decode(*given: Any, **named: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decode_jpeg(*given, **named)

    return decode


def nvjpeg_problem(device: torch.device) -> str | None:
    """Says why JPEGs cannot be decoded on a GPU; None where they can. Decodes a small one there."""
    import io

    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    try:
        jpeg_decoder()([torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)], mode="RGB", device=device)
    except RuntimeError as error:
        return _line(error)
    return None


def _odd(image: Image.Image, gpu: bool) -> str:
    """What an image is, where torchvision does not decode it as PIL would."""
    if image.format != "JPEG":
        return f"no JPEG but {image.format}"
    if image.mode not in ("RGB", "L"):
        return f"a JPEG in {image.mode}"
    return "a progressive JPEG" if gpu and image.info.get("progressive") else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(to_channels_first(image).copy())
