"""From the recipe's `data:` to sources: datasets opened and loaded once, splits chosen, mistakes told early."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdbench.config.schema import SourceConfig
from kdbench.data.base import Dataset, Noise, Packed, open_dataset, placed
from kdbench.data.source import NoiseSource, ResidentSource, Setting, Source
from kdbench.data.split import balanced, empty_classes, without
from kdbench.data.view import View, build_views
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import generator

EVALUATION = ("eval", "validation", "test")
"""Sources that are only evaluated: their `batch_size` may exceed their length."""


@dataclass
class _Opened:
    """A dataset that several sources may read."""

    dataset: Any
    labels: Tensor
    packed: Packed | None = None
    held_out: Tensor | None = None


def build_sources(
    data: Mapping[str, SourceConfig],
    *,
    validation: float | int | None,
    seed: int,
    device: torch.device | str,
    data_root: str,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> dict[str, Source]:
    """Opens every source of a stage.

    Args:
        data: the sources by name.
        validation: a share in (0, 1) or a number of samples of `train`'s dataset that are held out, class-balanced, as
            the source `validation`. No source of the same dataset and split sees them. They are drawn before `subset`
            and `labels`, which choose among the rest.
        seed: of the run. The choices are functions of it alone.
        device: where the batches lie, and the images of datasets that fit.
        data_root: the folder of all datasets.
        rank, world: this process among those that train together.
        workers: processes that decode images of datasets which are not held in memory.
        dtype: of the images.
        channels_last: the images' memory layout.

    Raises:
        ConfigError: a parameter, an augmentation or a number does not fit, with its place.
        DataError: files are missing or damaged, or a split is empty.
    """
    setting = Setting(seed, torch.device(device), rank, world, workers, dtype, channels_last)
    opened: dict[str, _Opened] = {}
    noises: dict[str, Noise] = {}
    for name, config in data.items():
        key = _key(config)
        if key in opened:
            continue
        dataset = open_dataset(config, data_root)
        if isinstance(dataset, Noise):
            noises[name] = dataset
        else:
            opened[key] = _load(dataset, config, setting)
    held_out = None
    if validation is not None:
        held_out = _hold_out(data, opened, validation, seed)
    sources: dict[str, Source] = {}
    for name, config in data.items():
        if name in noises:
            sources[name] = NoiseSource(config, setting, noises[name])
        else:
            sources[name] = _open(config, opened[_key(config)], setting)
    if held_out is not None:
        train = data["train"]
        config = replace(train, name="validation", views={"image": ()}, labels=None, subset=None)
        found = opened[_key(train)]
        sources["validation"] = _source(config, found, setting, held_out, None)
    return sources


def _key(config: SourceConfig) -> str:
    return json.dumps([config.dataset.type, config.split, dict(config.dataset.params)], sort_keys=True, default=str)


def _load(dataset: Dataset, config: SourceConfig, setting: Setting) -> _Opened:
    if len(dataset) == 0:
        raise DataError(_at(config, f"{config.dataset.type}: the split {config.split!r} is empty"))
    if not dataset.resident:
        return _Opened(dataset, dataset.labels())
    with placed(config):
        packed = dataset.load()
    images = packed.images.to(setting.device)
    return _Opened(dataset, packed.labels, Packed(images, packed.labels, packed.checksum))


def _hold_out(
    data: Mapping[str, SourceConfig], opened: Mapping[str, _Opened], validation: float | int, seed: int
) -> Tensor:
    train = data.get("train")
    if train is None or _key(train) not in opened:
        raise ConfigError("validation is held out from the source `train`, which has to exist and have labels")
    found = opened[_key(train)]
    classes = found.dataset.classes
    everything = torch.arange(len(found.labels))
    what = _where(train, "validation")
    rng = generator(seed, "split", "validation")
    held_out = balanced(found.labels, everything, validation, len(classes), rng, what)
    for part, words in ((held_out, "has no sample"), (without(everything, held_out), "leaves train no sample")):
        missing = empty_classes(found.labels, part, classes)
        if missing:
            raise ConfigError(f"{what}: {validation} {words} of {_some(missing)}; the split has {len(everything)}")
    found.held_out = held_out
    return held_out


def _open(config: SourceConfig, found: _Opened, setting: Setting) -> Source:
    positions = torch.arange(len(found.labels))
    if found.held_out is not None:
        positions = without(positions, found.held_out)
    classes = found.dataset.classes
    if config.subset is not None:
        rng = generator(setting.seed, "split", "subset")
        positions = balanced(found.labels, positions, config.subset, len(classes), rng, _where(config, "subset"))
    labelled = None
    if config.labels is not None:
        present = len(classes) - len(empty_classes(found.labels, positions, classes))
        rng = generator(setting.seed, "split", "labels")
        labelled = balanced(found.labels, positions, config.labels, len(classes), rng, _where(config, "labels"))
        missing = empty_classes(found.labels, labelled, classes)
        if len(classes) - len(missing) < present:
            raise ConfigError(f"{_where(config, 'labels')}: {config.labels} leaves {_some(missing)} without any label")
    if len(positions) == 0:
        raise DataError(_at(config, f"{config.dataset.type}: no sample is left of the split {config.split!r}"))
    together = config.batch_size * setting.world
    if config.batch_size < 1:
        raise ConfigError(f"{_where(config, 'batch_size')} must be at least 1, got {config.batch_size}")
    if together > len(positions) and config.name not in EVALUATION:
        each = f"{config.batch_size} on each of {setting.world} processes" if setting.world > 1 else config.batch_size
        raise ConfigError(
            f"{_where(config, 'batch_size')}: {each} is more than the {len(positions)} samples of source "
            f"{config.name!r}"
        )
    return _source(config, found, setting, positions, labelled)


def _source(
    config: SourceConfig, found: _Opened, setting: Setting, positions: Tensor, labelled: Tensor | None
) -> Source:
    dataset: Dataset = found.dataset
    views = _views(config, dataset, setting)
    if found.packed is not None:
        for view in views.values():
            if view.reading is not None:
                raise ConfigError(
                    _at(
                        config,
                        f"view {view.name!r}: {view.reading.registered_name} chooses what is read from a file, but ",
                    )
                    + f"{config.dataset.type} is held in memory; use crop, or a dataset that is read in every epoch "
                    "(image_folder with resident: false, imagenet)"
                )
        return ResidentSource(config, setting, views, dataset.classes, found.packed, positions, labelled)
    from kdbench.data.streaming import StreamingSource

    return StreamingSource(
        config, setting, views, dataset.classes, found.labels, positions, labelled, dataset.checksum(), dataset.reader()
    )


def _views(config: SourceConfig, dataset: Dataset, setting: Setting) -> dict[str, View]:
    mean, std = (dataset.mean, dataset.std) if dataset.normalize else (None, None)
    return build_views(
        config,
        dataset.shape,
        mean=mean,
        std=std,
        device=setting.device,
        dtype=setting.dtype,
        channels_last=setting.channels_last,
    )


def _at(config: SourceConfig, text: str) -> str:
    return f"{config.place}: {text}" if str(config.place) else text


def _where(config: SourceConfig, option: str) -> str:
    """The place of one of a source's options, or the source's own where the option was not written."""
    return str(config.places.get(option) or _at(config, option))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more classes"
