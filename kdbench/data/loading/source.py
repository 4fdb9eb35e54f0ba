"""Sources, which yield the batches of a stage. The order of samples depends only on seed, epoch and step."""

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
"""Label of a sample whose label is hidden. It is the default `ignore_index` of torch's `cross_entropy`."""


MAX_BLOCK_BATCHES = 15
"""Maximum number of batches that are augmented together (in one block) on CUDA.

The number is odd because `kdbench profile` measures every second step. With an odd number, it measures the first steps
of blocks as often as they occur."""


MAX_BLOCK_BYTES = 32 * 2**20
"""Maximum size in bytes of all views of one block (batches that are augmented together)."""


@dataclass(frozen=True)
class LoadingOptions:
    """Options that are common to all sources of a run.

    Attributes:
        seed: seed of the run.
        device: device of the batches.
        rank, world_size: rank of this process and number of processes in data-parallel training.
        workers: number of processes that decode images for a source that decodes in every epoch.
        dtype, channels_last: dtype and memory layout of the images.
        notice: function that shows a sentence to the user.
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
    """Base class of all sources. A source yields batches on the device. All its batches have the same fields.

    Attributes:
        name: name of the source in the recipe, or `validation`.
        classes: names of the classes, in the order of the labels; empty for a source without labels.
        num_samples: number of samples in an epoch.
        population: number of samples in the full split, before `subset`. Values of the field `index` are below this
            number, so it is the size of memory banks and caches that `index` addresses.
        indices: indices of the samples that the source yields, int64 (num_samples,), sorted; empty for a source
            without labels.
        batch_size: batch size of one rank.
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
        """The number of steps in an epoch. Each rank reads one batch per step. A smaller last batch is not dropped."""
        return num_steps(self.num_samples, self.batch_size, self.options.world_size, overlap=self.config.overlap)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's training batches of one epoch, shuffled and augmented.

        Args:
            epoch: number of the epoch, from 0.
            start: number of the first step. The yielded batches equal the batches from this step on in a full pass.
        """
        raise NotImplementedError

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields this rank's part of all samples, each sample once, without augmentation, in the order of the split.

        All ranks get the same number of rows. If the samples cannot be divided evenly, some rows are repeated, and
        the field `valid` is False for the repeated rows.

        Args:
            batch_size: batch size of one rank.
        """
        raise NotImplementedError

    def field_specs(self) -> dict[str, FieldSpec]:
        """Returns field -> (shape of one sample, dtype) for all fields of the source's batches."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends worker processes, if there are any."""


StoredImages: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""View -> (stored images, row numbers in them), both on the device."""


ShardImages: TypeAlias = tuple[RankShard, StoredImages, StoredImages | None]
"""One rank's rows of a batch on the device, their images, and the images with which they are mixed (or None)."""


@dataclass(frozen=True)
class SampleMetadata:
    """The labels and other values of a split's samples, and the indices of the samples that a source yields.

    Attributes:
        labels: labels of the full split after `relabel`, int64 (population,); negative for a sample without label.
        indices: indices of the samples that the source yields, int64 (num_samples,), sorted.
        labelled_indices: subset of `indices` whose labels are visible, int64, sorted; None: all labels are visible.
        true_labels: labels before `relabel`, int64 (population,); None if the source has no `relabel`.
        fields: name -> values of an additional field of the batches, (population, ...).
    """

    labels: Tensor
    indices: Tensor
    labelled_indices: Tensor | None = None
    true_labels: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)


class ImageSource(Source):
    """Base class of sources of labelled images. It computes order, labels and views; a subclass reads the images.

    Args:
        config: configuration of the source in the recipe.
        options: options that are common to all sources of a run.
        views: image field -> view that augments and normalises the images of this field.
        classes: names of the classes, in the order of the labels.
        samples: labels of the split, and indices of the samples that the source yields.
        checksum: digest of the dataset's content.
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
        """Returns (first step, number of batches) for each block of batches that are augmented together.

        The boundaries of the blocks do not depend on `start`. Blocks before `start` are left out. A block that
        contains `start` is computed in full, because on a GPU rounding may depend on the number of samples in an
        operation.
        """
        size, end = self.block_size, self.steps_per_epoch
        full_batches = self.num_samples // (self.batch_size * self.options.world_size) if size > 1 else 0
        blocks = [(step, min(size, full_batches - step)) for step in range(0, full_batches, size)]
        blocks += [(step, 1) for step in range(full_batches, end)]
        return [(step, count) for step, count in blocks if step + count > start]

    def epoch_params(self, view: str, epoch: int) -> Tensor:
        """Returns the random augmentation parameters of a view for one epoch, float32 (population, num_params).

        The tensor is on the device. If batches overlap, each sample is used twice in an epoch. The tensor then has
        twice as many rows: first the parameters for all first uses, then those for all second uses.
        """
        options = self.options
        # "again" is a key of the random stream. Another word would change the parameters.
        visits = (epoch, f"{epoch} again") if self.config.overlap else (epoch,)
        params = [self.views[view].sample_params(self.population, options.seed, self.name, visit) for visit in visits]
        return torch.cat(params).to(options.device)

    def epoch_indices(self, epoch: int) -> Tensor:
        """Returns the indices of the samples that this rank yields in an epoch, int64, sorted, unique, on the CPU."""
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
        """Computes the fields of one or more batches on the device, without a synchronisation with the host.

        Args:
            shard: rows of the batches, on the device.
            images: stored images of these rows.
            partner_images: stored images of the samples with which the rows are mixed (mixup, cutmix). None in a
                single process, where each row is mixed with the preceding row.
            params: view -> augmentation parameters of the epoch, float32 (population, num_params); (2 * population,
                num_params) if batches overlap.
            num_batches: number of equal batches into which the rows are divided. Rows of different batches are not
                mixed.

        Returns:
            Field -> tensor (rows, ...).
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
        """Returns field -> tensor (rows, ...) for the fields that are not images, such as `label` and `index`."""
        fields = {"label": self._labels.index_select(0, shard.index), "index": shard.index}
        fields |= {name: value.index_select(0, shard.index) for name, value in self._sample_fields.items()}
        if shard.valid is not None:
            fields["valid"] = shard.valid
        return fields

    def _move_order(self, order: Tensor) -> Tensor:
        """Moves the order of samples (int64 indices) to the device on which the subclass needs it to read images."""
        raise NotImplementedError

    def _read_images(self, shards: Iterable[RankShard], epoch: int | None) -> Iterator[ShardImages]:
        """Yields each shard (one rank's rows of a batch) on the device, with the stored images of its rows.

        Args:
            epoch: number of the epoch; None in evaluation.

        Yields:
            The shard, the images of its rows, and the images with which the rows are mixed. The last item is None if
            it is not needed, for example in a single process.
        """
        raise NotImplementedError


class ResidentSource(ImageSource):
    """A source that holds the full split in device memory, in the stored format (uint8 or float32).

    Args:
        split: split with images (population, ...) on the device. Other sources of the dataset share these images.
        config, options, views, classes, samples: see `ImageSource`.
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
        """Returns the maximum number of batches that are augmented together: 1 on a CPU, up to 15 on CUDA."""
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
    """A source of random fields without labels. All its batches are full.

    A batch depends only on the seed, the name of the source, the epoch and the step.
    """

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
        """Yields full evaluation batches. Every evaluation yields the same batches."""
        for step in range(num_steps(self.num_samples, batch_size, self.options.world_size)):
            yield self._batch(step, batch_size, "evaluation", 0)

    def field_specs(self) -> dict[str, FieldSpec]:
        return _with_float_dtype(self._dataset.field_specs(), self.options.dtype)

    def _batch(self, step: int, batch_size: int, use: str, epoch: int) -> Batch:
        """Draws one global batch and returns this rank's rows.

        Args:
            use: part of the random stream's key, "order" or "evaluation". Other words would change the random
                numbers.
        """
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
    """Returns the specs of fields in which the dtype float32 is replaced by `dtype`, the dtype of the run's images."""
    name = str(dtype).removeprefix("torch.")
    return {field: (shape, name if kind == "float32" else kind) for field, (shape, kind) in specs.items()}
