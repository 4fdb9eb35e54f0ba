"""Bilevel updates: a loss at the weights after an inner step, differentiated through that step.

An update with `inner_step` learns from the effect of another step. Let w be the weights that the inner step trains,
f the loss of the inner step, and v the parameters that the update trains. f may depend on v. The inner step gives

    w'(v) = w - lr * df/dw(w, v),

and the update's own loss is computed at w'(v). Its gradient with respect to v contains the derivative of df/dw, that
is, a second derivative. (The update may also train w; the gradient with respect to w then contains one too.) The
inner step is plain gradient descent: no momentum, no weight decay, no clipping. It does not change the stored w.
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
from kdbench.data.loading.batch import MicroBatch, Window
from kdbench.engine.distributed.world import World, all_reduce_sum
from kdbench.engine.network.network import Network, Wiring
from kdbench.engine.network.terms import Count
from kdbench.engine.train.meters import LossMeters
from kdbench.errors import ConfigError

LossFunction = Callable[[MicroBatch, Mapping[str, Count], Wiring, float], tuple[Tensor, Tensor]]
"""The signature of `Network.forward`: a micro-batch in, the weighted total and the vector of losses out."""


def roles_with_gradient(update: UpdateConfig) -> tuple[str, ...]:
    """Returns the names of the roles through which a gradient flows in an update or in its inner step."""
    inner = update.inner_step.models if update.inner_step is not None else ()
    return tuple(dict.fromkeys((*update.models, *inner)))


@contextmanager
def swapped_parameters(network: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Context manager: replaces parameters by given tensors, and buffers of modules in training mode by copies.

    Whatever a forward pass writes into the copied buffers (BatchNorm statistics, memory banks, counters) is
    discarded. A parameter that several modules share is replaced in all of them. After the block, every module has
    its original tensors again, even if the block raised an exception.
    """
    tensors = [(module, module._parameters.copy(), module._buffers.copy()) for module in network.modules()]
    in_training = [buffer for module, _, buffers in tensors if module.training for buffer in buffers.values()]
    copies = {id(buffer): buffer.clone() for buffer in in_training if buffer is not None}
    replacements: dict[int, Any] = {id(parameter): value for parameter, value in values.items()}
    try:
        for module, parameters, buffers in tensors:
            swapped = {name: replacements[id(p)] for name, p in parameters.items() if id(p) in replacements}
            module._parameters.update(swapped)
            module._buffers.update({name: copies[id(b)] for name, b in buffers.items() if id(b) in copies})
        yield
    finally:
        for module, parameters, buffers in tensors:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def differentiable_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """Returns one differentiable gradient per parameter; zeros for a parameter that the loss does not depend on."""
    return torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)


def twice_differentiable() -> AbstractContextManager[Any]:
    """Context manager: makes torch compute attention by plain matrix products, which have a second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


@dataclass
class InnerStep:
    """The inner step of a bilevel update: one step of gradient descent that is differentiated through.

    Attributes:
        parameters: the parameters that the inner step trains.
        wiring: the resolved forward pass of the inner step's terms: which roles run and what is read.
        rates: (n,) the distinct learning rates.
        rate_indices: for each parameter, the index of its learning rate in `rates`.
        rate_source: a schedule, or the optimizer groups whose learning rates are used; None for constant rates.
        unlogged: indices (in the vector of losses) of the terms that only the inner step computes. The losses of all
            other terms are logged by the updates.
        meter_indices: indices of the unlogged terms in the loss meters.
    """

    config: InnerStepConfig
    parameters: list[nn.Parameter]
    wiring: Wiring
    rates: Tensor
    rate_indices: tuple[int, ...]
    rate_source: Schedule | list[dict[str, Any]] | None
    unlogged: Tensor
    meter_indices: Tensor

    def set_rates(self, value_of: Callable[[Schedule], float]) -> None:
        """Sets `rates` to the learning rates of the next training step."""
        if isinstance(self.rate_source, list):
            for number, group in enumerate(self.rate_source):
                rate, lr = self.rates[number], group["lr"]
                rate.copy_(lr) if isinstance(lr, Tensor) else rate.fill_(lr)
        elif self.rate_source is not None:
            self.rates.fill_(value_of(self.rate_source))

    def losses_after(
        self,
        network: Network,
        window: Window,
        fraction: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[LossFunction, list[Tensor]]:
        """Computes the inner step on the effective batch of all ranks.

        Args:
            window: list of the micro-batches of the effective batch.
            fraction: the fraction of the effective batch in each micro-batch.
            autocast: function that returns the autocast context of a forward pass.

        Returns:
            A function like `Network.forward` that uses the weights after the inner step, and a list with the losses
            of the terms in `unlogged`, one tensor for each micro-batch.
        """
        counts = network.valid_counts(window, self.wiring.terms)
        total: Tensor | None = None
        unlogged = []
        for batches in window:
            # No parameter is replaced here: this only discards what the forward writes into buffers.
            with swapped_parameters(network, {}), twice_differentiable(), autocast():
                loss, values = network(batches, counts, self.wiring, fraction)
            total = loss if total is None else total + loss
            unlogged.append(values.index_select(0, self.unlogged))
        assert total is not None
        gradients = _summed_over_ranks(differentiable_gradients(total, self.parameters), network.world)
        steps = zip(self.parameters, self.rate_indices, gradients, strict=True)
        after = {p: p - (self.rates[index] * gradient).to(p.dtype) for p, index, gradient in steps}

        def forward(
            batches: MicroBatch, counts: Mapping[str, Count], wiring: Wiring, fraction: float
        ) -> tuple[Tensor, Tensor]:
            with swapped_parameters(network, after):
                return network(batches, counts, wiring, fraction)

        return forward, unlogged if len(self.unlogged) else []


def _summed_over_ranks(gradients: Sequence[Tensor], world: World) -> Sequence[Tensor]:
    """Sums gradients over ranks. The sum is differentiable: its backward pass sums over ranks too."""
    if world.size == 1:
        return gradients
    flat = all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def build_inner_step(
    update: UpdateConfig,
    network: Network,
    parameters: list[nn.Parameter],
    optimizers: Sequence[Optimizer],
    meters: LossMeters,
    logged: Collection[str],
) -> InnerStep:
    """Builds the inner step of an update.

    Args:
        parameters: the parameters that the inner step trains.
        optimizers: the optimizers of all updates. The inner step uses their learning rates if the recipe states none.
        meters: sums of losses for the log. The inner step adds the losses of its terms that are not in `logged`.
        logged: names of the terms whose losses are already logged, because an update computes them too.
    """
    config = update.inner_step
    assert config is not None
    rate_source: Schedule | list[dict[str, Any]] | None = None
    rate_indices = (0,) * len(parameters)
    rates = [0.0]
    if config.lr is None:
        rate_source, rate_indices = _optimizer_groups(parameters, optimizers)
        rates = [0.0] * len(rate_source)
    elif isinstance(config.lr, PartConfig):
        rate_source = build_schedule(config.lr)
    else:
        rates = [float(config.lr)]
    unlogged = [number for number, name in enumerate(config.terms) if name not in logged]
    device, count = meters.sums.device, len(config.terms)
    return InnerStep(
        config,
        parameters,
        network.wiring(config.terms, roles_with_gradient(update)),
        torch.tensor(rates, device=device, dtype=meters.sums.dtype),
        rate_indices,
        rate_source,
        torch.tensor([*unlogged, *(number + count for number in unlogged)], device=device, dtype=torch.int64),
        meters.indices(tuple(config.terms[number] for number in unlogged)),
    )


def _optimizer_groups(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Returns the optimizer groups that contain the given parameters, and for each parameter the index of its group."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    number = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
    used = sorted({number[id(parameter)] for parameter in parameters})
    return [groups[i] for i in used], tuple(used.index(number[id(parameter)]) for parameter in parameters)


def dry_run_inner_step(
    network: Network, update: UpdateConfig, forward: Callable[[UpdateConfig | InnerStepConfig], Tensor]
) -> tuple[Tensor, tuple[str, ...]]:
    """Executes an update with an inner step on meta tensors.

    Args:
        forward: function that computes the total loss of an update or of an inner step on the batch of the dry run.
            It raises a ConfigError if the forward pass fails.

    Returns:
        The update's loss (scalar), with the autograd graph through the inner step, and the names of the parameters
        that the inner step trains.

    Raises:
        ConfigError: the inner step trains nothing, cannot be differentiated, or has no effect on the update's loss.
    """
    inner = update.inner_step
    assert inner is not None
    gradients = _inner_gradients(network, inner, forward, roles_with_gradient(update))
    after = {parameter: parameter - gradient for parameter, gradient in gradients.values()}
    with swapped_parameters(network, after):
        loss = forward(replace(update, models=roles_with_gradient(update)))
    effects: Sequence[Tensor | None] = []
    if loss.requires_grad:
        effects = torch.autograd.grad(loss, list(after.values()), allow_unused=True, retain_graph=True)
    terms, models = ", ".join(update.terms), ", ".join(inner.models)
    if all(gradient is None for gradient in effects):
        raise ConfigError(f"{inner.location}: no term of {terms} reads anything that the inner step of {models} trains")
    try:  # all inputs: for a part of them autograd would skip operations that it cannot differentiate
        loss.backward(retain_graph=True)
    except RuntimeError as error:
        raise _no_second_derivative(inner, error) from error
    reached = any(parameter.grad is not None for parameter in network.candidate_parameters(update).values())
    network.zero_grad(set_to_none=True)
    if not reached:
        raise ConfigError(
            f"{update.location}: nothing to update: the gradient of {terms} does not reach a parameter of "
            f"{', '.join(update.models)} through the inner step of {models} by {', '.join(inner.terms)}"
        )
    return loss, tuple(gradients)


def _inner_gradients(
    network: Network,
    inner: InnerStepConfig,
    forward: Callable[[UpdateConfig | InnerStepConfig], Tensor],
    models: tuple[str, ...],
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Returns parameter name -> (parameter, gradient) for the parameters that an inner step trains."""
    if not inner.terms:
        raise ConfigError(f"{inner.location}: the inner step is empty: all of its terms have weight 0")
    with twice_differentiable():
        total = forward(replace(inner, models=models))
    trainable = {name: p for name, p in network.candidate_parameters(inner).items() if p.requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(trainable)
    if total.requires_grad and trainable:
        try:
            gradients = torch.autograd.grad(total, list(trainable.values()), create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise _no_second_derivative(inner, error) from error
    pairs = zip(trainable.items(), gradients, strict=True)
    reached = {name: (parameter, gradient) for (name, parameter), gradient in pairs if gradient is not None}
    if all(name.startswith("terms.") for name in reached):
        terms, models_text = ", ".join(inner.terms), ", ".join(inner.models)
        raise ConfigError(
            f"{inner.location}: the inner step is empty: no term of {terms} reaches a parameter of {models_text}"
        )
    return reached


def _no_second_derivative(inner: InnerStepConfig, error: RuntimeError) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(
        f"{inner.location}: the gradient flows through this inner step, but {', '.join(inner.terms)} cannot be "
        f"differentiated twice: {reason}"
    )


def check_inner_rates(updates: Sequence[tuple[UpdateConfig, Sequence[str], Sequence[str]]]) -> None:
    """Checks that each inner step without its own learning rate can use the rates of other updates.

    An inner step uses the learning rates of the updates that train its parameters.

    Args:
        updates: triples of an update's config, the names of the parameters that its inner step trains, and the names
            of the parameters that the update trains.

    Raises:
        ConfigError: a parameter of an inner step is trained by no update, or by several.
    """
    for update, inner_names, _ in updates:
        if update.inner_step is None or update.inner_step.lr is not None:
            continue
        for name in inner_names:
            count = sum(name in names for _, _, names in updates)
            if count != 1:
                reason = "no update trains" if count == 0 else f"{count} updates train"
                raise ConfigError(
                    f"{update.inner_step.location}: the inner step needs a learning rate, such as `lr: 0.1`, "
                    f"because {reason} {name}"
                )
