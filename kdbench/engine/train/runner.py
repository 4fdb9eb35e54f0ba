"""The runner, which trains one stage: it sets schedules, executes steps, and reads and writes the training state."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.config.schedules import build_schedule
from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.loading.batch import Window
from kdbench.engine.distributed.dtensor import full_tensors, load_full_state, shard_optimizer_state, total_norm
from kdbench.engine.network.build import exported_state
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.run_state import TrainingState, check_names, report_misfit
from kdbench.engine.timer import SectionTimer
from kdbench.engine.train.averages import Averages
from kdbench.engine.train.meters import LossMeans, LossMeters
from kdbench.engine.train.notices import Notices, PrintedNotices
from kdbench.engine.train.optimizers import load_optimizer_state, optimizer_state, set_lr_factor
from kdbench.engine.train.progress import Progress
from kdbench.engine.train.steps import EagerStep, StepStrategy
from kdbench.engine.train.updates import build_updates
from kdbench.errors import TrainingError
from kdbench.randomness import derive


class Runner:
    """Trains the network of one stage, one step at a time.

    Args:
        plan: the checked plan of the stage.
        recipe: the recipe, which has the seed and the settings that stages share.
        network: the return value of `build_network`, on the device.
        device: the device of all tensors.
        steps_per_epoch: optimizer steps in one epoch of the training source.
        notices: receiver of messages to the user and of manifest entries.

    Attributes:
        progress: the position within the stage.
        eager: the strategy that executes the operations of a step one by one.
        strategy: the strategy that executes the steps. It is `eager` unless `use` was called.
    """

    def __init__(
        self,
        plan: StagePlan,
        recipe: Recipe,
        network: Network,
        device: torch.device,
        *,
        steps_per_epoch: int,
        notices: Notices | None = None,
    ) -> None:
        self.plan, self.recipe, self.network, self.device = plan, recipe, network, device
        self.world = network.world
        self.stage: StageConfig = plan.stage
        self.notices: Notices = notices if notices is not None else PrintedNotices()
        steps = self.stage.steps
        self.progress = Progress(
            total_steps=steps if steps is not None else steps_per_epoch * (self.stage.epochs or 0),
            steps_per_epoch=steps_per_epoch,
            log_every=self.stage.log_every,
            eval_every=self.stage.eval_every,
        )
        self.meters = LossMeters(plan.resolved_stage.terms, device)
        self.updates = build_updates(plan, recipe, network, self.meters)
        self.lr_schedule = build_schedule(self.stage.scheduler) if self.stage.scheduler else None
        self.averages = Averages(plan, network)
        self.eager = EagerStep(
            plan, recipe, network, self.updates, self.meters, self.averages, self.progress, self.notices
        )
        self.strategy: StepStrategy = self.eager
        network.train()

    @property
    def timer(self) -> SectionTimer:
        return self.network.timer

    @property
    def average(self) -> nn.Module | None:
        """The moving average of the exported role, or None if the recipe has no `ema:`."""
        return self.averages.average

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the autocast context for forward passes of this stage."""
        return self.eager.autocast()

    def use(self, strategy: StepStrategy) -> None:
        """Chooses the strategy (eager, CUDA graph, ...) that executes all steps from the next one on."""
        self.strategy = strategy

    # One step

    def begin_step(self) -> None:
        """Sets everything that depends on the step number: learning rates, schedules, random seeds, snapshots."""
        value_of = self.progress.value_of
        if self.lr_schedule is not None:
            factor = value_of(self.lr_schedule)
            for update in self.updates:
                set_lr_factor(update.optimizer, factor)
        for update in self.updates:
            if update.inner_step is not None:
                update.inner_step.set_rates(value_of)
        for name in self.plan.resolved_stage.terms:
            self.network.term(name).set_scheduled(value_of)
        self.seed_generators()
        self.averages.refresh_snapshots(self.progress.steps_done, self.progress.steps_per_epoch)

    def step(self, window: Window) -> None:
        """Trains on one effective batch, without waiting for the device.

        Args:
            window: list of the effective batch's micro-batches: one, unless the recipe accumulates gradients.
        """
        self.strategy.run(window)
        self.meters.steps += 1
        self.progress.steps_done += 1
        self.timer.end_section("optimizer")

    def seed_generators(self) -> None:
        """Seeds torch's global random generators, which dropout uses, for the next step."""
        # The key of this stream must not change: it determines every random number of the models.
        seed = derive(self.recipe.seed, "model", self.stage.name, self.progress.steps_done, self.world.rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # State

    def exported(self, name: str) -> dict[str, Tensor]:
        """Returns a role's weights after weight transforms (quantisation, pruning), as the forward pass uses them.

        The keys are the parameter names of the model without the transforms.
        """
        return exported_state(self.stage.roles[name], self.network.role(name).model)

    def training_state(self) -> TrainingState:
        """Returns the training state of the stage for a checkpoint, without the weights of frozen roles.

        Every rank must call this method, because sharded tensors are gathered on rank 0.
        """
        keep = self.world.is_main
        roles = {name: self.network.role(name) for name in self.plan.resolved_stage.order}
        transformed = [name for name, role in roles.items() if role.config.transforms]
        if roles[self.stage.export].config.mode == "reuse":  # its source role may be frozen and thus not saved
            transformed.append(self.stage.export)
        norm = self.eager.grad_norm
        return TrainingState(
            step=self.progress.steps_done,
            total_steps=self.progress.total_steps,
            models={name: full_tensors(roles[name].model.state_dict(), keep=keep) for name in self._trained_roles()},
            effective={name: self.exported(name) for name in transformed},
            average=self.average.state_dict() if self.average is not None else None,
            terms={name: self.network.term(name).state_dict() for name in self.plan.resolved_stage.terms},
            optimizers=[full_tensors(optimizer_state(update.optimizer), keep=keep) for update in self.updates],
            scaler=self.eager.scaler.state_dict(),
            meters=self.meters.state_dict(),
            grad_norm=None if norm is None else norm.cpu(),
        )

    def _trained_roles(self) -> list[str]:
        order = self.plan.resolved_stage.order
        return [name for name in order if self.network.role(name).config.mode not in ("frozen", "reuse")]

    def load_training_state(self, state: TrainingState, source: Path | str = "the checkpoint") -> None:
        """Loads a training state that `training_state` returned.

        Args:
            source: name of the checkpoint file for error messages.

        Raises:
            CheckpointError: an entry does not fit the stage. The message names the entry.
        """
        check_names(source, "models", state.models, self._trained_roles())
        check_names(source, "terms", state.terms, self.plan.resolved_stage.terms)
        self.progress.steps_done = state.step
        for name, values in state.models.items():
            with report_misfit(source, f"models.{name}"):
                load_full_state(self.network.role(name).model, values)
        for name, values in state.terms.items():
            with report_misfit(source, f"terms.{name}"):
                self.network.term(name).load_state_dict(values)
        with report_misfit(source, "optimizers"):
            for update, values in zip(self.updates, state.optimizers, strict=True):
                load_optimizer_state(update.optimizer, shard_optimizer_state(update.optimizer, values))
        with report_misfit(source, "scaler"):
            self.eager.scaler.load_state_dict(dict(state.scaler))
        with report_misfit(source, "meters"):
            self.meters.load_state_dict(dict(state.meters))
        if self.average is not None:
            with report_misfit(source, "average"):
                self.average.load_state_dict(state.average)  # type: ignore[arg-type]
        norm = state.grad_norm
        self.eager.put_grad_norm(None if norm is None else norm.to(self.device))

    # Log values

    def read_log(self) -> tuple[LossMeans, dict[str, Any]]:
        """Returns the values of a log line (mean losses, learning rates, ...) and resets the loss meters.

        Waits for the device.

        Raises:
            TrainingError: the loss of a term was not finite. The message names the term and its first such step.
        """
        means = self.meters.read(self.world)
        self.check_finite_losses(means)
        norm = self.eager.grad_norm
        weights = {name: float(self.network.term(name).weight) for name in means.losses}
        return means, {
            "total": means.total,
            "lr": float(self.updates[0].optimizer.param_groups[0]["lr"]) if self.updates else 0.0,
            "grad_norm": None if norm is None else float(norm),
            "terms": {
                name: {"loss": loss, "weight": weights[name], "weighted": means.weighted[name]}
                for name, loss in means.losses.items()
            },
            **({"time_fractions": self.timer.fractions()} if self.timer.enabled else {}),
        }

    def check_finite_weights(self) -> None:
        """Raises TrainingError if a loss or a weight is NaN or infinite.

        The method is called before each evaluation and checkpoint. It checks the weights too, because a finite loss
        can have an infinite gradient (for example, a square root at 0), which would make only later losses infinite.
        """
        self.check_finite_losses()
        parameters = [parameter.detach() for update in self.updates for parameter in update.parameters]
        if total_norm(parameters, self.world, math.inf).isfinite():
            return
        names = [
            name
            for update in self.updates
            for name, parameter in zip(update.names, update.parameters, strict=True)
            if not full_tensors(parameter.detach()).isfinite().all()
        ]
        raise TrainingError(
            f"{len(names)} parameters, such as {names[0]}, are NaN or infinite after step {self.progress.steps_done} "
            f"of stage {self.stage.name!r} (epoch {self.progress.epoch}). Every loss was finite, so a gradient was "
            "not. Training stopped; earlier checkpoints are kept. A smaller learning rate, `clip`, or another term "
            "may help."
        )

    def check_finite_losses(self, means: LossMeans | None = None) -> None:
        """Raises TrainingError if the loss of a term was NaN or infinite in a step since the last reading."""
        means = means or self.meters.peek(self.world)
        if not means.not_finite:
            return
        name, step = min(means.not_finite.items(), key=lambda item: item[1])
        config = self.stage.terms[name]
        raise TrainingError(
            f"{config.location}: the loss of term {name!r} ({config.type}) is not finite since step {step} of stage "
            f"{self.stage.name!r} (epoch {self.progress.epoch_of(step)}). Training stopped; earlier checkpoints are "
            "kept. A smaller learning rate, `clip`, or a smaller weight may help."
        )
