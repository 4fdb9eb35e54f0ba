"""Opens the datasets of sources, and describes sources before an image is decoded or downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kdbench.config.schema import SourceConfig
from kdbench.data.augment.view import image_field_specs, reject_decode_augmentations, variant_counts
from kdbench.data.datasets.artifact import ArtifactFiles
from kdbench.data.datasets.base import GeneratedDataset, stored_field_specs
from kdbench.data.sampling.select import check_selection, option_location, subset_size
from kdbench.data.sampling.split import amount_to_count
from kdbench.data.source_spec import SourceSpec
from kdbench.errors import ConfigError, DataError, UserError
from kdbench.registry import DATASETS


@contextmanager
def located_errors(config: SourceConfig) -> Iterator[None]:
    """Context manager: prefixes errors about a dataset with the dataset's location (file and line) in the recipe."""
    location = str(config.dataset.location) or str(config.location)
    try:
        yield
    except UserError as error:
        raise type(error)(f"{location}: {error}" if location else str(error)) from None


def open_dataset(config: SourceConfig, data_root: str, artifact_files: ArtifactFiles | None = None) -> Any:
    """Builds the dataset of a source. Error messages begin with the location (file and line) in the recipe.

    Args:
        data_root: folder of all datasets.
        artifact_files: `STAGE.NAME` -> file of a dataset that an earlier stage built.

    Raises:
        ConfigError: the dataset, a parameter or the split is unknown.
        DataError: files are missing or unsuitable.
    """
    part = config.dataset
    location = part.location if str(part.location) else config.location
    DATASETS.check(part.type, part.params, location)
    file = None if config.artifact is None else (artifact_files or {}).get(config.artifact)
    with located_errors(config):
        return DATASETS.build(
            part.type,
            part.params,
            location,
            split=config.split,
            data_root=os.path.expanduser(data_root),
            file=None if file is None else str(file),
        )


def describe_source(
    config: SourceConfig,
    data_root: str,
    *,
    artifact_files: ArtifactFiles | None = None,
    artifact_spec: SourceSpec | None = None,
) -> SourceSpec:
    """Returns the description of a source: fields, classes and sizes. No image is decoded or downloaded.

    If the dataset's files are missing, the description is built from the keywords of the dataset's registration and
    has a `problem`. If an artifact does not exist yet, the description is built from `artifact_spec`.

    Args:
        data_root: folder of all datasets.
        artifact_files: `STAGE.NAME` -> file of an artifact that exists.
        artifact_spec: expected description of the artifact before augmentation (see
            `datasets.artifact.expected_spec`).

    Raises:
        ConfigError: the dataset, a parameter, the split, a subset, a relabelling or an augmentation is unknown.
    """
    if config.artifact is not None and config.artifact not in (artifact_files or {}):
        return _describe_missing_artifact(config, artifact_spec or SourceSpec())
    try:
        dataset = open_dataset(config, data_root, artifact_files)
    except DataError as error:
        if config.artifact is not None:
            raise
        return _describe_missing_files(config, str(error), artifact_files)
    if isinstance(dataset, GeneratedDataset):
        return SourceSpec(dataset.field_specs(), None, len(dataset), None)
    check_selection(config, dataset.classes)
    if dataset.resident:
        reject_decode_augmentations(config)
    fields = image_field_specs(config, dataset.shape, stored_field_specs(getattr(dataset, "extra", {})))
    population = len(dataset)
    variants = variant_counts(config, dataset.shape, resident=dataset.resident)
    samples = subset_size(config, population, population, artifact_files)
    return SourceSpec(fields, len(dataset.classes), samples, dataset.problem, population, variants)


def _describe_missing_files(config: SourceConfig, problem: str, artifact_files: ArtifactFiles | None) -> SourceSpec:
    """Describes a source without the files of its dataset, from the keywords of the dataset's registration."""
    check_selection(config, ())
    entry = DATASETS.entry(config.dataset.type)
    params = {key: parameter.default for key, parameter in entry.parameters.items()} | dict(config.dataset.params)
    shape = entry.facts.get("shape")
    if shape is None:
        return SourceSpec(problem=problem)
    shape = tuple(params[size] if isinstance(size, str) else size for size in shape)
    if entry.load().resident and "resident" not in entry.parameters:
        reject_decode_augmentations(config)
    population = entry.facts.get("samples", {}).get(config.split)
    samples = subset_size(config, population, population, artifact_files)
    fields, variants = image_field_specs(config, shape), variant_counts(config, shape)
    return SourceSpec(fields, entry.facts.get("classes"), samples, problem, population, variants)


def _describe_missing_artifact(config: SourceConfig, artifact_spec: SourceSpec) -> SourceSpec:
    """Describes a source whose artifact does not exist yet, from the expected description of the artifact."""
    check_selection(config, ())
    if "image" not in artifact_spec.fields:
        return SourceSpec(artifact_spec.fields, artifact_spec.classes)
    reject_decode_augmentations(config)
    computed = ("image", "label", "index")
    stored = {name: value for name, value in artifact_spec.fields.items() if name not in computed}
    return SourceSpec(image_field_specs(config, artifact_spec.fields["image"][0], stored), artifact_spec.classes)


def describe_sources(
    data: Mapping[str, SourceConfig],
    validation: float | int | None,
    data_root: str,
    *,
    artifact_files: ArtifactFiles | None = None,
    artifact_specs: Mapping[str, SourceSpec] | None = None,
) -> dict[str, SourceSpec]:
    """Describes the fields, classes and sizes of all data sources of a stage.

    The numbers of samples do not include samples that are held out for validation.

    Args:
        data: name -> configuration of the source.
        validation: fraction or number of the samples of source `train` that are held out; None: no sample.
        data_root: folder of all datasets.
        artifact_files: `STAGE.NAME` -> file of an artifact that exists.
        artifact_specs: `STAGE.NAME` -> expected description of an artifact that does not exist yet. If an artifact
            has no entry, it is assumed to have the images of `train`, or of the first source with images.

    Returns:
        Name -> description of the source.

    Raises:
        ConfigError: a dataset, parameter, split, subset, relabelling or augmentation is unknown.
    """
    specs = {
        name: describe_source(config, data_root, artifact_files=artifact_files)
        for name, config in data.items()
        if config.artifact is None
    }
    # Artifacts come second. By default they are assumed to be like the source `train`, or the first with images.
    candidates = (spec for name in ("train", *specs) if (spec := specs.get(name)) is not None)
    similar = next((spec for spec in candidates if "image" in spec.fields), None)
    default = None if similar is None else SourceSpec({"image": similar.fields["image"]}, similar.classes)
    for name, config in data.items():
        if config.artifact is not None:
            artifact_spec = (artifact_specs or {}).get(config.artifact, default)
            specs[name] = describe_source(config, data_root, artifact_files=artifact_files, artifact_spec=artifact_spec)
    specs = {name: specs[name] for name in data}
    train = data.get("train")
    if validation is None or train is None:
        return specs
    for name, config in data.items():
        population = specs[name].population
        if population is not None and reads_same_split(config, train):
            try:
                # A subset selects among the samples that are not held out.
                num_candidates = max(population - amount_to_count(population, validation), 0)
            except ConfigError as error:
                raise ConfigError(f"{option_location(train, 'validation')}: {error}") from None
            samples = subset_size(config, num_candidates, population, artifact_files)
            specs[name] = replace(specs[name], samples=samples)
    return specs


def reads_same_split(first: SourceConfig, second: SourceConfig) -> bool:
    """Returns whether two sources read the same split of the same dataset."""
    return (first.dataset.type, dict(first.dataset.params), first.split, first.artifact) == (
        second.dataset.type,
        dict(second.dataset.params),
        second.split,
        second.artifact,
    )
