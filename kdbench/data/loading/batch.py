"""Batches: the rows that one source contributes to one micro-batch of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class Batch(NamedTuple):
    """Rows of one source.

    A named tuple, because torch's compiler traces named tuples of dictionaries without a graph break.

    Attributes:
        fields: name -> tensor (rows, ...), such as `image`, `label`, `index` and, where rows are padding, `valid`.
        precomputed: (role, feature) -> tensor (rows, ...): outputs of a frozen role that ran before the step. Either
            all features of a role are present or none; the step does not run a role whose features are present.
    """

    fields: dict[str, Tensor]
    precomputed: Mapping[tuple[str, Any], Tensor] = {}  # never mutated: `with_precomputed` returns a new batch

    @property
    def size(self) -> int:
        """The number of rows, padding included."""
        first = next(iter((*self.fields.values(), *self.precomputed.values())))
        return first.shape[0]

    def with_fields(self, fields: Mapping[str, Tensor]) -> Batch:
        """Returns the batch with further or replaced fields."""
        return Batch({**self.fields, **fields}, self.precomputed)

    def with_precomputed(self, features: Mapping[tuple[str, Any], Tensor]) -> Batch:
        """Returns the batch with further precomputed features."""
        return Batch(self.fields, {**self.precomputed, **features})

    def slice(self, rows: slice) -> Batch:
        """Returns the batch of a range of rows, as views."""
        fields = {name: value[rows] for name, value in self.fields.items()}
        return Batch(fields, {key: value[rows] for key, value in self.precomputed.items()})

    def select(self, rows: Tensor) -> Batch:
        """Returns the batch of the given rows, int64 (selected,)."""
        fields = {name: value.index_select(0, rows) for name, value in self.fields.items()}
        return Batch(fields, {key: value.index_select(0, rows) for key, value in self.precomputed.items()})


MicroBatch: TypeAlias = Mapping[str, Batch]
"""The batches of all sources that one micro-batch of a step consists of, by source."""

Window: TypeAlias = Sequence[MicroBatch]
"""The micro-batches of one effective batch: one, unless the recipe accumulates."""
