"""The description of a source: its fields, classes and sizes, as far as they are known before its files are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

FieldSpec: TypeAlias = tuple[tuple[int, ...], str]
"""Shape of one sample (without the batch dimension) and name of the dtype, such as `((3, 32, 32), "float32")`."""


@dataclass(frozen=True)
class VariantCount:
    """The number of different images (variants) that a view can show of one sample.

    Attributes:
        count: number of variants; None if it is infinite or unknown.
        reason: reason for which `count` is None.
    """

    count: int | None
    reason: str = ""


@dataclass(frozen=True)
class SourceSpec:
    """The fields, classes and sizes of a data source, as far as they are known before its files are read.

    Attributes:
        fields: field -> (shape of one sample, dtype).
        classes: number of classes; None if it is unknown, or if there are no labels.
        samples: number of samples of the source; None if it is unknown.
        problem: sentence about what has to happen before training can start, or None.
        population: number of samples of the full split, before `subset`. Values of the field `index` are below this
            number.
        variants: view -> number of different images that the view can show of one sample.
    """

    fields: Mapping[str, FieldSpec] = field(default_factory=dict)
    classes: int | None = None
    samples: int | None = None
    problem: str | None = None
    population: int | None = None
    variants: Mapping[str, VariantCount] = field(default_factory=dict)
