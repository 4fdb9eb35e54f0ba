"""Synthetic images, which are generated without files, for tests and demonstrations."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from kdbench.data.datasets.base import Dataset, PackedSplit, pack
from kdbench.errors import ConfigError
from kdbench.registry import DATASETS


@DATASETS.register("synthetic", version=1, injected=("split", "data_root"))
class Synthetic(Dataset):
    """Generated, learnable images (uint8): each class has a blurred pattern, and each image is a pattern plus noise.

    All splits have equal patterns and different noise. The classes are equally frequent.

    Args:
        shape: shape of one sample, usually [channels, height, width]. Samples with another number of dimensions
            cannot be augmented.
        classes: number of classes.
        samples: number of samples in each split.
        seed: seed of patterns and noise. They do not depend on the seed of the run.
        normalize: whether images are normalised; false: values stay in [0, 1].
    """

    splits = ("train", "val", "test")

    def __init__(
        self,
        shape: tuple[int, ...] = (3, 32, 32),
        classes: int = 10,
        samples: int = 512,
        seed: int = 0,
        normalize: bool = True,
        split: str = "train",
        data_root: str = "data",
    ) -> None:
        self.check_split(split)
        if not shape or min(shape) < 1:
            raise ConfigError(f"synthetic: shape must be a list of whole numbers of at least 1, got {list(shape)}")
        if classes < 1 or samples < classes:
            raise ConfigError(f"synthetic: needs at least one sample per class, got {samples} for {classes} classes")
        self.shape = tuple(shape)
        self.samples = samples
        self.seed = seed
        self.split = split
        self.normalize = normalize
        self.classes = [f"class{number:0{len(str(classes - 1))}d}" for number in range(classes)]
        self.mean = (0.5,) * self.shape[0]
        self.std = (0.2,) * self.shape[0]

    def __len__(self) -> int:
        return self.samples

    def load(self) -> PackedSplit:
        patterns = _rng(self.seed, "patterns").normal(size=(len(self.classes), *self.shape))
        for axis in range(2, patterns.ndim):  # neighbouring pixels are similar, so that a shifted crop keeps its class
            patterns = np.stack([np.roll(patterns, shift, axis) for shift in range(-2, 3)]).sum(0) / 5**0.5
        labels = np.arange(self.samples) % len(self.classes)
        noise = _rng(self.seed, self.split).normal(size=(self.samples, *self.shape))
        images = np.clip(128 + 30 * patterns[labels] + 30 * noise, 0, 255).astype(np.uint8)
        return pack(self.classes, torch.from_numpy(images), torch.from_numpy(labels))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"synthetic {seed} {purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "big")))
