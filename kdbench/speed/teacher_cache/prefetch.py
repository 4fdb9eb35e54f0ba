"""Prefetching: frozen roles (networks) run for several coming steps at once, on a batch size that suits the device.

The output of a frozen network for an image is the same in all steps. Each step receives its rows of the output as
precomputed features of its batches. This is correct only if a row depends on its image alone, not on other rows or on
random numbers. To check this, the roles run on the first block (the rows of several steps) and on a part of the
block, and the outputs are compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from kdbench.data.loading.batch import Batch, MicroBatch, Window
from kdbench.engine.device import precision_settings
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import Feature
from kdbench.engine.network.network import Network, roles_for_operands
from kdbench.engine.network.operands import Values
from kdbench.engine.network.roles import input_addresses, root_role, updated_roles
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.runner import Runner

ROUNDING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Dtype -> largest difference of a row between two batch sizes, relative to the feature's largest value.

Another batch size selects other kernels, which sum in another order. If a row depends on other rows of the batch, the
difference is larger than a hundredth."""


COUPLED_ROWS = "its rows depend on the other rows of the batch, or on random numbers"


def prefetch_obstacles(plan: StagePlan) -> dict[str, str]:
    """Finds the frozen roles (networks) of a step, and for each role the obstacle to prefetching.

    A prefetched role runs before the step, for several steps at once.

    Returns:
        Role -> obstacle, in the order in which the roles run. The obstacle is "" if the role can be prefetched.
    """
    stage = plan.stage
    trained = {root for update in plan.updates for root in updated_roles(update.config, stage.roles)}
    # Operands of artifact builders are read after the last step.
    operands = stage.read_operands(plan.resolved_stage.terms, include_artifacts=False)
    required = roles_for_operands(operands, stage.roles)
    obstacles: dict[str, str] = {}
    for name in plan.resolved_stage.order:
        root = root_role(name, stage.roles)
        if name in required and stage.roles[root].mode == "frozen":
            obstacles[name] = "an update trains it" if root in trained else _input_obstacle(plan, name, obstacles)
    return obstacles


def _input_obstacle(plan: StagePlan, name: str, obstacles: Mapping[str, str]) -> str:
    """Returns the reason why the inputs of a role (network) prevent prefetching, or an empty string.

    Args:
        plan: plan of the training stage.
        name: name of the role.
        obstacles: earlier frozen role -> obstacle to prefetching the earlier role. The output of a role that is not in
            this mapping changes during the stage.
    """
    config = plan.stage.roles[name]
    for upstream in config.upstream_roles:
        if upstream not in obstacles:
            return f"it reads the output of role {upstream!r}, which changes during the stage"
    for upstream in config.upstream_roles:
        if obstacles[upstream]:
            return f"it reads the output of role {upstream!r}, which runs inside the step"
    sources = {address.split(".", 1)[0] for address in input_addresses(config) if ":" not in address}
    sources |= {plan.resolved_stage.sources[upstream] for upstream in config.upstream_roles}
    return f"it combines rows of the sources {' and '.join(sorted(sources))}" if len(sources) > 1 else ""


class Prefetcher:
    """Provider of batches that adds outputs of frozen roles (networks) to the batches of another provider.

    The roles run once for each block of consecutive steps. The step numbers alone determine the steps of a block, so
    a run that is resumed inside a block computes the full block again, with bit-identical results. The last block of
    a stage is padded to the shape of a full block. Batches after the last step of the stage are not read.

    Args:
        feed: the other provider of batches.
        runner: training loop of the stage, which contains the networks and determines autocast.
        roles: names of the roles to prefetch, in the order in which the roles run.
        batch_size: maximum number of rows in a block. A block has at least one step, even if this step is larger.
        on_check: function that is called after the outputs of the first block are checked. The argument is role ->
            reason, for the roles that must run inside the step.

    Attributes:
        steps_per_block: number of steps of a block.
        rows_per_block: source -> number of rows of a block.
    """

    def __init__(
        self,
        feed: Feed,
        runner: Runner,
        roles: Sequence[str],
        batch_size: int,
        on_check: Callable[[dict[str, str]], None] = lambda rejected: None,
    ) -> None:
        self.feed, self.runner, self.main, self.on_check = feed, runner, feed.main, on_check
        self.roles = tuple(roles)
        configs, sources = runner.network.configs, runner.network.sources
        step_rows = {
            source: feed.sources[source].batch_size * feed.accumulate
            for source in dict.fromkeys(sources[name] for name in roles)
        }
        self.steps_per_block = max(1, batch_size // max(step_rows.values()))
        self.rows_per_block = {source: rows * self.steps_per_block for source, rows in step_rows.items()}
        self.fields: dict[str, list[str]] = {source: [] for source in self.rows_per_block}
        self.precomputed: dict[str, list[tuple[str, Feature]]] = {source: [] for source in self.rows_per_block}
        for name in self.roles:
            source, addresses = sources[name], input_addresses(configs[name])
            self.fields[source] += [address.split(".", 1)[1] for address in addresses if ":" not in address]
            # Features of cached upstream roles are part of the batches already.
            cached = [upstream for upstream in configs[name].upstream_roles if upstream not in self.roles]
            self.precomputed[source] += [(role, f) for role in cached for f in runner.network.role(role).features]
        self.rows_checked = False

    def windows(self, step: int) -> Iterator[list[MicroBatch]]:
        """Yields the list of micro-batches of every step, from the step number `step` to the end of the stage."""
        total_steps = self.runner.progress.total_steps
        skipped = step % self.steps_per_block
        first = step - skipped
        windows = self.feed.windows(first)
        while first < total_steps:
            count = min(self.steps_per_block, total_steps - first)
            ready = deque(self._with_features(list(islice(windows, count))))
            for _ in range(skipped):
                ready.popleft()
            while ready:
                yield ready.popleft()  # no reference stays here: the memory of a batch is free after its step
            first, skipped = first + self.steps_per_block, 0

    def _with_features(self, windows: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Runs the frozen roles on all rows of a block (several steps), and adds their features to the batches.

        Args:
            windows: micro-batches of each step in the block.

        Returns:
            The micro-batches of each step, with features.
        """
        self.runner.timer.end_section("data")
        batches = [batch for window in windows for batch in window]
        block = {source: self._concatenate([b[source] for b in batches], source) for source in self.rows_per_block}
        if not self.rows_checked:
            self._check_rows(block, batches)
        if not self.roles:
            return windows
        with self.runner.autocast():
            values = self.runner.network.run_frozen(block, self.roles)
        positions = dict.fromkeys(self.rows_per_block, 0)
        return [[self._add_rows(batch, values, positions) for batch in window] for window in windows]

    def _concatenate(self, batches: Sequence[Batch], source: str) -> Batch:
        """Concatenates batches of a source, and pads the result to the number of rows in a block (several steps).

        The result contains only the fields and features that the prefetched roles read.
        """
        rows = self.rows_per_block[source]
        fields = {f: concat_padded([batch.fields[f] for batch in batches], rows) for f in self.fields[source]}
        keys = self.precomputed[source]
        return Batch(fields, {k: concat_padded([batch.precomputed[k] for batch in batches], rows) for k in keys})

    def _add_rows(self, batches: MicroBatch, values: Values, positions: dict[str, int]) -> MicroBatch:
        """Returns a copy of a micro-batch with the features of the prefetched roles (networks).

        Args:
            batches: the micro-batch.
            values: features for all rows of the block (several steps).
            positions: source -> index of the micro-batch's first row in the block. The function increases each index
                by the number of rows in the micro-batch.
        """
        result = dict(batches)
        for source in self.rows_per_block:
            start = positions[source]
            positions[source] = stop = start + batches[source].size
            features = {
                (name, feature): values[name, feature][start:stop]
                for name in self.roles
                if self.runner.network.sources[name] == source
                for feature in self.runner.network.role(name).features
            }
            result[source] = batches[source].with_precomputed(features)
        return result

    def _check_rows(self, block: MicroBatch, batches: Window) -> None:
        """Stops the prefetching of roles (networks) whose output rows depend on other rows of the batch.

        The method waits for the device.

        Args:
            block: source -> concatenated batches of the first block (several steps).
            batches: micro-batches of the first block.
        """
        self.rows_checked = True
        network, subsets = self.runner.network, {}
        for source in self.rows_per_block:
            # The last rows before the padding.
            stop = sum(batch[source].size for batch in batches)
            subsets[source] = slice(stop - max(1, min(batches[0][source].size, stop // 2)), stop)
        coupled = find_coupled_roles(network, block, subsets, self.roles)
        rejected = union_over_ranks(coupled, self.roles, self.runner.world, self.runner.device)
        for name in self.roles:
            upstream = next((role for role in network.configs[name].upstream_roles if role in rejected), None)
            if upstream is not None:
                rejected.setdefault(name, f"it reads the output of role {upstream!r}, which runs inside the step")
        self.roles = tuple(name for name in self.roles if name not in rejected)
        self.on_check(rejected)


def find_coupled_roles(
    network: Network, block: MicroBatch, subsets: Mapping[str, slice], roles: Collection[str]
) -> dict[str, str]:
    """Finds roles (networks) whose output rows depend on other rows of the batch or on random numbers: coupled rows.

    The roles run on a batch and on a subset of its rows, and the outputs for the subset are compared. The forwards
    use neither autocast nor TF32, because rounding in these formats differs more between batch sizes.

    Args:
        network: container of all roles.
        block: source -> batch with all rows.
        subsets: source -> slice of the rows in the subset.
        roles: names of the roles.

    Returns:
        Role -> reason, for each role with coupled rows.
    """
    subset = {source: batch.slice(subsets[source]) for source, batch in block.items()}
    with precision_settings("float32"):
        block_values, subset_values = network.run_frozen(block, roles), network.run_frozen(subset, roles)
    coupled: dict[str, str] = {}
    for name in roles:
        source = network.sources[name]
        for feature in network.role(name).features:
            values = block_values[name, feature]
            if values.dim() == 0 or len(values) != block[source].size:
                coupled.setdefault(name, f"{feature} of {name} does not have one row for each sample")
            elif not equal_up_to_rounding(subset_values[name, feature], values[subsets[source]]):
                coupled.setdefault(name, COUPLED_ROWS)
    return coupled


def equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Returns True if two tensors are equal up to rounding. The comparison runs on the CPU.

    Args:
        actual, expected: the tensors. Integer tensors must be exactly equal, and NaN is unequal to every value.
        tolerance: largest difference, relative to the largest absolute value of `expected`. None: a value that depends
            on the dtype.
    """
    if actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return bool((actual == expected).all())
    limit = tolerance if tolerance is not None else ROUNDING_TOLERANCE.get(actual.dtype, 0.05)
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return bool((actual - expected).abs().max() <= limit * expected.abs().max()) if actual.numel() else True


def union_over_ranks(
    reasons: Mapping[str, str], names: Collection[str], world: World, device: torch.device
) -> dict[str, str]:
    """Combines the rejected roles (networks) of all ranks, so that all ranks reject the same roles.

    Args:
        reasons: role -> reason, for the roles that this rank rejects.
        names: names of all roles, in an order that is the same on every rank.
        world: the process group.
        device: device for the collective.

    Returns:
        Role -> reason, for every role that at least one rank rejects. If this rank rejects the role, the reason is the
        reason in `reasons`.
    """
    if world.size == 1:
        return dict(reasons)
    flags = world.all_reduce_sum_(torch.tensor([float(name in reasons) for name in names], device=device)).tolist()
    remote = "another process reports an obstacle"
    return {name: reasons.get(name, remote) for name, flag in zip(names, flags, strict=True) if flag}


def concat_padded(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Concatenates tensors along the rows, and pads the result to `rows` rows by repeating the first row.

    The memory format is kept.
    """
    first = tensors[0]
    missing = rows - sum(len(tensor) for tensor in tensors)
    if missing:
        tensors = [*tensors, first[:1].expand(missing, *first.shape[1:])]
    result = torch.cat(list(tensors))
    if first.dim() == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()
