"""Gaussian noise, the input of the generator in data-free distillation."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kdbench.data.datasets.base import GeneratedDataset
from kdbench.data.source_spec import FieldSpec
from kdbench.errors import ConfigError
from kdbench.registry import DATASETS


@DATASETS.register("gaussian", version=1, injected=("split", "data_root"), fields=("z",))
class Gaussian(GeneratedDataset):
    """Standard normal vectors in the field `z`, drawn in every step. The dataset has no files and no labels.

    Args:
        shape: shape of one sample.
        samples: number of samples in an epoch, rounded up to full batches.
    """

    def __init__(
        self, shape: tuple[int, ...] = (64,), samples: int = 50000, split: str = "train", data_root: str = "data"
    ) -> None:
        if not shape or min(shape) < 1:
            raise ConfigError(f"gaussian: shape must be a list of whole numbers of at least 1, got {list(shape)}")
        if samples < 1:
            raise ConfigError(f"gaussian: samples must be at least 1, got {samples}")
        self.shape = tuple(shape)
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def field_specs(self) -> dict[str, FieldSpec]:
        return {"z": (self.shape, "float32"), "index": ((), "int64")}

    def sample(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        return {"z": torch.randn(count, *self.shape, generator=generator)}

    def checksum(self) -> str:
        return hashlib.sha256(f"gaussian {list(self.shape)} {self.samples}".encode()).hexdigest()
