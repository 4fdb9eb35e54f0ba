"""Describes a source, and opens its dataset, before any image is decoded or downloaded."""

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
    """Prefixes errors about a dataset's files with the dataset's location in the recipe."""
    location = str(config.dataset.location) or str(config.location)
    try:
        yield
    except UserError as error:
        raise type(error)(f"{location}: {error}" if location else str(error)) from None


def open_dataset(config: SourceConfig, data_root: str, artifact_files: ArtifactFiles | None = None) -> Any:
    """Builds the dataset of a source; errors start with the location in the recipe.

    Args:
        artifact_files: `STAGE.NAME` -> file of the artifact; artifacts that do not exist yet are left out.

    Raises:
        ConfigError: an unknown dataset, parameter or split.
        DataError: the files are missing or unsuitable.
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
    """Returns the spec of a source, without decoding or downloading anything.

    A dataset whose files are missing is described by the facts of its registration, with a `problem`. An artifact that
    does not exist yet is described by `artifact_spec`.

    Args:
        artifact_files: `STAGE.NAME` -> file of the artifact.
        artifact_spec: the artifact's expected spec (`datasets.artifact.expected_spec`), before augmentation.

    Raises:
        ConfigError: an unknown dataset, parameter, split, subset, relabelling or augmentation.
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
    """Describes a source by the facts of its dataset's registration."""
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
    """Describes a source by the expected spec of an artifact that does not exist yet."""
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
    """Describes every source of a stage; samples held out for validation are not counted.

    Args:
        artifact_files: `STAGE.NAME` -> file of the artifact.
        artifact_specs: `STAGE.NAME` -> expected spec of an artifact that does not exist yet. An artifact without one is
            described like another source of the stage.

    Raises:
        ConfigError: an unknown dataset, parameter, split, subset, relabelling or augmentation.
    """
    specs = {
        name: describe_source(config, data_root, artifact_files=artifact_files)
        for name, config in data.items()
        if config.artifact is None
    }
    # Artifacts come second: where nothing else is known they look like the training source, or the first with images.
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
