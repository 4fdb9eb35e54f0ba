"""The moves of a step, ready to run: their parameters and optimisers, and which rows each moves by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.config.schema import Recipe, UpdateConfig
from kdbench.engine.distributed.dtensor import is_sharded
from kdbench.engine.distributed.gradients import GradientReducer
from kdbench.engine.distributed.world import World
from kdbench.engine.network.network import Network
from kdbench.engine.network.operands import Batch, operand_source
from kdbench.engine.network.roles import updated_roles
from kdbench.engine.plan.dry_run import UpdatePlan
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.bilevel import InnerStep, build_inner_step
from kdbench.engine.train.meters import LossMeters
from kdbench.engine.train.optimizers import build_optimizer
from kdbench.registry import SELECTORS


@dataclass
class Update:
    """One move of a step, ready to run."""

    config: UpdateConfig
    names: tuple[str, ...]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    meter_indices: Tensor
    reducer: GradientReducer
    covers_all_parameters: bool
    """Whether its parameters are all that a backward could reach: then the backward need not be told."""
    select: RowSelection | None = None
    inner_step: InnerStep | None = None
    """The step at whose end its terms are taken."""


@dataclass
class RowSelection:
    """Which rows of a batch an update moves by: a selector, who observes for it, and how many rows stay."""

    selector: nn.Module
    inputs: tuple[str, ...]
    owner: str
    source: str
    keep: float | int

    def rows(self, network: Network, batch: Batch) -> Batch:
        """The batch with the chosen rows of its source; nothing here depends on a value but which rows they are."""
        fields = batch[self.source]
        given = {**fields, **network.observe(batch, self.owner)}
        size = next(iter(fields.values())).shape[0]
        count = round(size * self.keep) if self.keep < 1 else min(int(self.keep), size)
        chosen = self.selector(max(count, 1), None, **{n: given[n] for n in self.inputs if n in given})
        return {**batch, self.source: {name: value.index_select(0, chosen) for name, value in fields.items()}}


def build_updates(plan: StagePlan, recipe: Recipe, network: Network, meters: LossMeters, world: World) -> list[Update]:
    """The updates of a stage in order, on the device of `meters`."""
    updates = [_update(planned, plan, recipe, network, meters, world) for planned in plan.updates]
    logged = {name for update in updates for name in update.config.terms}
    for update, planned in zip(updates, plan.updates, strict=True):
        if update.config.inner_step is not None:
            parameters = [network.candidate_parameters(update.config.inner_step)[name] for name in planned.inner_parameters]
            optimizers = [other.optimizer for other in updates]
            update.inner_step = build_inner_step(update.config, parameters, optimizers, meters, logged)
    return updates


def group_updates(updates: list[Update]) -> list[list[Update]]:
    """The updates in order, those that move together in one group."""
    groups: list[list[Update]] = []
    for update in updates:
        number = update.config.group
        if groups and number is not None and groups[-1][0].config.group == number:
            groups[-1].append(update)
        else:
            groups.append([update])
    return groups


def _update(
    planned: UpdatePlan, plan: StagePlan, recipe: Recipe, network: Network, meters: LossMeters, world: World
) -> Update:
    modules = _modules(planned.config, plan, network)
    owned = network.candidate_parameters(planned.config)
    parameters = [owned[name] for name in planned.parameters]
    wanted = planned.config.optimizer or plan.stage.optimizer
    optimizer = build_optimizer(wanted, modules, parameters, capture=recipe.uses_cuda_graph(meters.device.type))
    learning = sum(1 for p in network.parameters() if p.requires_grad)
    return Update(
        planned.config,
        planned.parameters,
        parameters,
        optimizer,
        meters.indices(planned.config.terms),
        GradientReducer([p for p in parameters if not is_sharded(p)], world),
        covers_all_parameters=len(plan.updates) == 1 and len(parameters) + len(planned.unreached_parameters) == learning,
        select=_selection(planned.config, plan, meters.device),
    )


def _modules(update: UpdateConfig, plan: StagePlan, network: Network) -> Mapping[str, nn.Module]:
    """What an update moves, by the prefix of its parameters' names in the plan."""
    modules: dict[str, nn.Module] = {name: network.role(name).model for name in updated_roles(update, plan.stage.roles)}
    return modules | {f"terms.{name}": network.term(name) for name in update.terms}


def _selection(update: UpdateConfig, plan: StagePlan, device: torch.device) -> RowSelection | None:
    if update.select is None or update.keep is None:
        return None
    part = update.select
    entry = SELECTORS.entry(part.type)
    first = next(iter(part.operands.values()), None)
    source = operand_source(first, plan.resolved_stage.sources, plan.stage.terms) if first is not None else None
    owner = f"select.{next(i for i, u in enumerate(plan.stage.updates) if u.select is part)}"
    selector = SELECTORS.build(part.type, part.params, part.location).to(device)
    return RowSelection(selector, entry.inputs, owner, source or plan.train_source, update.keep)
