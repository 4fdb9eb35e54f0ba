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

from kdbench.config.identity import part_facts
from kdbench.data.augment.view import spelled_out
from kdbench.data.loading.source import ResidentSource, Source
from kdbench.engine.device import describe_device
from kdbench.engine.network.operands import given_key
from kdbench.engine.network.resolved_stage import architecture
from kdbench.engine.network.roles import root_of
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.weights import state_hash
from kdbench.engine.train.runner import Runner
from kdbench.registry import AUGMENTATIONS, MODELS, WEIGHT_TRANSFORMS
from kdbench.speed.teacher_cache.cache_file import Columns, Refused, Table, size_words
from kdbench.speed.teacher_cache.prefetch import coupled, joined, near

MEMORY_SHARE = 0.25
"""How much of the memory an epoch's rows may take."""


TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
"""How far a row of a table may be from what the network gives now, as a share of the largest value, by precision."""


def extent(plan: StagePlan, name: str) -> tuple[int, int, int]:
    """Samples, variants of each, and bytes in about of the table of a role.

    Raises:
        Refused: what the role sees has no finite list of images.
    """
    config, stage = plan.stage.roles[name], plan.stage
    if ":" in config.input or config.extra_inputs:
        raise Refused("it sees more than an image of its source")
    source, field = config.input.split(".", 1)
    spec = plan.specs[source]
    variants = spec.variants.get(field)
    if variants is None:
        raise Refused(f"{config.input} is no image of a dataset")
    if variants.count is None:
        raise Refused(variants.why)
    samples = spec.population or spec.samples
    if samples is None:
        raise Refused(f"the samples of source {source!r} are not counted yet")
    elements = sum(torch.Size(shape).numel() for shape in plan.roles[name].features.values())
    size = {"float64": 8, "bf16": 2, "fp16": 2}.get(stage.precision, 4)
    return samples, variants.count, samples * variants.count * elements * size


class Forward:
    """Runs one role on chosen variants of samples, always at the same number of rows."""

    def __init__(self, runner: Runner, name: str, origin: ResidentSource, field: str, rows: int) -> None:
        self.runner, self.name, self.origin, self.rows = runner, name, origin, rows
        self.field, self.view = field, origin.views[field]
        self.features = runner.network.role(name).features

    def block(self, samples: Tensor, draws: Tensor) -> dict[str, dict[str, Tensor]]:
        """A batch of `rows` rows: the samples' images, and the first one again where there are fewer."""
        device = self.origin.images.device
        at = joined([samples.to(device)], self.rows)
        image = self.view.augmented(self.origin.images, at, draws.index_select(0, at))
        return {self.origin.name: {self.field: image}}

    def __call__(self, samples: Tensor, draws: Tensor) -> dict[Any, Tensor]:
        """Returns what the role gives for the samples, by feature."""
        with self.runner.autocast():
            values = self.runner.network.run_fixed(self.block(samples, draws), [self.name])
        return {feature: values[self.name, feature][: len(samples)] for feature in self.features}


class Tabled(Source):
    """The batches of a source, with the rows of one role.

    Args:
        inner: the source, or another role's `Tabled` of it.
        forward: of the role.
        table: of the role.
        say: is told once when the disk takes no more rows.
    """

    def __init__(self, inner: Source, forward: Forward, table: Table, say: Callable[[str], None]) -> None:
        super().__init__(inner.config, inner.setting)
        self.classes, self.num_samples, self.population = inner.classes, inner.num_samples, inner.population
        self.positions, self.checksum = inner.positions, inner.checksum
        self.inner, self.forward, self.table, self.say = inner, forward, table, say
        self.read = 0
        self._told = False

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        rows, slots = self._epoch(epoch)
        for batch in self.inner.batches(epoch, start):
            own = rows.index_select(0, slots.index_select(0, batch["index"]))
            values = self.table.columns.unpack(own)
            yield batch | {given_key(self.forward.name, feature): value for feature, value in values.items()}

    def in_order(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        return self.inner.in_order(batch_size)

    def sample_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return self.inner.sample_spec()

    def close(self) -> None:
        self.inner.close()

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's rows on the device, ordered by sample, and the row of each sample."""
        device = self.setting.device
        samples, places, draws = shown(self.forward, epoch)
        self._fill(samples, places, draws)
        self.read += len(places)
        slots = torch.zeros(self.population, dtype=torch.int64)
        slots[samples] = torch.arange(len(samples))
        return self.table.read(places).to(device), slots.to(device)

    def _fill(self, samples: Tensor, places: Tensor, draws: Tensor) -> None:
        table, rows = self.table, self.forward.rows
        missing = table.missing(places)
        samples, places = samples[missing], places[missing]
        for start in range(0, len(samples), rows):
            part = samples[start : start + rows]
            table.add(places[start : start + rows], table.columns.pack(self.forward(part, draws)).cpu())
        table.write()
        if table.fault and not self._told:
            self.say(f"{table.name}: new rows are not kept ({table.fault}); the run goes on.")
            self._told = True


def shown(forward: Forward, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What this process sees in an epoch: samples, sorted; their places in the table; all draws, on the device."""
    draws = forward.origin.draws(forward.field, epoch)
    samples = forward.origin.visited(epoch)
    codes = forward.view.codes(draws).cpu()  # on the device, whose arithmetic makes the images
    count = forward.view.variants.count
    assert count is not None
    return samples, samples * count + codes[samples], draws


def open_table(
    runner: Runner, name: str, inner: Source, *, epoch: int, rows: int, folder: Path, say: Callable[[str], None]
) -> Tabled:
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
    samples, variants, _ = extent(plan, name)
    origin = inner
    while isinstance(origin, Tabled):
        origin = origin.inner
    if not isinstance(origin, ResidentSource):
        raise Refused(f"the images of source {origin.name!r} are read from files")
    field = plan.stage.roles[name].input.split(".", 1)[1]
    forward = Forward(runner, name, origin, field, rows)
    seen, places, draws = shown(forward, epoch)
    probe, at = seen[:rows], places[:rows]
    parts = {origin.name: slice(0, max(1, min(origin.batch_size, len(probe) // 2)))}
    refused = coupled(runner.network, forward.block(probe, draws), parts, [name])
    if refused:
        raise Refused(refused[name])
    values = forward(probe, draws)
    columns = Columns(
        forward.features,
        tuple(tuple(values[feature].shape[1:]) for feature in forward.features),
        tuple(values[feature].dtype for feature in forward.features),
    )
    needed = len(seen) * sum(columns.widths) * columns.dtype.itemsize
    free = memory(origin.images.device)
    if needed > MEMORY_SHARE * free:
        raise Refused(f"the rows of an epoch would take {size_words(needed)} of {size_words(free)} of memory")
    table = Table(folder, _content(runner, name, forward), columns, samples * variants)
    _compare(table, at, values, TOLERANCE.get(plan.stage.precision, 0.05))
    return Tabled(inner, forward, table, say)


def _compare(table: Table, places: Tensor, values: dict[Any, Tensor], tolerance: float) -> None:
    """Compares what is in a table with what its role gives now."""
    known = ~table.missing(places)
    kept = table.columns.unpack(table.read(places[known]))
    for feature, value in kept.items():
        if not near(values[feature].cpu()[known], value, tolerance):
            raise Refused(f"{table.name} holds other values than the network gives; delete the folder")


def _content(runner: Runner, name: str, forward: Forward) -> dict[str, Any]:
    """Everything that a row depends on."""
    stage, origin, view = runner.stage, forward.origin, forward.view
    config, root = stage.roles[name], stage.roles[root_of(name, stage.roles)]
    augments = [part_facts(named, AUGMENTATIONS) for named, _ in spelled_out(origin.config.views)[forward.field]]
    return {
        "model": part_facts(architecture(root, stage.roles), MODELS),
        "transforms": [part_facts(named, WEIGHT_TRANSFORMS) for named in root.transforms],
        "part": config.module_path,
        "weights": state_hash(runner.network.role(root.name).model),
        "precision": stage.precision,
        "device": describe_device(runner.device),
        "torch": torch.__version__,
        "at_once": forward.rows,
        "data": {"checksum": origin.checksum, "population": origin.population, "stored": list(view.stored)},
        "view": {
            "augments": augments,
            "mean": None if view.mean is None else view.mean.flatten().tolist(),
            "std": None if view.std is None else view.std.flatten().tolist(),
            "dtype": str(view.dtype),
            "channels_last": view.channels_last,
        },
    }


def memory(device: torch.device) -> int:
    """Bytes of memory: what is free on a GPU, what there is on the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
