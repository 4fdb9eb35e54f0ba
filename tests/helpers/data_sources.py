"""Sources and image folders for tests: short ways to configure, open, read and compare them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.loading.build import build_sources
from kdbench.data.loading.source import Source
from kdbench.errors import Location


def part_config(name: str, **params: Any) -> PartConfig:
    """Configures a part without a location, such as a subset."""
    return PartConfig(type=name, params=params)


def augmentation(name: str, **params: Any) -> PartConfig:
    """Configures an augmentation, located at `recipe.yaml:7 augment.NAME`."""
    return PartConfig(type=name, params=params, location=Location(f"augment.{name}", "recipe.yaml", 7))


def views(*names: str) -> dict[str, tuple[PartConfig, ...]]:
    """Returns one view `image` with augmentations in their default configuration."""
    return {"image": tuple(augmentation(name) for name in names)}


def source_config(
    name: str = "train",
    dataset: str = "synthetic",
    split: str = "train",
    batch_size: int = 16,
    views: Mapping[str, tuple[PartConfig, ...]] | None = None,
    params: Mapping[str, Any] | None = None,
    **options: Any,
) -> SourceConfig:
    """Configures a source, located at `recipe.yaml:3 data.NAME`."""
    return SourceConfig(
        name=name,
        dataset=PartConfig(type=dataset, params=params or {}),
        split=split,
        batch_size=batch_size,
        views=views or {"image": ()},
        location=Location(f"data.{name}", "recipe.yaml", 3),
        **options,
    )


def open_source(
    config: SourceConfig | None = None, *, seed: int = 1, data_root: Path | str = "data", **options: Any
) -> Any:
    """Builds one source."""
    config = config or source_config()
    options = {"validation": None, "device": "cpu"} | options
    return build_sources({config.name: config}, seed=seed, data_root=str(data_root), **options)[config.name]


def training_batches(source: Source, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yields the fields of the training batches."""
    return (batch.fields for batch in source.batches(epoch, start))


def evaluation_batches(source: Source, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields the fields of the evaluation batches."""
    return (batch.fields for batch in source.evaluation_batches(batch_size))


def concatenate(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates batches with the same fields."""
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def equal_fields(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Returns whether two batches have the same fields with bitwise equal values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def equal_batches(first: Iterable[Mapping[str, Tensor]], second: Iterable[Mapping[str, Tensor]]) -> bool:
    """Returns whether two sequences of batches have the same length and bitwise equal fields."""
    return all(equal_fields(a, b) for a, b in zip(first, second, strict=True))


def write_image_folders(
    root: Path,
    splits: Mapping[str, Mapping[str, int]],
    size: tuple[int, int] = (12, 10),
    seed: int = 0,
    suffix: str = "png",
) -> dict[str, list[tuple[str, Path, np.ndarray]]]:
    """Writes class folders of random images.

    Args:
        splits: split -> class -> number of images.
        size: (width, height) of the images.

    Returns:
        Split -> (class, path, pixels) of each image, in the order written.
    """
    rng = np.random.default_rng(seed)
    images: dict[str, list[tuple[str, Path, np.ndarray]]] = {}
    for split, classes in splits.items():
        images[split] = []
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                path = folder / f"{number:03d}.{suffix}"
                Image.fromarray(pixels).save(path)
                images[split].append((name, path, pixels))
    return images
