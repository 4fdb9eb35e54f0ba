"""A step that is never taken: the weights to which it would lead, and the loss there, differentiated through the step.

An update with `inner_step` learns by what another step would do: with w the weights that the virtual step moves and f its
loss, which may depend on this update's parameters v,

    w'(v) = w - lr * df/dw(w, v),    and the update's own loss is taken at w'(v).

Its gradient with respect to v (and to w, where the update moves w as well) goes through df/dw: a second derivative. The
step is the plain one: no momentum, no weight decay, no clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from kdbench.config.schedules import Schedule, build_schedule
from kdbench.config.schema import InnerStepConfig, PartConfig, UpdateConfig
from kdbench.engine.distributed.world import World, all_reduce_sum
from kdbench.engine.network.network import Network
from kdbench.engine.network.operands import Batch
from kdbench.engine.network.terms import Count
from kdbench.engine.train.meters import LossMeters
from kdbench.errors import ConfigError

Losses = Callable[[Batch, Mapping[str, Count], Sequence[str], Sequence[str], float], tuple[Tensor, Tensor]]
"""What `Network.forward` is: a batch in, the weighted total and the vector of losses out."""


def roles_with_gradient(update: UpdateConfig) -> tuple[str, ...]:
    """The roles through which a gradient goes in either step of an update with `inner_step`."""
    own = update.inner_step.models if update.inner_step is not None else ()
    return tuple(dict.fromkeys((*update.models, *own)))


@contextmanager
def swapped_parameters(network: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside the block the network has these tensors in place of some parameters, and copies of what it may write to.

    Those are the buffers of modules in training mode: BatchNorm's statistics, banks, counters. What a forward writes
    there is forgotten. A parameter that several modules share is replaced in all of them. However the block ends, all
    modules have their own tensors again.
    """
    own = [(module, module._parameters.copy(), module._buffers.copy()) for module in network.modules()]
    written = [buffer for module, _, held in own if module.training for buffer in held.values() if buffer is not None]
    copies = {id(buffer): buffer.clone() for buffer in written}
    swapped: dict[int, Any] = {id(parameter): value for parameter, value in values.items()}
    try:
        for module, parameters, buffers in own:
            module._parameters.update({n: swapped[id(p)] for n, p in parameters.items() if id(p) in swapped})
            module._buffers.update({n: copies[id(b)] for n, b in buffers.items() if id(b) in copies})
        yield
    finally:
        for module, parameters, buffers in own:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def gradients_through(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """The gradient of a loss, zeros where it reaches nothing, as a function of all that it depends on."""
    return torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)


def twice_differentiable() -> AbstractContextManager[Any]:
    """Attention as plain matrix products: its fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


@dataclass
class InnerStep:
    """A virtual step, ready to run.

    parameters: of the network, those that it moves. moving: the roles through which a gradient goes.
    rates: the different learning rates, which `move` takes from `source`; whose: the number of each parameter's rate.
    rows: of the terms' losses, those that no update logs; positions: where the meters add them.
    """

    config: InnerStepConfig
    parameters: list[nn.Parameter]
    moving: tuple[str, ...]
    rates: Tensor
    whose: tuple[int, ...]
    source: Schedule | list[dict[str, Any]] | None
    rows: Tensor
    positions: Tensor

    def set_rates(self, scheduled: Callable[[Schedule], float]) -> None:
        """Sets the rates for the coming step."""
        if isinstance(self.source, list):
            for number, group in enumerate(self.source):
                rate, lr = self.rates[number], group["lr"]
                rate.copy_(lr) if isinstance(lr, Tensor) else rate.fill_(lr)
        elif self.source is not None:
            self.rates.fill_(scheduled(self.source))

    def losses_after(
        self,
        network: Network,
        window: Sequence[Batch],
        share: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Losses, list[Tensor]]:
        """Thinks the step, over the whole effective batch and all ranks.

        Returns:
            The network's forward at the weights to which the step leads; and each micro-batch's own losses of the step
            that no update logs.
        """
        terms = self.config.terms
        counts = network.valid_counts(window, terms)
        total: Tensor | None = None
        seen = []
        for batch in window:
            with swapped_parameters(network, {}), twice_differentiable(), autocast():
                loss, values = network(batch, counts, terms, self.moving, share)
            total = loss if total is None else total + loss
            seen.append(values.index_select(0, self.rows))
        assert total is not None
        gradients = _summed(gradients_through(total, self.parameters), network.world)
        steps = zip(self.parameters, self.whose, gradients, strict=True)
        ahead = {own: own - (self.rates[number] * gradient).to(own.dtype) for own, number, gradient in steps}

        def losses(
            batch: Batch, counts: Mapping[str, Count], terms: Sequence[str], moving: Sequence[str], share: float
        ) -> tuple[Tensor, Tensor]:
            with swapped_parameters(network, ahead):
                return network(batch, counts, terms, self.moving, share)

        return losses, seen if len(self.rows) else []


def _summed(gradients: Sequence[Tensor], world: World) -> Sequence[Tensor]:
    """The gradients of the whole batch, on every rank; what comes back through them is summed likewise."""
    if world.size == 1:
        return gradients
    flat = all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def build_inner_step(
    update: UpdateConfig,
    parameters: list[nn.Parameter],
    optimizers: Sequence[Optimizer],
    meters: LossMeters,
    logged: Collection[str],
) -> InnerStep:
    """Makes the virtual step of an update ready.

    Args:
        parameters: those that the step moves.
        optimizers: of all updates, whose rates the step takes where the recipe says none.
        meters: where losses are logged that no update logs.
        logged: the terms that some update logs.
    """
    after = update.inner_step
    assert after is not None
    source: Schedule | list[dict[str, Any]] | None = None
    whose = (0,) * len(parameters)
    rates = [0.0]
    if after.lr is None:
        source, whose = _groups(parameters, optimizers)
        rates = [0.0] * len(source)
    elif isinstance(after.lr, PartConfig):
        source = build_schedule(after.lr)
    else:
        rates = [float(after.lr)]
    own = [number for number, name in enumerate(after.terms) if name not in logged]
    device, count = meters.sums.device, len(after.terms)
    return InnerStep(
        after,
        parameters,
        roles_with_gradient(update),
        torch.tensor(rates, device=device, dtype=meters.sums.dtype),
        whose,
        source,
        torch.tensor([*own, *(number + count for number in own)], device=device, dtype=torch.int64),
        meters.indices(tuple(after.terms[number] for number in own)),
    )


def _groups(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The groups of the optimisers that move these parameters, and for each parameter the number of its group."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    number = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
    used = sorted({number[id(parameter)] for parameter in parameters})
    return [groups[i] for i in used], tuple(used.index(number[id(parameter)]) for parameter in parameters)


def dry_run_inner_step(
    network: Network, update: UpdateConfig, forward: Callable[[UpdateConfig | InnerStepConfig], Tensor]
) -> tuple[Tensor, tuple[str, ...]]:
    """Rehearses an update with a virtual step.

    Args:
        forward: the total of a move on the rehearsal's batch; it tells failures in words.

    Returns:
        The update's loss as a function of all that it depends on, and the names of the parameters that the step moves.

    Raises:
        ConfigError: the step moves nothing, cannot be differentiated, or nothing comes after it.
    """
    after = update.inner_step
    assert after is not None
    steps = _rehearsed(network, after, forward, roles_with_gradient(update))
    ahead = {own: own - gradient for own, gradient in steps.values()}
    with swapped_parameters(network, ahead):
        loss = forward(replace(update, models=roles_with_gradient(update)))
    told: Sequence[Tensor | None] = []
    if loss.requires_grad:
        told = torch.autograd.grad(loss, list(ahead.values()), allow_unused=True, retain_graph=True)
    own, models = ", ".join(update.terms), ", ".join(after.models)
    if all(gradient is None for gradient in told):
        said = f"no term of {own} reads what the virtual step of {models} moves"
        raise ConfigError(f"{after.location}: nothing comes after this step: {said}")
    try:  # everywhere: where only some parameters are asked for, autograd leaves out what it cannot differentiate
        loss.backward(retain_graph=True)
    except RuntimeError as error:
        raise _once(after, error) from error
    reached = any(parameter.grad is not None for parameter in network.candidate_parameters(update).values())
    network.zero_grad(set_to_none=True)
    if not reached:
        said = f"the gradient of {own} finds no way through the virtual step of {models} by {', '.join(after.terms)}"
        raise ConfigError(f"{update.location}: nothing to update: {said} to a parameter of {', '.join(update.models)}")
    return loss, tuple(steps)


def _rehearsed(
    network: Network,
    after: InnerStepConfig,
    forward: Callable[[UpdateConfig | InnerStepConfig], Tensor],
    moving: tuple[str, ...],
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The parameters that a virtual step moves, by name, and their gradients."""
    if not after.terms:
        raise ConfigError(f"{after.location}: no virtual step to take: every term of it has weight 0")
    with twice_differentiable():
        total = forward(replace(after, models=moving))
    learning = {name: p for name, p in network.candidate_parameters(after).items() if p.requires_grad}
    found: Sequence[Tensor | None] = [None] * len(learning)
    if total.requires_grad and learning:
        try:
            found = torch.autograd.grad(total, list(learning.values()), create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise _once(after, error) from error
    reached = {name: (p, g) for (name, p), g in zip(learning.items(), found, strict=True) if g is not None}
    if all(name.startswith("terms.") for name in reached):
        said = f"no term of {', '.join(after.terms)} reaches a parameter of {', '.join(after.models)}"
        raise ConfigError(f"{after.location}: no virtual step to take: {said}")
    return reached


def _once(after: InnerStepConfig, error: RuntimeError) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    said = f"a gradient goes through this step, but {', '.join(after.terms)} cannot be differentiated twice"
    return ConfigError(f"{after.location}: {said}: {reason}")


def check_rates(moves: Sequence[tuple[UpdateConfig, Sequence[str], Sequence[str]]]) -> None:
    """A virtual step without a rate of its own takes those of the updates that move its parameters.

    Args:
        moves: each update, what its virtual step moves, and what it moves itself.

    Raises:
        ConfigError: no update moves one of them, or several do.
    """
    for update, ahead, _ in moves:
        if update.inner_step is None or update.inner_step.lr is not None:
            continue
        for name in ahead:
            count = sum(name in parameters for _, _, parameters in moves)
            if count != 1:
                who = "no update moves" if count == 0 else f"{count} updates move"
                raise ConfigError(
                    f"{update.inner_step.location}: say the learning rate of this step, `lr: 0.1`: {who} {name}"
                )
