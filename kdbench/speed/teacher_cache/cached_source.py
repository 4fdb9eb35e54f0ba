"""A source whose batches hold what a frozen role gives for them, from a table that is filled epoch by epoch.

Which images an epoch shows is known before it begins: the draws of all samples are functions of the seed and the epoch.
So the rows that are missing are computed first, in blocks of one shape, ordered by sample; then the epoch's rows are
read once into one tensor on the device, and each step picks its own by index. Nothing in a step waits for the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.config.identity import part_identity
from kdbench.data.augment.view import resolve_views
from kdbench.data.loading.source import ResidentSource, Source
from kdbench.engine.device import describe_device
from kdbench.engine.network.operands import given_key
from kdbench.engine.network.resolved_stage import architecture
from kdbench.engine.network.roles import root_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.weights import state_hash
from kdbench.engine.train.runner import Runner
from kdbench.registry import AUGMENTATIONS, MODELS, WEIGHT_TRANSFORMS
from kdbench.speed.teacher_cache.cache_file import CacheFile, CacheUnavailable, RowLayout, format_bytes
from kdbench.speed.teacher_cache.prefetch import concat_padded, equal_up_to_rounding, find_coupled_roles

MEMORY_FRACTION = 0.25
"""How much of the memory an epoch's rows may take."""


CACHE_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
"""How far a row of a table may be from what the network gives now, as a share of the largest value, by precision."""


def cache_size(plan: StagePlan, name: str) -> tuple[int, int, int]:
    """Samples, variants of each, and bytes in about of the table of a role.

    Raises:
        Refused: what the role sees has no finite list of images.
    """
    config, stage = plan.stage.roles[name], plan.stage
    if ":" in config.input or config.extra_inputs:
        raise CacheUnavailable("it sees more than an image of its source")
    source, field = config.input.split(".", 1)
    spec = plan.specs[source]
    variants = spec.variants.get(field)
    if variants is None:
        raise CacheUnavailable(f"{config.input} is no image of a dataset")
    if variants.count is None:
        raise CacheUnavailable(variants.reason)
    samples = spec.population or spec.samples
    if samples is None:
        raise CacheUnavailable(f"the samples of source {source!r} are not counted yet")
    elements = sum(torch.Size(shape).numel() for shape in plan.roles[name].features.values())
    size = {"float64": 8, "bf16": 2, "fp16": 2}.get(stage.precision, 4)
    return samples, variants.count, samples * variants.count * elements * size


class RoleForward:
    """Runs one role on chosen variants of samples, always at the same number of rows."""

    def __init__(self, runner: Runner, name: str, source: ResidentSource, field: str, batch_size: int) -> None:
        self.runner, self.name, self.source, self.batch_size = runner, name, source, batch_size
        self.field, self.view = field, source.views[field]
        self.features = runner.network.role(name).features

    def padded_batch(self, samples: Tensor, draws: Tensor) -> dict[str, dict[str, Tensor]]:
        """A batch of `rows` rows: the samples' images, and the first one again where there are fewer."""
        device = self.source.images.device
        at = concat_padded([samples.to(device)], self.batch_size)
        image = self.view.augment(self.source.images, at, draws.index_select(0, at))
        return {self.source.name: {self.field: image}}

    def __call__(self, samples: Tensor, draws: Tensor) -> dict[Any, Tensor]:
        """Returns what the role gives for the samples, by feature."""
        with self.runner.autocast():
            values = self.runner.network.run_frozen(self.padded_batch(samples, draws), [self.name])
        return {feature: values[self.name, feature][: len(samples)] for feature in self.features}


class CachedSource(Source):
    """The batches of a source, with the rows of one role.

    Args:
        inner: the source, or another role's `Tabled` of it.
        forward: of the role.
        table: of the role.
        say: is told once when the disk takes no more rows.
    """

    def __init__(self, inner: Source, forward: RoleForward, cache: CacheFile, notice: Callable[[str], None]) -> None:
        super().__init__(inner.config, inner.options)
        self.classes, self.num_samples, self.population = inner.classes, inner.num_samples, inner.population
        self.positions, self.checksum = inner.positions, inner.checksum
        self.inner, self.forward, self.cache, self.notice = inner, forward, cache, notice
        self.rows_read = 0
        self._told = False

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        rows, slots = self._epoch(epoch)
        for batch in self.inner.batches(epoch, start):
            own = rows.index_select(0, slots.index_select(0, batch["index"]))
            values = self.cache.row_layout.unpack(own)
            yield batch | {given_key(self.forward.name, feature): value for feature, value in values.items()}

    def evaluation_batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        return self.inner.evaluation_batches(batch_size)

    def field_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return self.inner.field_specs()

    def close(self) -> None:
        self.inner.close()

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's rows on the device, ordered by sample, and the row of each sample."""
        device = self.options.device
        samples, places, draws = epoch_rows(self.forward, epoch)
        self._fill(samples, places, draws)
        self.rows_read += len(places)
        slots = torch.zeros(self.population, dtype=torch.int64)
        slots[samples] = torch.arange(len(samples))
        return self.cache.read_rows(places).to(device), slots.to(device)

    def _fill(self, samples: Tensor, places: Tensor, draws: Tensor) -> None:
        table, rows = self.cache, self.forward.batch_size
        missing = table.missing_rows(places)
        samples, places = samples[missing], places[missing]
        for start in range(0, len(samples), rows):
            part = samples[start : start + rows]
            table.add_rows(places[start : start + rows], table.row_layout.pack(self.forward(part, draws)).cpu())
        table.flush()
        if table.write_error and not self._told:
            self.notice(f"{table.name}: new rows are not kept ({table.write_error}); the run goes on.")
            self._told = True


def epoch_rows(forward: RoleForward, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What this process sees in an epoch: samples, sorted; their places in the table; all draws, on the device."""
    draws = forward.source.epoch_params(forward.field, epoch)
    samples = forward.source.epoch_positions(epoch)
    codes = forward.view.variant_ids(draws).cpu()  # on the device, whose arithmetic makes the images
    count = forward.view.variant_count.count
    assert count is not None
    return samples, samples * count + codes[samples], draws


def open_cached_source(
    runner: Runner, name: str, inner: Source, *, epoch: int, batch_size: int, folder: Path, notice: Callable[[str], None]
) -> CachedSource:
    """Finds or makes the table of a role, and checks that it holds what the role gives.

    Args:
        inner: the source that the role sees, or another role's `Tabled` of it.
        epoch: of the source, the first that will be shown.
        rows: that are computed at once.
        folder: of all tables.

    Raises:
        Refused: there can be no table, with the reason.
    """
    plan = runner.plan
    samples, variants, _ = cache_size(plan, name)
    origin = inner
    while isinstance(origin, CachedSource):
        origin = origin.inner
    if not isinstance(origin, ResidentSource):
        raise CacheUnavailable(f"the images of source {origin.name!r} are read from files")
    field = plan.stage.roles[name].input.split(".", 1)[1]
    forward = RoleForward(runner, name, origin, field, batch_size)
    seen, places, draws = epoch_rows(forward, epoch)
    probe, at = seen[:batch_size], places[:batch_size]
    parts = {origin.name: slice(0, max(1, min(origin.batch_size, len(probe) // 2)))}
    refused = find_coupled_roles(runner.network, forward.padded_batch(probe, draws), parts, [name])
    if refused:
        raise CacheUnavailable(refused[name])
    values = forward(probe, draws)
    columns = RowLayout(
        forward.features,
        tuple(tuple(values[feature].shape[1:]) for feature in forward.features),
        tuple(values[feature].dtype for feature in forward.features),
    )
    needed = len(seen) * sum(columns.widths) * columns.dtype.itemsize
    free = available_memory(origin.images.device)
    if needed > MEMORY_FRACTION * free:
        raise CacheUnavailable(f"the rows of an epoch would take {format_bytes(needed)} of {format_bytes(free)} of memory")
    table = CacheFile(folder, _content(runner, name, forward), columns, samples * variants)
    _compare(table, at, values, CACHE_TOLERANCE.get(plan.stage.precision, 0.05))
    return CachedSource(inner, forward, table, notice)


def _compare(table: CacheFile, places: Tensor, values: dict[Any, Tensor], tolerance: float) -> None:
    """Compares what is in a table with what its role gives now."""
    known = ~table.missing_rows(places)
    kept = table.row_layout.unpack(table.read_rows(places[known]))
    for feature, value in kept.items():
        if not equal_up_to_rounding(values[feature].cpu()[known], value, tolerance):
            raise CacheUnavailable(f"{table.name} holds other values than the network gives; delete the folder")


def _content(runner: Runner, name: str, forward: RoleForward) -> dict[str, Any]:
    """Everything that a row depends on."""
    stage, origin, view = runner.stage, forward.source, forward.view
    config, root = stage.roles[name], stage.roles[root_role(name, stage.roles)]
    augments = [part_identity(named, AUGMENTATIONS) for named, _ in resolve_views(origin.config.views)[forward.field]]
    return {
        "model": part_identity(architecture(root, stage.roles), MODELS),
        "transforms": [part_identity(named, WEIGHT_TRANSFORMS) for named in root.transforms],
        "part": config.module_path,
        "weights": state_hash(runner.network.role(root.name).model),
        "precision": stage.precision,
        "device": describe_device(runner.device),
        "torch": torch.__version__,
        "at_once": forward.batch_size,
        "data": {"checksum": origin.checksum, "population": origin.population, "stored": list(view.stored_shape)},
        "view": {
            "augments": augments,
            "mean": None if view.mean is None else view.mean.flatten().tolist(),
            "std": None if view.std is None else view.std.flatten().tolist(),
            "dtype": str(view.dtype),
            "channels_last": view.channels_last,
        },
    }


def available_memory(device: torch.device) -> int:
    """Bytes of memory: what is free on a GPU, what there is on the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
