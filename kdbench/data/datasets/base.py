"""Base classes of datasets of labelled images, and of generators of random fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdbench.data.source_spec import FieldSpec
from kdbench.errors import ConfigError, suggest


@dataclass(frozen=True)
class PackedSplit:
    """One split of a dataset in memory.

    Attributes:
        images: uint8 (samples, channels, height, width), or float32 (samples, ...) in [0, 1].
        labels: int64 (samples,), in [0, classes).
        checksum: SHA-256 of class names, images and labels, see `content_checksum`.
        fields: name -> additional values of each sample, (samples, ...).
    """

    images: Tensor
    labels: Tensor
    checksum: str
    fields: Mapping[str, Tensor] = field(default_factory=dict)


class Dataset:
    """Base class of all datasets: one split of labelled images. The constructor may list files but decodes none.

    Register a dataset with `@DATASETS.register("cifar100", injected=("split", "data_root"), ...)`. The framework then
    passes the arguments `split` and `data_root` to the constructor. Properties that are known without files (`shape`,
    `classes`, `samples` of each split) are keywords of the registration. A string in `shape` is the name of a
    constructor parameter that has the value: `(3, "size", "size")`.

    Attributes:
        classes: names of the classes, in the order of the labels.
        shape: shape of one image, such as (channels, height, width).
        mean, std: mean and standard deviation of images in [0, 1], per channel (the first dimension of `shape`).
        normalize: whether images are normalised; False: they stay in [0, 1].
        problem: sentence about what has to happen before `load` can succeed; None if all files exist.
        resident: whether the full split is held in memory. If False, a reader decodes one image at a time.
    """

    classes: list[str]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalize: bool = True
    problem: str | None = None
    resident: bool = True

    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self) -> PackedSplit:
        """Reads, decodes and returns the full split.

        Raises:
            DataError: files are missing or damaged. The message names the files and the remedy.
        """
        raise NotImplementedError

    def labels(self) -> Tensor:
        """Returns the labels, int64 (samples,). Called only if `resident` is False, without decoding images."""
        raise NotImplementedError

    def reader(self) -> Any:
        """Returns an `ImageReader`, which decodes image files one at a time. Called only if `resident` is False."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of the dataset's content, which is part of a run's identity."""
        return self.load().checksum

    @classmethod
    def check_split(cls, split: str) -> None:
        """Raises ConfigError if the dataset does not have a split of this name."""
        if split not in cls.splits:
            name = getattr(cls, "registered_name", cls.__name__)
            raise ConfigError(f"dataset {name!r} has no split {split!r}.{suggest(split, cls.splits)}")


def content_checksum(classes: list[str], images: Tensor, labels: Tensor) -> str:
    """Returns the SHA-256 of class names, shape, dtype, pixels and labels, in this order."""
    header = json.dumps([classes, list(images.shape), str(images.dtype)])
    digest = hashlib.sha256(header.encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def pack(classes: list[str], images: Tensor, labels: Tensor) -> PackedSplit:
    """Returns a PackedSplit of the images and labels, and computes its checksum."""
    return PackedSplit(images, labels, content_checksum(classes, images, labels))


def stored_field_specs(fields: Mapping[str, Tensor]) -> dict[str, FieldSpec]:
    """Returns name -> (shape of one sample, dtype) for the additional fields of a dataset.

    The dtype of all floating-point fields is reported as float32, because they are later converted to the dtype of
    the images.
    """
    kinds = {name: "float32" if v.is_floating_point() else str(v.dtype)[6:] for name, v in fields.items()}
    return {name: (tuple(value.shape[1:]), kinds[name]) for name, value in fields.items()}


class GeneratedDataset:
    """Base class of datasets without files: random fields without labels, such as noise for a generator.

    An epoch has `len(self)` samples, rounded up to full batches.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def field_specs(self) -> dict[str, FieldSpec]:
        """Returns field -> (shape of one sample, dtype) for the fields that the dataset generates."""
        raise NotImplementedError

    def sample(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        """Draws `count` samples. Returns field -> float32 (count, ...), on the CPU."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of the distribution and its parameters, which is part of a run's identity."""
        raise NotImplementedError
