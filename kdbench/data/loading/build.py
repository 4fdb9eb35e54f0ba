"""Builds the sources of a stage: opens each dataset once, splits off validation, selects subsets, checks sizes."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdbench.config.parse.data import is_evaluation
from kdbench.config.schema import SourceConfig
from kdbench.data.augment.view import View, build_views, image_field_specs, reject_decode_augmentations
from kdbench.data.datasets.artifact import ArtifactFiles
from kdbench.data.datasets.base import Dataset, GeneratedDataset, PackedSplit, stored_field_specs
from kdbench.data.describe import located_errors, open_dataset
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
    labelled_indices,
    option_location,
    subset_indices,
)
from kdbench.data.sampling.split import balanced_indices, empty_classes, exclude
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import generator

_SHARED_SPLITS: weakref.WeakValueDictionary[str, PackedSplit] | None = None
"""Splits on a device that runs of one process share inside `shared_splits`; a split is freed with its last source."""


@contextmanager
def shared_splits() -> Iterator[None]:
    """Lets sources that are opened inside share the memory of equal splits. The files must not change meanwhile."""
    global _SHARED_SPLITS
    before = _SHARED_SPLITS
    _SHARED_SPLITS = weakref.WeakValueDictionary() if before is None else before
    try:
        yield
    finally:
        _SHARED_SPLITS = before


@dataclass
class _DatasetEntry:
    """A dataset that several sources may read.

    labels: int64 (population,), of the full split.
    split: the images on the device; None unless the dataset is resident.
    validation_indices: samples held out, int64, sorted; None if none are.
    """

    dataset: Dataset
    labels: Tensor
    split: PackedSplit | None = None
    validation_indices: Tensor | None = None


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
    artifact_files: ArtifactFiles | None = None,
    notice: Callable[[str], None] = print,
) -> dict[str, Source]:
    """Opens every source of a stage.

    Args:
        data: the sources by name.
        validation: a fraction in (0, 1) or a number of samples of `train`'s dataset that are held out, class-balanced,
            as the source `validation`. No source of the same dataset and split yields them. They are drawn first;
            `subset` and `label_fraction` select among the rest.
        seed: of the run. Splits, subsets and labels are functions of it.
        device: of the batches, and of the images of resident datasets.
        data_root: the folder of all datasets.
        rank, world_size: this process in data-parallel training.
        workers: processes that decode images of datasets that are not resident.
        dtype: of the images.
        channels_last: memory layout of the images.
        artifact_files: `STAGE.NAME` -> file of a dataset or subset that an earlier stage built.
        notice: shows a sentence to the user.

    Returns:
        The sources by name, with `validation` where samples are held out.

    Raises:
        ConfigError: a parameter, an augmentation or a number does not fit; the message names its location.
        DataError: files are missing or damaged, or a split is empty.
    """
    options = LoadingOptions(seed, torch.device(device), rank, world_size, workers, dtype, channels_last, notice)
    entries: dict[str, _DatasetEntry] = {}
    generated: dict[str, GeneratedDataset] = {}
    for name, config in data.items():
        key = _dataset_key(config)
        if key in entries:  # sources of one dataset share its memory, and the samples held out of it
            continue
        dataset = open_dataset(config, data_root, artifact_files)
        if isinstance(dataset, GeneratedDataset):
            generated[name] = dataset
        else:
            entries[key] = _load(dataset, config, options, data_root)
    # Validation is held out before any source is built, so that no subset can contain its samples.
    validation_indices = None if validation is None else _hold_out(data, entries, validation, seed)
    sources: dict[str, Source] = {}
    for name, config in data.items():
        if name not in generated:
            sources[name] = _build_image_source(config, entries[_dataset_key(config)], options, artifact_files)
        elif config.overlap:
            raise ConfigError(
                _with_location(config, "`overlap` repeats samples, but generated data is new in every batch")
            )
        else:
            sources[name] = GeneratedSource(config, options, generated[name])
    if validation_indices is not None:
        config, entry = _validation_config(data), entries[_dataset_key(data["train"])]
        sources["validation"] = _new_image_source(config, entry, options, validation_indices, None)
    return sources


def _dataset_key(config: SourceConfig) -> str:
    """Returns a text that is equal for sources that read the same split of the same dataset."""
    dataset = [config.dataset.type, config.split, dict(config.dataset.params), config.artifact]
    return json.dumps(dataset, sort_keys=True, default=str)


def _load(dataset: Dataset, config: SourceConfig, options: LoadingOptions, data_root: str) -> _DatasetEntry:
    """Loads a dataset's labels, and its images if it is resident."""
    if config.artifact is not None and dataset.problem is not None:
        raise DataError(_with_location(config, f"the artifact {config.artifact} does not exist yet"))
    if len(dataset) == 0:
        raise DataError(_with_location(config, f"{config.dataset.type}: the split {config.split!r} is empty"))
    if not dataset.resident:
        return _DatasetEntry(dataset, dataset.labels())
    split = _resident_split(dataset, config, options, data_root)
    return _DatasetEntry(dataset, split.labels, split)


def _resident_split(dataset: Dataset, config: SourceConfig, options: LoadingOptions, data_root: str) -> PackedSplit:
    """Returns a split with its images on the device, from `_SHARED_SPLITS` if possible."""
    # An artifact is not shared: its stage may write the file again.
    shared = None if config.artifact is not None else _SHARED_SPLITS
    key = json.dumps([_dataset_key(config), data_root, str(options.device)])
    split = None if shared is None else shared.get(key)
    if split is None:
        with located_errors(config):
            split = dataset.load()
        split = replace(split, images=split.images.to(options.device))
        if shared is not None:
            shared[key] = split
            if options.device.type == "cuda":  # other runs read it on other streams
                torch.cuda.current_stream(options.device).synchronize()
    return split


def _hold_out(
    data: Mapping[str, SourceConfig], entries: Mapping[str, _DatasetEntry], validation: float | int, seed: int
) -> Tensor:
    """Draws the validation samples of `train`'s dataset, notes them there, and returns their indices."""
    train = data.get("train")
    if train is None or _dataset_key(train) not in entries:
        raise ConfigError("`validation` needs a source `train` with labels, from which it is held out")
    entry = entries[_dataset_key(train)]
    classes = entry.dataset.classes
    all_indices = torch.arange(len(entry.labels))
    location = option_location(train, "validation")
    rng = generator(seed, "split", "validation")
    validation_indices = balanced_indices(entry.labels, all_indices, validation, len(classes), rng, location)
    rest = exclude(all_indices, validation_indices)
    for part, problem in ((validation_indices, "has no sample"), (rest, "leaves train no sample")):
        missing = empty_classes(entry.labels, part, classes)
        if missing:
            raise ConfigError(
                f"{location}: {validation} {problem} of {class_list_text(missing)}; the split has {len(all_indices)}"
            )
    entry.validation_indices = validation_indices
    return validation_indices


def _validation_config(data: Mapping[str, SourceConfig]) -> SourceConfig:
    """Returns the source `validation`: the dataset of `train` under the views of `eval`, which roles are fed with."""
    views = data["eval"].views if "eval" in data else {"image": ()}
    return replace(
        data["train"],
        name="validation",
        views=views,
        label_fraction=None,
        subset=None,
        relabel=None,
        overlap=False,
    )


def _build_image_source(
    config: SourceConfig, entry: _DatasetEntry, options: LoadingOptions, artifact_files: ArtifactFiles | None
) -> Source:
    """Selects the samples and labels of a source, and checks its batch size."""
    indices = torch.arange(len(entry.labels))
    if entry.validation_indices is not None:
        indices = exclude(indices, entry.validation_indices)
    classes = entry.dataset.classes
    indices = subset_indices(config, entry.labels, indices, classes, options.seed, artifact_files)
    # An artifact may mark samples as unlabelled: their labels are hidden, and do not count for `label_fraction`.
    labelled_mask = None if entry.split is None else entry.split.fields.get("labelled")
    labels = entry.labels
    if labelled_mask is not None:
        labels = torch.where(labelled_mask, labels, IGNORE_INDEX)
    labelled = labelled_indices(config, labels, indices, classes, options.seed, artifact_files)
    if labelled is None and labelled_mask is not None:
        labelled = indices[labelled_mask[indices]]
    if len(indices) == 0:
        raise DataError(_with_location(config, f"{config.dataset.type}: no sample of split {config.split!r} is left"))
    _check_batch_size(config, len(indices), options.world_size)
    return _new_image_source(config, entry, options, indices, labelled)


def _check_batch_size(config: SourceConfig, num_samples: int, world_size: int) -> None:
    location = option_location(config, "batch_size")
    if config.batch_size < 1:
        raise ConfigError(f"{location} must be at least 1, got {config.batch_size}")
    if config.batch_size * world_size > num_samples and not is_evaluation(config.name):
        size = f"{config.batch_size} on each of {world_size} processes" if world_size > 1 else config.batch_size
        raise ConfigError(f"{location}: {size} is more than the {num_samples} samples of source {config.name!r}")


def _new_image_source(
    config: SourceConfig,
    entry: _DatasetEntry,
    options: LoadingOptions,
    indices: Tensor,
    labelled: Tensor | None,
) -> Source:
    """Builds a resident or a streaming source.

    Args:
        indices: int64, sorted: samples of the split that the source yields.
        labelled: the part of `indices` that keeps its label; None for all.
    """
    dataset, split = entry.dataset, entry.split
    views = _build_views(config, dataset, options)
    labels = apply_relabel(config, entry.labels, dataset.classes, options.seed)
    true_labels = None if config.relabel is None else entry.labels
    fields = {} if split is None else {name: value for name, value in split.fields.items() if name != "labelled"}
    samples = SampleMetadata(labels, indices, labelled, true_labels, fields)
    image_field_specs(config, dataset.shape, stored_field_specs(fields))  # raises where a view has the name of a field
    if split is not None:
        reject_decode_augmentations(config)
        return ResidentSource(config, options, views, dataset.classes, samples, split)
    # Imported here because it imports PIL, which takes 0.1 s of every start; most sources are resident.
    from kdbench.data.loading.streaming import StreamingSource

    return StreamingSource(config, options, views, dataset.classes, samples, dataset.checksum(), dataset.reader())


def _build_views(config: SourceConfig, dataset: Dataset, options: LoadingOptions) -> dict[str, View]:
    mean, std = (dataset.mean, dataset.std) if dataset.normalize else (None, None)
    return build_views(
        config,
        dataset.shape,
        mean=mean,
        std=std,
        device=options.device,
        dtype=options.dtype,
        channels_last=options.channels_last,
        in_unit_range=config.artifact is None or dataset.normalize,
    )


def _with_location(config: SourceConfig, message: str) -> str:
    return f"{config.location}: {message}" if str(config.location) else message
