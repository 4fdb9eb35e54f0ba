"""A view: how the image of a source becomes one field of the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.augment.base import (
    OUTSIDE,
    Augmentation,
    ColorAugmentation,
    DecodeTimeAugmentation,
    GeometricAugmentation,
    MixingAugmentation,
    PostNormalizeAugmentation,
)
from kdbench.data.source_spec import VariantCount
from kdbench.errors import ConfigError, UserError, suggest
from kdbench.randomness import derive
from kdbench.registry import AUGMENTATIONS


class View:
    """Augments, normalises and converts the images of one field, batched, on the device.

    Crops and flips are composed into coordinates and read in one gather from the resident images; then x / 255; then
    colours; then (x - mean) / std; then cutout and noise; then mixup or cutmix; then what the recipe has after that.
    No step waits for the device.

    Args:
        name: of the field, such as `image`.
        augments: the recipe's list.
        shape: of one stored image, (channels, height, width); other shapes take no augmentation.
        mean, std: per channel, of images in [0, 1]; None leaves them in [0, 1].
        owners: the view whose draws each augmentation takes; None: this view.
        pixels: whether the stored images are in [0, 1] (or uint8), not normalised already.

    Attributes:
        shape: of one image of the batch.
        columns: how many numbers a sample draws in an epoch.
        mixes: the view whose draws mix this one; empty where nothing is mixed.
        reading: what chooses the part of a file that is read, and `reading_owner` the view whose draws it takes.
        draws_always: whether evaluation needs draws.

    Raises:
        ConfigError: an augmentation is unknown, does not fit the shape, or two of them mix.
    """

    def __init__(
        self,
        name: str,
        augments: Sequence[PartConfig],
        shape: tuple[int, ...],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        owners: Sequence[str] | None = None,
        in_unit_range: bool = True,
    ) -> None:
        self.name = name
        self.in_unit_range = in_unit_range
        self.augmentations: list[Augmentation] = []
        self._input_shapes: list[tuple[int, ...]] = []  # the shape that goes into each augmentation
        self.stored_shape = shape
        self.shape = shape
        for named in augments:
            self._add(named)
        self.stream_keys = _keys(augments)
        self.num_params = sum(augment.num_params for augment in self.augmentations)
        self.owners = list(owners) if owners is not None else [name] * len(self.augmentations)
        self._mixing = next((i for i, augment in enumerate(self.augmentations) if isinstance(augment, MixingAugmentation)), None)
        self.mix_owner = "" if self._mixing is None else self.owners[self._mixing]
        reads = [(a, owner) for a, owner in zip(self.augmentations, self.owners, strict=True) if isinstance(a, DecodeTimeAugmentation)]
        self.decode_augmentation, self.decode_owner = reads[0] if reads else (None, "")
        self.needs_evaluation_params = any(augment.always and augment.num_params for augment in self.augmentations)
        self.dtype = dtype
        self.channels_last = channels_last and len(shape) == 3
        trailing = (-1, *([1] * (len(shape) - 1)))
        self.mean = None if mean is None else torch.tensor(mean, dtype=dtype, device=device).view(trailing)
        self.std = None if std is None else torch.tensor(std, dtype=dtype, device=device).view(trailing)

    def _add(self, named: PartConfig) -> None:
        AUGMENTATIONS.check(named.type, named.params, named.location)
        if len(self.stored_shape) != 3:
            raise ConfigError(
                f"{named.location}: {named.type} needs images of shape [channels, height, width], "
                f"but this dataset's samples are {list(self.stored_shape)}".lstrip(": ")
            )
        self._input_shapes.append(self.shape)
        try:
            augment: Augmentation = AUGMENTATIONS.build(named.type, named.params, named.location)
            self.shape = augment.output_shape(self.shape)
        except UserError as error:
            raise ConfigError(f"{named.location}: {error}".lstrip(": ")) from None
        if isinstance(augment, ColorAugmentation) and not self.in_unit_range:
            raise ConfigError(
                f"{named.location}: {named.type} changes colours of images in [0, 1], but these were stored "
                "normalised".lstrip(": ")
            )
        if isinstance(augment, MixingAugmentation) and any(isinstance(other, MixingAugmentation) for other in self.augmentations):
            raise ConfigError(f"{named.location}: view {self.name!r} already mixes; one of mixup and cutmix is enough")
        self.augmentations.append(augment)

    def sample_params(self, samples: int, seed: int, source: str, epoch: int | str) -> Tensor:
        """Returns the draws of all samples for one epoch, float32 (samples, columns), on the CPU.

        Each augmentation has its own stream: one more in the list leaves the draws of the others as they are. Those
        that another view owns have that view's.
        """
        parts = [
            augment.sample_params(samples, derive(seed, "augment", source, owner, epoch, key))
            for augment, owner, key in zip(self.augmentations, self.owners, self.stream_keys, strict=True)
            if augment.num_params
        ]
        return torch.cat(parts, dim=1) if parts else torch.empty(samples, 0)

    def augment(self, images: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
        """Returns the augmented images before mixing.

        Args:
            images: (samples, *stored shape), uint8 or float in [0, 1].
            rows: int64 (batch,), which of them.
            draws: float32 (batch, columns).

        Returns:
            (batch, *shape), normalised.
        """
        own = self._with_draws(draws)
        moves = [(augment, drawn) for augment, drawn in own if isinstance(augment, GeometricAugmentation)]
        if moves:
            ys, xs = _identity(len(rows), self.stored_shape, rows.device)
            for augment, drawn in moves:
                ys, xs = augment.map_coordinates(ys, xs, drawn)
            read = gather_pixels(images, rows, ys, xs)
        else:
            read = images.index_select(0, rows)
        image = self._scaled(read)
        for augment, drawn in own:
            if isinstance(augment, ColorAugmentation):
                image = augment.apply(image, drawn)
        image = self._normalised(image)
        return self._to_memory_format(_masked(image, own[: self._mixing]))

    def mix(self, image: Tensor, partner: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Blends each image with its partner; returns the blend and the share of the own label (batch,)."""
        own = self._with_draws(draws)
        for number, (augment, drawn) in enumerate(own):
            if isinstance(augment, MixingAugmentation):
                image, share = augment.mix(image, partner, drawn)
                return self._to_memory_format(_masked(image, own[number:])), share
        raise ValueError(f"view {self.name!r} does not mix")

    def evaluation_images(self, images: Tensor, rows: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the images as evaluation sees them: normalised, cut to the view's size at the centre, and with what
        the view always does.

        Args:
            draws: float32 (batch, columns); needed where `draws_always`.
        """
        moves = [augment for augment in self.augmentations if isinstance(augment, GeometricAugmentation)]
        if self.shape == self.stored_shape:
            read = images.index_select(0, rows)
        else:
            ys, xs = _identity(len(rows), self.stored_shape, rows.device)
            for augment in moves:
                ys, xs = augment.map_evaluation_coordinates(ys, xs)
            read = gather_pixels(images, rows, ys, xs)
        image = self._normalised(self._scaled(read))
        if draws is None:
            draws = torch.zeros(len(rows), self.num_params, device=rows.device)
        own = self._with_draws(draws) if any(augment.always for augment in self.augmentations) else []
        return self._to_memory_format(_masked(image, [(augment, drawn) for augment, drawn in own if augment.always]))

    def extra_fields(self, draws: Tensor) -> dict[str, Tensor]:
        """Returns what the view says of itself in fields of its own, such as how far it is turned."""
        if not self.extra_field_names:
            return {}
        return {
            self.extra_field_names[augment.extra_field]: augment.extra_field_values(drawn)
            for augment, drawn in self._with_draws(draws)
            if augment.extra_field
        }

    @cached_property
    def extra_field_names(self) -> dict[str, str]:
        """What an augmentation tells -> its field: the same word in the view `image`, else `VIEW_WORD`."""
        words = [augment.extra_field for augment in self.augmentations if augment.extra_field]
        return {word: word if self.name == "image" else f"{self.name}_{word}" for word in words}

    @cached_property
    def variant_count(self) -> VariantCount:
        """How many images the view can show of one sample: those of its augmentations, multiplied."""
        count = 1
        for augment, shape in zip(self.augmentations, self._input_shapes, strict=True):
            if isinstance(augment, MixingAugmentation):
                return VariantCount(None, f"{augment.registered_name} blends samples")
            own = augment.num_variants(shape)
            if own is None:
                return VariantCount(None, f"the images that {augment.registered_name} makes of a sample are not counted")
            count *= own
        return VariantCount(count)

    def variant_ids(self, draws: Tensor) -> Tensor:
        """Returns which of its `variants` each sample's draws give, int64 (batch,), from 0.

        Args:
            draws: float32 (batch, columns).
        """
        codes = torch.zeros(len(draws), dtype=torch.int64, device=draws.device)
        for (augment, drawn), shape in zip(self._with_draws(draws), self._input_shapes, strict=True):
            codes = codes * (augment.num_variants(shape) or 1) + augment.variant_id(drawn, shape)
        return codes

    def _with_draws(self, draws: Tensor) -> list[tuple[Augmentation, Tensor]]:
        parts = draws.split([augment.num_params for augment in self.augmentations], dim=1) if self.augmentations else ()
        return list(zip(self.augmentations, parts, strict=True))

    def _scaled(self, read: Tensor) -> Tensor:
        image = read.to(self.dtype)
        return image if read.is_floating_point() else image.div_(255)

    def _normalised(self, image: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            image = image.sub_(self.mean).div_(self.std)
        return image

    def _to_memory_format(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image


def _masked(image: Tensor, own: Sequence[tuple[Augmentation, Tensor]]) -> Tensor:
    for augment, drawn in own:
        if isinstance(augment, PostNormalizeAugmentation):
            image = augment.apply(image, drawn)
    return image


def _keys(augments: Sequence[PartConfig]) -> list[str]:
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


def resolve_views(views: Mapping[str, Sequence[PartConfig]]) -> dict[str, list[tuple[PartConfig, str]]]:
    """Puts the augmentations of the other view in the place of each `reuse`.

    Returns:
        View -> its augmentations in order, each with the view whose draws it takes.

    Raises:
        ConfigError: `reuse` is not the first of a view, or names none, or itself.
    """
    found: dict[str, list[tuple[PartConfig, str]]] = {}

    def spell(name: str, above: tuple[str, ...]) -> list[tuple[PartConfig, str]]:
        if name in found:
            return found[name]
        own: list[tuple[PartConfig, str]] = []
        for number, named in enumerate(views[name]):
            if named.type != "same":
                own.append((named, name))
                continue
            other = str(named.params.get("view"))
            where = f"{named.location}: " if str(named.location) else ""
            if number:
                raise ConfigError(f"{where}`reuse` comes first in a view; what follows it is done to what it gives")
            if other not in views:
                raise ConfigError(f"{where}no view {other!r}.{suggest(other, views)}")
            if other in (*above, name):
                raise ConfigError(f"{where}views continue each other in a circle: {' -> '.join((*above, name, other))}")
            own += spell(other, (*above, name))
        found[name] = own
        return own

    for name in views:
        spell(name, ())
    return {name: found[name] for name in views}


def build_views(config: SourceConfig, shape: tuple[int, ...], **options: object) -> dict[str, View]:
    """Builds the views of a source.

    Raises:
        ConfigError: an augmentation does not fit, or two views mix labels, each in its own way.
    """
    views = {}
    for name, own in resolve_views(config.views).items():
        augments, owners = [named for named, _ in own], [owner for _, owner in own]
        views[name] = View(name, augments, shape, owners=owners, **options)  # type: ignore[arg-type]
    if len({view.mix_owner for view in views.values() if view.mix_owner}) > 1:
        mixing = [name for name, view in views.items() if view.mix_owner]
        raise ConfigError(
            f"{config.location}: views {' and '.join(mixing)} both mix samples, but a batch has one `mix` and one "
            "`label_other`; mix in one view, and let the other continue it (`from:`)".lstrip(": ")
        )
    return views


def reject_decode_augmentations(config: SourceConfig) -> None:
    """Raises ConfigError where a view chooses what is read from a file, of a dataset that is held in memory."""
    for name, own in resolve_views(config.views).items():
        for named, _ in own:
            if issubclass(AUGMENTATIONS.entry(named.type).load(), DecodeTimeAugmentation):
                raise ConfigError(
                    f"{named.location}: view {name!r}: {named.type} chooses what is read from a file, but "
                    f"{config.dataset.type} is held in memory; use crop, or a dataset that is read in every epoch "
                    "(image_folder with resident: false, imagenet)".lstrip(": ")
                )


def variant_counts(config: SourceConfig, shape: tuple[int, ...], *, resident: bool = True) -> dict[str, VariantCount]:
    """Returns how many images each view of a source can show of one sample.

    Args:
        shape: of one stored image.
        resident: whether the images lie in memory.
    """
    found = {name: view.variant_count for name, view in build_views(config, shape).items()}
    if not resident:
        return dict.fromkeys(found, VariantCount(None, f"the images of source {config.name!r} are read from files"))
    if config.overlap:
        why = f"batches of source {config.name!r} overlap, so that a sample is seen twice in an epoch"
        return dict.fromkeys(found, VariantCount(None, why))
    return found


def image_field_specs(
    config: SourceConfig, shape: tuple[int, ...], extra: Mapping[str, tuple[tuple[int, ...], str]] | None = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the fields of a source's batches: name -> (shape of one sample, dtype).

    Args:
        shape: of one stored image.
        extra: what the dataset itself has for each sample.
    """
    views = build_views(config, shape)
    fields = {name: (view.shape, "float32") for name, view in views.items()}
    fields |= {"label": ((), "int64"), "index": ((), "int64")}
    if config.relabel is not None:
        fields["label_true"] = ((), "int64")
    if config.label_fraction is not None:
        fields["labelled"] = ((), "bool")
    if any(view.mix_owner for view in views.values()):
        fields |= {"label_other": ((), "int64"), "mix": ((), "float32")}
    for view in views.values():
        fields |= {name: ((), "int64") for name in view.extra_field_names.values()}
    taken = sorted(set(fields).difference({"labelled"}).intersection(extra or {}))
    if taken:
        raise ConfigError(
            f"{config.location}: a view is called {', '.join(taken)}, which is a field of the dataset".lstrip(": ")
        )
    return fields | dict(extra or {})
