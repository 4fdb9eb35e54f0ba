"""From the recipe's `data:` to sources: datasets opened and loaded once, splits chosen, mistakes told early."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.config.parse.data import is_evaluation
from kdbench.config.schema import SourceConfig
from kdbench.data.augment.view import View, build_views, image_field_specs, reject_decode_augmentations
from kdbench.data.datasets.base import Dataset, GeneratedDataset, PackedSplit
from kdbench.data.describe import located_errors, open_dataset, stored_field_specs
from kdbench.data.loading.source import (
    IGNORE_INDEX,
    GeneratedSource,
    LoadingOptions,
    ResidentSource,
    SampleMetadata,
    Source,
)
from kdbench.data.sampling.select import (
    apply_relabel,
    class_list_text,
    labelled_positions,
    option_location,
    subset_positions,
)
from kdbench.data.sampling.split import balanced_positions, empty_classes, exclude
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import generator

_SHARED_SPLITS: weakref.WeakValueDictionary[str, PackedSplit] | None = None
"""What runs in one process share while `shared` holds: splits on a device, as long as a source keeps them."""


@contextmanager
def shared_splits() -> Iterator[None]:
    """Lets sources that are opened meanwhile share the memory of a split. Its files must not change meanwhile."""
    global _SHARED_SPLITS
    before = _SHARED_SPLITS
    _SHARED_SPLITS = weakref.WeakValueDictionary() if before is None else before
    try:
        yield
    finally:
        _SHARED_SPLITS = before


@dataclass
class _OpenDataset:
    """A dataset that several sources may read."""

    dataset: Any
    labels: Tensor
    packed: PackedSplit | None = None
    held_out: Tensor | None = None


def build_sources(
    data: Mapping[str, SourceConfig],
    *,
    validation: float | int | None,
    seed: int,
    device: torch.device | str,
    data_root: str,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    artifact_files: Mapping[str, Path] | None = None,
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
        made: `STAGE.NAME` -> the file of what an earlier stage made: datasets, and choices of samples.

    Raises:
        ConfigError: a parameter, an augmentation or a number does not fit, with its place.
        DataError: files are missing or damaged, or a split is empty.
    """
    setting = LoadingOptions(seed, torch.device(device), rank, world_size, workers, dtype, channels_last)
    opened: dict[str, _OpenDataset] = {}
    noises: dict[str, GeneratedDataset] = {}
    for name, config in data.items():
        key = _key(config)
        if key in opened:
            continue
        dataset = open_dataset(config, data_root, artifact_files)
        if isinstance(dataset, GeneratedDataset):
            noises[name] = dataset
        else:
            opened[key] = _load(dataset, config, setting, data_root)
    held_out = None
    if validation is not None:
        held_out = _hold_out(data, opened, validation, seed)
    sources: dict[str, Source] = {}
    for name, config in data.items():
        if name in noises:
            if config.overlap:
                raise ConfigError(_at(config, "`overlap` repeats samples, and noise is drawn anew for every batch"))
            sources[name] = GeneratedSource(config, setting, noises[name])
        else:
            sources[name] = _open(config, opened[_key(config)], setting, artifact_files)
    if held_out is not None:
        train = data["train"]
        views = data["eval"].views if "eval" in data else {"image": ()}  # what a role sees is there in both
        config = replace(
            train, name="validation", views=views, label_fraction=None, subset=None, relabel=None, overlap=False
        )
        sources["validation"] = _source(config, opened[_key(train)], setting, held_out, None)
    return sources


def _key(config: SourceConfig) -> str:
    named = [config.dataset.type, config.split, dict(config.dataset.params), config.artifact]
    return json.dumps(named, sort_keys=True, default=str)


def _load(dataset: Dataset, config: SourceConfig, setting: LoadingOptions, data_root: str) -> _OpenDataset:
    if config.artifact is not None and dataset.problem is not None:
        raise DataError(_at(config, f"{config.artifact} has not been made yet"))
    if len(dataset) == 0:
        raise DataError(_at(config, f"{config.dataset.type}: the split {config.split!r} is empty"))
    if not dataset.resident:
        return _OpenDataset(dataset, dataset.labels())
    packed = _resident(dataset, config, setting, data_root)
    return _OpenDataset(dataset, packed.labels, packed)


def _resident(dataset: Dataset, config: SourceConfig, setting: LoadingOptions, data_root: str) -> PackedSplit:
    """A split with its images on the device; a made one is never shared, since its run may make it anew."""
    key = json.dumps([_key(config), data_root, str(setting.device)])
    found = None if _SHARED_SPLITS is None or config.artifact is not None else _SHARED_SPLITS.get(key)
    if found is None:
        with located_errors(config):
            packed = dataset.load()
        found = replace(packed, images=packed.images.to(setting.device))
        if _SHARED_SPLITS is not None and config.artifact is None:
            _SHARED_SPLITS[key] = found
            if setting.device.type == "cuda":  # others read it on streams of their own
                torch.cuda.current_stream(setting.device).synchronize()
    return found


def _hold_out(
    data: Mapping[str, SourceConfig], opened: Mapping[str, _OpenDataset], validation: float | int, seed: int
) -> Tensor:
    train = data.get("train")
    if train is None or _key(train) not in opened:
        raise ConfigError("validation is held out from the source `train`, which has to exist and have labels")
    found = opened[_key(train)]
    classes = found.dataset.classes
    everything = torch.arange(len(found.labels))
    what = option_location(train, "validation")
    rng = generator(seed, "split", "validation")
    held_out = balanced_positions(found.labels, everything, validation, len(classes), rng, what)
    for part, words in ((held_out, "has no sample"), (exclude(everything, held_out), "leaves train no sample")):
        missing = empty_classes(found.labels, part, classes)
        if missing:
            raise ConfigError(f"{what}: {validation} {words} of {class_list_text(missing)}; the split has {len(everything)}")
    found.held_out = held_out
    return held_out


def _open(config: SourceConfig, found: _OpenDataset, setting: LoadingOptions, made: Mapping[str, Path] | None) -> Source:
    positions = torch.arange(len(found.labels))
    if found.held_out is not None:
        positions = exclude(positions, found.held_out)
    names = found.dataset.classes
    positions = subset_positions(config, found.labels, positions, names, setting.seed, made)
    stored = None if found.packed is None else found.packed.fields.get("labelled")
    known = found.labels if stored is None else torch.where(stored, found.labels, IGNORE_INDEX)
    labelled = labelled_positions(config, known, positions, names, setting.seed, made)
    if labelled is None and stored is not None:
        labelled = positions[stored[positions]]
    if len(positions) == 0:
        raise DataError(_at(config, f"{config.dataset.type}: no sample is left of the split {config.split!r}"))
    together = config.batch_size * setting.world_size
    if config.batch_size < 1:
        raise ConfigError(f"{option_location(config, 'batch_size')} must be at least 1, got {config.batch_size}")
    if together > len(positions) and not is_evaluation(config.name):
        each = f"{config.batch_size} on each of {setting.world_size} processes" if setting.world_size > 1 else config.batch_size
        raise ConfigError(
            f"{option_location(config, 'batch_size')}: {each} is more than the {len(positions)} samples of source {config.name!r}"
        )
    return _source(config, found, setting, positions, labelled)


def _source(
    config: SourceConfig, found: _OpenDataset, setting: LoadingOptions, positions: Tensor, labelled: Tensor | None
) -> Source:
    dataset: Dataset = found.dataset
    views = _views(config, dataset, setting)
    told = apply_relabel(config, found.labels, dataset.classes, setting.seed)
    truth = None if config.relabel is None else found.labels
    fields = {} if found.packed is None else {k: v for k, v in found.packed.fields.items() if k != "labelled"}
    samples = SampleMetadata(told, positions, labelled, truth, fields)
    image_field_specs(config, dataset.shape, stored_field_specs(fields))  # no view may be called like one of them
    if found.packed is not None:
        reject_decode_augmentations(config)
        return ResidentSource(config, setting, views, dataset.classes, samples, found.packed)
    from kdbench.data.loading.streaming import StreamingSource

    return StreamingSource(config, setting, views, dataset.classes, samples, dataset.checksum(), dataset.reader())


def _views(config: SourceConfig, dataset: Dataset, setting: LoadingOptions) -> dict[str, View]:
    mean, std = (dataset.mean, dataset.std) if dataset.normalize else (None, None)
    return build_views(
        config,
        dataset.shape,
        mean=mean,
        std=std,
        device=setting.device,
        dtype=setting.dtype,
        channels_last=setting.channels_last,
        in_unit_range=config.artifact is None or dataset.normalize,
    )


def _at(config: SourceConfig, text: str) -> str:
    return f"{config.location}: {text}" if str(config.location) else text
