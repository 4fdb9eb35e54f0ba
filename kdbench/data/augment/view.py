"""Views. A view computes one image field of the batch from the stored images of a source."""

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
    """A view: augments, normalises and converts the images of one field of a batch, on the device.

    The order of the operations is: crops and flips (composed into one gather), x / 255, colours, (x - mean) / std,
    cutout and noise, mixup or cutmix, and the augmentations that follow mixup or cutmix in the recipe. No operation
    waits for the device.

    Args:
        name: name of the field, such as `image`.
        parts: configurations of the augmentations, in the order of the recipe.
        shape: shape of one stored image, (channels, height, width). Samples with another number of dimensions cannot
            be augmented.
        mean, std: mean and standard deviation per channel of images in [0, 1]; None: images are not normalised.
        device, dtype, channels_last: device, dtype and memory layout of the computed images.
        owners: for each augmentation, the name of the view whose random parameters it uses; None: this view.
        in_unit_range: whether the stored images are uint8 or in [0, 1]; False if they are already normalised.

    Attributes:
        shape: shape of one image of the batch.
        stored_shape: shape of one stored image.
        num_params: number of random parameters per sample and epoch.
        mix_owner: name of the view whose random parameters are used for mixup or cutmix; empty: images are not mixed.
        decode_augmentation: augmentation that selects the part of an image file to decode, or None.
        decode_owner: name of the view whose random parameters `decode_augmentation` uses.
        needs_evaluation_params: whether random parameters are used in evaluation.

    Raises:
        ConfigError: an augmentation is unknown or does not fit the shape, or there are two mixing augmentations.
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
        self._input_shapes: list[tuple[int, ...]] = []  # input shape of each augmentation
        self.stored_shape = shape
        self.shape = shape
        for part in parts:
            self._add(part)
        self.stream_keys = _stream_keys(parts)
        self.num_params = sum(augmentation.num_params for augmentation in self.augmentations)
        self.owners = list(owners) if owners is not None else [name] * len(self.augmentations)
        kinds = [type(augmentation) for augmentation in self.augmentations]
        # Augmentations of the normalised image are applied before or after the mixing, as the recipe orders them.
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
        """Builds one augmentation and checks that it fits the shape of the images and the augmentations before it."""
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
                f"{part.location}: {part.type} changes colours of images in [0, 1], but this dataset's images were "
                "stored normalised".lstrip(": ")
            )
        if isinstance(augmentation, MixingAugmentation) and any(
            isinstance(previous, MixingAugmentation) for previous in self.augmentations
        ):
            raise ConfigError(f"{part.location}: view {self.name!r} mixes images twice; use either mixup or cutmix")
        self.augmentations.append(augmentation)

    def sample_params(self, samples: int, seed: int, source: str, epoch: int | str) -> Tensor:
        """Draws the random parameters of all samples for one epoch, float32 (samples, num_params), on the CPU.

        Each augmentation has its own random stream, so an added augmentation does not change the parameters of the
        others. An augmentation that belongs to another view uses the stream of that view.

        Args:
            samples: number of samples in the full split.
            source: name of the source, a part of the key of the random streams.
            epoch: number of the epoch, or "evaluation".
        """
        params = [
            augmentation.sample_params(samples, derive(seed, "augment", source, owner, epoch, key))
            for augmentation, owner, key in zip(self.augmentations, self.owners, self.stream_keys, strict=True)
            if augmentation.num_params
        ]
        return torch.cat(params, dim=1) if params else torch.empty(samples, 0)

    def augment(self, images: Tensor, rows: Tensor, params: Tensor) -> Tensor:
        """Computes the augmented and normalised images, without mixup and cutmix.

        Args:
            images: stored images, (samples, *stored_shape), uint8 or float in [0, 1].
            rows: int64 (batch,), row numbers in `images`.
            params: random parameters, float32 (batch, num_params).

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
        """Blends each image with a second image (mixup, cutmix), then applies the augmentations that follow.

        Args:
            image, partner: augmented images, and the images with which they are blended, (batch, *shape).
            params: random parameters, float32 (batch, num_params).

        Returns:
            The blend, and the weight of the sample's own label, float (batch,).
        """
        if self._mix_position is None:
            raise ValueError(f"view {self.name!r} has no mixup or cutmix")
        pairs = self._with_params(params)[self._mix_position :]
        mixing, mix_params = pairs[0]
        assert isinstance(mixing, MixingAugmentation)
        image, label_weight = mixing.mix(image, partner, mix_params)
        return self._to_memory_format(_apply_post_normalize(image, pairs)), label_weight

    def evaluation_images(self, images: Tensor, rows: Tensor, params: Tensor | None = None) -> Tensor:
        """Computes images for evaluation: cropped at the center and normalised.

        Augmentations that are also applied in evaluation (with `always`) follow the normalisation.

        Args:
            images, rows: stored images, and row numbers in them, see `augment`.
            params: random parameters, float32 (batch, num_params); required if `needs_evaluation_params`.
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
        """Returns name -> values of the fields that augmentations add to the batch, such as quarter turns.

        Args:
            params: random parameters, float32 (batch, num_params).
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
        """The names of fields that augmentations add to the batch: `Augmentation.extra_field` -> name in the batch.

        The name in the batch is `VIEW_FIELD` for a view other than `image`.
        """
        fields = [augmentation.extra_field for augmentation in self.augmentations if augmentation.extra_field]
        return {field: field if self.name == "image" else f"{self.name}_{field}" for field in fields}

    @cached_property
    def variant_count(self) -> VariantCount:
        """The number of different images that the view can show of one sample, or the reason why it is not known."""
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
        """Returns, for each sample, the number of the image that the parameters select among all images of this sample.

        Args:
            params: random parameters, float32 (batch, num_params).

        Returns:
            int64 (batch,), numbers below `variant_count`.
        """
        ids = torch.zeros(len(params), dtype=torch.int64, device=params.device)
        for (augmentation, own_params), shape in zip(self._with_params(params), self._input_shapes, strict=True):
            ids = ids * (augmentation.num_variants(shape) or 1) + augmentation.variant_id(own_params, shape)
        return ids

    def _with_params(self, params: Tensor) -> list[tuple[Augmentation, Tensor]]:
        """Returns (augmentation, its columns of `params`) for each augmentation of the view."""
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
    """Returns the key of each augmentation's random stream: `crop`, `crop1` for a second crop, and so on.

    A change of these keys would change the random numbers of existing recipes.
    """
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
    """Gathers out[b, c, i, j] = images[rows[b], c, ys[b, i], xs[b, j]]. Pixels with a coordinate OUTSIDE are zero.

    Args:
        images: (samples, channels, height, width).
        rows: int64 (batch,), row numbers in `images`.
        ys: int64 (batch, out_height), input row of each output row.
        xs: int64 (batch, out_width), input column of each output column.

    Returns:
        (batch, channels, out_height, out_width), with the dtype of `images`.
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
    """Replaces each augmentation `same` by the augmentations of the view that it names.

    Args:
        views: view -> configurations of its augmentations.

    Returns:
        View -> its augmentations in order, each with the name of the view whose random parameters it uses.

    Raises:
        ConfigError: `same` is not the first augmentation of a view or names an unknown view, or views refer to each
            other in a cycle.
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
                raise ConfigError(f"{location}there is no view {base!r}.{suggest(base, views)}")
            if base in (*path, name):
                raise ConfigError(
                    f"{location}the views refer to each other in a cycle: {' -> '.join((*path, name, base))}"
                )
            parts += resolve(base, (*path, name))
        resolved[name] = parts
        return parts

    for name in views:
        resolve(name, ())
    return {name: resolved[name] for name in views}


def build_views(config: SourceConfig, shape: tuple[int, ...], **options: object) -> dict[str, View]:
    """Builds the views of a data source. Returns name -> `View`.

    Args:
        shape: shape of one stored image.
        options: further arguments of `View`.

    Raises:
        ConfigError: an augmentation does not fit, or two views mix images with different random parameters.
    """
    views: dict[str, View] = {}
    for name, pairs in resolve_views(config.views).items():
        parts, owners = [part for part, _ in pairs], [owner for _, owner in pairs]
        views[name] = View(name, parts, shape, owners=owners, **options)  # type: ignore[arg-type]
    if len({view.mix_owner for view in views.values() if view.mix_owner}) > 1:
        mixing = [name for name, view in views.items() if view.mix_owner]
        raise ConfigError(
            f"{config.location}: views {' and '.join(mixing)} both mix samples, but a batch has only one field `mix` "
            "and one `label_other`. Mix in one view only, and write the other view as "
            "`{from: VIEW, then: [...]}`".lstrip(": ")
        )
    return views


def reject_decode_augmentations(config: SourceConfig) -> None:
    """Raises ConfigError if a view of an in-memory dataset has an augmentation that needs the image files."""
    for name, pairs in resolve_views(config.views).items():
        for part, _ in pairs:
            if issubclass(AUGMENTATIONS.entry(part.type).load(), DecodeTimeAugmentation):
                raise ConfigError(
                    f"{part.location}: view {name!r}: {part.type} crops while a file is decoded, but "
                    f"{config.dataset.type} is held in memory. Use crop, or a dataset that is decoded in every epoch "
                    "(image_folder with resident: false, imagenet)".lstrip(": ")
                )


def variant_counts(config: SourceConfig, shape: tuple[int, ...], *, resident: bool = True) -> dict[str, VariantCount]:
    """Returns, for each view of a source, the number of different images that the view can show of one sample.

    Args:
        shape: shape of one stored image.
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
    """Returns the fields of a source's batches: name -> (shape of one sample, dtype).

    Args:
        shape: shape of one stored image.
        stored: specs of the fields that the dataset stores in addition to image and label, by name.

    Raises:
        ConfigError: a view has the name of a field that the dataset stores.
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
