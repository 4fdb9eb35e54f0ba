"""A step of several runs at once: their students stacked, one forward, one backward; the rest is each one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.engine.network.operands import Batch, given_key
from kdbench.engine.network.roles import Role, root_role
from kdbench.engine.train.optimizers import stays_on_device
from kdbench.engine.train.runner import Runner
from kdbench.engine.train.updates import Update
from kdbench.speed.concurrent.stacked_network import StackedNetwork, difference, unstackable_layer
from kdbench.speed.cuda_graph import CudaGraphStep, CudaRecorder

EXACT = 1e-8
"""How far, in float64, the stacked students may be from each alone: rounding, far below any mistake."""


def stacking_key(runner: Runner) -> Any:
    """Runs of the same kind have students that can be stacked: one architecture, one input, one number format."""
    role, overwritten = _student(runner)
    tensors = (*role.model.named_parameters(), *role.model.named_buffers())
    return (
        repr(role.model),
        tuple((n, t.shape, t.stride(), t.dtype, t.requires_grad) for n, t in tensors),
        tuple(module.training for module in role.model.modules()),
        (role.features, overwritten, role.config.input, runner.network.sources[runner.stage.export]),
        (runner.stage.precision, runner.device, type(role.model)),
    )


def stacking_obstacle(runner: Runner) -> str:
    """Why a run's student cannot be stacked with others, in words; empty where nothing speaks against."""
    stage, roles = runner.stage, runner.stage.roles
    export = stage.export
    config = roles[export]
    [update, *more] = runner.updates or [None]
    states = (leaf for operand in stage.read_operands() for leaf in operand.feature_operands() if leaf.is_state)
    reasons = {
        "several processes train it": runner.world.size > 1,
        "its step is compiled (compile=capture is not)": runner.compiling,
        "fp16 scales the losses of each run by itself": stage.precision == "fp16",
        "an Apple GPU has no float64 to check it in": runner.device.type == "mps",
        "it accumulates over several batches": stage.accumulate > 1,
        "its step is more than one plain update": update is None or bool(more) or not _plain(update, export),
        "its student is not trained itself": config.mode != "trainable",
        "its student sees what other roles give": ":" in config.input or bool(config.extra_inputs),
        "its student's weights are transformed": bool(config.transforms),
        "parts of its student are roles of their own": any(
            name != export and root_role(name, roles) == export for name in runner.plan.resolved_stage.order
        ),
        "a term reads its student's weights": any(root_role(leaf.role, roles) == export for leaf in states),
    }
    return next((reason for reason, holds in reasons.items() if holds), "") or unstackable_layer(_student(runner)[0].model)


def _plain(update: Update, export: str) -> bool:
    alone = update.select is None and update.config.inner_step is None
    return alone and update.config.repeat == 1 and export in update.config.models


def _student(runner: Runner) -> tuple[Role, frozenset[Any]]:
    name = runner.stage.export
    return runner.network.role(name), runner.plan.resolved_stage.overwritten.get(name, frozenset())


def stacking_error(runners: Sequence[Runner], window: Sequence[Batch]) -> tuple[float, float]:
    """How far stacked students are from each alone on a batch of each run: in float64, and as the runs compute."""
    first = runners[0]
    role, overwritten = _student(first)
    images = [_image(runner, batch) for runner, batch in zip(runners, window, strict=True)]
    models, dtype = [_student(runner)[0].model for runner in runners], next(role.model.parameters()).dtype
    exact = difference(models, role.features, overwritten, images, torch.float64)
    if dtype == torch.float64:
        return exact, exact
    return exact, difference(models, role.features, overwritten, images, dtype, first.autocast())


def _image(runner: Runner, batch: Batch) -> Tensor:
    """What a run's student sees."""
    source, field = runner.stage.roles[runner.stage.export].input.split(".", 1)
    return batch[source][field]


class JointStep:
    """Steps of several runs at once. To a recorder of steps it is one runner, whose window holds a batch of each run.

    From its making on, the students' parameters are views of the stacked ones.

    Args:
        runners: of one kind, none of which is to stay alone.
        say: tells the person something.
    """

    def __init__(self, runners: Sequence[Runner], say: Callable[[str], None]) -> None:
        self.runners, self.say = list(runners), say
        first = self.runners[0]
        self.recipe, self.device, self.world, self.stage = first.recipe, first.device, first.world, first.stage
        self.export, self.source = first.stage.export, first.network.sources[first.stage.export]
        self.updates = [runner.updates[0] for runner in self.runners]
        self.network = nn.ModuleList(runner.network for runner in self.runners)
        role, overwritten = _student(first)
        self.features = role.features
        models = [_student(runner)[0].model for runner in self.runners]
        self.stacked = StackedNetwork(models, self.features, overwritten)
        self.stacked.share()
        wide, others = self.stacked.stacked_of(p for update in self.updates for p in update.parameters)
        self.inputs = [*wide, *others]
        self.draws = False
        self.perform: Callable[[Sequence[Batch]], None] = self.execute
        if self.recipe.uses_cuda_graph(self.device.type) and all(stays_on_device(u.optimizer) for u in self.updates):
            _Recorded(self, CudaRecorder(self.device))  # type: ignore[arg-type]

    def execute(self, window: Sequence[Batch]) -> None:
        """One step of every run, each with its own batch: what the device does, and nothing that the host counts."""
        values = self._differentiate(window)
        for runner, batch, own in zip(self.runners, window, values, strict=True):
            runner.forget_lap()
            before = runner.differentiate
            runner.differentiate = _told(runner, own)
            try:
                runner.execute([batch])
            finally:
                runner.differentiate = before
            runner.lap("optimiser")

    def _differentiate(self, window: Sequence[Batch]) -> list[Tensor]:
        """Leaves each run's gradients in its parameters; returns its losses as its network gives them."""
        for runner, update in zip(self.runners, self.updates, strict=True):
            update.optimizer.zero_grad(set_to_none=True)
            runner.forget_lap()
        self.stacked.net.zero_grad(set_to_none=True)
        with self.runners[0].autocast():
            given = self.stacked([_image(r, batch) for r, batch in zip(self.runners, window, strict=True)])
        self._lap("student")
        totals, losses = [], []
        for runner, batch, own in zip(self.runners, window, given, strict=True):
            total, values = self._losses(runner, batch, own)
            totals.append(total)
            losses.append(values)
        for runner in self.runners:
            runner.forget_lap()
        torch.autograd.backward(totals, inputs=self.inputs)
        self.stacked.hand_out()
        self._lap("backward")
        return losses

    def _losses(self, runner: Runner, batch: Batch, given: dict[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """A run's own terms, with its own draws, on what its student gave."""
        runner.forget_lap()
        [update] = runner.updates
        fields = {given_key(self.export, feature): value for feature, value in given.items()}
        batch = {**batch, self.source: {**batch[self.source], **fields}}
        counts = runner.network.valid_counts([batch], update.config.terms)
        with self._own_draws(runner), runner.autocast():
            return runner.losses(batch, counts, update.config.terms, update.config.models, 1.0)

    @contextlib.contextmanager
    def _own_draws(self, runner: Runner) -> Iterator[None]:
        """A run draws by its own seed, which no recording can change on its way; what draws nothing needs none."""
        on_cuda = self.device.type == "cuda"
        if on_cuda and torch.cuda.is_current_stream_capturing():
            if self.draws:
                raise RuntimeError("its runs draw random numbers, each by a seed of its own")
            yield
            return
        runner.seed_draws()
        before = torch.cuda.get_rng_state(self.device) if on_cuda else None
        yield
        if before is not None:
            self.draws |= not torch.equal(before, torch.cuda.get_rng_state(self.device))

    def _lap(self, part: str) -> None:
        for runner in self.runners:
            runner.lap(part)

    # What a recorder of steps asks of a runner besides

    @property
    def done(self) -> int:
        return 0

    def logs_at(self, done: int) -> tuple[bool, ...]:
        """Which of the runs measure their gradient norm in the step `done` after the coming one."""
        return tuple(runner.logs_at(runner.steps_done + done) for runner in self.runners)

    @property
    def grad_norm(self) -> list[Tensor | None] | None:
        norms = [runner.grad_norm for runner in self.runners]
        return norms if any(norm is not None for norm in norms) else None

    @grad_norm.setter
    def grad_norm(self, norms: Sequence[Tensor | None] | None) -> None:
        for runner, norm in zip(self.runners, norms or [None] * len(self.runners), strict=True):
            runner.grad_norm = norm

    def restart_scaler(self) -> None:
        for runner in self.runners:
            runner.restart_scaler()


class _Recorded(CudaGraphStep):
    """A joint step is recorded whole or not at all."""

    def _in_parts(self, obstacle: str) -> None:
        self._forget()
        self.runner.perform = self.runner.execute
        self.runner.say(f"the stacked step cannot be one CUDA graph ({obstacle}); it runs as it is.")


def _told(runner: Runner, values: Tensor) -> Callable[[Update, Sequence[Batch]], None]:
    """Stands for making an update's gradients, when they are there already."""
    return lambda update, _: runner.meters.add(values, update.meter_indices)
