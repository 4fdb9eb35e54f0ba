"""Tiny datasets on disk, and short ways to write a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.loading.build import build_sources
from kdbench.errors import Location


def part_config(text, **params):
    return PartConfig(type=text, params=params, location=Location(f"augment.{text}", "recipe.yaml", 7))


def source_config(name="train", dataset="synthetic", split="train", batch_size=16, views=None, params=None, **rest):
    return SourceConfig(
        name=name,
        dataset=PartConfig(type=dataset, params=params or {}),
        split=split,
        batch_size=batch_size,
        views=views or {"image": ()},
        location=Location(f"data.{name}", "recipe.yaml", 3),
        **rest,
    )


def open_source(source=None, *, seed=1, data_root="data", **options):
    """Builds one source and returns it."""
    source = source or source_config()
    options = {"validation": None, "device": "cpu"} | options
    return build_sources({source.name: source}, seed=seed, data_root=str(data_root), **options)[source.name]


@pytest.fixture
def make():
    return source_config


@pytest.fixture
def part():
    return part_config


@pytest.fixture
def source_of():
    return open_source


@pytest.fixture
def write_folders():
    """Writes class folders of random images; returns split -> list of (class, file, pixels) in the order written."""

    def write(root: Path, splits: dict[str, dict[str, int]], size=(12, 10), seed=0, suffix="png"):
        rng = np.random.default_rng(seed)
        written: dict[str, list] = {}
        for split, classes in splits.items():
            written[split] = []
            for name, count in classes.items():
                folder = root / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number:03d}.{suffix}")
                    written[split].append((name, folder / f"{number:03d}.{suffix}", pixels))
        return written

    return write
