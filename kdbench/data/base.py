"""What a dataset is: images and labels of one split, known by shape before anything is decoded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdbench.config.schema import SourceConfig
from kdbench.errors import ConfigError, DataError, UserError, nearest
from kdbench.registry import DATASETS


@dataclass(frozen=True)
class Packed:
    """One split in memory.

    images: uint8 (samples, channels, height, width), or float32 (samples, ...) in [0, 1].
    labels: int64 (samples,), in [0, classes).
    checksum: SHA-256 of the content; see `content_checksum`.
    """

    images: Tensor
    labels: Tensor
    checksum: str


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

    def load(self) -> Packed:
        """Returns the split, decoded.

        Raises:
            DataError: files are missing or damaged; the message names them and says what to do.
        """
        raise NotImplementedError

    def labels(self) -> Tensor:
        """Returns the labels, int64 (samples,), without decoding an image; of a dataset that is not resident."""
        raise NotImplementedError

    def reader(self) -> Any:
        """Returns what decodes one image at a time (`kdbench.data.streaming.Reader`), of one that is not resident."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of the content, which is part of a run's identity."""
        return self.load().checksum

    @classmethod
    def check_split(cls, split: str) -> None:
        """Raises ConfigError when the dataset has no such split."""
        if split not in cls.splits:
            name = getattr(cls, "registered_name", cls.__name__)
            raise ConfigError(f"dataset {name!r} has no split {split!r}.{nearest(split, cls.splits)}")


def content_checksum(classes: list[str], images: Tensor, labels: Tensor) -> str:
    """Returns the SHA-256 over class names, shape, dtype, pixels and labels, in that order."""
    head = json.dumps([classes, list(images.shape), str(images.dtype)])
    digest = hashlib.sha256(head.encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def pack(classes: list[str], images: Tensor, labels: Tensor) -> Packed:
    """Returns the split with its checksum."""
    return Packed(images, labels, content_checksum(classes, images, labels))


@dataclass(frozen=True)
class SourceSpec:
    """What a source will give, known before its files are read.

    fields: field -> (shape of one sample, dtype), such as `image -> ((3, 32, 32), 'float32')`; without the batch.
    classes, samples: None where only the files could tell.
    problem: what stands in the way of training, in words; None when nothing does.
    """

    fields: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    classes: int | None = None
    samples: int | None = None
    problem: str | None = None


@contextmanager
def placed(config: SourceConfig) -> Iterator[None]:
    """Puts the place of a source's dataset in the recipe before what is wrong with its files."""
    where = str(config.dataset.place) or str(config.place)
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


def open_dataset(config: SourceConfig, data_root: str) -> Any:
    """Builds the dataset of a source; a user's mistake is told with the place in the recipe.

    Raises:
        ConfigError: an unknown dataset, parameter or split.
        DataError: the files are missing or unsuitable.
    """
    named = config.dataset
    where = named.place if str(named.place) else config.place
    DATASETS.check(named.type, named.params, where)
    with placed(config):
        return DATASETS.build(
            named.type, named.params, where, split=config.split, data_root=os.path.expanduser(data_root)
        )


def describe(config: SourceConfig, data_root: str) -> SourceSpec:
    """Returns what a source will give, without decoding or downloading anything.

    A dataset whose files are missing is described by the facts on its registration, with `problem` in words.

    Raises:
        ConfigError: an unknown dataset, parameter, split or augmentation.
    """
    from kdbench.data.split import share
    from kdbench.data.view import fields_of

    try:
        dataset = open_dataset(config, data_root)
    except DataError as error:
        entry = DATASETS.entry(config.dataset.type)
        values = {key: parameter.default for key, parameter in entry.parameters.items()} | dict(config.dataset.params)
        shape = entry.facts.get("shape")
        if shape is None:
            return SourceSpec(problem=str(error))
        shape = tuple(values[part] if isinstance(part, str) else part for part in shape)
        samples = entry.facts.get("samples", {}).get(config.split)
        return SourceSpec(fields_of(config, shape), entry.facts.get("classes"), samples, str(error))
    if isinstance(dataset, Noise):
        return SourceSpec(dataset.fields(), None, len(dataset), None)
    samples = len(dataset)
    if config.subset is not None:
        samples = share(samples, config.subset)
    return SourceSpec(fields_of(config, dataset.shape), len(dataset.classes), samples, dataset.problem)


def describe_all(
    data: Mapping[str, SourceConfig], validation: float | int | None, data_root: str
) -> dict[str, SourceSpec]:
    """Describes every source of a stage, less what is held out of `train` for validation.

    Raises:
        ConfigError: an unknown dataset, parameter, split or augmentation.
    """
    from kdbench.data.split import share

    specs = {name: describe(config, data_root) for name, config in data.items()}
    train = data.get("train")
    if validation is not None and train is not None:
        for name, config in data.items():
            whole = describe(replace(config, subset=None), data_root).samples
            same = (config.dataset.type, config.dataset.params) == (train.dataset.type, train.dataset.params)
            if whole is not None and same and config.split == train.split:
                left = max(whole - share(whole, validation), 0)  # a subset is chosen among what is left
                left = left if config.subset is None else share(left, config.subset)
                specs[name] = replace(specs[name], samples=left)
    return specs


class Noise:
    """A source without files: fields that are drawn, not read. It has no labels and no end.

    An epoch is `len(self)` samples long, rounded up to whole batches.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns field -> (shape of one sample, dtype)."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        """Returns `count` samples of every field, float32 on the CPU."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns a digest of what is drawn."""
        raise NotImplementedError
