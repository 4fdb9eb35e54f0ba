"""Base classes of datasets: one split of labelled images, or a generator of random fields."""

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
    """One split in memory.

    images: uint8 (samples, channels, height, width), or float32 (samples, ...) in [0, 1].
    labels: int64 (samples,), in [0, classes).
    checksum: SHA-256 of the content; see `content_checksum`.
    fields: further values of each sample by name, (samples, ...).
    """

    images: Tensor
    labels: Tensor
    checksum: str
    fields: Mapping[str, Tensor] = field(default_factory=dict)


class Dataset:
    """Base of all datasets: one split of labelled images. The constructor may list files; it decodes none.

    Register a dataset with `@DATASETS.register("cifar100", injected=("split", "data_root"), ...)`. It is built with
    `split` and `data_root` next to its own parameters. Facts that hold without files (`shape`, `classes`, `samples` by
    split) are declared at the registration; a name in `shape` refers to a parameter: `(3, "size", "size")`.

    Attributes:
        classes: names, in the order of the labels.
        shape: of one image, such as (channels, height, width).
        mean, std: per channel (the first dimension of `shape`), of images in [0, 1].
        normalize: False leaves the images in [0, 1].
        problem: a sentence about what has to happen before `load` succeeds; None if all files exist.
        resident: whether the full split is held in memory. Otherwise `reader` decodes one image at a time.
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
        """Returns the split, decoded.

        Raises:
            DataError: files are missing or damaged; the message names them and the remedy.
        """
        raise NotImplementedError

    def labels(self) -> Tensor:
        """Returns the labels, int64 (samples,), without decoding an image. Only of datasets that are not resident."""
        raise NotImplementedError

    def reader(self) -> Any:
        """Returns a `kdbench.data.loading.decode.ImageReader`. Only of datasets that are not resident."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of the content, which is part of a run's identity."""
        return self.load().checksum

    @classmethod
    def check_split(cls, split: str) -> None:
        """Raises ConfigError when the dataset has no such split."""
        if split not in cls.splits:
            name = getattr(cls, "registered_name", cls.__name__)
            raise ConfigError(f"dataset {name!r} has no split {split!r}.{suggest(split, cls.splits)}")


def content_checksum(classes: list[str], images: Tensor, labels: Tensor) -> str:
    """Returns the SHA-256 of class names, shape, dtype, pixels and labels, in that order."""
    header = json.dumps([classes, list(images.shape), str(images.dtype)])
    digest = hashlib.sha256(header.encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def pack(classes: list[str], images: Tensor, labels: Tensor) -> PackedSplit:
    """Returns the split with its checksum."""
    return PackedSplit(images, labels, content_checksum(classes, images, labels))


def stored_field_specs(fields: Mapping[str, Tensor]) -> dict[str, FieldSpec]:
    """Returns the specs of a dataset's further fields, (samples, ...) each; floats get the dtype of the images."""
    kinds = {name: "float32" if v.is_floating_point() else str(v.dtype)[6:] for name, v in fields.items()}
    return {name: (tuple(value.shape[1:]), kinds[name]) for name, value in fields.items()}


class GeneratedDataset:
    """Base of datasets without files: random fields, no labels, any number of samples.

    An epoch has `len(self)` samples, rounded up to full batches.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def field_specs(self) -> dict[str, FieldSpec]:
        """Returns field -> (shape of one sample, dtype)."""
        raise NotImplementedError

    def sample(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        """Returns `count` samples of every field, float32 on the CPU."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of the distribution and its parameters."""
        raise NotImplementedError
