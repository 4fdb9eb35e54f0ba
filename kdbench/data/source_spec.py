"""The description of a source: its fields, classes and sizes, known before its files are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class VariantCount:
    """How many images a view can show of one sample; `count` is None where they are not counted, and `why` says why."""

    count: int | None
    reason: str = ""


@dataclass(frozen=True)
class SourceSpec:
    """What a source will give, known before its files are read.

    fields: field -> (shape of one sample, dtype), such as `image -> ((3, 32, 32), 'float32')`; without the batch.
    classes, samples: None where only the files could tell.
    problem: what stands in the way of training, in words; None when nothing does.
    population: samples of the whole split, of which the source may give a part: `index` is below it.
    variants: view -> how many images it can show of one sample.
    """

    fields: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    classes: int | None = None
    samples: int | None = None
    problem: str | None = None
    population: int | None = None
    variants: Mapping[str, VariantCount] = field(default_factory=dict)
