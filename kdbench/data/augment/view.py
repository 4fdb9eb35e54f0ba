"""A view: computes one image field of the batch from the stored images of a source."""

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
from kdbench.data.source_spec import FieldSpec, VariantCount
from kdbench.errors import ConfigError, UserError, suggest
from kdbench.randomness import derive
from kdbench.registry import AUGMENTATIONS


class View:
    """Augments, normalises and converts the images of one field, batched, on the device.

    Order: crops and flips, composed into coordinates and read in one gather; x / 255; colours; (x - mean) / std; cutout
    and noise; mixup or cutmix; augmentations that follow the mixing in the recipe. No step waits for the device.

    Args:
        name: of the field, such as `image`.
        parts: the augmentations of the recipe, in order.
        shape: of one stored image, (channels, height, width); other shapes take no augmentation.
        mean, std: per channel, of images in [0, 1]; None leaves them in [0, 1].
        device, dtype, channels_last: of the computed images.
        owners: for each augmentation, the view whose parameters it uses; None: this view.
        in_unit_range: whether the stored images are uint8 or in [0, 1]; False if they are normalised already.

    Attributes:
        shape: of one image of the batch.
        stored_shape: of one stored image.
        num_params: random numbers for each sample and epoch.
        mix_owner: the view whose parameters mix this one; empty without mixing.
        decode_augmentation: selects the part of a file that is decoded; None without.
        decode_owner: the view whose parameters it uses.
        needs_evaluation_params: whether evaluation uses parameters.

    Raises:
        ConfigError: an augmentation is unknown, does not fit the shape, or two of them mix.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[PartConfig],
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
        self._input_shapes: list[tuple[int, ...]] = []  # of each augmentation
        self.stored_shape = shape
        self.shape = shape
        for part in parts:
            self._add(part)
        self.stream_keys = _stream_keys(parts)
        self.num_params = sum(augmentation.num_params for augmentation in self.augmentations)
        self.owners = list(owners) if owners is not None else [name] * len(self.augmentations)
        kinds = [type(augmentation) for augmentation in self.augmentations]
        # The position of the mixing splits the masks in two groups: before it and after it.
        self._mix_position = next((i for i, kind in enumerate(kinds) if issubclass(kind, MixingAugmentation)), None)
        self.mix_owner = "" if self._mix_position is None else self.owners[self._mix_position]
        self.decode_augmentation: DecodeTimeAugmentation | None = None
        self.decode_owner = ""
        for augmentation, owner in zip(self.augmentations, self.owners, strict=True):
            if isinstance(augmentation, DecodeTimeAugmentation) and self.decode_augmentation is None:
                self.decode_augmentation, self.decode_owner = augmentation, owner
        self.needs_evaluation_params = any(a.always and a.num_params for a in self.augmentations)
        self.dtype = dtype
        self.channels_last = channels_last and len(shape) == 3
        broadcast_shape = (-1, *([1] * (len(shape) - 1)))
        self.mean = None if mean is None else torch.tensor(mean, dtype=dtype, device=device).view(broadcast_shape)
        self.std = None if std is None else torch.tensor(std, dtype=dtype, device=device).view(broadcast_shape)

    def _add(self, part: PartConfig) -> None:
        """Builds one augmentation and checks that it fits the previous ones."""
        AUGMENTATIONS.check(part.type, part.params, part.location)
        if len(self.stored_shape) != 3:
            raise ConfigError(
                f"{part.location}: {part.type} needs images of shape [channels, height, width], "
                f"but this dataset's samples are {list(self.stored_shape)}".lstrip(": ")
            )
        self._input_shapes.append(self.shape)
        try:
            augmentation: Augmentation = AUGMENTATIONS.build(part.type, part.params, part.location)
            self.shape = augmentation.output_shape(self.shape)
        except UserError as error:
            raise ConfigError(f"{part.location}: {error}".lstrip(": ")) from None
        if isinstance(augmentation, ColorAugmentation) and not self.in_unit_range:
            raise ConfigError(
                f"{part.location}: {part.type} changes colours of images in [0, 1], but these were stored "
                "normalised".lstrip(": ")
            )
        if isinstance(augmentation, MixingAugmentation) and any(
            isinstance(previous, MixingAugmentation) for previous in self.augmentations
        ):
            raise ConfigError(f"{part.location}: view {self.name!r} already mixes; use either mixup or cutmix")
        self.augmentations.append(augmentation)

    def sample_params(self, samples: int, seed: int, source: str, epoch: int | str) -> Tensor:
        """Draws the parameters of all samples for one epoch, float32 (samples, num_params), on the CPU.

        Each augmentation has a random stream of its own, so adding one does not change the parameters of the others. An
        augmentation that belongs to another view uses that view's stream.
        """
        params = [
            augmentation.sample_params(samples, derive(seed, "augment", source, owner, epoch, key))
            for augmentation, owner, key in zip(self.augmentations, self.owners, self.stream_keys, strict=True)
            if augmentation.num_params
        ]
        return torch.cat(params, dim=1) if params else torch.empty(samples, 0)

    def augment(self, images: Tensor, rows: Tensor, params: Tensor) -> Tensor:
        """Computes the augmented images, before mixing.

        Args:
            images: (samples, *stored_shape), uint8 or float in [0, 1].
            rows: int64 (batch,), rows of `images`.
            params: float32 (batch, num_params).

        Returns:
            (batch, *shape), normalised.
        """
        pairs = self._with_params(params)
        moves = [(move, values) for move, values in pairs if isinstance(move, GeometricAugmentation)]
        if moves:
            ys, xs = _identity_coordinates(len(rows), self.stored_shape, rows.device)
            for move, move_params in moves:
                ys, xs = move.map_coordinates(ys, xs, move_params)
            pixels = gather_pixels(images, rows, ys, xs)
        else:
            pixels = images.index_select(0, rows)
        image = self._to_unit_range(pixels)
        for augmentation, color_params in pairs:
            if isinstance(augmentation, ColorAugmentation):
                image = augmentation.apply(image, color_params)
        image = self._normalize(image)
        return self._to_memory_format(_apply_post_normalize(image, pairs[: self._mix_position]))

    def mix(self, image: Tensor, partner: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Blends each image with its partner, then applies the augmentations that follow the mixing.

        Returns:
            The blend, and the weight of the sample's own label, float (batch,).
        """
        if self._mix_position is None:
            raise ValueError(f"view {self.name!r} does not mix")
        pairs = self._with_params(params)[self._mix_position :]
        mixing, mix_params = pairs[0]
        assert isinstance(mixing, MixingAugmentation)
        image, label_weight = mixing.mix(image, partner, mix_params)
        return self._to_memory_format(_apply_post_normalize(image, pairs)), label_weight

    def evaluation_images(self, images: Tensor, rows: Tensor, params: Tensor | None = None) -> Tensor:
        """Computes the images of evaluation: cropped at the center, normalised, changed by augmentations with `always`.

        Args:
            images, rows: see `augment`.
            params: float32 (batch, num_params); required if `needs_evaluation_params`.
        """
        if self.shape == self.stored_shape:
            pixels = images.index_select(0, rows)
        else:
            ys, xs = _identity_coordinates(len(rows), self.stored_shape, rows.device)
            for augmentation in self.augmentations:
                if isinstance(augmentation, GeometricAugmentation):
                    ys, xs = augmentation.map_evaluation_coordinates(ys, xs)
            pixels = gather_pixels(images, rows, ys, xs)
        image = self._normalize(self._to_unit_range(pixels))
        if any(augmentation.always for augmentation in self.augmentations):
            if params is None:
                params = torch.zeros(len(rows), self.num_params, device=rows.device)
            pairs = [pair for pair in self._with_params(params) if pair[0].always]
            image = _apply_post_normalize(image, pairs)
        return self._to_memory_format(image)

    def extra_fields(self, params: Tensor) -> dict[str, Tensor]:
        """Returns the extra fields of the batch that the parameters determine, such as quarter turns.

        Args:
            params: float32 (batch, num_params).
        """
        if not self.extra_field_names:
            return {}
        return {
            self.extra_field_names[augmentation.extra_field]: augmentation.extra_field_values(own_params)
            for augmentation, own_params in self._with_params(params)
            if augmentation.extra_field
        }

    @cached_property
    def extra_field_names(self) -> dict[str, str]:
        """Maps `Augmentation.extra_field` to the field's name: the same in the view `image`, otherwise `VIEW_FIELD`."""
        fields = [augmentation.extra_field for augmentation in self.augmentations if augmentation.extra_field]
        return {field: field if self.name == "image" else f"{self.name}_{field}" for field in fields}

    @cached_property
    def variant_count(self) -> VariantCount:
        """Number of different images of one sample: the product over the augmentations."""
        count = 1
        for augmentation, shape in zip(self.augmentations, self._input_shapes, strict=True):
            name = augmentation.registered_name
            if isinstance(augmentation, MixingAugmentation):
                return VariantCount(None, f"{name} blends samples")
            variants = augmentation.num_variants(shape)
            if variants is None:
                return VariantCount(None, f"{name} has no finite list of variants of a sample")
            count *= variants
        return VariantCount(count)

    def variant_ids(self, params: Tensor) -> Tensor:
        """Returns the variant of each sample, int64 (batch,), in [0, variant_count).

        Args:
            params: float32 (batch, num_params).
        """
        ids = torch.zeros(len(params), dtype=torch.int64, device=params.device)
        for (augmentation, own_params), shape in zip(self._with_params(params), self._input_shapes, strict=True):
            ids = ids * (augmentation.num_variants(shape) or 1) + augmentation.variant_id(own_params, shape)
        return ids

    def _with_params(self, params: Tensor) -> list[tuple[Augmentation, Tensor]]:
        """Returns each augmentation with its columns of `params`."""
        sizes = [augmentation.num_params for augmentation in self.augmentations]
        columns = params.split(sizes, dim=1) if self.augmentations else ()
        return list(zip(self.augmentations, columns, strict=True))

    def _to_unit_range(self, pixels: Tensor) -> Tensor:
        image = pixels.to(self.dtype)
        return image if pixels.is_floating_point() else image.div_(255)

    def _normalize(self, image: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            image = image.sub_(self.mean).div_(self.std)
        return image

    def _to_memory_format(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image


def _apply_post_normalize(image: Tensor, pairs: Sequence[tuple[Augmentation, Tensor]]) -> Tensor:
    for augmentation, params in pairs:
        if isinstance(augmentation, PostNormalizeAugmentation):
            image = augmentation.apply(image, params)
    return image


def _stream_keys(parts: Sequence[PartConfig]) -> list[str]:
    """Returns keys of the random streams: `crop`, and `crop1` for a second crop. Other keys would change the draws."""
    counts: Counter[str] = Counter()
    keys = []
    for part in parts:
        keys.append(f"{part.type}{counts[part.type] or ''}")
        counts[part.type] += 1
    return keys


def _identity_coordinates(batch: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    _, height, width = shape
    ys = torch.arange(height, device=device).expand(batch, height)
    xs = torch.arange(width, device=device).expand(batch, width)
    return ys, xs


def gather_pixels(images: Tensor, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Gathers out[b, c, i, j] = images[rows[b], c, ys[b, i], xs[b, j]], zero where a coordinate is OUTSIDE.

    Args:
        images: (samples, channels, height, width).
        rows: int64 (batch,).
        ys: int64 (batch, out_height).
        xs: int64 (batch, out_width).

    Returns:
        (batch, channels, out_height, out_width), of the dtype of `images`.
    """
    # All OUTSIDE coordinates read one added row and column of zeros. Gathering complete rows first and pixels second is
    # twice as fast on a CPU as one `take` over all pixels.
    channels, height, width = images.shape[1:]
    batch = rows.shape[0]
    padded = F.pad(images.index_select(0, rows), (0, 1, 0, 1))
    ys = torch.where(ys == OUTSIDE, height, ys)
    xs = torch.where(xs == OUTSIDE, width, xs)
    planes = torch.arange(batch * channels, device=rows.device).view(batch, channels, 1) * (height + 1)
    lines = padded.view(-1, width + 1).index_select(0, (planes + ys[:, None, :]).view(-1))
    lines = lines.view(batch, channels, ys.shape[1], width + 1)
    return lines.gather(3, xs[:, None, None, :].expand(batch, channels, ys.shape[1], xs.shape[1]))


def resolve_views(views: Mapping[str, Sequence[PartConfig]]) -> dict[str, list[tuple[PartConfig, str]]]:
    """Replaces each `same` by the augmentations of the view that it names.

    Returns:
        View -> its augmentations in order, each with the view whose parameters it uses.

    Raises:
        ConfigError: `same` is not the first of a view, names no view, or the views form a cycle.
    """
    resolved: dict[str, list[tuple[PartConfig, str]]] = {}

    def resolve(name: str, path: tuple[str, ...]) -> list[tuple[PartConfig, str]]:
        if name in resolved:
            return resolved[name]
        parts: list[tuple[PartConfig, str]] = []
        for number, part in enumerate(views[name]):
            if part.type != "same":
                parts.append((part, name))
                continue
            base = str(part.params.get("view"))
            location = f"{part.location}: " if str(part.location) else ""
            if number:
                raise ConfigError(f"{location}`same` must be the first augmentation of view {name!r}")
            if base not in views:
                raise ConfigError(f"{location}no view {base!r}.{suggest(base, views)}")
            if base in (*path, name):
                raise ConfigError(f"{location}views continue each other in a cycle: {' -> '.join((*path, name, base))}")
            parts += resolve(base, (*path, name))
        resolved[name] = parts
        return parts

    for name in views:
        resolve(name, ())
    return {name: resolved[name] for name in views}


def build_views(config: SourceConfig, shape: tuple[int, ...], **options: object) -> dict[str, View]:
    """Builds the views of a source.

    Args:
        shape: of one stored image.
        options: further arguments of `View`.

    Raises:
        ConfigError: an augmentation does not fit, or two views mix, each with parameters of its own.
    """
    views: dict[str, View] = {}
    for name, pairs in resolve_views(config.views).items():
        parts, owners = [part for part, _ in pairs], [owner for _, owner in pairs]
        views[name] = View(name, parts, shape, owners=owners, **options)  # type: ignore[arg-type]
    if len({view.mix_owner for view in views.values() if view.mix_owner}) > 1:
        mixing = [name for name, view in views.items() if view.mix_owner]
        raise ConfigError(
            f"{config.location}: views {' and '.join(mixing)} both mix samples, but a batch has one `mix` and one "
            "`label_other`. Mix in one view only, and write the other as `{from: VIEW, then: [...]}`".lstrip(": ")
        )
    return views


def reject_decode_augmentations(config: SourceConfig) -> None:
    """Raises ConfigError where a view of a resident dataset has an augmentation that needs the image file."""
    for name, pairs in resolve_views(config.views).items():
        for part, _ in pairs:
            if issubclass(AUGMENTATIONS.entry(part.type).load(), DecodeTimeAugmentation):
                raise ConfigError(
                    f"{part.location}: view {name!r}: {part.type} crops while a file is decoded, but "
                    f"{config.dataset.type} is held in memory. Use crop, or a dataset that is decoded in every epoch "
                    "(image_folder with resident: false, imagenet)".lstrip(": ")
                )


def variant_counts(config: SourceConfig, shape: tuple[int, ...], *, resident: bool = True) -> dict[str, VariantCount]:
    """Returns the number of different images of one sample for each view of a source.

    Args:
        shape: of one stored image.
        resident: whether the dataset is held in memory.
    """
    counts = {name: view.variant_count for name, view in build_views(config, shape).items()}
    if not resident:
        return dict.fromkeys(counts, VariantCount(None, f"the images of source {config.name!r} are read from files"))
    if config.overlap:
        reason = f"batches of source {config.name!r} overlap, so an epoch contains a sample twice"
        return dict.fromkeys(counts, VariantCount(None, reason))
    return counts


def image_field_specs(
    config: SourceConfig, shape: tuple[int, ...], stored: Mapping[str, FieldSpec] | None = None
) -> dict[str, FieldSpec]:
    """Returns the fields of a source's batches.

    Args:
        shape: of one stored image.
        stored: further fields of the dataset.

    Raises:
        ConfigError: a view has the name of a stored field.
    """
    views = build_views(config, shape)
    fields: dict[str, FieldSpec] = {name: (view.shape, "float32") for name, view in views.items()}
    fields |= {"label": ((), "int64"), "index": ((), "int64")}
    if config.relabel is not None:
        fields["label_true"] = ((), "int64")
    if config.label_fraction is not None:
        fields["labelled"] = ((), "bool")
    if any(view.mix_owner for view in views.values()):
        fields |= {"label_other": ((), "int64"), "mix": ((), "float32")}
    for view in views.values():
        fields |= {name: ((), "int64") for name in view.extra_field_names.values()}
    duplicates = sorted(set(fields).difference({"labelled"}).intersection(stored or {}))
    if duplicates:
        raise ConfigError(
            f"{config.location}: rename the view {', '.join(duplicates)}: the dataset has a field of this name".lstrip(
                ": "
            )
        )
    return fields | dict(stored or {})
