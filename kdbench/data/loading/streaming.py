"""A source that decodes its images in every epoch, in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdbench.config.schema import SourceConfig
from kdbench.data.augment.view import View
from kdbench.data.loading.decode import EVALUATION_IMAGE, ImageReader
from kdbench.data.loading.source import ImageSource, LoadingOptions, SampleMetadata, ShardImages
from kdbench.data.sampling.order import RankShard
from kdbench.errors import DataError
from kdbench.randomness import derive

Request = tuple[int | None, list[int]]
"""Decoding request for one batch: the epoch (None in evaluation, where no crop is random) and the rows to decode.

A row is a sample's index in the split. If batches overlap, a sample's second visit in an epoch has the row
`index + len(split)`, so that its random crop differs from that of the first visit."""


class _RequestSampler:
    """Batch sampler of a DataLoader: yields, for each batch of a pass, the epoch and the rows to decode."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _DecodeDataset(TorchDataset):
    """Dataset of a DataLoader: decodes the images of one batch in a worker process."""

    def __init__(self, reader: ImageReader, views: dict[str, View], seed: int, source: str) -> None:
        self.reader = reader
        self.augmentations = {
            view.decode_owner: view.decode_augmentation
            for view in views.values()
            if view.decode_augmentation is not None
        }
        self.needs_evaluation_image = any(view.decode_augmentation is None for view in views.values())
        self.seed = seed
        self.source = source

    def __getitems__(self, request: Request) -> tuple[Request, Any]:
        epoch, rows = request
        try:
            samples = [self._read(epoch, row) for row in rows]
        except DataError as error:
            return request, error  # the main process raises it, so that its text has no traceback of the worker
        return request, self.reader.collect(samples)

    def _read(self, epoch: int | None, row: int) -> Any:
        index = row % len(self.reader.paths)
        if epoch is None:
            return self.reader.read(index, {}, True)
        crops = {}
        for view, augmentation in self.augmentations.items():
            # The words are keys of the random stream. Other words would change the crops.
            key = derive(self.seed, "augment", self.source, view, epoch, "reading")
            crops[view] = (augmentation, np.random.Generator(np.random.Philox(key=[key, row])))
        return self.reader.read(index, crops, self.needs_evaluation_image)


def _identity(batch: Any) -> Any:
    return batch


class StreamingSource(ImageSource):
    """A source that decodes its images in every epoch, in worker processes of a DataLoader.

    Its batches equal those of a source that holds the images in memory.

    Args:
        reader: reader of the dataset's image files.
        config, options, views, classes, samples, checksum: see `ImageSource`.
    """

    def __init__(
        self,
        config: SourceConfig,
        options: LoadingOptions,
        views: dict[str, View],
        classes: Sequence[str],
        samples: SampleMetadata,
        checksum: str,
        reader: ImageReader,
    ) -> None:
        super().__init__(config, options, views, classes, samples, checksum)
        self.reader = reader
        self._dataset = _DecodeDataset(reader, views, options.seed, config.name)
        self._sampler = _RequestSampler([])
        self._training_loader: DataLoader | None = None
        self._iterators: WeakSet[Any] = WeakSet()

    def close(self) -> None:
        """Ends all worker processes, including those of unfinished passes."""
        self._training_loader = None
        for iterator in list(self._iterators):
            # Without this call the workers live as long as any reference to the iterator.
            shutdown = getattr(iterator, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
        self._iterators.clear()

    def _move_order(self, order: Tensor) -> Tensor:
        return order

    def _read_images(self, shards: Iterable[RankShard], epoch: int | None) -> Iterator[ShardImages]:
        shards = list(shards)
        training = epoch is not None
        # Partners of other ranks are decoded too, because mixing must not depend on the number of ranks.
        mixes = any(view.mix_owner for view in self.views.values())
        with_partners = training and self.options.world_size > 1 and mixes
        requests: list[Request] = []
        for shard in shards:
            partner_rows = shard.partner_param_rows(self.population).tolist() if with_partners else []
            requests.append((epoch, [*shard.param_rows(self.population).tolist(), *partner_rows]))
        device = self.options.device
        for shard, decoded in zip(shards, self._decode(requests, persistent=training), strict=True):
            by_key = self.reader.to_device(decoded, device, self.options.notice)
            rows = torch.arange(len(shard.index), device=device)
            stored = {
                name: by_key[view.decode_owner if training and view.decode_augmentation else EVALUATION_IMAGE]
                for name, view in self.views.items()
            }
            images = {name: (value, rows) for name, value in stored.items()}
            partner_images = None
            if with_partners:  # the workers return the partners after the rows
                partner_images = {name: (value, rows + len(rows)) for name, value in stored.items()}
            yield shard.to(device), images, partner_images

    def _decode(self, requests: list[Request], *, persistent: bool) -> Iterator[Any]:
        """Yields the result of `ImageReader.collect` for each request (an epoch and the rows of a batch), in order.

        Raises:
            DataError: an image cannot be read, or a worker process ended.
        """
        self.reader.prepare(self.options.device, self.options.notice)
        iterator = iter(self._loader(requests, persistent=persistent))
        self._iterators.add(iterator)
        for request in requests:
            try:
                returned_request, samples = next(iterator)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"a worker process that decodes images of source {self.name!r} ended "
                    f"({' '.join(str(error).split())}). If memory ran out, use fewer `workers` "
                    f"(now {self.options.workers}) or a smaller batch."
                ) from None
            # tuple(): pinning in older versions of torch returns a list
            assert tuple(returned_request) == request, f"source {self.name!r} was started twice at the same time"
            if isinstance(samples, DataError):
                raise samples
            yield samples
        assert next(iterator, None) is None  # the last `next` ends the workers of a loader that is not persistent

    def _loader(self, requests: list[Request], *, persistent: bool) -> DataLoader:
        """Returns a DataLoader that decodes the requests (an epoch and the rows of a batch).

        The workers for training are kept from epoch to epoch. Evaluation, which may run between epochs, uses its own
        workers.
        """
        if not persistent:
            return self._new_loader(_RequestSampler(requests), persistent=False)
        if self._training_loader is None:
            self._training_loader = self._new_loader(self._sampler, persistent=True)
        self._sampler.requests = requests
        return self._training_loader

    def _new_loader(self, sampler: _RequestSampler, *, persistent: bool) -> DataLoader:
        workers = self.options.workers
        return DataLoader(
            self._dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable; each item is passed on to __getitems__
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            collate_fn=_identity,
            pin_memory=self.options.device.type == "cuda",
            generator=torch.Generator(),  # by default the loader draws its base seed from the global generator
        )
