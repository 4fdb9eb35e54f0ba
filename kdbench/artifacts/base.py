"""Base classes of artifact builders and of selectors, and the inputs of an artifact builder."""

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
    """Metadata of the inputs of an artifact builder. It is available to the dry run, before any data is loaded.

    Attributes:
        classes: class names of the evaluation source.
        samples: number of samples in the builder's source; None if it is unknown until the files are read.
        population: number of samples in the source's whole split; None if it is unknown until the files are read.
        shapes: operand name -> shape of one sample.
        injected: the constructor arguments num_classes, in_channels and image_size, for builders that construct
            models.
        labelled_samples: number of the source's samples that have a visible label; None if all samples have one, or
            if the number is not known yet.
    """

    classes: tuple[str, ...] = ()
    samples: int | None = None
    population: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    injected: Mapping[str, Any] = field(default_factory=dict)
    labelled_samples: int | None = None


@dataclass
class SampleOutputs:
    """Input of an artifact builder: the samples of one source and the outputs of the roles on these samples.

    Attributes:
        source: the source (samples with their fields) that the builder reads.
        seed: random seed for this builder in this stage.
        device: device of the roles' models and of the batches.
        context: metadata of the builder's inputs.
        previous: content of the artifact of the same name from the previous round of a loop over stages; None in the
            first round and outside a loop.
        modules: role -> model, in eval mode.
        operands: operand name -> configuration. Each batch contains these operands.
        make_batches: function of an epoch (see `batches`) that returns an iterator over the batches of the source.
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
        """Yields batches with the operands and the fields of the source. No gradients are computed.

        Args:
            epoch: None: every sample once, in the order of the split, with evaluation views. A number: shuffled and
                augmented as in that epoch of training.

        Yields:
            Operand or field name -> tensor (batch, ...). The fields are those of `image`, `label`, `index` and
            `labelled` that the source has.
        """
        with torch.no_grad():
            yield from self.make_batches(epoch)

    def gather(self, *names: str, epoch: int | None = None) -> dict[str, Tensor]:
        """Concatenates operands or fields of all samples, on the CPU.

        Args:
            names: operands or fields to gather.
            epoch: see `batches`.

        Returns:
            Name -> (samples, ...). A name that no batch contains is omitted.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch in self.batches(epoch):
            for name in parts:
                if name in batch:
                    parts[name].append(batch[name].cpu())
        return {name: torch.cat(values) for name, values in parts.items() if values}

    def operand_names(self, name: str) -> list[str]:
        """Returns the names of the operands in the recipe's list for `name`: for example `teacher`, `teacher_1`, ..."""
        return [name, *(operand for operand in self.operands if operand.startswith(f"{name}_"))]

    def image_entries(self, index: Tensor, evaluation_images: Tensor) -> dict[str, Any]:
        """Returns the entries `images`, `mean` and `std` of a dataset artifact, for some samples of the source.

        The images are the source's 8-bit images if it keeps them in memory at the resolution of its view. Otherwise
        they are the normalised evaluation images, and mean and std are None.

        Args:
            index: int64 (samples,), positions of the samples in the split.
            evaluation_images: (samples, ...), the images of these samples in the evaluation view.
        """
        normalised = {"images": evaluation_images.contiguous(), "mean": None, "std": None}
        source = self.source
        view = source.views.get("image") if isinstance(source, ImageSource) else None
        if not isinstance(source, ResidentSource) or view is None:
            return normalised
        if not view.in_unit_range or view.shape != view.stored_shape:
            return normalised
        images = source.images.cpu().index_select(0, index)
        mean, std = view.mean, view.std
        if mean is None or std is None:  # without them a dataset of 8-bit images would be divided by 255
            return normalised
        return {"images": images, "mean": mean.flatten().tolist(), "std": std.flatten().tolist()}


class ArtifactBuilder:
    """Base class of artifact builders.

    Register a subclass with the kind of artifact that it produces and the operands that it reads:

        @ARTIFACTS.register("class_means", produces="tensor", operands=("features",))

    `__call__` returns the content of the artifact, by kind:

        dataset: {"images": (samples, ...) uint8 or float, "labels": int64 (samples,), "fields": {name: (samples,
            ...)}, "classes": names, "mean": per channel, "std": per channel}. Mean and std are None if the images are
            already normalised. The keyword `fields` of the decorator lists the names of the fields.
        subset: {"index": int64, sorted positions in the source's split}.
        tensor: {"value": Tensor}.
        model: {"type": name, "params": {...}}, one of the candidates in the recipe. The keyword `candidates` of the
            decorator names the parameter that contains the candidates.

    Any content may have the entry "summary", a mapping of plain values for the manifest.

    Further keywords of the decorator:

        selector: name of the parameter that contains a selector. The selector's operands become operands of the
            builder.
        operand_list: name of an operand for which the recipe may give a list.
        labels: True if the builder reads the field `label`.
    """

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        """Computes the content of the artifact."""
        raise NotImplementedError

    def check(self, context: ArtifactContext) -> None:
        """Raises ValueError if the artifact cannot be computed from these inputs. The dry run calls it."""

    def output_shape(self, context: ArtifactContext) -> tuple[int, ...]:
        """Returns the shape of a tensor artifact. A size that is not known yet is 1."""
        raise NotImplementedError


class Selector(nn.Module):
    """Base class of selectors, which select rows of a batch (`select` of an update) or of a source (`choose`).

        @SELECTORS.register("k_center", operands=("student",))

    `forward` also receives the operands that the decorator declares, the fields of the batch that are among its
    parameters (such as `label`), and `seed` if that is one of its parameters. The output shape must not depend on
    values, because a selector can run inside a training step.
    """

    def forward(self, count: int, excluded: Tensor | None = None, **operands: Tensor) -> Tensor:
        """Selects rows of a batch or of a source.

        Args:
            count: number of rows to select.
            excluded: bool (rows,), rows that must not be selected; None excludes none.
            operands: tensors of the declared operands and fields, (rows, ...) each.

        Returns:
            int64 (count,), row numbers in ascending order.
        """
        raise NotImplementedError


def top_rows(scores: Tensor, count: int, excluded: Tensor | None) -> Tensor:
    """Returns the numbers of the rows with the highest scores, in ascending order.

    Of two rows with equal scores, the row with the lower number ranks first. Excluded rows rank last.

    Args:
        scores: (rows,).
        count: number of rows to return.
        excluded: bool (rows,), or None.

    Returns:
        int64 (count,).
    """
    if excluded is not None:
        scores = torch.where(excluded, -torch.inf, scores)
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
