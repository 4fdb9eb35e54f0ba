"""Look-ahead: a network that does not move gives an image the same values now as some steps later.

So it is run for the coming steps at once, on a batch as large as the device likes, and its rows are handed to the steps
as fields of their batches (`given_key`). That each row is what the network gives for its image alone, whatever stands
beside it and whatever was drawn before, is not assumed: the first block of a stage is compared with a part of itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from kdbench.engine.device import precision_settings
from kdbench.engine.distributed.world import World
from kdbench.engine.network.network import Network, roles_for_operands
from kdbench.engine.network.operands import Batch, Values, given_key
from kdbench.engine.network.roles import input_addresses, root_role, updated_roles
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.runner import Runner

ROUNDING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far a row may move, as a share of the feature's largest value, when other rows stand beside it. Another batch
size chooses other kernels, which sum in another order; what mixes rows moves them by more than a hundredth."""


COUPLED_ROWS = "its rows depend on the other rows of the batch, or on random draws"


def prefetch_obstacles(plan: StagePlan) -> dict[str, str]:
    """The roles that a step runs and whose networks do not move in the stage, in the order in which they run.

    Returns:
        Role -> why it has to run inside the step; empty where it may run before it.
    """
    stage, order = plan.stage, plan.resolved_stage.order
    moved = {root for update in plan.updates for root in updated_roles(update.config, stage.roles)}
    found: dict[str, str] = {}
    # what only makers read runs after the steps
    run = roles_for_operands(stage.read_operands(plan.resolved_stage.terms, include_artifacts=False), stage.roles)
    for name in order:
        config = stage.roles[name]
        root = root_role(name, stage.roles)
        if name not in run or stage.roles[root].mode != "frozen":
            continue
        sources = {address.split(".", 1)[0] for address in input_addresses(config) if ":" not in address}
        sources |= {plan.resolved_stage.sources[other] for other in config.upstream_roles}
        moving = next((other for other in config.upstream_roles if other not in found), None)
        inside = next((other for other in config.upstream_roles if found.get(other)), None)
        if root in moved:
            found[name] = "an update moves it"
        elif moving is not None:
            found[name] = f"it sees {moving}, which moves"
        elif inside is not None:
            found[name] = f"it sees {inside}, which runs inside the step"
        elif len(sources) > 1:
            found[name] = f"it sees the sources {' and '.join(sorted(sources))} side by side"
        else:
            found[name] = ""
    return found


class Prefetcher:
    """The windows of a feed, with what fixed roles give for them.

    A stage's steps are parted into blocks by their number alone, so that a run that goes on in the middle of a block
    computes the whole block again, to the same bits; a block that is cut short by the end of the stage is filled up to
    the shape of the others. Nothing is read beyond the stage's last step.

    Args:
        feed: the batches.
        runner: of the stage; its network's roles run with its precision.
        roles: those that run ahead, in the order in which they run.
        rows: about how many rows they are run on at once.
        told: called once, after the first block, with the roles that must run inside the step after all, and why.

    Attributes:
        steps: of a block.
        rows: of a block, by source.
    """

    def __init__(
        self,
        feed: Feed,
        runner: Runner,
        roles: Sequence[str],
        batch_size: int,
        on_decision: Callable[[dict[str, str]], None] = lambda refused: None,
    ) -> None:
        self.feed, self.runner, self.main, self.on_decision = feed, runner, feed.main, on_decision
        self.roles = tuple(roles)
        configs, sources = runner.network.configs, runner.network.sources
        read = dict.fromkeys(sources[name] for name in roles)
        sizes = {source: feed.sources[source].batch_size * feed.accumulate for source in read}
        self.steps_per_block = max(1, batch_size // max(sizes.values()))
        self.rows_per_block = {source: size * self.steps_per_block for source, size in sizes.items()}
        self.fields: dict[str, list[str]] = {source: [] for source in self.rows_per_block}
        for name in self.roles:
            own = [address.split(".", 1)[1] for address in input_addresses(configs[name]) if ":" not in address]
            # What comes from a table is in the batch already.
            above = [other for other in configs[name].upstream_roles if other not in self.roles]
            own += [given_key(other, f) for other in above for f in runner.network.role(other).features]
            self.fields[sources[name]] += own
        self.rows_checked = False

    def windows(self, step: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of every step from `step` on, to the end of the stage."""
        inside = step % self.steps_per_block
        first = step - inside
        coming = self.feed.windows(first)
        while first < self.runner.total_steps:
            ready = deque(self._answered(list(islice(coming, min(self.steps_per_block, self.runner.total_steps - first)))))
            for _ in range(inside):
                ready.popleft()
            while ready:
                yield ready.popleft()  # nothing here holds on to a step's batch once it is over
            first, inside = first + self.steps_per_block, 0

    def _answered(self, windows: list[list[Batch]]) -> list[list[Batch]]:
        """Runs the roles on all rows of a block, and gives each batch its own."""
        self.runner.lap("data")
        batches = [batch for window in windows for batch in window]
        block = {s: {f: concat_padded([b[s][f] for b in batches], n) for f in self.fields[s]} for s, n in self.rows_per_block.items()}
        if not self.rows_checked:
            self._check(block, batches)
        if not self.roles:
            return windows
        with self.runner.autocast():
            values = self.runner.network.run_frozen(block, self.roles)
        at = dict.fromkeys(self.rows_per_block, 0)
        return [[self._with_rows(batch, values, at) for batch in window] for window in windows]

    def _with_rows(self, batch: Batch, values: Values, at: dict[str, int]) -> Batch:
        """A batch with its rows of what the roles gave; moves `at`, the place in the block, by source."""
        given = dict(batch)
        for source in self.rows_per_block:
            start = at[source]
            at[source] = stop = start + _length(batch[source])
            own = {
                given_key(name, feature): values[name, feature][start:stop]
                for name in self.roles
                if self.runner.network.sources[name] == source
                for feature in self.runner.network.role(name).features
            }
            given[source] = {**batch[source], **own}
        return given

    def _check(self, block: Batch, batches: Sequence[Batch]) -> None:
        """Keeps the roles whose rows are their own; the only place here that waits for the device, once in a stage."""
        self.rows_checked = True
        network, parts = self.runner.network, {}
        for source in self.rows_per_block:
            stop = sum(_length(batch[source]) for batch in batches)
            parts[source] = slice(stop - max(1, min(_length(batches[0][source]), stop // 2)), stop)
        refused = union_over_ranks(find_coupled_roles(network, block, parts, self.roles), self.roles, self.runner.world, self.runner.device)
        for name in self.roles:
            inside = next((other for other in network.configs[name].upstream_roles if other in refused), None)
            if inside is not None:
                refused.setdefault(name, f"it sees {inside}, which runs inside the step")
        self.roles = tuple(name for name in self.roles if name not in refused)
        self.on_decision(refused)


def find_coupled_roles(network: Network, block: Batch, parts: Mapping[str, slice], roles: Sequence[str]) -> dict[str, str]:
    """Runs roles on a block and on a part of its rows, and compares what both give for these.

    Both run without autocast and without TF32: it is asked whether a network couples its rows, not how it rounds.

    Args:
        parts: the rows of each source.

    Returns:
        The roles whose rows are not their own, and why.
    """
    some = {s: {name: value[parts[s]] for name, value in fields.items()} for s, fields in block.items()}
    with precision_settings("float32"):
        whole, part = network.run_frozen(block, roles), network.run_frozen(some, roles)
    found: dict[str, str] = {}
    for name in roles:
        source = network.sources[name]
        rows = _length(block[source])
        for feature in network.role(name).features:
            values, again = whole[name, feature], part[name, feature]
            if values.dim() == 0 or len(values) != rows:
                found.setdefault(name, f"{feature} of {name} has not one row for each sample")
            elif not equal_up_to_rounding(again, values[parts[source]]):
                found.setdefault(name, COUPLED_ROWS)
    return found


def equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Whether two tensors are equal but for rounding; reads them on the host."""
    if actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return bool((actual == expected).all())
    allowed = tolerance if tolerance is not None else ROUNDING_TOLERANCE.get(actual.dtype, 0.05)
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return bool((actual - expected).abs().max() <= allowed * expected.abs().max()) if actual.numel() else True


def union_over_ranks(refused: Mapping[str, str], names: Sequence[str], world: World, device: torch.device) -> dict[str, str]:
    """What any process refuses among `names`, all of them do; each keeps its own reason."""
    if world.size == 1:
        return dict(refused)
    flags = world.all_reduce_sum_(torch.tensor([float(name in refused) for name in names], device=device)).tolist()
    other = "another process found that it must not"
    return {name: refused.get(name, other) for name, flag in zip(names, flags, strict=True) if flag}


def _length(fields: Mapping[str, Tensor]) -> int:
    return next(iter(fields.values())).shape[0]


def concat_padded(pieces: Sequence[Tensor], rows: int) -> Tensor:
    """Puts batches of one field behind each other, in their memory layout; what is missing repeats the first row."""
    first = pieces[0]
    missing = rows - sum(len(piece) for piece in pieces)
    if missing:
        pieces = [*pieces, first[:1].expand(missing, *first.shape[1:])]
    whole = torch.cat(list(pieces))
    if first.dim() == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
        return whole.contiguous(memory_format=torch.channels_last)
    return whole.contiguous()
