"""The description of a source: its fields, classes and sizes, known before its files are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

FieldSpec: TypeAlias = tuple[tuple[int, ...], str]
"""Shape of one sample, without the batch dimension, and name of the dtype: `((3, 32, 32), "float32")`."""


@dataclass(frozen=True)
class VariantCount:
    """Number of different images that a view can show of one sample.

    count: None where there is no finite list of images; `reason` then says why.
    """

    count: int | None
    reason: str = ""


@dataclass(frozen=True)
class SourceSpec:
    """Fields, classes and sizes of a source.

    fields: field -> (shape of one sample, dtype).
    classes, samples: None where they are unknown before the files are read.
    problem: a sentence about what has to happen before training can start; None if nothing has to.
    population: samples of the full split, before `subset`; `index` is below it.
    variants: view -> number of different images of one sample.
    """

    fields: Mapping[str, FieldSpec] = field(default_factory=dict)
    classes: int | None = None
    samples: int | None = None
    problem: str | None = None
    population: int | None = None
    variants: Mapping[str, VariantCount] = field(default_factory=dict)
