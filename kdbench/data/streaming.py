"""A source whose images are decoded in every epoch, by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdbench.config.schema import SourceConfig
from kdbench.data.augment import Reading
from kdbench.data.files import Listing, pixels, read_image, resize_and_crop
from kdbench.data.order import Shard
from kdbench.data.source import ImageSource, Pixels, Samples, Setting
from kdbench.data.view import View
from kdbench.errors import DataError
from kdbench.randomness import derive

WHOLE = ""
"""Key of the image as evaluation reads it, which all views without a `Reading` share."""


class Reader:
    """Decodes one image at a time; small enough to be sent to worker processes.

    Args:
        listing: the files.
        resize: the shorter side is resized to this...
        size: ...and the central square of this side is cut out.
    """

    def __init__(self, listing: Listing, resize: int, size: int) -> None:
        # One array instead of a list of strings: workers share its memory instead of copying it page by page.
        self.paths = np.array([os.fsencode(listing.folder / path) for path in listing.paths])
        self.resize = resize
        self.size = size

    def read(
        self, number: int, readings: dict[str, tuple[Reading, np.random.Generator]], whole: bool
    ) -> dict[str, Tensor]:
        """Decodes the file once; returns uint8 (3, size, size) for each reading, and under WHOLE the plain image."""
        image = read_image(os.fsdecode(self.paths[number]))
        found = {}
        for name, (reading, rng) in readings.items():
            part = image.crop(reading.box(*image.size, rng))
            found[name] = _tensor(part.resize((self.size, self.size), Image.Resampling.BILINEAR))
        if whole:
            found[WHOLE] = _tensor(resize_and_crop(image, self.resize, self.size))
        return found


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(pixels(image).copy())


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

    def __init__(self, reader: Reader, views: dict[str, View], seed: int, source: str) -> None:
        self.reader = reader
        self.readings = {view.reading_owner: view.reading for view in views.values() if view.reading is not None}
        self.whole = any(view.reading is None for view in views.values())
        self.seed = seed
        self.source = source

    def __getitems__(self, request: Request) -> tuple[Request, dict[str, Tensor] | DataError]:
        epoch, numbers = request
        try:
            samples = [self._one(epoch, number) for number in numbers]
        except DataError as error:
            return request, error  # raised in the main process, without the worker's traceback in its text
        return request, {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def _one(self, epoch: int | None, number: int) -> dict[str, Tensor]:
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
        setting: Setting,
        views: dict[str, View],
        classes: Sequence[str],
        samples: Samples,
        checksum: str,
        reader: Reader,
    ) -> None:
        super().__init__(config, setting, views, classes, samples, checksum)
        self._decoder = _Decoder(reader, views, setting.seed, config.name)
        self._plan = _Plan([])
        self._training: DataLoader | None = None

    def close(self) -> None:
        self._training = None

    def _placed(self, order: Tensor) -> Tensor:
        return order

    def _read(self, parts: Iterable[Shard], epoch: int | None) -> Iterator[tuple[Shard, Pixels, Pixels | None]]:
        parts = list(parts)
        # A partner that another rank holds is decoded here too: what is mixed must not depend on the number of ranks.
        partners = epoch is not None and self.setting.world > 1 and any(view.mixes for view in self.views.values())
        requests: list[Request] = [
            (
                epoch,
                [
                    *part.drawn(self.population).tolist(),
                    *(part.partner_drawn(self.population).tolist() if partners else []),
                ],
            )
            for part in parts
        ]
        device = self.setting.device
        loader = self._loader(requests, lasting=epoch is not None)
        for part, request, (answered, read) in zip(parts, requests, loader, strict=True):
            assert answered == request, f"source {self.name!r} was started twice at the same time"
            if isinstance(read, DataError):
                raise read
            images = {key: value.to(device, non_blocking=True) for key, value in read.items()}
            rows = torch.arange(len(part.index), device=device)
            read_for = {
                name: images[view.reading_owner if view.reading is not None and epoch is not None else WHOLE]
                for name, view in self.views.items()
            }
            own = {name: (stored, rows) for name, stored in read_for.items()}
            other = {name: (stored, rows + len(rows)) for name, stored in read_for.items()} if partners else None
            yield part.to(device), own, other

    def _loader(self, requests: list[Request], *, lasting: bool) -> DataLoader:
        """Training keeps its workers from epoch to epoch; evaluation, which may run in between, has its own."""
        if not lasting:
            return self._new_loader(_Plan(requests), lasting=False)
        if self._training is None:
            self._training = self._new_loader(self._plan, lasting=True)
        self._plan.requests = requests
        return self._training

    def _new_loader(self, plan: _Plan, *, lasting: bool) -> DataLoader:
        workers = self.setting.workers
        return DataLoader(
            self._decoder,
            batch_sampler=plan,  # type: ignore[arg-type]  # any iterable; each item reaches __getitems__ as it is
            num_workers=workers,
            persistent_workers=lasting and workers > 0,
            collate_fn=_as_it_is,
            pin_memory=self.setting.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws its base seed from the global generator
        )
