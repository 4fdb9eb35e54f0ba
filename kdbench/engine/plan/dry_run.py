"""Dry run of one training step on meta tensors: finds the parameters that each update trains.

The dry run finds errors that the first training step would raise, before any data is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdbench.config.schema import InnerStepConfig, StageConfig, TermConfig, UpdateConfig
from kdbench.data.loading.batch import MicroBatch
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.network import Network
from kdbench.engine.network.resolved_stage import ResolvedStage
from kdbench.engine.network.roles import updated_roles
from kdbench.engine.plan.meta import DRY_RUN_ROWS, failures_as_config_errors, meta_batch
from kdbench.engine.plan.requirements import batch_sizes_text, equal_batch_sizes
from kdbench.engine.train.bilevel import check_inner_rates, dry_run_inner_step
from kdbench.errors import ConfigError, Location

AnyUpdate = TypeVar("AnyUpdate", UpdateConfig, InnerStepConfig)


@dataclass(frozen=True)
class UpdatePlan:
    """One update of a step, with the parameters that its backward pass reaches.

    Attributes:
        config: the update's models and terms. They come from the recipe's `updates:`, or from the default update.
        parameters: names of the parameters that receive a gradient, including parameters of terms and adapters.
        unreached_parameters: names of the update's trainable parameters that receive no gradient.
        inner_parameters: names of the parameters that the update's inner step trains.
    """

    config: UpdateConfig
    parameters: tuple[str, ...]
    unreached_parameters: tuple[str, ...]
    inner_parameters: tuple[str, ...] = ()


def resolve_updates(stage: StageConfig, terms: Collection[str]) -> tuple[UpdateConfig, ...]:
    """Returns the stage's updates, in which only the given terms remain.

    A stage without `updates` has one default update, in which all terms train all trainable roles. An update without
    terms is left out.
    """
    if stage.updates:
        updates = [_with_terms(update, terms) for update in stage.updates]
        return tuple(
            replace(update, inner_step=update.inner_step and _with_terms(update.inner_step, terms))
            for update in updates
            if update.terms
        )
    models = tuple(name for name, role in stage.roles.items() if role.mode == "trainable")
    return (UpdateConfig(models=models, terms=tuple(terms)),) if terms else ()


def _with_terms(update: AnyUpdate, terms: Collection[str]) -> AnyUpdate:
    return replace(update, terms=tuple(name for name in update.terms if name in terms))


def _all_steps(stage: StageConfig, terms: Collection[str]) -> Iterator[UpdateConfig | InnerStepConfig]:
    """Yields the updates of a stage and their inner steps. An inner step comes before its update."""
    for update in resolve_updates(stage, terms):
        yield from (update,) if update.inner_step is None else (update.inner_step, update)


class _SavedTensors:
    """Sums the bytes of the tensors that autograd saves for the backward pass, except parameters and buffers."""

    def __init__(self, network: nn.Module) -> None:
        self._network_storages = {_storage_id(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self._bytes_by_storage: dict[int, int] = {}  # operations that save the same tensor save it once

    def record(self) -> AbstractContextManager[object]:
        """Context manager: resets the sum to 0 and counts the tensors that autograd saves inside the block."""
        self._bytes_by_storage.clear()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._bytes_by_storage.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage_id(tensor) not in self._network_storages:
            self._bytes_by_storage[_storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def dry_run_step(
    network: Network,
    stage: StageConfig,
    resolved_stage: ResolvedStage,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
) -> tuple[tuple[UpdatePlan, ...], int]:
    """Runs the forward and the backward pass of one training step on meta tensors, without an optimizer step.

    Returns:
        The plan of each update, and the bytes that autograd saves in the largest forward pass of `DRY_RUN_ROWS` rows.

    Raises:
        ConfigError: a model or a term fails, or an update has nothing to train.
    """
    network.train()
    batches = meta_batch(specs, dict.fromkeys(resolved_stage.step_sources(stage), DRY_RUN_ROWS), device)
    forward = partial(_checked_forward, network, stage, batches)
    saved_tensors = _SavedTensors(network)
    plans = []
    largest = 0
    for update in resolve_updates(stage, resolved_stage.terms):
        network.zero_grad(set_to_none=True)
        inner_parameters: tuple[str, ...] = ()
        with saved_tensors.record():
            if update.inner_step is None:
                total = forward(update)
            else:
                total, inner_parameters = dry_run_inner_step(network, update, forward)
        largest = max(largest, saved_tensors.bytes)
        location = update.location if str(update.location) else stage.terms[update.terms[0]].location
        candidates = {n: p for n, p in network.candidate_parameters(update).items() if p.requires_grad}
        reached = _backward(total, candidates, update, location)
        _check_every_model_reached(stage, update, reached, location)
        plans.append(UpdatePlan(update, reached, tuple(n for n in candidates if n not in reached), inner_parameters))
        # `_backward` has checked a single term; after an inner step, terms have no forward of their own.
        for name in update.terms if len(update.terms) > 1 and update.inner_step is None else ():
            _check_term_trains_model(network, stage.terms[name], batches, update, candidates)
    network.zero_grad(set_to_none=True)
    check_inner_rates([(plan.config, plan.inner_parameters, plan.parameters) for plan in plans])
    return tuple(plans), largest


_ADAPTER_ONLY = "only an adapter after a detached operand would be trained, and no model"


def _is_adapter_parameter(name: str) -> bool:
    return name.startswith("terms.") and ".adapter." in name


def _backward(
    total: Tensor, candidates: Mapping[str, nn.Parameter], update: UpdateConfig, location: Location
) -> tuple[str, ...]:
    """Runs the backward pass of an update and returns the names of all parameters that received a gradient.

    Raises:
        ConfigError: no parameter of the update's models received a gradient.
    """
    models, terms = ", ".join(update.models) or "any model", ", ".join(update.terms)
    if not total.requires_grad:
        raise ConfigError(
            f"{location}: nothing to update: no term of {terms} reaches a trainable parameter of {models}"
        )
    total.backward()
    reached = tuple(name for name, parameter in candidates.items() if parameter.grad is not None)
    if all(_is_adapter_parameter(name) for name in reached):
        raise ConfigError(f"{location}: nothing to update: {terms} reaches no parameter of {models}; {_ADAPTER_ONLY}")
    return reached


def _check_every_model_reached(
    stage: StageConfig, update: UpdateConfig, reached: Collection[str], location: Location
) -> None:
    """Raises a ConfigError if an update lists a model in `models` that receives no gradient from its terms.

    In a stage without `updates`, the default update may leave some trainable models without gradient.
    """
    reached_roles = {name.split(".", 1)[0] for name in reached}
    roles = updated_roles(update, stage.roles)
    unreached = [name for name in roles if name not in reached_roles]
    if stage.updates and unreached and len(unreached) < len(roles):
        raise ConfigError(
            f"{location}: nothing to update: no term of {', '.join(update.terms)} reaches a trainable parameter of "
            f"{', '.join(unreached)}; remove it from this update's `models`"
        )


def _check_term_trains_model(
    network: Network,
    config: TermConfig,
    batches: MicroBatch,
    update: UpdateConfig,
    candidates: Mapping[str, nn.Parameter],
) -> None:
    """Raises a ConfigError if a term with an adapter trains only the adapter and no model."""
    names = {name for name in candidates if name.startswith(f"terms.{config.name}.")}
    if not any(map(_is_adapter_parameter, names)) or _reads_other_terms(config):
        return
    network.zero_grad(set_to_none=True)
    network(batches, {config.name: 1}, network.wiring([config.name], update.models), 1.0)[0].backward()
    if all(_is_adapter_parameter(name) for name, parameter in candidates.items() if parameter.grad is not None):
        models = ", ".join(update.models)
        raise ConfigError(f"{config.location}: term {config.name!r} reaches no parameter of {models}; {_ADAPTER_ONLY}")


def _reads_other_terms(config: TermConfig) -> bool:
    return any(operand.kind == "term" for operand in config.read_operands())


def _checked_forward(
    network: Network,
    stage: StageConfig,
    batches: MicroBatch,
    update: UpdateConfig | InnerStepConfig,
    batch_note: str = "",
) -> Tensor:
    """Computes the total loss of an update. A failure becomes a ConfigError that names the failing model or term.

    Args:
        batch_note: text for error messages, which describes what is unusual about the batches.
    """
    counts = dict.fromkeys(update.terms, 1)
    note = f": {batch_note}" if batch_note else ""
    wiring = network.wiring(update.terms, update.models)
    with failures_as_config_errors(f"{stage.name}: the models cannot run on this data{note}"):
        network.run_roles(batches, wiring.runs)
    for number, name in enumerate(update.terms):
        config = stage.terms[name]
        # A term that reads other terms cannot run without those before it.
        terms = update.terms[: number + 1] if _reads_other_terms(config) else (name,)
        prefix = f"{config.location}: term {name!r} ({config.type}) cannot be computed from its operands{note}"
        with failures_as_config_errors(prefix):
            network(batches, counts, network.wiring(terms, update.models), 1.0)
    return network(batches, counts, wiring, 1.0)[0]


def check_unequal_batches(
    network: Network,
    stage: StageConfig,
    resolved_stage: ResolvedStage,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
    world_size: int,
) -> None:
    """Checks that no term or model combines sources whose batches differ in size.

    The forward pass runs on batches in which sources of unequal batch size have unequal numbers of rows.

    Raises:
        ConfigError: a model or a term fails on batches of unequal size. The message lists the batch sizes.
    """
    sources = resolved_stage.step_sources(stage)
    rows: dict[str, int] = {}
    for source in sources:
        equals = (name for name in rows if equal_batch_sizes(stage, source, name, specs, world_size))
        rows[source] = rows.get(next(equals, ""), DRY_RUN_ROWS + len(rows))
    if len(set(rows.values())) < 2:
        return
    note = f"batches differ in size ({batch_sizes_text(stage, sources, specs, world_size)})"
    for update in _all_steps(stage, resolved_stage.terms):
        _checked_forward(network, stage, meta_batch(specs, rows, device), update, note)


def check_last_batch(
    network: Network,
    stage: StageConfig,
    resolved_stage: ResolvedStage,
    specs: Mapping[str, SourceSpec],
    device: torch.device,
    world_size: int,
) -> None:
    """Checks that BatchNorm accepts the last batch of an epoch, which may have one row on a rank.

    Without this check, training would fail at the end of the first epoch.

    Raises:
        ConfigError: the last batch has one row, and a model's BatchNorm cannot normalise one row.
    """
    sources = resolved_stage.step_sources(stage)
    statistics_per_batch = 1 if stage.sync_batchnorm else world_size
    for source in sources:
        size = stage.data[source].batch_size * world_size
        samples = specs[source].samples
        remainder = 0 if samples is None else samples % size
        # A remainder is split evenly over the ranks, so one row each is the smallest case.
        if size > statistics_per_batch and not 0 < remainder <= statistics_per_batch:
            continue
        rows = {name: (1 if name == source else DRY_RUN_ROWS) for name in sources}
        for update in _all_steps(stage, resolved_stage.terms):
            batches = meta_batch(specs, rows, device)
            counts, wiring = dict.fromkeys(update.terms, 1), network.wiring(update.terms, update.models)
            try:
                network(batches, counts, wiring, 1.0)
            except ValueError as error:
                if size <= statistics_per_batch:
                    cause = f"batch_size {size // world_size}"
                else:
                    cause = f"{samples} samples in batches of {size}"
                location = stage.data[source].locations.get("batch_size", stage.data[source].location)
                raise ConfigError(
                    f"{location}: {cause} leaves a batch of one row, which BatchNorm cannot normalise ({error}). Use "
                    "another batch_size."
                ) from None
