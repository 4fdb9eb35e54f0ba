"""What a stage makes for later stages, and what chooses among samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdbench.config.schema import OperandConfig
from kdbench.data.loading.source import ImageSource, ResidentSource, Source

ArtifactKind = Literal["dataset", "subset", "tensor", "model"]


BatchIterator = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class ArtifactContext:
    """What is known before anything is made.

    classes: names of the evaluation source's classes. samples: how many the maker's source gives; population: how many
    its whole split has; both None where only files could tell. shapes: per sample, of each operand by name.
    injected: num_classes, in_channels, image_size, for makers that build models. labelled: how many of the source's
    samples keep their label; None: all, or not known yet.
    """

    classes: tuple[str, ...] = ()
    samples: int | None = None
    population: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    injected: Mapping[str, Any] = field(default_factory=dict)
    labelled_samples: int | None = None


@dataclass
class SampleOutputs:
    """What a maker works on: the samples of one source, and what the roles say of them.

    seed: of this maker in this stage.
    previous: the content that the round before made under the same name; None in the first round, or outside a loop.
    modules: the roles' models by name, in eval mode. operands: the addresses of what `rows` gives.
    batches: yields a pass over the source, as `rows` does.
    """

    source: Source
    seed: int
    device: torch.device
    context: ArtifactContext = field(default_factory=ArtifactContext)
    previous: Mapping[str, Any] | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    operands: Mapping[str, OperandConfig] = field(default_factory=dict)
    make_batches: Callable[[int | None], BatchIterator] = lambda epoch: iter(())

    def batches(self, epoch: int | None = None) -> BatchIterator:
        """Yields, batch by batch and without gradient, the declared operands by name and the fields of the source
        (`image`, `label`, `index`, `labelled`).

        Args:
            epoch: None: every sample once, in the order of the split, as evaluation sees it; a number: shuffled and
                augmented as training sees it in that epoch.
        """
        with torch.no_grad():
            yield from self.make_batches(epoch)

    def gather(self, *names: str, epoch: int | None = None) -> dict[str, Tensor]:
        """Returns the named values of all samples, (samples, ...), on the CPU; names that no row has are left out."""
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for row in self.batches(epoch):
            for name in parts:
                if name in row:
                    parts[name].append(row[name].cpu())
        return {name: torch.cat(values) for name, values in parts.items() if values}

    def operand_names(self, name: str) -> list[str]:
        """The names of an operand for which the recipe may give a list: `teacher`, `teacher_1`, ..."""
        return [name, *(other for other in self.operands if other.startswith(f"{name}_"))]

    def image_entries(self, index: Tensor, evaluation_images: Tensor) -> dict[str, Any]:
        """The entries `images`, `mean` and `std` of a made dataset: as stored, where the source holds them in memory.

        Args:
            index: int64 (samples,), which samples of the split.
            seen: (samples, ...), the same images as evaluation sees them.
        """
        source = self.source
        view = source.views.get("image") if isinstance(source, ImageSource) else None
        if not isinstance(source, ResidentSource) or view is None or not view.in_unit_range or view.shape != view.stored_shape:
            return {"images": evaluation_images.contiguous(), "mean": None, "std": None}
        images = source.images.cpu().index_select(0, index)
        mean, std = view.mean, view.std
        if mean is None or std is None:  # kept as they are; an 8-bit image would be divided by 255 without them
            return {"images": evaluation_images.contiguous(), "mean": None, "std": None}
        return {"images": images, "mean": mean.flatten().tolist(), "std": std.flatten().tolist()}


class ArtifactBuilder:
    """Base of all makers. A subclass is registered with the kind of what it makes and the operands that it reads:

        @MAKERS.register("class_means", produces="tensor", operands=("features",))

    makes: what `__call__` returns.
        dataset: {"images": (samples, ...), uint8 or float, "labels": int64 (samples,), "fields": {name: (samples,
            ...)}, "classes": names, "mean", "std": per channel or None where the images are normalised already}. The
            fact `fields` names its fields.
        choice: {"index": int64, sorted positions in the source's split}.
        tensor: {"value": Tensor}.
        model: {"type": name, "params": {...}}, one of the candidates that the recipe lists under the parameter which
            the fact `candidates` names.
    Every content may have "summary": a mapping of plain values for the manifest (how many, which threshold...).
    selects: a fact, the key under which the recipe gives a selector; its operands are the maker's too.
    several: a fact, operands for which the recipe may give a list. labels: a fact, whether it reads the field `label`.
    """

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        raise NotImplementedError

    def check(self, context: ArtifactContext) -> None:
        """Raises ValueError, in words, when this cannot be made of that. Called by the plan."""

    def shape(self, context: ArtifactContext) -> tuple[int, ...]:
        """The shape of what a maker of tensors will make; what is not known yet counts as 1."""
        raise NotImplementedError


class Selector(nn.Module):
    """Base of all selectors: which rows are chosen, in a step (an update's `select`) or over a pool (`choose`).

        @SELECTORS.register("k_center", operands=("student",))

    `forward(count, taken, ...)` takes how many rows to choose, `taken` (bool, rows: not to be chosen again; None:
    none), the operands that the fact declares, fields of the batch such as `label`, and `seed` where it names it. It
    returns the chosen rows, int64 (count,), rising. Its shapes must not depend on values: it may stand in a step.
    """

    def forward(self, count: int, excluded: Tensor | None = None, **operands: Tensor) -> Tensor:
        raise NotImplementedError


def top_rows(scores: Tensor, count: int, excluded: Tensor | None) -> Tensor:
    """The rows of the highest scores, rising; of equal scores the first rows. Rows in `taken` come last.

    Args:
        scores: (rows,).

    Returns:
        int64 (count,).
    """
    if excluded is not None:
        scores = torch.where(excluded, -torch.inf, scores)
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
