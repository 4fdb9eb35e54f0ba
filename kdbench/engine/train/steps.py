"""The operations of one training step on the device, and the interface of strategies that execute steps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kdbench.config.schema import Recipe
from kdbench.data.loading.batch import Window
from kdbench.engine.distributed.batchnorm import broadcast_buffers, per_rank_buffers
from kdbench.engine.distributed.dtensor import clip_grad_norm_, total_norm
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.averages import Averages
from kdbench.engine.train.bilevel import LossFunction
from kdbench.engine.train.meters import LossMeters
from kdbench.engine.train.notices import Notices
from kdbench.engine.train.progress import Progress
from kdbench.engine.train.updates import Update, group_updates

ComputeGradients: TypeAlias = Callable[[Update, Window], None]
"""Leaves the gradients of the effective batch, summed over all ranks, in the parameters of an update."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

COMPILED_VARIANTS = 64
"""The number of compiled variants of the step that a process may keep. Each run of a sweep, each stage and each batch
size needs one; torch's default of eight would make later runs fall back to eager silently."""


class StepStrategy(Protocol):
    """Protocol of a strategy that executes training steps: eagerly, as a CUDA graph, or jointly with other runs."""

    def run(self, window: Window) -> None:
        """Executes one step: computes gradients, updates parameters and averages, and adds losses to the meters.

        The step counters on the host are not changed, because the runner increments them.
        """
        ...


class EagerStep:
    """Strategy that executes the operations of a training step one by one, in eager mode or with a compiled forward.

    Args:
        plan: the checked plan of the stage.
        recipe: the recipe, which has the compiler settings.
        network: the roles and terms, on the device.
        updates: the updates of a step, in their order.
        meters: meters to which the losses are added.
        averages: EMA roles and snapshots, which are updated at the end of each step.
        progress: the position, which determines in which steps the gradient norm is measured.
        notices: receiver of the message that a step cannot be compiled.

    Attributes:
        grad_norm: gradient norm of the last step that measured it, before clipping.
        compiled: whether the forward pass is compiled.
    """

    def __init__(
        self,
        plan: StagePlan,
        recipe: Recipe,
        network: Network,
        updates: Sequence[Update],
        meters: LossMeters,
        averages: Averages,
        progress: Progress,
        notices: Notices,
    ) -> None:
        self.plan, self.stage, self.network = plan, plan.stage, network
        self.world, self.device, self.timer = network.world, meters.device, network.timer
        self.updates, self.groups = list(updates), group_updates(updates)
        self.meters, self.averages, self.progress, self.notices = meters, averages, progress, notices
        self.scaler = self._new_scaler()
        self.grad_norm: Tensor | None = None
        self.compiled = recipe.uses_compiler and not network.sharded
        self.compute_losses: LossFunction = network
        if self.compiled:
            # Graphs of the compiler's own are off: speed.cuda_graph records the whole step instead of its parts.
            mode = "max-autotune-no-cudagraphs" if recipe.compile == "max" else None
            _configure_compiler()
            self.compute_losses = compile_network(network, fullgraph=True, dynamic=False, mode=mode)

    def run(self, window: Window, compute_gradients: ComputeGradients | None = None) -> None:
        """Executes every update in order, each on the same effective batch. Does not wait for the device.

        Args:
            window: list of the effective batch's micro-batches.
            compute_gradients: function that is called instead of the method `compute_gradients`. The joint step of
                concurrent runs passes one.
        """
        compute = compute_gradients or self.compute_gradients
        for group in self.groups:
            for _ in range(group[0].config.repeat):
                # All gradients of a group are taken before any of its parameters moves.
                for update in group:
                    compute(update, window)
                for update in group:
                    self._apply(update)
                self.scaler.update()  # once per group: its gradients were scaled by the same factor
        if self.averages:
            self.sync_buffers()
        self.averages.update()
        self.meters.end_step()

    def compute_gradients(self, update: Update, window: Window) -> None:
        """Computes the gradients of the effective batch, summed over ranks, into `.grad` of an update's parameters."""
        if update.select is not None:
            window = [update.select.select_rows(self.network, batches) for batches in window]
        try:
            losses = self._backward(update, window)
        except Exception as error:
            if not self.compiled or not _is_compiler_error(error):
                raise
            self._stop_compiling(error)
            losses = self._backward(update, window)
        repeat = update.config.repeat
        for values, indices in losses:  # the mean over repeats is logged, so that it compares with other terms
            self.meters.add(values if repeat == 1 else values / repeat, indices)
        update.reducer.finish()

    def _backward(self, update: Update, window: Window) -> list[tuple[Tensor, Tensor]]:
        """Computes this rank's gradients into `.grad`, without a sum over ranks.

        Returns:
            Pairs of a vector of losses and the indices of these losses in the meters.
        """
        counts = self.network.valid_counts(window, update.wiring.terms)
        fraction = 1.0 / (len(window) * self.world.size)
        update.optimizer.zero_grad(set_to_none=True)
        forward, inner = self.compute_losses, update.inner_step
        losses: list[tuple[Tensor, Tensor]] = []
        if inner is not None:
            forward, inner_losses = inner.losses_after(self.network, window, fraction, self.autocast)
            losses = [(values, inner.meter_indices) for values in inner_losses]
        for number, batches in enumerate(window, 1):
            last = number == len(window)
            with self.autocast():
                total, values = forward(batches, counts, update.wiring, fraction)
            if last and inner is None:  # the backward of an inner step contains reductions over ranks of its own
                update.reducer.prepare_for_backward()
            inputs = None if update.covers_all_parameters else update.parameters
            self.scaler.scale(total).backward(inputs=inputs, retain_graph=inner is not None and not last)
            self.timer.end_section("backward")
            losses.append((values, update.meter_indices))
        return losses

    def _apply(self, update: Update) -> None:
        """Clips the gradients of an update and takes an optimizer step."""
        self.scaler.unscale_(update.optimizer)
        if self.stage.clip is not None:
            self.grad_norm = clip_grad_norm_(update.parameters, self.stage.clip, self.world)
        elif self.progress.logs_after(self.progress.steps_done + 1):
            gradients = [p.grad for p in update.parameters if p.grad is not None]
            self.grad_norm = total_norm(gradients, self.world)
        self.scaler.step(update.optimizer)

    def sync_buffers(self) -> None:
        """Copies the buffers of rank 0 (such as BatchNorm statistics) to all ranks.

        Before that, they differ, because each rank computes them on its own rows. Afterwards evaluations, averages
        and checkpoints use the same model on every rank.
        """
        roles = (self.network.role(name) for name in self.plan.resolved_stage.order)
        broadcast_buffers((b for role in roles if role.trainable for b in per_rank_buffers(role.model)), self.world)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the autocast context for forward passes of this stage."""
        dtype = AUTOCAST.get(self.stage.precision)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    # Recording as a CUDA graph

    def variant(self) -> Hashable:
        """Returns a key for the kind of the next step: whether it measures the gradient norm.

        Two steps with equal keys and equal batch shapes have the same operations, and can share a CUDA graph.
        """
        return self.progress.logs_after(self.progress.steps_done + 1)

    def take_grad_norm(self) -> Tensor | None:
        """Returns the stored gradient norm and clears the stored value."""
        norm, self.grad_norm = self.grad_norm, None
        return norm

    def put_grad_norm(self, norm: Tensor | None) -> None:
        """Stores a gradient norm, for example the tensor into which a replayed CUDA graph writes."""
        self.grad_norm = norm

    def discard_unfinished(self) -> None:
        """Discards the gradient scaler's state of an unfinished step, such as a failed CUDA graph recording.

        The loss scale is kept.
        """
        state, self.scaler = self.scaler.state_dict(), self._new_scaler()
        self.scaler.load_state_dict(state)

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.stage.precision == "fp16")

    def _stop_compiling(self, error: Exception) -> None:
        self.compiled = False
        self.compute_losses = self.network
        reason = " ".join(str(error).split()) or type(error).__name__
        self.notices.notice(
            f"compile: the step could not be compiled ({reason[:300]}); the run continues in eager mode."
        )


compile_network: Any = torch.compile
"""Compiles the forward of a network; tests replace it."""


def _configure_compiler() -> None:
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # `precision` states what is wanted
    config: Any = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, COMPILED_VARIANTS)  # a setting of each thread


def _is_compiler_error(error: Exception) -> bool:
    """Returns whether an exception was raised by torch's compiler rather than by the compiled code."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)
