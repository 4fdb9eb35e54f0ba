"""The updates of a step: their parameters, optimizers and gradient reducers, and the rows that each update uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.config.schema import Recipe, UpdateConfig
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.distributed.dtensor import is_sharded
from kdbench.engine.distributed.gradients import GradientReducer
from kdbench.engine.network.network import Network, Wiring
from kdbench.engine.network.operands import operand_source
from kdbench.engine.network.roles import updated_roles
from kdbench.engine.plan.dry_run import UpdatePlan
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.bilevel import InnerStep, build_inner_step, roles_with_gradient
from kdbench.engine.train.meters import LossMeters
from kdbench.engine.train.optimizers import build_optimizer
from kdbench.registry import SELECTORS


@dataclass
class Update:
    """One update of a step: its parameters, its terms and its optimizer, on the device.

    Attributes:
        names: names of the parameters, in the order of `parameters`.
        wiring: the resolved forward pass of the update's terms: which roles run and what is read.
        meter_indices: indices of the update's losses in the loss meters.
        reducer: object that sums the update's gradients over ranks.
        covers_all_parameters: whether the update trains every parameter that its backward pass reaches, so that
            `backward` needs no argument `inputs`.
        select: selection of the rows that the update uses; None: all rows.
        inner_step: inner step of a bilevel update. The update's terms are computed at the weights after that step.
    """

    config: UpdateConfig
    names: tuple[str, ...]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    wiring: Wiring
    meter_indices: Tensor
    reducer: GradientReducer
    covers_all_parameters: bool
    select: RowSelection | None = None
    inner_step: InnerStep | None = None


@dataclass
class RowSelection:
    """Selects the rows of a batch that one update uses.

    Attributes:
        selector: module that receives operands and returns row numbers.
        inputs: names of the selector's parameters.
        owner: name under which the network stores the selector's operands.
        source: name of the source whose rows are selected.
        keep: fraction of the rows (below 1), or number of rows (from 1).
    """

    selector: nn.Module
    inputs: tuple[str, ...]
    owner: str
    source: str
    keep: float | int

    def select_rows(self, network: Network, batches: MicroBatch) -> MicroBatch:
        """Returns the micro-batch with only the selected rows.

        The number of selected rows does not depend on the values of any tensor.
        """
        batch = batches[self.source]
        available = {**batch.fields, **network.observe(batches, self.owner)}
        count = round(batch.size * self.keep) if self.keep < 1 else min(int(self.keep), batch.size)
        arguments = {name: available[name] for name in self.inputs if name in available}
        return {**batches, self.source: batch.select(self.selector(max(count, 1), None, **arguments))}


def build_updates(plan: StagePlan, recipe: Recipe, network: Network, meters: LossMeters) -> list[Update]:
    """Builds the updates of a stage, in their order, on the device of `meters`."""
    updates = [_build_update(update_plan, plan, recipe, network, meters) for update_plan in plan.updates]
    logged = {name for update in updates for name in update.config.terms}
    for update, update_plan in zip(updates, plan.updates, strict=True):
        if update.config.inner_step is not None:
            candidates = network.candidate_parameters(update.config.inner_step)
            parameters = [candidates[name] for name in update_plan.inner_parameters]
            optimizers = [each.optimizer for each in updates]
            update.inner_step = build_inner_step(update.config, network, parameters, optimizers, meters, logged)
    return updates


def group_updates(updates: Sequence[Update]) -> list[list[Update]]:
    """Groups consecutive updates that are computed at the same weights; keeps the order of the updates."""
    groups: list[list[Update]] = []
    for update in updates:
        number = update.config.group
        if groups and number is not None and groups[-1][0].config.group == number:
            groups[-1].append(update)
        else:
            groups.append([update])
    return groups


def _build_update(
    update_plan: UpdatePlan, plan: StagePlan, recipe: Recipe, network: Network, meters: LossMeters
) -> Update:
    config = update_plan.config
    modules = _modules_by_prefix(config, plan, network)
    candidates = network.candidate_parameters(config)
    parameters = [candidates[name] for name in update_plan.parameters]
    optimizer = build_optimizer(
        config.optimizer or plan.stage.optimizer,
        modules,
        parameters,
        capture=recipe.uses_cuda_graph(meters.device.type),
    )
    trainable = sum(1 for parameter in network.parameters() if parameter.requires_grad)
    reachable = len(parameters) + len(update_plan.unreached_parameters)
    return Update(
        config,
        update_plan.parameters,
        parameters,
        optimizer,
        network.wiring(config.terms, roles_with_gradient(config)),
        meters.indices(config.terms),
        GradientReducer([parameter for parameter in parameters if not is_sharded(parameter)], network.world),
        covers_all_parameters=len(plan.updates) == 1 and reachable == trainable,
        select=_build_selection(config, plan, meters.device),
    )


def _modules_by_prefix(update: UpdateConfig, plan: StagePlan, network: Network) -> Mapping[str, nn.Module]:
    """Returns name prefix -> module that an update trains: `ROLE` for a role, `terms.NAME` for a term."""
    modules: dict[str, nn.Module] = {name: network.role(name).model for name in updated_roles(update, plan.stage.roles)}
    return modules | {f"terms.{name}": network.term(name) for name in update.terms}


def _build_selection(update: UpdateConfig, plan: StagePlan, device: torch.device) -> RowSelection | None:
    if update.select is None or update.keep is None:
        return None
    part = update.select
    entry = SELECTORS.entry(part.type)
    first = next(iter(part.operands.values()), None)
    source = operand_source(first, plan.resolved_stage.sources, plan.stage.terms) if first is not None else None
    owner = f"select.{next(i for i, u in enumerate(plan.stage.updates) if u.select is part)}"
    selector = SELECTORS.build(part.type, part.params, part.location).to(device)
    return RowSelection(selector, entry.inputs, owner, source or plan.train_source, update.keep)
