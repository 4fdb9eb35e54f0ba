"""Source whose batches contain cached outputs of a frozen role (network), such as the teacher.

The images of an epoch are known before the epoch starts, because the augmentation parameters of all samples are
functions of the seed and the epoch. At the start of an epoch, the outputs for all images that are not in the cache
yet are computed, in batches of one shape. Then all cache rows of the epoch are copied to the device, and each batch
selects rows by index. A training step does not wait for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.config.identity import part_identity
from kdbench.data.augment.view import resolve_views
from kdbench.data.loading.batch import Batch, MicroBatch
from kdbench.data.loading.source import ResidentSource, Source
from kdbench.data.source_spec import FieldSpec
from kdbench.engine.device import describe_device
from kdbench.engine.network.features import Feature
from kdbench.engine.network.resolved_stage import architecture
from kdbench.engine.network.roles import root_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.weights import state_hash
from kdbench.engine.train.runner import Runner
from kdbench.registry import AUGMENTATIONS, MODELS, WEIGHT_TRANSFORMS
from kdbench.speed.teacher_cache.cache_file import CacheFile, CacheUnavailable, RowLayout, format_bytes
from kdbench.speed.teacher_cache.prefetch import concat_padded, equal_up_to_rounding, find_coupled_roles

MEMORY_FRACTION = 0.25
"""Fraction of the available memory that the cache rows of one epoch may use."""


CACHE_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
"""Precision -> largest difference between cached and recomputed rows, relative to the feature's largest value."""


def cache_size(plan: StagePlan, name: str) -> tuple[int, int, int]:
    """Returns the size of the teacher cache of a role (network).

    Returns:
        The number of samples, the number of variants (augmented images) of each sample, and the approximate size in
        bytes.

    Raises:
        CacheUnavailable: the number of different input images of the role is not finite or not known.
    """
    config, stage = plan.stage.roles[name], plan.stage
    if ":" in config.input or config.extra_inputs:
        raise CacheUnavailable("the network has more than one input, or reads the output of another role")
    source, field = config.input.split(".", 1)
    spec = plan.specs[source]
    variants = spec.variants.get(field)
    if variants is None:
        raise CacheUnavailable(f"{config.input} is not an image of a dataset")
    if variants.count is None:
        raise CacheUnavailable(variants.reason)
    samples = spec.population or spec.samples
    if samples is None:
        raise CacheUnavailable(f"the number of samples of source {source!r} is not known yet")
    elements = sum(torch.Size(shape).numel() for shape in plan.roles[name].features.values())
    element_size = {"float64": 8, "bf16": 2, "fp16": 2}.get(stage.precision, 4)
    return samples, variants.count, samples * variants.count * elements * element_size


class RoleForward:
    """Forward of one role (network) on augmented samples, always with the same number of rows.

    Args:
        runner: training loop that contains the network and determines autocast.
        name: name of the role.
        source: source of the samples.
        field: name of the view (augmented image field) that the role reads.
        batch_size: number of rows. Smaller batches are padded, because another batch size may round differently.
    """

    def __init__(self, runner: Runner, name: str, source: ResidentSource, field: str, batch_size: int) -> None:
        self.runner, self.name, self.source, self.batch_size = runner, name, source, batch_size
        self.field, self.view = field, source.views[field]
        self.features = runner.network.role(name).features

    def padded_batch(self, samples: Tensor, params: Tensor) -> MicroBatch:
        """Returns a batch of augmented images, padded to `batch_size` rows by repeating the first image.

        Args:
            samples: indices of the samples, int64 (rows,), at most `batch_size`.
            params: augmentation parameters of all samples in the epoch.
        """
        device = self.source.images.device
        indices = concat_padded([samples.to(device)], self.batch_size)
        images = self.view.augment(self.source.images, indices, params.index_select(0, indices))
        return {self.source.name: Batch({self.field: images})}

    def __call__(self, samples: Tensor, params: Tensor) -> dict[Feature, Tensor]:
        """Runs the network on augmented samples, and returns feature -> values (samples, ...).

        The docstring of `padded_batch` describes the arguments.
        """
        with self.runner.autocast():
            values = self.runner.network.run_frozen(self.padded_batch(samples, params), [self.name])
        return {feature: values[self.name, feature][: len(samples)] for feature in self.features}


class CachedSource(Source):
    """Source that adds the cached features of one role (network) to the batches of another source.

    Args:
        inner: the other source, which may be a cached source too, with the features of a second role.
        forward: forward of the role, which computes rows that the cache does not contain yet.
        cache: teacher cache of the role.
        notice: function that receives a message, at most once, if rows cannot be written to disk.

    Attributes:
        rows_read: number of rows that were read from the cache so far.
    """

    def __init__(self, inner: Source, forward: RoleForward, cache: CacheFile, notice: Callable[[str], None]) -> None:
        super().__init__(inner.config, inner.options)
        self.classes, self.num_samples, self.population = inner.classes, inner.num_samples, inner.population
        self.indices, self.checksum = inner.indices, inner.checksum
        self.inner, self.forward, self.cache, self.notice = inner, forward, cache, notice
        self.rows_read = 0
        self._reported_write_error = False

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        rows, row_of_sample = self._load_epoch(epoch)
        for batch in self.inner.batches(epoch, start):
            batch_rows = rows.index_select(0, row_of_sample.index_select(0, batch.fields["index"]))
            features = self.cache.row_layout.unpack(batch_rows)
            yield batch.with_precomputed({(self.forward.name, feature): value for feature, value in features.items()})

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        return self.inner.evaluation_batches(batch_size)

    def field_specs(self) -> dict[str, FieldSpec]:
        return self.inner.field_specs()

    def close(self) -> None:
        self.inner.close()

    def _load_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Computes the cache rows of an epoch that are missing, and copies all rows of the epoch to the device.

        Returns:
            A tuple of the rows of the epoch, ordered by sample, and an index tensor. The index tensor contains, for
            each sample of the split, the index of the sample's row in the first tensor.
        """
        device = self.options.device
        samples, indices, params = epoch_rows(self.forward, epoch)
        self._fill(samples, indices, params)
        self.rows_read += len(indices)
        row_of_sample = torch.zeros(self.population, dtype=torch.int64)
        row_of_sample[samples] = torch.arange(len(samples))
        return self.cache.read_rows(indices).to(device), row_of_sample.to(device)

    def _fill(self, samples: Tensor, indices: Tensor, params: Tensor) -> None:
        cache, batch_size = self.cache, self.forward.batch_size
        missing = cache.missing_rows(indices)
        samples, indices = samples[missing], indices[missing]
        for start in range(0, len(samples), batch_size):
            rows = cache.row_layout.pack(self.forward(samples[start : start + batch_size], params))
            cache.add_rows(indices[start : start + batch_size], rows.cpu())
        cache.flush()
        if cache.write_error and not self._reported_write_error:
            self.notice(f"{cache.name}: new rows cannot be saved ({cache.write_error}); the run continues.")
            self._reported_write_error = True


def epoch_rows(forward: RoleForward, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the samples of this process in an epoch, and the teacher-cache rows of the samples.

    Returns:
        A tuple of three tensors: the sorted indices of the samples, the index of each sample's row in the cache, and
        the augmentation parameters of all samples, on the device.
    """
    params = forward.source.epoch_params(forward.field, epoch)
    samples = forward.source.epoch_indices(epoch)
    variants = forward.view.variant_ids(params).cpu()  # computed on the device, so that they round as the images do
    count = forward.view.variant_count.count
    assert count is not None
    return samples, samples * count + variants[samples], params


def open_cached_source(
    runner: Runner,
    name: str,
    inner: Source,
    *,
    epoch: int,
    batch_size: int,
    folder: Path,
    notice: Callable[[str], None],
) -> CachedSource:
    """Opens or creates the teacher cache of a role (network), and returns a source with the cached features.

    Some rows that the cache already contains are compared with new outputs of the role.

    Args:
        runner: training loop of the present stage.
        name: name of the role.
        inner: source of the samples, or this source with cached features of another role.
        epoch: first epoch for which the source is used.
        batch_size: number of rows that the role computes at once.
        folder: folder of all caches.
        notice: function that receives messages to the user.

    Raises:
        CacheUnavailable: the role cannot have a cache. The message is the reason.
    """
    plan = runner.plan
    num_samples, num_variants, _ = cache_size(plan, name)
    source = inner
    while isinstance(source, CachedSource):
        source = source.inner
    if not isinstance(source, ResidentSource):
        raise CacheUnavailable(f"source {source.name!r} reads its images from files")
    field = plan.stage.roles[name].input.split(".", 1)[1]
    forward = RoleForward(runner, name, source, field, batch_size)
    samples, indices, params = epoch_rows(forward, epoch)

    # A row is cached by its image alone, so it must not depend on other rows. This is measured, not assumed.
    probe_samples, probe_indices = samples[:batch_size], indices[:batch_size]
    subsets = {source.name: slice(0, max(1, min(source.batch_size, len(probe_samples) // 2)))}
    coupled = find_coupled_roles(runner.network, forward.padded_batch(probe_samples, params), subsets, [name])
    if coupled:
        raise CacheUnavailable(coupled[name])

    # Shapes and dtypes are those of real outputs: autocast decides the dtype of each feature.
    values = forward(probe_samples, params)
    row_layout = RowLayout(
        forward.features,
        tuple(tuple(values[feature].shape[1:]) for feature in forward.features),
        tuple(values[feature].dtype for feature in forward.features),
    )
    required = len(samples) * sum(row_layout.widths) * row_layout.dtype.itemsize
    available = available_memory(source.images.device)
    if required > MEMORY_FRACTION * available:
        raise CacheUnavailable(
            f"the rows of one epoch would need {format_bytes(required)} of memory, more than {MEMORY_FRACTION:.0%} of "
            f"the available {format_bytes(available)}"
        )
    cache = CacheFile(folder, _dependencies(runner, name, forward), row_layout, num_samples * num_variants)
    _check_values(cache, probe_indices, values, CACHE_TOLERANCE.get(plan.stage.precision, 0.05))
    return CachedSource(inner, forward, cache, notice)


def _check_values(cache: CacheFile, indices: Tensor, values: Mapping[Feature, Tensor], tolerance: float) -> None:
    """Raises CacheUnavailable if rows of a teacher cache differ from new outputs of the teacher for the same samples.

    Such a difference is possible because the hash that names the cache does not include the code of the network. The
    code of a network in a plug-in may change without a new version number.
    """
    filled = ~cache.missing_rows(indices)
    cached_values = cache.row_layout.unpack(cache.read_rows(indices[filled]))
    for feature, cached in cached_values.items():
        if not equal_up_to_rounding(values[feature].cpu()[filled], cached, tolerance):
            raise CacheUnavailable(f"{cache.name} contains other values than the network computes; delete the folder")


def _dependencies(runner: Runner, name: str, forward: RoleForward) -> dict[str, Any]:
    """Returns name -> value, in JSON types, for everything that a row of a teacher cache depends on."""
    stage, source, view = runner.stage, forward.source, forward.view
    config, root = stage.roles[name], stage.roles[root_role(name, stage.roles)]
    augmentations = resolve_views(source.config.views)[forward.field]
    return {
        "model": part_identity(architecture(root, stage.roles), MODELS),
        "transforms": [part_identity(transform, WEIGHT_TRANSFORMS) for transform in root.transforms],
        "module_path": config.module_path,
        "weights": state_hash(runner.network.role(root.name).model),
        "precision": stage.precision,
        "device": describe_device(runner.device),
        "torch": torch.__version__,
        "batch_size": forward.batch_size,
        "data": {
            "checksum": source.checksum,
            "population": source.population,
            "stored_shape": list(view.stored_shape),
        },
        "view": {
            "augmentations": [part_identity(augmentation, AUGMENTATIONS) for augmentation, _ in augmentations],
            "mean": None if view.mean is None else view.mean.flatten().tolist(),
            "std": None if view.std is None else view.std.flatten().tolist(),
            "dtype": str(view.dtype),
            "channels_last": view.channels_last,
        },
    }


def available_memory(device: torch.device) -> int:
    """Returns the memory for a device in bytes: free memory of a CUDA device, otherwise total memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
