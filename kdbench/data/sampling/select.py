"""Selects the samples of a source (`subset`), hides labels (`label_fraction`) and changes labels (`relabel`).

A selection depends only on the seed and the split. It does not depend on the source's name, its batch size or the
number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.artifact import ArtifactFiles, read_subset
from kdbench.data.sampling.relabel import Relabel
from kdbench.data.sampling.split import amount_to_count, balanced_indices, empty_classes
from kdbench.data.sampling.subsets import Subset
from kdbench.errors import ConfigError, DataError, UserError
from kdbench.randomness import derive, generator
from kdbench.registry import RELABELS, SUBSETS, Registry


def subset_steps(config: SourceConfig) -> tuple[float | int | str | PartConfig, ...]:
    """Returns the entries of `subset` as a tuple: amounts, artifacts (`STAGE.NAME`) and registered subsets."""
    subset = config.subset
    return () if subset is None else subset if isinstance(subset, tuple) else (subset,)


def check_selection(config: SourceConfig, names: Sequence[str]) -> None:
    """Builds the subsets and relabellings of a source once, so that their errors are raised before training.

    Args:
        names: names of the dataset's classes; empty if they are unknown until the files are read.

    Raises:
        ConfigError: a subset, a relabelling or a parameter is unknown or does not fit.
    """
    for step in subset_steps(config):
        if isinstance(step, PartConfig):
            _build(SUBSETS, step, names, config, "subset")
    if config.relabel is not None:
        _build(RELABELS, config.relabel, names, config, "relabel")


def subset_size(
    config: SourceConfig,
    candidates: int | None,
    population: int | None,
    artifact_files: ArtifactFiles | None = None,
) -> int | None:
    """Returns the number of samples that the option `subset` of a data source selects.

    Args:
        candidates: number of samples of the split that are not held out for validation; None if unknown.
        population: number of samples of the full split; None if unknown.
        artifact_files: `STAGE.NAME` -> file of a subset that an earlier stage built.

    Returns:
        The number, or None if it depends on labels or missing files.

    Raises:
        ConfigError: `subset` asks for more samples than there are.
    """
    for step in subset_steps(config):
        if candidates is None:
            return None
        if isinstance(step, str):
            if candidates != population or step not in (artifact_files or {}):
                return None
            candidates = len(_read_artifact_subset(config, step, candidates, artifact_files, "subset"))
            continue
        part = _build(SUBSETS, step, (), config, "subset") if isinstance(step, PartConfig) else None
        try:
            candidates = amount_to_count(candidates, step) if part is None else part.size(candidates)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(f"{_step_location(step, config)}: {error}") from None
    return candidates


def subset_indices(
    config: SourceConfig,
    labels: Tensor,
    indices: Tensor,
    names: Sequence[str],
    seed: int,
    artifact_files: ArtifactFiles | None = None,
) -> Tensor:
    """Applies the option `subset` of a data source to `indices` and returns the selected indices, int64, sorted.

    Args:
        labels: int64 (population,), true labels of the full split; negative for a sample without label.
        indices: int64, sorted, indices of the samples that are not held out for validation.
        names: names of the classes.
        artifact_files: `STAGE.NAME` -> file of a subset that an earlier stage built.
    """
    location = option_location(config, "subset")
    for number, step in enumerate(subset_steps(config)):
        # The key of the first stream has no number, so that {subset: X} and {subset: [X, Y]} draw the same X.
        rng = generator(seed, "split", "subset", *([number] if number else []))
        if isinstance(step, str):
            artifact = _read_artifact_subset(config, step, len(labels), artifact_files, "subset")
            indices = indices[torch.isin(indices, artifact)]
        elif isinstance(step, PartConfig):
            part: Subset = _build(SUBSETS, step, names, config, "subset")
            try:
                indices = part.select(labels, indices, len(names), rng)
            except ConfigError as error:
                raise ConfigError(f"{_step_location(step, config)}: {step.type}: {error}") from None
        else:
            indices = balanced_indices(labels, indices, step, len(names), rng, location)
    return indices


def labelled_indices(
    config: SourceConfig,
    labels: Tensor,
    indices: Tensor,
    names: Sequence[str],
    seed: int,
    artifact_files: ArtifactFiles | None = None,
) -> Tensor | None:
    """Returns the indices of the samples whose labels stay visible with the option `label_fraction` of a source.

    Args:
        labels: int64 (population,), true labels of the full split; negative for a sample without label.
        indices: int64, sorted, indices of the samples that the source yields.
        names: names of the classes.
        artifact_files: `STAGE.NAME` -> file of a subset that an earlier stage built.

    Returns:
        A subset of `indices`, int64, sorted; None if the source has no `label_fraction`.

    Raises:
        ConfigError: no label of a class would be visible.
    """
    amount = config.label_fraction
    if amount is None:
        return None
    indices = indices[labels[indices] >= 0]
    if isinstance(amount, str):
        artifact = _read_artifact_subset(config, amount, len(labels), artifact_files, "label_fraction")
        return indices[torch.isin(indices, artifact)]
    location = option_location(config, "label_fraction")
    num_present = len(names) - len(empty_classes(labels, indices, names))
    # "labels" is a key of the random stream. Another word would change the selected labels.
    rng = generator(seed, "split", "labels")
    labelled = balanced_indices(labels, indices, amount, len(names), rng, location)
    missing = empty_classes(labels, labelled, names)
    if len(names) - len(missing) < num_present:
        raise ConfigError(f"{location}: {amount} leaves {class_list_text(missing)} without any label")
    return labelled


def apply_relabel(config: SourceConfig, labels: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """Returns the labels of the full split, changed by `relabel` of a source. Missing labels stay missing."""
    if config.relabel is None:
        return labels
    part: Relabel = _build(RELABELS, config.relabel, names, config, "relabel")
    rng = torch.Generator().manual_seed(derive(seed, "split", "relabel"))
    draws = torch.rand(len(labels), part.num_draws, generator=rng)
    present = labels >= 0
    new_labels = labels.clone()
    new_labels[present] = part(labels[present], draws[present], len(names))
    return new_labels


def option_location(config: SourceConfig, option: str) -> str:
    """Returns the location (file and line) of a source's option, or of the source if the recipe omits the option."""
    location = config.locations.get(option)
    return str(location or (f"{config.location}: {option}" if str(config.location) else option))


def _step_location(step: float | int | PartConfig, config: SourceConfig) -> str:
    """Returns the location (file and line) of one entry of the list `subset`."""
    if isinstance(step, PartConfig) and str(step.location):
        return str(step.location)
    return option_location(config, "subset")


def class_list_text(names: list[str]) -> str:
    """Returns a text with the first five names and the number of further names, for error messages."""
    first = ", ".join(repr(name) for name in names[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more classes"


def _read_artifact_subset(
    config: SourceConfig, name: str, population: int, artifact_files: ArtifactFiles | None, option: str
) -> Tensor:
    """Reads a subset that an earlier stage built, and returns its indices. Error messages name the option `option`."""
    location = option_location(config, option)
    if artifact_files is None or name not in artifact_files:
        raise DataError(f"{location}: the artifact {name} does not exist yet")
    try:
        return read_subset(artifact_files[name], population)
    except DataError as error:
        raise DataError(f"{location}: {error}") from None


def _build(registry: Registry, part: PartConfig, names: Sequence[str], config: SourceConfig, option: str) -> Any:
    """Builds a registered subset or relabelling. Error messages begin with the location (file and line) of `part`."""
    location = part.location if str(part.location) else option_location(config, option)
    registry.check(part.type, part.params, location)
    try:
        return registry.build(part.type, part.params, location, names=tuple(names))
    except UserError as error:
        raise ConfigError(f"{location}: {part.type}: {error}") from None
