"""The one training loop: stages -> steps -> terms, on CPU or CUDA, in one process or many."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.config.schedules import Schedule, build_schedule
from kdbench.config.schema import Recipe, StageConfig
from kdbench.engine.distributed.batchnorm import broadcast_buffers, per_rank_buffers
from kdbench.engine.distributed.dtensor import (
    clip_grad_norm_,
    full_tensors,
    load_full_state,
    shard_optimizer_state,
    total_norm,
)
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build import exported_state
from kdbench.engine.network.network import Network
from kdbench.engine.network.operands import Batch
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.averages import Averages
from kdbench.engine.train.bilevel import Losses
from kdbench.engine.train.meters import LossMeans, LossMeters
from kdbench.engine.train.optimizers import load_optimizer_state, optimizer_state, set_lr_factor
from kdbench.engine.train.timer import SectionTimer
from kdbench.engine.train.updates import Update, build_updates, group_updates
from kdbench.errors import TrainingError
from kdbench.randomness import derive

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runner:
    """Trains the network of one stage, one step at a time.

    Args:
        plan: the rehearsed stage.
        recipe: for the seed and the settings that stages share.
        network: built on the device by `build_network`.
        device: where everything lives.
        world: this process among all.
        steps_per_epoch: optimiser steps in one epoch of the training source.
    """

    def __init__(
        self,
        plan: StagePlan,
        recipe: Recipe,
        network: Network,
        device: torch.device,
        *,
        steps_per_epoch: int,
        world: World = World(),  # noqa: B008
    ) -> None:
        self.plan, self.recipe, self.network, self.device, self.world = plan, recipe, network, device, world
        self.stage: StageConfig = plan.stage
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = self.stage.steps if self.stage.steps is not None else steps_per_epoch * self._epochs()
        self.steps_done = 0  # finished steps of the stage: with the seed, all that a resume needs to find its place
        self.meters = LossMeters(plan.resolved_stage.terms, device)
        self.updates = build_updates(plan, recipe, network, self.meters, world)
        self.groups = group_updates(self.updates)
        self.lr_schedule = build_schedule(self.stage.scheduler) if self.stage.scheduler else None
        self.averages = Averages(plan, network)
        self.scaler = self._new_scaler()
        self.compiling = recipe.uses_compiler and not network.sharded
        self.clock = SectionTimer() if device.type == "cpu" and not self.compiling else None
        network.lap = self.clock.lap if self.clock else None
        self.losses: Losses = network
        if self.compiling:
            # Never with graphs of the compiler's own: kdbench.speed.cuda_graph records the whole step, not parts of it.
            mode = "max-autotune-no-cudagraphs" if recipe.compile == "max" else None
            _prepare_compiler()
            self.losses = compiled(network, fullgraph=True, dynamic=False, mode=mode)
        self.perform: Callable[[Sequence[Batch]], None] = self.execute
        """How a step is done: as it stands, or what stands for it (a captured graph, a gang's step)."""
        self.differentiate: Callable[[Update, Sequence[Batch]], None] = self.compute_gradients
        """How the gradients of an update come about; likewise."""
        self.say: Callable[[str], None] = print
        self.record: Callable[[Mapping[str, Any]], None] = _forgotten
        """Writes down how steps are done, where the run is written down; what stands for a step knows that."""
        self.grad_norm: Tensor | None = None
        network.train()

    # Building

    def _epochs(self) -> int:
        assert self.stage.epochs is not None
        return self.stage.epochs

    @property
    def epochs(self) -> int:
        """Epochs of the stage; the last may be cut short when the recipe counts steps."""
        return -(-self.total_steps // self.steps_per_epoch) if self.total_steps else 0

    @property
    def average(self) -> nn.Module | None:
        """The moving average of the exported role, when the recipe asks for one."""
        return self.averages.average

    # One step

    def step(self, window: Sequence[Batch]) -> None:
        """One step: every update in order, each over the same effective batch. Nothing here waits for the device.

        Args:
            window: the micro-batches of the effective batch (one, unless the recipe accumulates).
        """
        self.perform(window)
        self.meters.steps += 1
        self.steps_done += 1
        self.lap("optimiser")

    def execute(self, window: Sequence[Batch]) -> None:
        """What the device does in a step, and nothing that the host counts: it may be captured and replayed."""
        for group in self.groups:
            for _ in range(group[0].config.repeat):
                for update in group:
                    self.differentiate(update, window)
                for update in group:
                    self._move(update)
                self.scaler.update()  # once for all gradients that were taken at one scale
        if self.averages:
            self.sync_buffers()
        self.averages.update()
        self.meters.end_step()

    def compute_gradients(self, update: Update, window: Sequence[Batch]) -> None:
        """Leaves the gradients of the effective batch, over all ranks, in the update's parameters."""
        if update.select is not None:
            window = [update.select.rows(self.network, batch) for batch in window]
        try:
            losses = self._gradients(update, window)
        except Exception as error:
            if not self.compiling or not _is_compilers(error):
                raise
            self._stop_compiling(error)
            losses = self._gradients(update, window)
        repeat = update.config.repeat
        for values, positions in losses:  # logged is the mean over the repeats, comparable with every other term
            self.meters.add(values if repeat == 1 else values / repeat, positions)
        update.reducer.finish()

    def _move(self, update: Update) -> None:
        self.scaler.unscale_(update.optimizer)
        if self.stage.clip is not None:
            self.grad_norm = clip_grad_norm_(update.parameters, self.stage.clip, self.world)
        elif self.logs_at(self.steps_done + 1):
            gradients = [p.grad for p in update.parameters if p.grad is not None]
            self.grad_norm = total_norm(gradients, self.world)
        self.scaler.step(update.optimizer)

    def _gradients(self, update: Update, window: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """Leaves this rank's gradients in the parameters; returns losses, and where they belong."""
        terms, moving = update.config.terms, update.config.models
        counts = self.network.valid_counts(window, terms)
        share = 1.0 / (len(window) * self.world.size)
        update.optimizer.zero_grad(set_to_none=True)
        forward, virtual = self.losses, update.inner_step
        losses: list[tuple[Tensor, Tensor]] = []
        if virtual is not None:
            forward, seen = virtual.losses_after(self.network, window, share, self.autocast)
            losses = [(values, virtual.positions) for values in seen]
        for number, batch in enumerate(window, 1):
            last = number == len(window)
            with self.autocast():
                total, values = forward(batch, counts, terms, moving, share)
            if last and virtual is None:  # the backward of a virtual step has sums over ranks of its own
                update.reducer.prepare_for_backward()
            inputs = None if update.covers_all_parameters else update.parameters
            self.scaler.scale(total).backward(inputs=inputs, retain_graph=virtual is not None and not last)
            self.lap("backward")
            losses.append((values, update.meter_indices))
        return losses

    def _stop_compiling(self, error: Exception) -> None:
        self.compiling = False
        self.losses = self.network
        reason = " ".join(str(error).split()) or type(error).__name__
        self.say(f"compile: the step could not be compiled ({reason[:300]}); the run goes on without compiling.")

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.stage.precision == "fp16")

    def restart_scaler(self) -> None:
        """Forgets a step that was begun and not done, such as a recording that failed; the scale stays."""
        state, self.scaler = self.scaler.state_dict(), self._new_scaler()
        self.scaler.load_state_dict(state)

    def sync_buffers(self) -> None:
        """Gives every rank rank 0's buffers, such as BatchNorm's statistics, which each rank gathers from its own rows.

        What is evaluated, followed and saved is then the same model on every rank, and the one that a resume loads.
        """
        learning = (self.network.role(name) for name in self.plan.resolved_stage.order)
        broadcast_buffers((b for role in learning if role.trainable for b in per_rank_buffers(role.model)), self.world)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.stage.precision)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def logs_at(self, done: int) -> bool:
        """Whether a log line stands after so many steps: each interval, and before each evaluation."""
        over, inside = divmod(done, self.steps_per_epoch)
        evaluated = inside == 0 and over % self.stage.eval_every == 0
        return done % self.stage.log_every == 0 or evaluated or done == self.total_steps

    def lap(self, part: str) -> None:
        """Books the time since the last lap to a part of the step."""
        if self.clock is not None:
            self.clock.lap(part)

    def forget_lap(self) -> None:
        """Leaves the time since the last lap out: it went to something that is no part of training."""
        if self.clock is not None:
            self.clock.last = time.perf_counter()

    def begin_step(self) -> None:
        """Sets what moves with the position: learning rate, scheduled weights and parameters, the model's own draws."""
        if self.lr_schedule is not None:
            factor = self.scheduled(self.lr_schedule)
            for update in self.updates:
                set_lr_factor(update.optimizer, factor)
        for update in self.updates:
            if update.inner_step is not None:
                update.inner_step.set_rates(self.scheduled)
        for name in self.plan.resolved_stage.terms:
            self.network.term(name).set_scheduled(self.scheduled)
        self.seed_draws()
        self.averages.refresh_snapshots(self.steps_done, self.steps_per_epoch)

    def seed_draws(self) -> None:
        """Seeds torch's own generators, which dropout and the like draw from, for the coming step."""
        seed = derive(self.recipe.seed, "model", self.stage.name, self.steps_done, self.world.rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def scheduled(self, schedule: Schedule) -> float:
        """A schedule's value at the coming step."""
        if schedule.by == "epoch":
            return schedule(self.steps_done // self.steps_per_epoch, self.epochs)
        return schedule(self.steps_done, self.total_steps)

    # State

    def exported(self, name: str) -> dict[str, Tensor]:
        """A role's weights as its forward uses them, under the plain model's names."""
        return exported_state(self.stage.roles[name], self.network.role(name).model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the stage needs to go on; frozen roles come from where they came from.

        All ranks call it: tensors that lie in parts are put together, on the first one.
        """
        keep = self.world.is_main
        roles = {n: self.network.role(n) for n in self.plan.resolved_stage.order}
        used = [n for n, r in roles.items() if r.config.transforms]
        if roles[self.stage.export].config.mode == "reuse":  # its root may be frozen, which no checkpoint holds
            used.append(self.stage.export)
        return {
            "step": self.steps_done,
            "models": {
                n: full_tensors(r.model.state_dict(), keep=keep)
                for n, r in roles.items()
                if r.config.mode not in ("frozen", "reuse")
            },
            "baked": {n: self.exported(n) for n in used},
            "terms": {n: self.network.term(n).state_dict() for n in self.plan.resolved_stage.terms},
            "optimizers": [full_tensors(optimizer_state(update.optimizer), keep=keep) for update in self.updates],
            "scaler": self.scaler.state_dict(),
            "meters": self.meters.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "grad_norm": None if self.grad_norm is None else self.grad_norm.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps_done = int(state["step"])
        for name, values in state["models"].items():
            load_full_state(self.network.role(name).model, values)
        for name, values in state["terms"].items():
            self.network.term(name).load_state_dict(values)
        for update, values in zip(self.updates, state["optimizers"], strict=True):
            load_optimizer_state(update.optimizer, shard_optimizer_state(update.optimizer, values))
        self.scaler.load_state_dict(state["scaler"])
        self.meters.load_state_dict(state["meters"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.grad_norm = None if state["grad_norm"] is None else state["grad_norm"].to(self.device)

    # Reading

    def read(self) -> tuple[LossMeans, dict[str, Any]]:
        """Reads the meters (waits for the device) and returns them with what a log line holds besides.

        Raises:
            TrainingError: a term was not finite; the message names it and its first step.
        """
        reading = self.meters.read(self.world)
        self.check_finite_losses(reading)
        norm = None if self.grad_norm is None else float(self.grad_norm)
        weights = {name: float(self.network.term(name).weight) for name in reading.losses}
        return reading, {
            "total": reading.total,
            "lr": float(self.updates[0].optimizer.param_groups[0]["lr"]) if self.updates else 0.0,
            "grad_norm": norm,
            "terms": {
                name: {"loss": loss, "weight": weights[name], "weighted": reading.weighted[name]}
                for name, loss in reading.losses.items()
            },
            **({"shares": self.clock.read()} if self.clock else {}),
        }

    def check_finite_weights(self) -> None:
        """Raises TrainingError when a loss or a weight is not finite; called before every evaluation and checkpoint.

        A finite loss can have a gradient that is not (a square root at 0); the next loss would tell, too late.
        """
        self.check_finite_losses()
        parameters = [parameter.detach() for update in self.updates for parameter in update.parameters]
        if not total_norm(parameters, self.world, math.inf).isfinite():
            bad = [
                name
                for update in self.updates
                for name, parameter in zip(update.names, update.parameters, strict=True)
                if not full_tensors(parameter.detach()).isfinite().all()
            ]
            raise TrainingError(
                f"{len(bad)} parameters are not finite after step {self.steps_done} of stage {self.stage.name!r} (epoch "
                f"{(self.steps_done - 1) // self.steps_per_epoch + 1}), {bad[0]} among them, although every loss was: a "
                "gradient was not. Training stopped; what was saved before stays. A smaller learning rate, `clip`, or "
                "another term may help."
            )

    def check_finite_losses(self, reading: LossMeans | None = None) -> None:
        """Raises TrainingError when the loss of a term has not been finite."""
        reading = reading or self.meters.peek(self.world)
        if reading.not_finite:
            name, step = min(reading.not_finite.items(), key=lambda item: item[1])
            config = self.stage.terms[name]
            raise TrainingError(
                f"{config.location}: the loss of term {name!r} ({config.type}) is not finite since step {step} of stage "
                f"{self.stage.name!r} (epoch {(step - 1) // self.steps_per_epoch + 1}). Training stopped; what was "
                "saved before stays. A smaller learning rate, `clip`, or a smaller weight may help."
            )


def _forgotten(facts: Mapping[str, Any]) -> None:
    """Where no run is written down."""


compiled: Any = torch.compile
"""How a network becomes a compiled step."""


VARIANTS = 64
"""How many forms of the compiled step a process may keep. Each run of a sweep, each stage and each size of batch has
its own, where torch would refuse the ninth of all together."""


def _prepare_compiler() -> None:
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # `precision` says what is wanted
    config: Any = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, VARIANTS)  # torch keeps it for each thread


def _is_compilers(error: Exception) -> bool:
    """Whether an error is the compiler's own, not the step's."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)
