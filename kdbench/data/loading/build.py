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
from kdbench.data.augment.view import View, build_views, fields_of, refuse_reading
from kdbench.data.datasets.base import Dataset, Noise, Packed
from kdbench.data.describe import extra_fields, open_dataset, placed
from kdbench.data.loading.source import HIDDEN, NoiseSource, ResidentSource, Samples, Setting, Source
from kdbench.data.sampling.select import labelled_positions, place, relabelled, some, subset_positions
from kdbench.data.sampling.split import balanced, empty_classes, without
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import generator

_SHARED: weakref.WeakValueDictionary[str, Packed] | None = None
"""What runs in one process share while `shared` holds: splits on a device, as long as a source keeps them."""


@contextmanager
def shared() -> Iterator[None]:
    """Lets sources that are opened meanwhile share the memory of a split. Its files must not change meanwhile."""
    global _SHARED
    before = _SHARED
    _SHARED = weakref.WeakValueDictionary() if before is None else before
    try:
        yield
    finally:
        _SHARED = before


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
    made: Mapping[str, Path] | None = None,
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
    setting = Setting(seed, torch.device(device), rank, world, workers, dtype, channels_last)
    opened: dict[str, _Opened] = {}
    noises: dict[str, Noise] = {}
    for name, config in data.items():
        key = _key(config)
        if key in opened:
            continue
        dataset = open_dataset(config, data_root, made)
        if isinstance(dataset, Noise):
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
            sources[name] = NoiseSource(config, setting, noises[name])
        else:
            sources[name] = _open(config, opened[_key(config)], setting, made)
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


def _load(dataset: Dataset, config: SourceConfig, setting: Setting, data_root: str) -> _Opened:
    if config.artifact is not None and dataset.problem is not None:
        raise DataError(_at(config, f"{config.artifact} has not been made yet"))
    if len(dataset) == 0:
        raise DataError(_at(config, f"{config.dataset.type}: the split {config.split!r} is empty"))
    if not dataset.resident:
        return _Opened(dataset, dataset.labels())
    packed = _resident(dataset, config, setting, data_root)
    return _Opened(dataset, packed.labels, packed)


def _resident(dataset: Dataset, config: SourceConfig, setting: Setting, data_root: str) -> Packed:
    """A split with its images on the device; a made one is never shared, since its run may make it anew."""
    key = json.dumps([_key(config), data_root, str(setting.device)])
    found = None if _SHARED is None or config.artifact is not None else _SHARED.get(key)
    if found is None:
        with placed(config):
            packed = dataset.load()
        found = replace(packed, images=packed.images.to(setting.device))
        if _SHARED is not None and config.artifact is None:
            _SHARED[key] = found
            if setting.device.type == "cuda":  # others read it on streams of their own
                torch.cuda.current_stream(setting.device).synchronize()
    return found


def _hold_out(
    data: Mapping[str, SourceConfig], opened: Mapping[str, _Opened], validation: float | int, seed: int
) -> Tensor:
    train = data.get("train")
    if train is None or _key(train) not in opened:
        raise ConfigError("validation is held out from the source `train`, which has to exist and have labels")
    found = opened[_key(train)]
    classes = found.dataset.classes
    everything = torch.arange(len(found.labels))
    what = place(train, "validation")
    rng = generator(seed, "split", "validation")
    held_out = balanced(found.labels, everything, validation, len(classes), rng, what)
    for part, words in ((held_out, "has no sample"), (without(everything, held_out), "leaves train no sample")):
        missing = empty_classes(found.labels, part, classes)
        if missing:
            raise ConfigError(f"{what}: {validation} {words} of {some(missing)}; the split has {len(everything)}")
    found.held_out = held_out
    return held_out


def _open(config: SourceConfig, found: _Opened, setting: Setting, made: Mapping[str, Path] | None) -> Source:
    positions = torch.arange(len(found.labels))
    if found.held_out is not None:
        positions = without(positions, found.held_out)
    names = found.dataset.classes
    positions = subset_positions(config, found.labels, positions, names, setting.seed, made)
    stored = None if found.packed is None else found.packed.fields.get("labelled")
    known = found.labels if stored is None else torch.where(stored, found.labels, HIDDEN)
    labelled = labelled_positions(config, known, positions, names, setting.seed, made)
    if labelled is None and stored is not None:
        labelled = positions[stored[positions]]
    if len(positions) == 0:
        raise DataError(_at(config, f"{config.dataset.type}: no sample is left of the split {config.split!r}"))
    together = config.batch_size * setting.world
    if config.batch_size < 1:
        raise ConfigError(f"{place(config, 'batch_size')} must be at least 1, got {config.batch_size}")
    if together > len(positions) and not is_evaluation(config.name):
        each = f"{config.batch_size} on each of {setting.world} processes" if setting.world > 1 else config.batch_size
        raise ConfigError(
            f"{place(config, 'batch_size')}: {each} is more than the {len(positions)} samples of source {config.name!r}"
        )
    return _source(config, found, setting, positions, labelled)


def _source(
    config: SourceConfig, found: _Opened, setting: Setting, positions: Tensor, labelled: Tensor | None
) -> Source:
    dataset: Dataset = found.dataset
    views = _views(config, dataset, setting)
    told = relabelled(config, found.labels, dataset.classes, setting.seed)
    truth = None if config.relabel is None else found.labels
    fields = {} if found.packed is None else {k: v for k, v in found.packed.fields.items() if k != "labelled"}
    samples = Samples(told, positions, labelled, truth, fields)
    fields_of(config, dataset.shape, extra_fields(fields))  # no view may be called like one of them
    if found.packed is not None:
        refuse_reading(config)
        return ResidentSource(config, setting, views, dataset.classes, samples, found.packed)
    from kdbench.data.loading.streaming import StreamingSource

    return StreamingSource(config, setting, views, dataset.classes, samples, dataset.checksum(), dataset.reader())


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
        pixels=config.artifact is None or dataset.normalize,
    )


def _at(config: SourceConfig, text: str) -> str:
    return f"{config.location}: {text}" if str(config.location) else text
