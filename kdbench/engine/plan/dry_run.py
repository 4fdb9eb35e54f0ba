"""One step of a stage without computing: who moves by what, and what the first step would have failed at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdbench.config.schema import InnerStepConfig, StageConfig, TermConfig, UpdateConfig
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.network import Network
from kdbench.engine.network.operands import Batch
from kdbench.engine.network.resolved_stage import ResolvedStage
from kdbench.engine.network.roles import updated_roles
from kdbench.engine.plan.meta import DRY_RUN_ROWS, failures_as_config_errors, meta_batch
from kdbench.engine.plan.requirements import batch_sizes_text, equal_batch_sizes
from kdbench.engine.train.bilevel import check_rates, dry_run_inner_step
from kdbench.errors import ConfigError

Move = TypeVar("Move", UpdateConfig, InnerStepConfig)


@dataclass(frozen=True)
class UpdatePlan:
    """One move: these models (and the terms' own parameters) by these terms.

    ahead: the parameters that its virtual step moves.
    """

    config: UpdateConfig
    parameters: tuple[str, ...]
    unreached_parameters: tuple[str, ...]
    inner_parameters: tuple[str, ...] = ()


def resolve_updates(stage: StageConfig, terms: tuple[str, ...]) -> tuple[UpdateConfig, ...]:
    """The stage's updates; without any, one of all trainable roles by all terms."""
    if stage.updates:
        kept = [_of_terms(update, terms) for update in stage.updates]
        return tuple(replace(u, inner_step=u.inner_step and _of_terms(u.inner_step, terms)) for u in kept if u.terms)
    learning = tuple(name for name, role in stage.roles.items() if role.mode == "trainable")
    return (UpdateConfig(models=learning, terms=terms),) if terms else ()


def _of_terms(move: Move, terms: tuple[str, ...]) -> Move:
    return replace(move, terms=tuple(name for name in move.terms if name in terms))


def _moves(stage: StageConfig, terms: tuple[str, ...]) -> Iterator[UpdateConfig | InnerStepConfig]:
    """The stage's updates, and their virtual steps."""
    for update in resolve_updates(stage, terms):
        yield from (update,) if update.inner_step is None else (update.inner_step, update)


def dry_run_step(
    network: Network, stage: StageConfig, layout: ResolvedStage, specs: Mapping[str, SourceSpec], device: torch.device
) -> tuple[tuple[UpdatePlan, ...], int]:
    """One step without optimiser: which parameters get a gradient, and how many bytes are kept for the backward."""
    network.train()
    rows = dict.fromkeys(layout.step_sources(stage), DRY_RUN_ROWS)
    batch = meta_batch(specs, rows, device)
    updates = []
    most = 0
    own = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}  # storage -> its bytes: two operations that keep the same tensor keep it once

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    for update in resolve_updates(stage, layout.terms):
        network.zero_grad(set_to_none=True)
        saved.clear()
        ahead: tuple[str, ...] = ()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if update.inner_step is None:
                total = _forward_in_words(network, stage, batch, update)
            else:
                total, ahead = dry_run_inner_step(network, update, partial(_forward_in_words, network, stage, batch))
        where = update.location if str(update.location) else stage.terms[update.terms[0]].location
        models, what = ", ".join(update.models) or "any model", ", ".join(update.terms)
        if not total.requires_grad:
            said = f"no term of {what} reaches a parameter of {models} that trains"
            raise ConfigError(f"{where}: nothing to update: {said}")
        most = max(most, sum(saved.values()))
        total.backward()
        learning = {n: p for n, p in network.candidate_parameters(update).items() if p.requires_grad}
        reached = tuple(n for n, p in learning.items() if p.grad is not None)
        if all(_is_adapters(name) for name in reached):
            raise ConfigError(f"{where}: nothing to update: {what} reaches no parameter of {models}; {_ADAPTER_ALONE}")
        _refuse_unreached(stage, update, reached, where)
        updates.append(UpdatePlan(update, reached, tuple(n for n in learning if n not in reached), ahead))
        for name in update.terms if len(update.terms) > 1 and update.inner_step is None else ():
            _refuse_adapter_alone(network, stage.terms[name], batch, update, learning)
    network.zero_grad(set_to_none=True)
    check_rates([(planned.config, planned.inner_parameters, planned.parameters) for planned in updates])
    return tuple(updates), most


_ADAPTER_ALONE = "only an adapter on a detached operand would learn, and nothing would be taught"


def _is_adapters(parameter: str) -> bool:
    return parameter.startswith("terms.") and ".adapter." in parameter


def _refuse_unreached(stage: StageConfig, update: UpdateConfig, reached: tuple[str, ...], where: Any) -> None:
    """A role that an update of the recipe names must be moved by it; without `updates`, some may stand still."""
    moved = {name.split(".", 1)[0] for name in reached}
    missing = [name for name in updated_roles(update, stage.roles) if name not in moved]
    if stage.updates and missing and len(missing) < len(updated_roles(update, stage.roles)):
        said = f"no term of {', '.join(update.terms)} reaches a parameter of {', '.join(missing)} that trains"
        raise ConfigError(f"{where}: nothing to update: {said}; leave it out of this update's `models`")


def _refuse_adapter_alone(
    network: Network, config: TermConfig, batch: Batch, update: UpdateConfig, learning: Mapping[str, nn.Parameter]
) -> None:
    """A term among others that would train its own adapter and nothing else."""
    own = {n for n in learning if n.startswith(f"terms.{config.name}.")}
    if not any(map(_is_adapters, own)) or any(operand.kind == "term" for operand in config.read_operands()):
        return
    network.zero_grad(set_to_none=True)
    network(batch, {config.name: 1}, [config.name], update.models, 1.0)[0].backward()
    if all(_is_adapters(n) for n, p in learning.items() if p.grad is not None):
        said = f"term {config.name!r} reaches no parameter of {', '.join(update.models)}; {_ADAPTER_ALONE}"
        raise ConfigError(f"{config.location}: {said}")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _forward_in_words(
    network: Network, stage: StageConfig, batch: Batch, update: UpdateConfig | InnerStepConfig, why: str = ""
) -> Tensor:
    """One forward whose failures are told as the recipe's faults, naming the term where one is at fault.

    Args:
        why: what is peculiar to this batch.
    """
    counts = {name: 1 for name in update.terms}
    why = f": {why}" if why else ""
    with failures_as_config_errors(f"{stage.name}: the models cannot run on this data{why}"):
        network.run_roles(batch, update.terms, update.models)
    for number, name in enumerate(update.terms):
        config = stage.terms[name]
        with failures_as_config_errors(f"{config.location}: term {name!r} ({config.type}) cannot work on its operands{why}"):
            alone = not any(operand.kind == "term" for operand in config.read_operands())
            network(batch, counts, [name] if alone else update.terms[: number + 1], update.models, 1.0)
    return network(batch, counts, update.terms, update.models, 1.0)[0]


def check_unequal_batches(
    network: Network,
    stage: StageConfig,
    layout: ResolvedStage,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
    world_size: int,
) -> None:
    """What is compared row by row must come in batches of equal size; where these are not, it fails here in words."""
    read = layout.step_sources(stage)
    rows: dict[str, int] = {}
    for source in read:
        alike = (other for other in rows if equal_batch_sizes(stage, source, other, specs, world_size))
        rows[source] = rows.get(next(alike, ""), DRY_RUN_ROWS + len(rows))
    if len(set(rows.values())) < 2:
        return
    what = f"batches differ in size ({batch_sizes_text(stage, read, specs, world_size)})"
    for update in _moves(stage, layout.terms):
        _forward_in_words(network, stage, meta_batch(specs, rows, device), update, what)


def check_last_batch(
    network: Network,
    stage: StageConfig,
    layout: ResolvedStage,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
    world_size: int,
) -> None:
    """A batch of one row, as it may come at the end of an epoch, must not stop the run after hours."""
    apart = 1 if stage.sync_batchnorm else world_size  # how many share a batch, each with its own statistics
    for source in layout.step_sources(stage):
        size = stage.data[source].batch_size * world_size
        samples = specs[source].samples
        rest = 0 if samples is None else samples % size
        if size > apart and not 0 < rest <= apart:
            continue
        rows = {name: (1 if name == source else DRY_RUN_ROWS) for name in layout.step_sources(stage)}
        for update in _moves(stage, layout.terms):
            try:
                network(
                    meta_batch(specs, rows, device), dict.fromkeys(update.terms, 1), update.terms, update.models, 1.0
                )
            except ValueError as error:
                why = f"batch_size {size // world_size}" if size <= apart else f"{samples} samples in batches of {size}"
                place = stage.data[source].locations.get("batch_size", stage.data[source].location)
                raise ConfigError(
                    f"{place}: {why} leaves a batch of one row, which BatchNorm cannot normalise "
                    f"({error}). Choose another batch_size."
                ) from None
