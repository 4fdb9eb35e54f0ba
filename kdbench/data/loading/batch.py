"""The batch of one data source.

An optimizer step reads one or more micro-batches (gradient accumulation). A micro-batch has one batch of each source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class Batch(NamedTuple):
    """The rows of one source in one micro-batch, as tensors by name.

    A named tuple, because torch's compiler traces named tuples of dictionaries without a graph break.

    Attributes:
        fields: name -> tensor (rows, ...), such as `image`, `label` and `index`. A batch with padding rows also has
            the field `valid`, which is False for these rows.
        precomputed: (role, feature) -> tensor (rows, ...), outputs of frozen networks that ran before the step.
            Either all features of a role are present or none. The step does not run a role whose features are
            present.
    """

    fields: dict[str, Tensor]
    precomputed: Mapping[tuple[str, Any], Tensor] = {}  # never mutated: `with_precomputed` returns a new batch

    @property
    def size(self) -> int:
        """The number of rows, including padding."""
        first = next(iter((*self.fields.values(), *self.precomputed.values())))
        return first.shape[0]

    def with_fields(self, fields: Mapping[str, Tensor]) -> Batch:
        """Returns a copy of the batch in which fields are added or replaced."""
        return Batch({**self.fields, **fields}, self.precomputed)

    def with_precomputed(self, features: Mapping[tuple[str, Any], Tensor]) -> Batch:
        """Returns a copy of the batch to which precomputed features are added."""
        return Batch(self.fields, {**self.precomputed, **features})

    def slice(self, rows: slice) -> Batch:
        """Returns a batch with the rows of a range. Its tensors are views of this batch's tensors."""
        fields = {name: value[rows] for name, value in self.fields.items()}
        return Batch(fields, {key: value[rows] for key, value in self.precomputed.items()})

    def select(self, rows: Tensor) -> Batch:
        """Returns a batch with the rows of the given row numbers, int64 (selected,)."""
        fields = {name: value.index_select(0, rows) for name, value in self.fields.items()}
        return Batch(fields, {key: value.index_select(0, rows) for key, value in self.precomputed.items()})


MicroBatch: TypeAlias = Mapping[str, Batch]
"""One micro-batch (one of the batches of a gradient accumulation): source -> batch of this source."""

Window: TypeAlias = Sequence[MicroBatch]
"""All micro-batches of one optimizer step. There is one, unless the recipe accumulates gradients."""
