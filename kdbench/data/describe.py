"""What a source will yield, known before anything is decoded or downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kdbench.config.schema import SourceConfig
from kdbench.data.datasets.base import GeneratedDataset
from kdbench.data.source_spec import SourceSpec
from kdbench.errors import ConfigError, DataError, UserError
from kdbench.registry import DATASETS


@contextmanager
def located_errors(config: SourceConfig) -> Iterator[None]:
    """Puts the place of a source's dataset in the recipe before what is wrong with its files."""
    where = str(config.dataset.location) or str(config.location)
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


def open_dataset(config: SourceConfig, data_root: str, artifact_files: Mapping[str, Path] | None = None) -> Any:
    """Builds the dataset of a source; a user's mistake is told with the place in the recipe.

    Args:
        made: `STAGE.NAME` -> the file of what that stage made; what is not in it has not been made yet.

    Raises:
        ConfigError: an unknown dataset, parameter or split.
        DataError: the files are missing or unsuitable.
    """
    named = config.dataset
    where = named.location if str(named.location) else config.location
    DATASETS.check(named.type, named.params, where)
    file = None if config.artifact is None else (artifact_files or {}).get(config.artifact)
    with located_errors(config):
        return DATASETS.build(
            named.type,
            named.params,
            where,
            split=config.split,
            data_root=os.path.expanduser(data_root),
            file=None if file is None else str(file),
        )


def describe_source(
    config: SourceConfig,
    data_root: str,
    *,
    artifact_files: Mapping[str, Path] | None = None,
    artifact_spec: SourceSpec | None = None,
) -> SourceSpec:
    """Returns what a source will give, without decoding or downloading anything.

    A dataset whose files are missing is described by the facts on its registration, with `problem` in words; one that
    an earlier stage has still to make, by `like`.

    Args:
        made: `STAGE.NAME` -> the file of what that stage made.
        like: what a made dataset will give (`datasets.artifact.expected`); its images are not augmented yet.

    Raises:
        ConfigError: an unknown dataset, parameter, split, subset, relabelling or augmentation.
    """
    from kdbench.data.augment.view import image_field_specs, reject_decode_augmentations, variant_counts
    from kdbench.data.sampling.select import check_selection, subset_size

    if config.artifact is not None and config.artifact not in (artifact_files or {}):
        return _describe_missing_artifact(config, artifact_spec or SourceSpec())
    try:
        dataset = open_dataset(config, data_root, artifact_files)
    except DataError as error:
        if config.artifact is not None:
            raise
        check_selection(config, ())
        entry = DATASETS.entry(config.dataset.type)
        values = {key: parameter.default for key, parameter in entry.parameters.items()} | dict(config.dataset.params)
        shape = entry.facts.get("shape")
        if shape is None:
            return SourceSpec(problem=str(error))
        shape = tuple(values[part] if isinstance(part, str) else part for part in shape)
        if entry.load().resident and "resident" not in entry.parameters:
            reject_decode_augmentations(config)
        whole = entry.facts.get("samples", {}).get(config.split)
        samples = subset_size(config, whole, whole, artifact_files)
        classes, variants = entry.facts.get("classes"), variant_counts(config, shape)
        return SourceSpec(image_field_specs(config, shape), classes, samples, str(error), whole, variants)
    if isinstance(dataset, GeneratedDataset):
        return SourceSpec(dataset.field_specs(), None, len(dataset), None)
    check_selection(config, dataset.classes)
    if dataset.resident:
        reject_decode_augmentations(config)
    fields = image_field_specs(config, dataset.shape, stored_field_specs(getattr(dataset, "extra", {})))
    whole = len(dataset)
    variants = variant_counts(config, dataset.shape, resident=dataset.resident)
    samples = subset_size(config, whole, whole, artifact_files)
    return SourceSpec(fields, len(dataset.classes), samples, dataset.problem, whole, variants)


def stored_field_specs(stored: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns what per-sample values of a dataset are as fields of a batch; floats have the dtype of the images."""
    kinds = {name: "float32" if v.is_floating_point() else str(v.dtype)[6:] for name, v in stored.items()}
    return {name: (tuple(value.shape[1:]), kinds[name]) for name, value in stored.items()}


def _describe_missing_artifact(config: SourceConfig, like: SourceSpec) -> SourceSpec:
    """What a source will give whose dataset an earlier stage has still to make."""
    from kdbench.data.augment.view import image_field_specs, reject_decode_augmentations
    from kdbench.data.sampling.select import check_selection

    check_selection(config, ())
    if "image" not in like.fields:
        return SourceSpec(like.fields, like.classes)
    reject_decode_augmentations(config)
    extra = {name: value for name, value in like.fields.items() if name not in ("image", "label", "index")}
    return SourceSpec(image_field_specs(config, like.fields["image"][0], extra), like.classes)


def describe_sources(
    data: Mapping[str, SourceConfig],
    validation: float | int | None,
    data_root: str,
    *,
    artifact_files: Mapping[str, Path] | None = None,
    artifact_specs: Mapping[str, SourceSpec] | None = None,
) -> dict[str, SourceSpec]:
    """Describes every source of a stage, less what is held out of `train` for validation.

    Args:
        made: `STAGE.NAME` -> the file of what that stage made.
        like: `STAGE.NAME` -> what the dataset will give that this stage has still to make. Where a made source is not
            in it, another source of the stage stands in.

    Raises:
        ConfigError: an unknown dataset, parameter, split, subset, relabelling or augmentation.
    """
    from kdbench.data.sampling.select import option_location, subset_size
    from kdbench.data.sampling.split import amount_to_count

    own = {name: describe_source(config, data_root, artifact_files=artifact_files) for name, config in data.items() if config.artifact is None}
    images = (spec for name in ("train", *own) if (spec := own.get(name)) is not None and "image" in spec.fields)
    other = next(images, None)
    stand_in = None if other is None else SourceSpec({"image": other.fields["image"]}, other.classes)
    specs = {}
    for name, config in data.items():
        if config.artifact is None:
            specs[name] = own[name]
        else:
            specs[name] = describe_source(config, data_root, artifact_files=artifact_files, artifact_spec=(artifact_specs or {}).get(config.artifact, stand_in))
    train = data.get("train")
    if validation is not None and train is not None:
        for name, config in data.items():
            whole = specs[name].population
            if whole is not None and reads_same_split(config, train):
                try:
                    left = max(whole - amount_to_count(whole, validation), 0)  # a subset is chosen among what is left
                except ConfigError as error:
                    raise ConfigError(f"{option_location(train, 'validation')}: {error}") from None
                specs[name] = replace(specs[name], samples=subset_size(config, left, whole, artifact_files))
    return specs


def reads_same_split(first: SourceConfig, second: SourceConfig) -> bool:
    """Whether two sources read the same split of the same dataset."""
    return (first.dataset.type, dict(first.dataset.params), first.split, first.artifact) == (
        second.dataset.type,
        dict(second.dataset.params),
        second.split,
        second.artifact,
    )
