"""The choices of a source: which samples (`subset`), which labels stay (`label_fraction`), which change (`relabel`).

Each is a function of the seed and of the split, never of the source's name, its batches or the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.artifact import read_subset
from kdbench.data.sampling.relabel import Relabel
from kdbench.data.sampling.split import amount_to_count, balanced_positions, empty_classes
from kdbench.data.sampling.subsets import Subset
from kdbench.errors import ConfigError, DataError, UserError
from kdbench.randomness import derive, generator
from kdbench.registry import RELABELS, SUBSETS, Registry

ArtifactFiles = Mapping[str, Path] | None
"""`STAGE.NAME` -> the file of what that stage made."""


def subset_steps(config: SourceConfig) -> tuple[float | int | str | PartConfig, ...]:
    """Returns what is applied in order: numbers (balanced), texts (`STAGE.NAME` of a made choice), and parts."""
    subset = config.subset
    return () if subset is None else subset if isinstance(subset, tuple) else (subset,)


def check_selection(config: SourceConfig, names: Sequence[str]) -> None:
    """Builds the parts of a source's choices, for the faults in them.

    Args:
        names: of the dataset's classes; empty where only the files could tell.

    Raises:
        ConfigError: an unknown part or parameter, or one that does not fit.
    """
    for step in subset_steps(config):
        if isinstance(step, PartConfig):
            _build(SUBSETS, step, names, config, "subset")
    if config.relabel is not None:
        _build(RELABELS, config.relabel, names, config, "relabel")


def subset_size(config: SourceConfig, candidates: int | None, population: int | None, artifact_files: ArtifactFiles = None) -> int | None:
    """Returns how many of so many candidates the source will give; None where only labels or files could tell.

    Args:
        candidates: of the split, less what is held out. population: of the whole split.

    Raises:
        ConfigError: more are asked for than there are.
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


def subset_positions(
    config: SourceConfig, labels: Tensor, positions: Tensor, names: Sequence[str], seed: int, made: ArtifactFiles = None
) -> Tensor:
    """Returns the part of `positions` that the source gives, int64, sorted.

    Args:
        labels: int64 (population,), the true labels of the whole split; negative where there is none.
        positions: int64, sorted: the split, less what is held out.
    """
    where = option_location(config, "subset")
    for number, step in enumerate(subset_steps(config)):
        rng = generator(seed, "split", "subset", *([number] if number else []))
        if isinstance(step, str):
            positions = positions[torch.isin(positions, _read_artifact_subset(config, step, len(labels), made, "subset"))]
        elif isinstance(step, PartConfig):
            part: Subset = _build(SUBSETS, step, names, config, "subset")
            try:
                positions = part.select(labels, positions, len(names), rng)
            except ConfigError as error:
                raise ConfigError(f"{_step_location(step, config)}: {step.type}: {error}") from None
        else:
            positions = balanced_positions(labels, positions, step, len(names), rng, where)
    return positions


def labelled_positions(
    config: SourceConfig, labels: Tensor, positions: Tensor, names: Sequence[str], seed: int, made: ArtifactFiles = None
) -> Tensor | None:
    """Returns the part of `positions` whose label stays, int64, sorted; None where all stay."""
    if config.label_fraction is None:
        return None
    positions = positions[labels[positions] >= 0]
    if isinstance(config.label_fraction, str):
        return positions[torch.isin(positions, _read_artifact_subset(config, config.label_fraction, len(labels), made, "labels"))]
    where = option_location(config, "labels")
    present = len(names) - len(empty_classes(labels, positions, names))
    kept = balanced_positions(labels, positions, config.label_fraction, len(names), generator(seed, "split", "labels"), where)
    missing = empty_classes(labels, kept, names)
    if len(names) - len(missing) < present:
        raise ConfigError(f"{where}: {config.label_fraction} leaves {class_list_text(missing)} without any label")
    return kept


def apply_relabel(config: SourceConfig, labels: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """Returns the labels of the whole split as the source tells them; a missing label stays missing."""
    if config.relabel is None:
        return labels
    part: Relabel = _build(RELABELS, config.relabel, names, config, "relabel")
    rng = torch.Generator().manual_seed(derive(seed, "split", "relabel"))
    draws = torch.rand(len(labels), part.num_draws, generator=rng)
    known = labels >= 0
    changed = labels.clone()
    changed[known] = part(labels[known], draws[known], len(names))
    return changed


def option_location(config: SourceConfig, option: str) -> str:
    """The place of one of a source's options, or the source's own where the option was not written."""
    given = config.locations.get(option)
    return str(given or (f"{config.location}: {option}" if str(config.location) else option))


def _step_location(step: float | int | PartConfig, config: SourceConfig) -> str:
    """The place of one element of `subset`."""
    return str(step.location) if isinstance(step, PartConfig) and str(step.location) else option_location(config, "subset")


def class_list_text(names: list[str]) -> str:
    """The first few names, in words."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more classes"


def _read_artifact_subset(config: SourceConfig, name: str, population: int, made: ArtifactFiles, option: str) -> Tensor:
    where = option_location(config, option)
    if made is None or name not in made:
        raise DataError(f"{where}: {name} has not been made yet")
    try:
        return read_subset(made[name], population)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _build(registry: Registry, named: PartConfig, names: Sequence[str], config: SourceConfig, option: str) -> Any:
    where = named.location if str(named.location) else option_location(config, option)
    registry.check(named.type, named.params, where)
    try:
        return registry.build(named.type, named.params, where, names=tuple(names))
    except UserError as error:
        raise ConfigError(f"{where}: {named.type}: {error}") from None
