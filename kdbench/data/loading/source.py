"""Sources: what gives a stage its batches, in an order that depends on nothing but the seed and the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from kdbench.config.schema import SourceConfig
from kdbench.data.augment.view import View, image_field_specs
from kdbench.data.datasets.base import GeneratedDataset, PackedSplit
from kdbench.data.describe import stored_field_specs
from kdbench.data.sampling.order import RankShard, epoch_order, num_steps, rank_shard, rank_shard_of_block, to_device
from kdbench.randomness import generator

IGNORE_INDEX = -100
"""The label of a sample whose label the source hides; what `cross_entropy` ignores."""


MAX_BLOCK_BATCHES, MAX_BLOCK_BYTES = 15, 32 * 2**20
"""How many batches are augmented together on CUDA, and how large their views may be. An odd number: `kdbench profile`
takes every second step apart, and is to meet those that begin a block as often as they come."""


@dataclass(frozen=True)
class LoadingOptions:
    """What all sources of a run share."""

    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


class Source:
    """Gives batches: dictionaries of tensors on the device, with the same field names every time.

    Attributes:
        name: as in the recipe, or `validation`.
        classes: names, in the order of the labels; empty for a source without labels.
        num_samples: samples of an epoch.
        population: how many values `index` can take: the length of the whole split, before a part of it was chosen.
            Memory banks and caches that are addressed by `index` have this size.
        positions: int64 (num_samples,), sorted: which samples of the split the source gives, the values of `index`;
            empty for a source without labels.
        batch_size: of one rank.
        checksum: digest of the dataset's content.
    """

    name: str
    classes: list[str]
    num_samples: int
    population: int
    positions: Tensor
    batch_size: int
    checksum: str

    def __init__(self, config: SourceConfig, setting: LoadingOptions) -> None:
        self.config = config
        self.options = setting
        self.name = config.name
        self.batch_size = config.batch_size
        self.notice: Callable[[str], None] = print  # told in words what the user may want to know; a run sets it

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the last one may be smaller, none is dropped."""
        return num_steps(self.num_samples, self.batch_size, self.options.world_size, overlap=self.config.overlap)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yields this rank's batches of one epoch from step `start` on, shuffled and augmented.

        Starting in the middle costs nothing and gives the same batches as skipping `start` of them would.
        """
        raise NotImplementedError

    def evaluation_batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yields every sample once, in order, without augmentation, sharded by rank.

        All ranks get equally many rows: where the last ones do not divide, some are repeated and not `valid`.
        """
        raise NotImplementedError

    def field_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns field -> (shape of one sample, dtype), for the fields of every batch."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends worker processes, if there are any."""


StoredImages: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""View -> (stored images, which rows of them), both on the device."""


@dataclass(frozen=True)
class SampleMetadata:
    """What is known of a split's samples besides their images.

    labels: int64 (population,), those of the whole split, as the source tells them; negative: there is none.
    positions: int64 (num_samples,), sorted: the part of the split that the source gives.
    labelled: int64, sorted: the part of `positions` whose label is kept; None for all.
    truth: int64 (population,), the labels before they were changed; None where none was.
    fields: further fields of the batch by name, (population, ...).
    """

    labels: Tensor
    positions: Tensor
    labelled_positions: Tensor | None = None
    true_labels: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)


class ImageSource(Source):
    """A source of labelled images: order, labels and views. Subclasses say where the stored images come from.

    Args:
        config: the source as the recipe has it.
        setting: seed, device, rank.
        views: field -> how its image is made.
        classes: names in the order of the labels.
        samples: labels, and which samples the source gives.
        checksum: of the dataset.
    """

    def __init__(
        self,
        config: SourceConfig,
        setting: LoadingOptions,
        views: dict[str, View],
        classes: Sequence[str],
        samples: SampleMetadata,
        checksum: str,
    ) -> None:
        super().__init__(config, setting)
        self.views = views
        self.classes = list(classes)
        self.checksum = checksum
        self.population = len(samples.labels)
        self.num_samples = len(samples.positions)
        self.positions = samples.positions
        self.block_size = 1
        hidden = torch.zeros(self.population, dtype=torch.bool)
        self._by_index: dict[str, Tensor] = {}
        if samples.labelled_positions is not None:
            hidden[:] = True
            hidden[samples.labelled_positions] = False
            self._by_index["labelled"] = (~hidden).to(setting.device)
        self._labels = torch.where(hidden, IGNORE_INDEX, samples.labels).to(setting.device)
        if samples.true_labels is not None:
            self._by_index["label_true"] = torch.where(hidden, IGNORE_INDEX, samples.true_labels).to(setting.device)
        for name, value in samples.fields.items():
            dtype = setting.dtype if value.is_floating_point() else value.dtype
            self._by_index[name] = value.to(setting.device, dtype)
        self._extra = stored_field_specs(samples.fields)
        if samples.labelled_positions is not None:
            self._extra["labelled"] = ((), "bool")

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        here = self.options
        overlap = self.config.overlap
        order = self._move_order(epoch_order(self.positions, here.seed, self.name, epoch))
        tables = {name: self.epoch_params(name, epoch) for name in self.views}
        blocks = self._blocks(start)
        parts = (
            rank_shard_of_block(order, step, count, self.batch_size, here.rank, here.world_size)
            if count > 1
            else rank_shard(order, step, self.batch_size, here.rank, here.world_size, overlap=overlap)
            for step, count in blocks
        )
        for (step, count), (part, own, partner) in zip(blocks, self._read_images(parts, epoch), strict=True):
            block = self.augment(part, own, partner, tables, batches=count)
            if count == 1:
                yield block
                continue
            split = {name: value.split(self.batch_size) for name, value in block.items()}
            for number in range(max(start - step, 0), count):
                yield {name: batches[number] for name, batches in split.items()}

    def _blocks(self, start: int) -> list[tuple[int, int]]:
        """Which batches of an epoch are made together: (first step, how many), those that `start` lies in or before.

        They are fixed by the absolute step and made whole, also from the middle: on a GPU, rounding may depend on how
        many samples an operation has.
        """
        size, last = self.block_size, self.steps_per_epoch
        whole = self.num_samples // (self.batch_size * self.options.world_size) if size > 1 else 0
        blocks = [(step, min(size, whole - step)) for step in range(0, whole, size)]
        blocks += [(step, 1) for step in range(whole, last)]
        return [(step, count) for step, count in blocks if step + count > start]

    def epoch_params(self, view: str, epoch: int) -> Tensor:
        """Returns an epoch's draws of a view, float32 (population, columns), on the device.

        Where batches overlap there are twice as many rows: those of second visits stand behind those of the first.
        """
        here = self.options
        visits = (epoch, f"{epoch} again") if self.config.overlap else (epoch,)
        tables = [self.views[view].sample_params(self.population, here.seed, self.name, visit) for visit in visits]
        return torch.cat(tables).to(here.device)

    def epoch_positions(self, epoch: int) -> Tensor:
        """Returns the samples that this rank sees in an epoch, each once, int64, sorted, on the CPU."""
        here = self.options
        if here.world_size == 1:
            return self.positions
        order = epoch_order(self.positions, here.seed, self.name, epoch)
        steps = range(self.steps_per_epoch)
        parts = [rank_shard(order, s, self.batch_size, here.rank, here.world_size, overlap=self.config.overlap) for s in steps]
        return torch.cat([part.index for part in parts]).unique()

    def evaluation_batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        here = self.options
        order = self._move_order(self.positions)
        tables = {
            name: view.sample_params(self.population, here.seed, self.name, "evaluation").to(here.device)
            for name, view in self.views.items()
            if view.needs_evaluation_params
        }
        count = num_steps(len(order), batch_size, here.world_size)
        parts = (rank_shard(order, step, batch_size, here.rank, here.world_size) for step in range(count))
        for part, own, _ in self._read_images(parts, None):
            batch = {}
            for name, view in self.views.items():
                draws = tables[name].index_select(0, part.index) if name in tables else None
                batch[name] = view.evaluation_images(*own[name], draws)
            yield batch | self._fields(part)

    def augment(
        self, part: RankShard, own: StoredImages, partner: StoredImages | None, tables: Mapping[str, Tensor], *, batches: int = 1
    ) -> dict[str, Tensor]:
        """Makes batches from stored images and draws; everything stays on the device and no shape depends on a value.

        Args:
            part: the rows, on the device.
            own: the stored images of the rows.
            partner: those of the partners; None in a single process, where they are the same rows rolled by one.
            tables: view -> the epoch's draws, float32 (population, columns); twice as many rows where batches overlap.
            batches: how many of equal size the rows are, one after the other; each mixes its own rows.
        """
        batch = {}
        fields = self._fields(part)
        drawn = part.param_rows(self.population)
        for name, view in self.views.items():
            draws = tables[name].index_select(0, drawn)
            image = view.augment(*own[name], draws)
            if view.mix_owner:
                if partner is None:
                    other = image.unflatten(0, (batches, -1)).roll(1, 1).flatten(0, 1)
                else:
                    theirs = tables[name].index_select(0, part.partner_param_rows(self.population))
                    other = view.augment(*partner[name], theirs)
                image, fields["mix"] = view.mix(image, other, draws)
                fields["label_other"] = self._labels.index_select(0, part.partner)
            batch[name] = image
            fields |= view.extra_fields(draws)
        return batch | fields

    def field_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        dtype = str(self.options.dtype).removeprefix("torch.")
        fields = image_field_specs(self.config, next(iter(self.views.values())).stored_shape, self._extra)
        return {name: (shape, dtype if kind == "float32" else kind) for name, (shape, kind) in fields.items()}

    def _fields(self, part: RankShard) -> dict[str, Tensor]:
        fields = {"label": self._labels.index_select(0, part.index), "index": part.index}
        fields |= {name: value.index_select(0, part.index) for name, value in self._by_index.items()}
        if part.valid is not None:
            fields["valid"] = part.valid
        return fields

    def _move_order(self, order: Tensor) -> Tensor:
        """Puts an order where `_read_images` wants it."""
        raise NotImplementedError

    def _read_images(self, parts: Iterable[RankShard], epoch: int | None) -> Iterator[tuple[RankShard, StoredImages, StoredImages | None]]:
        """Yields each part, on the device, with its stored images; epoch is None when nothing is drawn."""
        raise NotImplementedError


class ResidentSource(ImageSource):
    """A source whose whole split lies on the device, as it was stored.

    Args:
        packed: the split, its images (population, ...) already on the device, shared with other sources of the same
            dataset.
        Everything else as in ImageSource.
    """

    def __init__(
        self,
        config: SourceConfig,
        setting: LoadingOptions,
        views: dict[str, View],
        classes: Sequence[str],
        samples: SampleMetadata,
        packed: PackedSplit,
    ) -> None:
        super().__init__(config, setting, views, classes, samples, packed.checksum)
        self.packed = packed
        self.images = packed.images
        if not config.overlap:
            self.block_size = self._max_block_size()

    def _max_block_size(self) -> int:
        """How many batches are augmented together: on CUDA, where a small operation costs its launch, up to BLOCK."""
        if self.options.device.type != "cuda":
            return 1
        size = self.options.dtype.itemsize
        batch = sum(self.batch_size * math.prod(view.shape) * size for view in self.views.values())
        return max(1, min(MAX_BLOCK_BATCHES, MAX_BLOCK_BYTES // max(batch, 1)))

    def _move_order(self, order: Tensor) -> Tensor:
        return order.to(self.options.device)

    def _read_images(self, parts: Iterable[RankShard], epoch: int | None) -> Iterator[tuple[RankShard, StoredImages, StoredImages | None]]:
        for part in parts:
            own = {name: (self.images, part.index) for name in self.views}
            alone = self.options.world_size == 1
            yield part, own, None if alone else {name: (self.images, part.partner) for name in self.views}


class GeneratedSource(Source):
    """A source of drawn fields, without labels: every batch is whole, a function of (seed, source, epoch, step)."""

    def __init__(self, config: SourceConfig, setting: LoadingOptions, noise: GeneratedDataset) -> None:
        super().__init__(config, setting)
        self._noise = noise
        self.classes = []
        self.checksum = noise.checksum()
        self.num_samples = len(noise)
        self.population = self.steps_per_epoch * self.batch_size * setting.world_size
        self.positions = torch.empty(0, dtype=torch.int64)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for step in range(start, self.steps_per_epoch):
            yield self._batch(step, self.batch_size, "order", epoch)

    def evaluation_batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yields the same noise every time, all batches whole."""
        for step in range(num_steps(self.num_samples, batch_size, self.options.world_size)):
            yield self._batch(step, batch_size, "evaluation", 0)

    def field_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        dtype = str(self.options.dtype).removeprefix("torch.")
        fields = self._noise.field_specs().items()
        return {name: (shape, dtype if kind == "float32" else kind) for name, (shape, kind) in fields}

    def _batch(self, step: int, batch_size: int, use: str, epoch: int) -> dict[str, Tensor]:
        here = self.options
        together = batch_size * here.world_size
        drawn = self._noise.sample(generator(here.seed, "augment", self.name, use, epoch, step), together)
        own = {name: value[here.rank :: here.world_size].to(here.dtype) for name, value in drawn.items()}
        batch = {name: to_device(value, here.device) for name, value in own.items()}
        first = step * together + here.rank
        batch["index"] = torch.arange(first, (step + 1) * together, here.world_size, device=here.device)
        return batch
