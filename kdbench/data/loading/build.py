"""Builds the data sources of a stage: opens each dataset once, holds out validation samples, and selects subsets."""

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
"""Splits in device memory that runs of one process share inside the context `shared_splits`. None outside of it.

The memory of a split is freed with the last source that uses the split."""


@contextmanager
def shared_splits() -> Iterator[None]:
    """Context manager: sources that are opened inside it share one copy of equal splits in device memory.

    The files of the datasets must not change inside the context.
    """
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

    Attributes:
        labels: labels of the full split, int64 (population,).
        split: images and labels, with the images on the device; None if the images are decoded in every epoch.
        validation_indices: indices of the samples that are held out for validation, int64, sorted; None: no sample is
            held out.
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
    """Opens all data sources of a stage (a part of a training), one for each entry of `data`.

    Args:
        data: name -> configuration of the source.
        validation: fraction in (0, 1), or number, of the samples of source `train` that are held out as the source
            `validation`. They are drawn class-balanced, before `subset` and `label_fraction` are applied. No other
            source of the same split yields them.
        seed: seed of the run. It determines the validation samples, the subsets and the hidden labels.
        device: device of the batches, and of the images of datasets that are held in memory.
        data_root: folder of all datasets.
        rank, world_size: rank of this process and number of processes in data-parallel training.
        workers: number of processes that decode images of datasets that are not held in memory.
        dtype: dtype of the images.
        channels_last: whether the memory layout of the images is channels last.
        artifact_files: `STAGE.NAME` -> file of a dataset or subset that an earlier stage built.
        notice: function that shows a sentence to the user.

    Returns:
        Name -> source. The name `validation` is added if samples are held out.

    Raises:
        ConfigError: a parameter, an augmentation or a number does not fit. The message names the location in the
            recipe.
        DataError: files are missing or damaged, or a split is empty.
    """
    options = LoadingOptions(seed, torch.device(device), rank, world_size, workers, dtype, channels_last, notice)
    entries: dict[str, _DatasetEntry] = {}
    generated: dict[str, GeneratedDataset] = {}
    for name, config in data.items():
        key = _dataset_key(config)
        if key in entries:  # sources of one dataset share its memory and its validation samples
            continue
        dataset = open_dataset(config, data_root, artifact_files)
        if isinstance(dataset, GeneratedDataset):
            generated[name] = dataset
        else:
            entries[key] = _load(dataset, config, options, data_root)
    # Validation samples are held out before any source is built, so that no subset can contain its samples.
    validation_indices = None if validation is None else _hold_out(data, entries, validation, seed)
    sources: dict[str, Source] = {}
    for name, config in data.items():
        if name not in generated:
            sources[name] = _build_image_source(config, entries[_dataset_key(config)], options, artifact_files)
        elif config.overlap:
            raise ConfigError(
                _with_location(
                    config, "`overlap` repeats samples of the previous batch, but generated data is new in every batch"
                )
            )
        else:
            sources[name] = GeneratedSource(config, options, generated[name])
    if validation_indices is not None:
        config, entry = _validation_config(data), entries[_dataset_key(data["train"])]
        sources["validation"] = _new_image_source(config, entry, options, validation_indices, None)
    return sources


def _dataset_key(config: SourceConfig) -> str:
    """Returns a key that is equal for all sources that read the same split of the same dataset."""
    dataset = [config.dataset.type, config.split, dict(config.dataset.params), config.artifact]
    return json.dumps(dataset, sort_keys=True, default=str)


def _load(dataset: Dataset, config: SourceConfig, options: LoadingOptions, data_root: str) -> _DatasetEntry:
    """Loads the labels of a dataset, and its images if the dataset is held in memory."""
    if config.artifact is not None and dataset.problem is not None:
        raise DataError(_with_location(config, f"the artifact {config.artifact} does not exist yet"))
    if len(dataset) == 0:
        raise DataError(_with_location(config, f"{config.dataset.type}: the split {config.split!r} is empty"))
    if not dataset.resident:
        return _DatasetEntry(dataset, dataset.labels())
    split = _resident_split(dataset, config, options, data_root)
    return _DatasetEntry(dataset, split.labels, split)


def _resident_split(dataset: Dataset, config: SourceConfig, options: LoadingOptions, data_root: str) -> PackedSplit:
    """Loads a split and copies its images to the device, unless another run of this process already did so."""
    # An artifact is not shared, because a later round of its stage may write the file again.
    shared = None if config.artifact is not None else _SHARED_SPLITS
    key = json.dumps([_dataset_key(config), data_root, str(options.device)])
    split = None if shared is None else shared.get(key)
    if split is None:
        with located_errors(config):
            split = dataset.load()
        split = replace(split, images=split.images.to(options.device))
        if shared is not None:
            shared[key] = split
            if options.device.type == "cuda":  # other runs read the split on other streams
                torch.cuda.current_stream(options.device).synchronize()
    return split


def _hold_out(
    data: Mapping[str, SourceConfig], entries: Mapping[str, _DatasetEntry], validation: float | int, seed: int
) -> Tensor:
    """Draws the validation samples from the dataset of source `train` and returns their indices, int64, sorted.

    The indices are also stored in the dataset's `_DatasetEntry`, so that all other sources of this dataset exclude
    them.
    """
    train = data.get("train")
    if train is None or _dataset_key(train) not in entries:
        raise ConfigError(
            "`validation` needs a source `train` with labels, from which the validation samples are held out"
        )
    entry = entries[_dataset_key(train)]
    classes = entry.dataset.classes
    all_indices = torch.arange(len(entry.labels))
    location = option_location(train, "validation")
    rng = generator(seed, "split", "validation")
    validation_indices = balanced_indices(entry.labels, all_indices, validation, len(classes), rng, location)
    rest = exclude(all_indices, validation_indices)
    for part, name in ((validation_indices, "the validation split"), (rest, "the training split")):
        missing = empty_classes(entry.labels, part, classes)
        if missing:
            raise ConfigError(
                f"{location}: with {validation}, {name} has no sample of {class_list_text(missing)}; "
                f"the full split has {len(all_indices)} samples"
            )
    entry.validation_indices = validation_indices
    return validation_indices


def _validation_config(data: Mapping[str, SourceConfig]) -> SourceConfig:
    """Returns the configuration of source `validation`: the dataset of source `train`, the views of source `eval`."""
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
    """Builds a source of labelled images: selects its samples and visible labels, and checks its batch size."""
    indices = torch.arange(len(entry.labels))
    if entry.validation_indices is not None:
        indices = exclude(indices, entry.validation_indices)
    classes = entry.dataset.classes
    indices = subset_indices(config, entry.labels, indices, classes, options.seed, artifact_files)
    # An artifact may mark samples as unlabelled. Their labels are hidden and do not count for `label_fraction`.
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
    """Builds the source of a dataset: in device memory (resident), or decoded in every epoch (streaming).

    Args:
        indices: indices of the samples that the source yields, int64, sorted.
        labelled: subset of `indices` whose labels are visible; None: all labels are visible.
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
    # A late import: it imports PIL, which takes 0.1 s of every start, and most sources do not need it.
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
