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
from kdbench.data.datasets.base import Noise
from kdbench.data.source_spec import SourceSpec
from kdbench.errors import ConfigError, DataError, UserError
from kdbench.registry import DATASETS


@contextmanager
def placed(config: SourceConfig) -> Iterator[None]:
    """Puts the place of a source's dataset in the recipe before what is wrong with its files."""
    where = str(config.dataset.location) or str(config.location)
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


def open_dataset(config: SourceConfig, data_root: str, made: Mapping[str, Path] | None = None) -> Any:
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
    file = None if config.artifact is None else (made or {}).get(config.artifact)
    with placed(config):
        return DATASETS.build(
            named.type,
            named.params,
            where,
            split=config.split,
            data_root=os.path.expanduser(data_root),
            file=None if file is None else str(file),
        )


def describe(
    config: SourceConfig,
    data_root: str,
    *,
    made: Mapping[str, Path] | None = None,
    like: SourceSpec | None = None,
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
    from kdbench.data.augment.view import fields_of, refuse_reading, variants_of
    from kdbench.data.sampling.select import check, size

    if config.artifact is not None and config.artifact not in (made or {}):
        return _unmade(config, like or SourceSpec())
    try:
        dataset = open_dataset(config, data_root, made)
    except DataError as error:
        if config.artifact is not None:
            raise
        check(config, ())
        entry = DATASETS.entry(config.dataset.type)
        values = {key: parameter.default for key, parameter in entry.parameters.items()} | dict(config.dataset.params)
        shape = entry.facts.get("shape")
        if shape is None:
            return SourceSpec(problem=str(error))
        shape = tuple(values[part] if isinstance(part, str) else part for part in shape)
        if entry.load().resident and "resident" not in entry.parameters:
            refuse_reading(config)
        whole = entry.facts.get("samples", {}).get(config.split)
        samples = size(config, whole, whole, made)
        classes, variants = entry.facts.get("classes"), variants_of(config, shape)
        return SourceSpec(fields_of(config, shape), classes, samples, str(error), whole, variants)
    if isinstance(dataset, Noise):
        return SourceSpec(dataset.fields(), None, len(dataset), None)
    check(config, dataset.classes)
    if dataset.resident:
        refuse_reading(config)
    fields = fields_of(config, dataset.shape, extra_fields(getattr(dataset, "extra", {})))
    whole = len(dataset)
    variants = variants_of(config, dataset.shape, resident=dataset.resident)
    samples = size(config, whole, whole, made)
    return SourceSpec(fields, len(dataset.classes), samples, dataset.problem, whole, variants)


def extra_fields(stored: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns what per-sample values of a dataset are as fields of a batch; floats have the dtype of the images."""
    kinds = {name: "float32" if v.is_floating_point() else str(v.dtype)[6:] for name, v in stored.items()}
    return {name: (tuple(value.shape[1:]), kinds[name]) for name, value in stored.items()}


def _unmade(config: SourceConfig, like: SourceSpec) -> SourceSpec:
    """What a source will give whose dataset an earlier stage has still to make."""
    from kdbench.data.augment.view import fields_of, refuse_reading
    from kdbench.data.sampling.select import check

    check(config, ())
    if "image" not in like.fields:
        return SourceSpec(like.fields, like.classes)
    refuse_reading(config)
    extra = {name: value for name, value in like.fields.items() if name not in ("image", "label", "index")}
    return SourceSpec(fields_of(config, like.fields["image"][0], extra), like.classes)


def describe_all(
    data: Mapping[str, SourceConfig],
    validation: float | int | None,
    data_root: str,
    *,
    made: Mapping[str, Path] | None = None,
    like: Mapping[str, SourceSpec] | None = None,
) -> dict[str, SourceSpec]:
    """Describes every source of a stage, less what is held out of `train` for validation.

    Args:
        made: `STAGE.NAME` -> the file of what that stage made.
        like: `STAGE.NAME` -> what the dataset will give that this stage has still to make. Where a made source is not
            in it, another source of the stage stands in.

    Raises:
        ConfigError: an unknown dataset, parameter, split, subset, relabelling or augmentation.
    """
    from kdbench.data.sampling.select import place, size
    from kdbench.data.sampling.split import share

    own = {name: describe(config, data_root, made=made) for name, config in data.items() if config.artifact is None}
    images = (spec for name in ("train", *own) if (spec := own.get(name)) is not None and "image" in spec.fields)
    other = next(images, None)
    stand_in = None if other is None else SourceSpec({"image": other.fields["image"]}, other.classes)
    specs = {}
    for name, config in data.items():
        if config.artifact is None:
            specs[name] = own[name]
        else:
            specs[name] = describe(config, data_root, made=made, like=(like or {}).get(config.artifact, stand_in))
    train = data.get("train")
    if validation is not None and train is not None:
        for name, config in data.items():
            whole = specs[name].population
            if whole is not None and same_split(config, train):
                try:
                    left = max(whole - share(whole, validation), 0)  # a subset is chosen among what is left
                except ConfigError as error:
                    raise ConfigError(f"{place(train, 'validation')}: {error}") from None
                specs[name] = replace(specs[name], samples=size(config, left, whole, made))
    return specs


def same_split(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether two sources read the same split of the same dataset."""
    return (one.dataset.type, dict(one.dataset.params), one.split, one.artifact) == (
        other.dataset.type,
        dict(other.dataset.params),
        other.split,
        other.artifact,
    )
