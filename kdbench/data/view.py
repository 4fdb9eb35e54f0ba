"""A view: how the image of a source becomes one field of the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.config.schema import Named, SourceConfig
from kdbench.data.augment import OUTSIDE, Augment, Geometric, Masking, Mixing, Reading
from kdbench.errors import ConfigError, UserError
from kdbench.randomness import derive
from kdbench.registry import AUGMENTS


class View:
    """Augments, normalises and converts the images of one field, batched, on the device.

    Crops and flips are composed into coordinates and read in one gather from the resident images; then
    (x / 255 - mean) / std; then cutout; then mixup or cutmix. No step waits for the device.

    Args:
        name: of the field, such as `image`.
        augments: the recipe's list.
        shape: of one stored image, (channels, height, width); other shapes take no augmentation.
        mean, std: per channel, of images in [0, 1]; None leaves them in [0, 1].

    Attributes:
        shape: of one image of the batch.
        columns: how many numbers a sample draws in an epoch.

    Raises:
        ConfigError: an augmentation is unknown, does not fit the shape, or two of them mix.
    """

    def __init__(
        self,
        name: str,
        augments: Sequence[Named],
        shape: tuple[int, ...],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self.name = name
        self.augments: list[Augment] = []
        self.stored = shape
        self.shape = shape
        for named in augments:
            self._add(named)
        self.keys = _keys(augments)
        self.columns = sum(augment.columns for augment in self.augments)
        self.mixes = any(isinstance(augment, Mixing) for augment in self.augments)
        self.reading = next((augment for augment in self.augments if isinstance(augment, Reading)), None)
        self.dtype = dtype
        self.channels_last = channels_last and len(shape) == 3
        trailing = (-1, *([1] * (len(shape) - 1)))
        self.mean = None if mean is None else torch.tensor(mean, dtype=dtype, device=device).view(trailing)
        self.std = None if std is None else torch.tensor(std, dtype=dtype, device=device).view(trailing)

    def _add(self, named: Named) -> None:
        AUGMENTS.check(named.type, named.params, named.place)
        if len(self.stored) != 3:
            raise ConfigError(
                f"{named.place}: {named.type} needs images of shape [channels, height, width], "
                f"but this dataset's samples are {list(self.stored)}".lstrip(": ")
            )
        try:
            augment: Augment = AUGMENTS.build(named.type, named.params, named.place)
            self.shape = augment.shape(self.shape)
        except UserError as error:
            raise ConfigError(f"{named.place}: {error}".lstrip(": ")) from None
        if isinstance(augment, Mixing) and any(isinstance(other, Mixing) for other in self.augments):
            raise ConfigError(f"{named.place}: view {self.name!r} already mixes; one of mixup and cutmix is enough")
        self.augments.append(augment)

    def table(self, samples: int, seed: int, source: str, epoch: int) -> Tensor:
        """Returns the draws of all samples for one epoch, float32 (samples, columns), on the CPU.

        Each augmentation has its own stream: one more in the list leaves the draws of the others as they are.
        """
        parts = [
            augment.table(samples, derive(seed, "augment", source, self.name, epoch, key))
            for augment, key in zip(self.augments, self.keys, strict=True)
            if augment.columns
        ]
        return torch.cat(parts, dim=1) if parts else torch.empty(samples, 0)

    def augmented(self, images: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
        """Returns the augmented images before mixing.

        Args:
            images: (samples, *stored shape), uint8 or float in [0, 1].
            rows: int64 (batch,), which of them.
            draws: float32 (batch, columns).

        Returns:
            (batch, *shape), normalised.
        """
        moves, masks = [], []
        for augment, own in self._with_draws(draws):
            if isinstance(augment, Geometric):
                moves.append((augment, own))
            elif isinstance(augment, Masking):
                masks.append((augment, own))
        if moves:
            ys, xs = _identity(len(rows), self.stored, rows.device)
            for augment, own in moves:
                ys, xs = augment.maps(ys, xs, own)
            read = gather_pixels(images, rows, ys, xs)
        else:
            read = images.index_select(0, rows)
        image = self._normalised(read)
        for augment, own in masks:
            image = augment.apply(image, own)
        return self._laid_out(image)

    def mixed(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Blends each image with its partner; returns the blend and the share of the own label (batch,)."""
        for augment, own in self._with_draws(draws):
            if isinstance(augment, Mixing):
                image, share = augment.mix(image, partner, own)
                return self._laid_out(image), share
        raise ValueError(f"view {self.name!r} does not mix")

    def plain(self, images: Tensor, rows: Tensor) -> Tensor:
        """Returns the images as evaluation sees them: normalised, and cut to the view's size at the centre."""
        moves = [augment for augment in self.augments if isinstance(augment, Geometric)]
        if self.shape == self.stored:
            return self._laid_out(self._normalised(images.index_select(0, rows)))
        ys, xs = _identity(len(rows), self.stored, rows.device)
        for augment in moves:
            ys, xs = augment.fixed(ys, xs)
        return self._laid_out(self._normalised(gather_pixels(images, rows, ys, xs)))

    def _with_draws(self, draws: Tensor) -> list[tuple[Augment, Tensor]]:
        parts = draws.split([augment.columns for augment in self.augments], dim=1) if self.augments else ()
        return list(zip(self.augments, parts, strict=True))

    def _normalised(self, read: Tensor) -> Tensor:
        image = read.to(self.dtype)
        if not read.is_floating_point():
            image = image.div_(255)
        if self.mean is not None and self.std is not None:
            image = image.sub_(self.mean).div_(self.std)
        return image

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image


def _keys(augments: Sequence[Named]) -> list[str]:
    seen: Counter[str] = Counter()
    keys = []
    for named in augments:
        keys.append(f"{named.type}{seen[named.type] or ''}")
        seen[named.type] += 1
    return keys


def _identity(batch: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    _, height, width = shape
    ys = torch.arange(height, device=device).expand(batch, height)
    xs = torch.arange(width, device=device).expand(batch, width)
    return ys, xs


def gather_pixels(images: Tensor, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Reads out[b, c, i, j] = images[rows[b], c, ys[b, i], xs[b, j]], zero where a coordinate is OUTSIDE.

    Args:
        images: (samples, channels, height, width).
        rows: int64 (batch,).
        ys: int64 (batch, out_height). xs: int64 (batch, out_width).

    Returns:
        (batch, channels, out_height, out_width), of the dtype of `images`.
    """
    # One row and one column of zeros stand for everything outside. Whole rows are copied first, pixels second: that
    # is twice as fast on a CPU as one take over all pixels.
    channels, height, width = images.shape[1:]
    batch = rows.shape[0]
    read = F.pad(images.index_select(0, rows), (0, 1, 0, 1))
    ys = torch.where(ys == OUTSIDE, height, ys)
    xs = torch.where(xs == OUTSIDE, width, xs)
    planes = torch.arange(batch * channels, device=rows.device).view(batch, channels, 1) * (height + 1)
    lines = read.view(-1, width + 1).index_select(0, (planes + ys[:, None, :]).view(-1))
    lines = lines.view(batch, channels, ys.shape[1], width + 1)
    return lines.gather(3, xs[:, None, None, :].expand(batch, channels, ys.shape[1], xs.shape[1]))


def build_views(config: SourceConfig, shape: tuple[int, ...], **options: object) -> dict[str, View]:
    """Builds the views of a source.

    Raises:
        ConfigError: an augmentation does not fit, or two views mix labels.
    """
    views = {name: View(name, augments, shape, **options) for name, augments in config.views.items()}  # type: ignore[arg-type]
    mixing = [name for name, view in views.items() if view.mixes]
    if len(mixing) > 1:
        raise ConfigError(
            f"{config.place}: views {' and '.join(mixing)} both mix samples, but a batch has one `mix` and one "
            "`label_other`; mix in one view".lstrip(": ")
        )
    return views


def fields_of(config: SourceConfig, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the fields of a source's batches: name -> (shape of one sample, dtype)."""
    views = build_views(config, shape)
    fields = {name: (view.shape, "float32") for name, view in views.items()}
    fields |= {"label": ((), "int64"), "index": ((), "int64")}
    if config.labels is not None:
        fields["labelled"] = ((), "bool")
    if any(view.mixes for view in views.values()):
        fields |= {"label_other": ((), "int64"), "mix": ((), "float32")}
    return fields
