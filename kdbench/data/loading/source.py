"""Sources: iterators over batches. The order of samples depends only on the seed, the epoch and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from kdbench.config.schema import SourceConfig
from kdbench.data.augment.view import View, image_field_specs
from kdbench.data.datasets.base import GeneratedDataset, PackedSplit, stored_field_specs
from kdbench.data.loading.batch import Batch
from kdbench.data.sampling.order import RankShard, epoch_order, num_steps, rank_shard, rank_shard_of_block, to_device
from kdbench.data.source_spec import FieldSpec
from kdbench.randomness import generator

IGNORE_INDEX = -100
"""Label of a sample whose label is hidden: the `ignore_index` of `cross_entropy`."""


MAX_BLOCK_BATCHES = 15
"""Number of batches that are augmented together on CUDA, at most. Odd on purpose: `kdbench profile` profiles every
second step, and so meets first steps of a block as often as they occur."""


MAX_BLOCK_BYTES = 32 * 2**20
"""Size of the views of one block, at most."""


@dataclass(frozen=True)
class LoadingOptions:
    """Seed, device, rank and image format, common to all sources of a run.

    rank, world_size: this process in data-parallel training.
    workers: decoding processes of a streaming source.
    dtype, channels_last: data type and memory layout of the images.
    """

    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    notice: Callable[[str], None] = field(default=print, compare=False)


class Source:
    """Base of all sources. Yields batches on the device, always with the same field names.

    Attributes:
        name: as in the recipe, or `validation`.
        classes: names, in the order of the labels; empty for a source without labels.
        num_samples: samples of an epoch.
        population: length of the full split, before `subset`. `index` is below it, so memory banks and caches that are
            addressed by `index` have this size.
        indices: int64 (num_samples,), sorted: samples of the split that the source yields, as in the field `index`;
            empty for a source without labels.
        batch_size: of one rank.
        checksum: digest of the dataset's content.
    """

    name: str
    classes: list[str]
    num_samples: int
    population: int
    indices: Tensor
    batch_size: int
    checksum: str

    def __init__(self, config: SourceConfig, options: LoadingOptions) -> None:
        self.config = config
        self.options = options
        self.name = config.name
        self.batch_size = config.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch; the last one may be smaller, none is dropped."""
        return num_steps(self.num_samples, self.batch_size, self.options.world_size, overlap=self.config.overlap)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's training batches of one epoch, shuffled and augmented.

        Args:
            epoch: from 0.
            start: first step. Earlier batches are not computed; the rest is equal to a full pass.
        """
        raise NotImplementedError

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every sample once, in the order of the split, without augmentation, sharded by rank.

        All ranks get the same number of rows. Where the samples do not divide evenly, some rows are repeated; the field
        `valid` is False there.
        """
        raise NotImplementedError

    def field_specs(self) -> dict[str, FieldSpec]:
        """Returns field -> (shape of one sample, dtype) for the fields of every batch."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends worker processes, if there are any."""


StoredImages: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""View -> (stored images, row numbers in them), both on the device."""


ShardImages: TypeAlias = tuple[RankShard, StoredImages, StoredImages | None]
"""A shard on the device, the images of its rows, and those of the partners; None where a partner is a row as well."""


@dataclass(frozen=True)
class SampleMetadata:
    """Labels and further values of a split's samples.

    labels: int64 (population,), of the full split, after `relabel`; negative where a label is missing.
    indices: int64 (num_samples,), sorted: samples of the split that the source yields.
    labelled_indices: int64, sorted: the part of `indices` that keeps its label; None for all.
    true_labels: int64 (population,), the labels before `relabel`; None without `relabel`.
    fields: further fields of the batch by name, (population, ...).
    """

    labels: Tensor
    indices: Tensor
    labelled_indices: Tensor | None = None
    true_labels: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)


class ImageSource(Source):
    """Base of the sources of labelled images: order, labels and views. Subclasses read the stored images.

    Args:
        config: the source's part of the recipe.
        options: seed, device, rank.
        views: field -> view that computes it.
        classes: names, in the order of the labels.
        samples: labels, and the samples that the source yields.
        checksum: of the dataset.
    """

    def __init__(
        self,
        config: SourceConfig,
        options: LoadingOptions,
        views: dict[str, View],
        classes: Sequence[str],
        samples: SampleMetadata,
        checksum: str,
    ) -> None:
        super().__init__(config, options)
        self.views = views
        self.classes = list(classes)
        self.checksum = checksum
        self.population = len(samples.labels)
        self.num_samples = len(samples.indices)
        self.indices = samples.indices
        self.block_size = 1
        hidden = torch.zeros(self.population, dtype=torch.bool)
        self._sample_fields: dict[str, Tensor] = {}  # (population, ...) each, on the device
        if samples.labelled_indices is not None:
            hidden[:] = True
            hidden[samples.labelled_indices] = False
            self._sample_fields["labelled"] = (~hidden).to(options.device)
        self._labels = torch.where(hidden, IGNORE_INDEX, samples.labels).to(options.device)
        if samples.true_labels is not None:
            true_labels = torch.where(hidden, IGNORE_INDEX, samples.true_labels)
            self._sample_fields["label_true"] = true_labels.to(options.device)
        for name, value in samples.fields.items():
            dtype = options.dtype if value.is_floating_point() else value.dtype
            self._sample_fields[name] = value.to(options.device, dtype)
        self._stored_specs = stored_field_specs(samples.fields)
        if samples.labelled_indices is not None:
            self._stored_specs["labelled"] = ((), "bool")

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        options, overlap = self.options, self.config.overlap
        order = self._move_order(epoch_order(self.indices, options.seed, self.name, epoch))
        params = {name: self.epoch_params(name, epoch) for name in self.views}
        blocks = self._blocks(start)
        shards = (
            rank_shard_of_block(order, step, count, self.batch_size, options.rank, options.world_size)
            if count > 1
            else rank_shard(order, step, self.batch_size, options.rank, options.world_size, overlap=overlap)
            for step, count in blocks
        )
        shard_images = self._read_images(shards, epoch)
        for (step, count), (shard, images, partner_images) in zip(blocks, shard_images, strict=True):
            block = self.augment(shard, images, partner_images, params, num_batches=count)
            if count == 1:
                yield Batch(block)
                continue
            batches = {name: value.split(self.batch_size) for name, value in block.items()}
            for number in range(max(start - step, 0), count):
                yield Batch({name: values[number] for name, values in batches.items()})

    def _blocks(self, start: int) -> list[tuple[int, int]]:
        """Returns (first step, number of batches) of the blocks that are augmented together, from step `start` on.

        Blocks are fixed by the absolute step. A block that contains `start` is computed as a whole: on a GPU, rounding
        may depend on the number of samples in an operation.
        """
        size, end = self.block_size, self.steps_per_epoch
        full_batches = self.num_samples // (self.batch_size * self.options.world_size) if size > 1 else 0
        blocks = [(step, min(size, full_batches - step)) for step in range(0, full_batches, size)]
        blocks += [(step, 1) for step in range(full_batches, end)]
        return [(step, count) for step, count in blocks if step + count > start]

    def epoch_params(self, view: str, epoch: int) -> Tensor:
        """Returns the augmentation parameters of a view for one epoch, float32 (population, num_params), on the device.

        Where batches overlap there are twice as many rows: those of the second visits follow those of the first.
        """
        options = self.options
        # "again" is a key of the random stream: another word would change the parameters.
        visits = (epoch, f"{epoch} again") if self.config.overlap else (epoch,)
        params = [self.views[view].sample_params(self.population, options.seed, self.name, visit) for visit in visits]
        return torch.cat(params).to(options.device)

    def epoch_indices(self, epoch: int) -> Tensor:
        """Returns the samples that this rank yields in an epoch, each once, int64, sorted, on the CPU."""
        options, overlap = self.options, self.config.overlap
        if options.world_size == 1:
            return self.indices
        order = epoch_order(self.indices, options.seed, self.name, epoch)
        shards = [
            rank_shard(order, step, self.batch_size, options.rank, options.world_size, overlap=overlap)
            for step in range(self.steps_per_epoch)
        ]
        return torch.cat([shard.index for shard in shards]).unique()

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        options = self.options
        order = self._move_order(self.indices)
        params = {
            name: view.sample_params(self.population, options.seed, self.name, "evaluation").to(options.device)
            for name, view in self.views.items()
            if view.needs_evaluation_params
        }
        steps = range(num_steps(len(order), batch_size, options.world_size))
        shards = (rank_shard(order, step, batch_size, options.rank, options.world_size) for step in steps)
        for shard, images, _ in self._read_images(shards, None):
            batch = {}
            for name, view in self.views.items():
                view_params = params[name].index_select(0, shard.index) if name in params else None
                batch[name] = view.evaluation_images(*images[name], view_params)
            yield Batch(batch | self._fields(shard))

    def augment(
        self,
        shard: RankShard,
        images: StoredImages,
        partner_images: StoredImages | None,
        params: Mapping[str, Tensor],
        *,
        num_batches: int = 1,
    ) -> dict[str, Tensor]:
        """Computes the fields of batches on the device. No value is read on the host, no shape depends on a value.

        Args:
            shard: the rows, on the device.
            images: stored images of the rows.
            partner_images: those of the partners; None in a single process, where the partners are the rows rolled by
                one.
            params: view -> augmentation parameters of the epoch, float32 (population, num_params); twice as many rows
                where batches overlap.
            num_batches: batches of equal size in the rows, one after the other; mixing stays within a batch.
        """
        batch = {}
        fields = self._fields(shard)
        param_rows = shard.param_rows(self.population)
        for name, view in self.views.items():
            view_params = params[name].index_select(0, param_rows)
            image = view.augment(*images[name], view_params)
            if view.mix_owner:
                if partner_images is None:
                    partner = image.unflatten(0, (num_batches, -1)).roll(1, 1).flatten(0, 1)
                else:
                    partner_params = params[name].index_select(0, shard.partner_param_rows(self.population))
                    partner = view.augment(*partner_images[name], partner_params)
                image, fields["mix"] = view.mix(image, partner, view_params)
                fields["label_other"] = self._labels.index_select(0, shard.partner)
            batch[name] = image
            fields |= view.extra_fields(view_params)
        return batch | fields

    def field_specs(self) -> dict[str, FieldSpec]:
        stored_shape = next(iter(self.views.values())).stored_shape
        return _with_float_dtype(image_field_specs(self.config, stored_shape, self._stored_specs), self.options.dtype)

    def _fields(self, shard: RankShard) -> dict[str, Tensor]:
        """Returns the fields of a shard that are not images."""
        fields = {"label": self._labels.index_select(0, shard.index), "index": shard.index}
        fields |= {name: value.index_select(0, shard.index) for name, value in self._sample_fields.items()}
        if shard.valid is not None:
            fields["valid"] = shard.valid
        return fields

    def _move_order(self, order: Tensor) -> Tensor:
        """Moves an order of samples to the device that `_read_images` needs."""
        raise NotImplementedError

    def _read_images(self, shards: Iterable[RankShard], epoch: int | None) -> Iterator[ShardImages]:
        """Yields each shard, on the device, with its stored images. `epoch` is None in evaluation."""
        raise NotImplementedError


class ResidentSource(ImageSource):
    """A source that holds its full split in device memory, in the stored format (uint8 or float32).

    Args:
        split: its images (population, ...) are on the device already; other sources of the dataset share them.
        Further arguments: see `ImageSource`.
    """

    def __init__(
        self,
        config: SourceConfig,
        options: LoadingOptions,
        views: dict[str, View],
        classes: Sequence[str],
        samples: SampleMetadata,
        split: PackedSplit,
    ) -> None:
        super().__init__(config, options, views, classes, samples, split.checksum)
        self.split = split
        self.images = split.images
        if not config.overlap:
            self.block_size = self._max_block_size()

    def _max_block_size(self) -> int:
        """Returns the number of batches to augment together: several on CUDA, where small kernels are launch-bound."""
        if self.options.device.type != "cuda":
            return 1
        itemsize = self.options.dtype.itemsize
        batch_bytes = sum(self.batch_size * math.prod(view.shape) * itemsize for view in self.views.values())
        return max(1, min(MAX_BLOCK_BATCHES, MAX_BLOCK_BYTES // max(batch_bytes, 1)))

    def _move_order(self, order: Tensor) -> Tensor:
        return order.to(self.options.device)

    def _read_images(self, shards: Iterable[RankShard], epoch: int | None) -> Iterator[ShardImages]:
        for shard in shards:
            partner_images = None
            if self.options.world_size > 1:
                partner_images = {name: (self.images, shard.partner) for name in self.views}
            yield shard, {name: (self.images, shard.index) for name in self.views}, partner_images


class GeneratedSource(Source):
    """A source of random fields without labels. A batch is a function of (seed, source, epoch, step); all are full."""

    def __init__(self, config: SourceConfig, options: LoadingOptions, dataset: GeneratedDataset) -> None:
        super().__init__(config, options)
        self._dataset = dataset
        self.classes = []
        self.checksum = dataset.checksum()
        self.num_samples = len(dataset)
        self.population = self.steps_per_epoch * self.batch_size * options.world_size
        self.indices = torch.empty(0, dtype=torch.int64)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step in range(start, self.steps_per_epoch):
            yield self._batch(step, self.batch_size, "order", epoch)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields full batches, the same ones in every evaluation."""
        for step in range(num_steps(self.num_samples, batch_size, self.options.world_size)):
            yield self._batch(step, batch_size, "evaluation", 0)

    def field_specs(self) -> dict[str, FieldSpec]:
        return _with_float_dtype(self._dataset.field_specs(), self.options.dtype)

    def _batch(self, step: int, batch_size: int, use: str, epoch: int) -> Batch:
        """Draws the global batch and returns this rank's rows. `use` is a key of the random stream: keep its values."""
        options = self.options
        global_size = batch_size * options.world_size
        rng = generator(options.seed, "augment", self.name, use, epoch, step)
        rank_rows = {
            name: value[options.rank :: options.world_size].to(options.dtype)
            for name, value in self._dataset.sample(rng, global_size).items()
        }
        batch = {name: to_device(value, options.device) for name, value in rank_rows.items()}
        start = step * global_size + options.rank
        batch["index"] = torch.arange(start, (step + 1) * global_size, options.world_size, device=options.device)
        return Batch(batch)


def _with_float_dtype(specs: Mapping[str, FieldSpec], dtype: torch.dtype) -> dict[str, FieldSpec]:
    """Replaces float32 by the dtype of the run's images."""
    name = str(dtype).removeprefix("torch.")
    return {field: (shape, name if kind == "float32" else kind) for field, (shape, kind) in specs.items()}
