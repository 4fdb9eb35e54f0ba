"""A source whose images are decoded in every epoch, by worker processes."""

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
from kdbench.data.loading.source import ImageSource, LoadingOptions, SampleMetadata, StoredImages
from kdbench.data.sampling.order import RankShard
from kdbench.errors import DataError
from kdbench.randomness import derive

Request = tuple[int | None, list[int]]
"""An epoch (None: evaluation, nothing is drawn) and the positions to read; second visits lie behind the end of the
split, so that they have draws of their own."""


class _Plan:
    """The requests of the next pass over the loader."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _Decoder(TorchDataset):
    """Answers requests in a worker process."""

    def __init__(self, reader: ImageReader, views: dict[str, View], seed: int, source: str) -> None:
        self.reader = reader
        self.readings = {view.decode_owner: view.decode_augmentation for view in views.values() if view.decode_augmentation is not None}
        self.whole = any(view.decode_augmentation is None for view in views.values())
        self.seed = seed
        self.source = source

    def __getitems__(self, request: Request) -> tuple[Request, Any]:
        epoch, numbers = request
        try:
            samples = [self._one(epoch, number) for number in numbers]
        except DataError as error:
            return request, error  # raised in the main process, without the worker's traceback in its text
        return request, self.reader.collect(samples)

    def _one(self, epoch: int | None, number: int) -> Any:
        position = number % len(self.reader.paths)
        if epoch is None:
            return self.reader.read(position, {}, True)
        readings = {}
        for name, reading in self.readings.items():
            key = derive(self.seed, "augment", self.source, name, epoch, "reading")
            readings[name] = (reading, np.random.Generator(np.random.Philox(key=[key, number])))
        return self.reader.read(position, readings, self.whole)


def _as_it_is(batch: Any) -> Any:
    return batch


class StreamingSource(ImageSource):
    """A source that decodes its images in every epoch; the same order, draws and batches as a resident one.

    Args:
        reader: of the dataset.
        Everything else as in ImageSource.
    """

    def __init__(
        self,
        config: SourceConfig,
        setting: LoadingOptions,
        views: dict[str, View],
        classes: Sequence[str],
        samples: SampleMetadata,
        checksum: str,
        reader: ImageReader,
    ) -> None:
        super().__init__(config, setting, views, classes, samples, checksum)
        self.reader = reader
        self._decoder = _Decoder(reader, views, setting.seed, config.name)
        self._plan = _Plan([])
        self._training: DataLoader | None = None
        self._passes: WeakSet[Any] = WeakSet()

    def close(self) -> None:
        """Ends the worker processes, those of passes that were left in the middle too."""
        self._training = None
        for one in list(self._passes):
            end = getattr(one, "_shutdown_workers", None)  # else they live as long as somebody holds the iterator
            if end is not None:
                end()
        self._passes.clear()

    def _move_order(self, order: Tensor) -> Tensor:
        return order

    def _read_images(self, parts: Iterable[RankShard], epoch: int | None) -> Iterator[tuple[RankShard, StoredImages, StoredImages | None]]:
        parts = list(parts)
        # A partner that another rank holds is decoded here too: what is mixed must not depend on the number of ranks.
        partners = epoch is not None and self.options.world_size > 1 and any(view.mix_owner for view in self.views.values())
        requests: list[Request] = [
            (
                epoch,
                [
                    *part.param_rows(self.population).tolist(),
                    *(part.partner_param_rows(self.population).tolist() if partners else []),
                ],
            )
            for part in parts
        ]
        device = self.options.device
        for part, read in zip(parts, self._answers(requests, lasting=epoch is not None), strict=True):
            images = self.reader.to_device(read, device, self.notice)
            rows = torch.arange(len(part.index), device=device)
            read_for = {
                name: images[view.decode_owner if view.decode_augmentation is not None and epoch is not None else EVALUATION_IMAGE]
                for name, view in self.views.items()
            }
            own = {name: (stored, rows) for name, stored in read_for.items()}
            other = {name: (stored, rows + len(rows)) for name, stored in read_for.items()} if partners else None
            yield part.to(device), own, other

    def _answers(self, requests: list[Request], *, lasting: bool) -> Iterator[Any]:
        """Yields what the workers read, in order.

        Raises:
            DataError: an image cannot be read, or a worker died.
        """
        self.reader.prepare(self.options.device, self.notice)
        answers = iter(self._loader(requests, lasting=lasting))
        self._passes.add(answers)
        for request in requests:
            try:
                answered, read = next(answers)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"a process that decodes images of source {self.name!r} ended ({' '.join(str(error).split())}). "
                    f"Where memory ran out, take fewer `workers` (now {self.options.workers}) or a smaller batch."
                ) from None
            # an older torch's pinning makes lists of tuples
            assert tuple(answered) == request, f"source {self.name!r} was started twice at the same time"
            if isinstance(read, DataError):
                raise read
            yield read
        assert next(answers, None) is None  # asking once more ends the workers of a pass that has its own

    def _loader(self, requests: list[Request], *, lasting: bool) -> DataLoader:
        """Training keeps its workers from epoch to epoch; evaluation, which may run in between, has its own."""
        if not lasting:
            return self._new_loader(_Plan(requests), lasting=False)
        if self._training is None:
            self._training = self._new_loader(self._plan, lasting=True)
        self._plan.requests = requests
        return self._training

    def _new_loader(self, plan: _Plan, *, lasting: bool) -> DataLoader:
        workers = self.options.workers
        return DataLoader(
            self._decoder,
            batch_sampler=plan,  # type: ignore[arg-type]  # any iterable; each item reaches __getitems__ as it is
            num_workers=workers,
            persistent_workers=lasting and workers > 0,
            collate_fn=_as_it_is,
            pin_memory=self.options.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws its base seed from the global generator
        )
