"""What a stage makes for later stages, and what chooses among samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdbench.data.source import Source

Kind = Literal["dataset", "choice", "tensor", "model"]


@dataclass
class Pool:
    """What a maker works on: the samples of one source, and what the roles say of them.

    source: None where the maker runs over none. seed: of this maker in this stage.
    previous: the content that the round before made under the same name; None in the first round, or outside a loop.
    facts: num_classes, in_channels, image_size of the evaluation source's images, for makers that build models.
    modules: the roles' models by name, in eval mode.
    """

    source: Source | None
    seed: int
    device: torch.device
    previous: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    batches: Callable[[], Iterator[dict[str, Tensor]]] = lambda: iter(())

    def rows(self) -> Iterator[dict[str, Tensor]]:
        """Yields, batch by batch in the order of the source's samples, without gradient: the declared operands by name,
        and the fields of the source (`image` as evaluation sees it, `label`, `index`, `labelled`)."""
        with torch.no_grad():
            yield from self.batches()

    def gathered(self, *names: str) -> dict[str, Tensor]:
        """Returns the named values of all samples, (samples, ...), on the CPU."""
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for row in self.rows():
            for name in names:
                parts[name].append(row[name].cpu())
        return {name: torch.cat(values) for name, values in parts.items()}


class Maker:
    """Base of all makers. A subclass is registered with the kind of what it makes and the operands that it reads:

        @MAKERS.register("class_means", makes="tensor", operands=("features",))

    makes: what `__call__` returns.
        dataset: {"images": (samples, ...), uint8 or float, "labels": int64 (samples,), "fields": {name: (samples, ...)},
            "classes": names, "mean", "std": per channel or None where the images are normalised already}.
        choice: {"index": int64, sorted positions in the source's split}.
        tensor: {"value": Tensor}.
        model: {"type": name, "params": {...}}, one of the candidates that the recipe lists.
    Every content may have "told": a mapping of plain values for the manifest (how many, which threshold...).
    """

    def __call__(self, pool: Pool) -> dict[str, Any]:
        raise NotImplementedError


class Selector(nn.Module):
    """Base of all selectors: which rows are chosen. In a step (an update's `select`), or over a pool (the maker `choose`).

        @SELECTORS.register("k_center", operands=("student",))

    `forward(count, taken, ...)` takes how many rows to choose, `taken` (bool, rows: not to be chosen again; None: none),
    the operands that the fact declares, fields of the batch such as `label`, and `seed` where it names it. It returns
    the chosen rows, int64 (count,), rising. Its shapes must not depend on values: it may stand in a training step.
    """

    def forward(self, count: int, taken: Tensor | None = None, **operands: Tensor) -> Tensor:
        raise NotImplementedError
