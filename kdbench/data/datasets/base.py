"""What a dataset is: images and labels of one split, known by shape before anything is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdbench.errors import ConfigError, suggest


@dataclass(frozen=True)
class PackedSplit:
    """One split in memory.

    images: uint8 (samples, channels, height, width), or float32 (samples, ...) in [0, 1].
    labels: int64 (samples,), in [0, classes).
    checksum: SHA-256 of the content; see `content_checksum`.
    fields: whatever else is stored for each sample, (samples, ...), by name.
    """

    images: Tensor
    labels: Tensor
    checksum: str
    fields: Mapping[str, Tensor] = field(default_factory=dict)


class Dataset:
    """One split of labelled images. The constructor is cheap: it may list files, it decodes none.

    A dataset is registered (`@DATASETS.register("cifar100", injected=("split", "data_root"), ...)`) and built with
    `split` and `data_root` next to its own parameters. Facts that hold without files (`shape`, `classes`, `samples` by
    split) stand on the registration; a name in `shape` is a parameter: `(3, "size", "size")`.

    Attributes:
        classes: names, in the order of the labels.
        shape: of one image, such as (channels, height, width).
        mean, std: per channel (the first dimension of `shape`), of images in [0, 1].
        normalize: False leaves the images in [0, 1].
        problem: what must happen before `load` succeeds, in words; None when everything lies there.
        resident: whether the whole split fits into memory. If not, `reader` gives one image at a time.
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
            DataError: files are missing or damaged; the message names them and says what to do.
        """
        raise NotImplementedError

    def labels(self) -> Tensor:
        """Returns the labels, int64 (samples,), without decoding an image; of a dataset that is not resident."""
        raise NotImplementedError

    def reader(self) -> Any:
        """Returns what decodes one image at a time (`kdbench.data.loading.decode.Reader`), unless resident."""
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
    """Returns the SHA-256 over class names, shape, dtype, pixels and labels, in that order."""
    head = json.dumps([classes, list(images.shape), str(images.dtype)])
    digest = hashlib.sha256(head.encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def pack(classes: list[str], images: Tensor, labels: Tensor) -> PackedSplit:
    """Returns the split with its checksum."""
    return PackedSplit(images, labels, content_checksum(classes, images, labels))


class GeneratedDataset:
    """A source without files: fields that are drawn, not read. It has no labels and no end.

    An epoch is `len(self)` samples long, rounded up to whole batches.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def field_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns field -> (shape of one sample, dtype)."""
        raise NotImplementedError

    def sample(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        """Returns `count` samples of every field, float32 on the CPU."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of what is drawn."""
        raise NotImplementedError
