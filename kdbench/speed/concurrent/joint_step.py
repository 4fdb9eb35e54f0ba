"""Joint steps of concurrent runs: their students form one stacked network, with one forward and one backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdbench.data.loading.batch import MicroBatch, Window
from kdbench.engine.network.features import Feature
from kdbench.engine.network.roles import Role, root_role
from kdbench.engine.train.optimizers import stays_on_device
from kdbench.engine.train.runner import Runner
from kdbench.engine.train.steps import StepStrategy
from kdbench.engine.train.updates import Update
from kdbench.speed.concurrent.stacked_network import StackedNetwork, stacking_difference, unstackable_layer
from kdbench.speed.cuda_graph import CudaGraphStep, CudaRecorder

EXACT = 1e-8
"""Largest relative difference, in float64, between stacked and separate students that counts as rounding."""


def stacking_key(runner: Runner) -> Hashable:
    """Returns a key that is equal for runs whose students can be stacked, which means computed as one network.

    The key contains the architecture, the input and the number format.
    """
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
    """Returns the reason why a run's student cannot be stacked, or an empty string.

    Stacked students of several runs are computed as one network.
    """
    stage, roles = runner.stage, runner.stage.roles
    export = stage.export
    config = roles[export]
    [update, *more] = runner.updates or [None]
    states = (leaf for operand in stage.read_operands() for leaf in operand.feature_operands() if leaf.is_state)
    reasons = {
        "several processes train it": runner.world.size > 1,
        "its step is compiled (with compile=cuda_graph it would not be)": runner.eager.compiled,
        "fp16 scales the losses of each run by a different factor": stage.precision == "fp16",
        "stacking is verified in float64, which an Apple GPU does not have": runner.device.type == "mps",
        "it accumulates gradients over several batches": stage.accumulate > 1,
        "its step is not one update of the student without `select`, `inner_step` and `repeat`": (
            update is None or bool(more) or not _is_plain(update, export)
        ),
        "its student is not trained directly": config.mode != "trainable",
        "its student reads outputs of other roles": ":" in config.input or bool(config.extra_inputs),
        "its student has weight transforms": bool(config.transforms),
        "modules of its student are reused as other roles": any(
            name != export and root_role(name, roles) == export for name in runner.plan.resolved_stage.order
        ),
        "a term reads its student's weights": any(root_role(leaf.role, roles) == export for leaf in states),
    }
    return next((reason for reason, holds in reasons.items() if holds), "") or unstackable_layer(
        _student(runner)[0].model
    )


def _is_plain(update: Update, export: str) -> bool:
    config = update.config
    return update.select is None and config.inner_step is None and config.repeat == 1 and export in config.models


def _student(runner: Runner) -> tuple[Role, frozenset[Feature]]:
    """Returns a run's student, and the student's features that later operations overwrite in place."""
    name = runner.stage.export
    return runner.network.role(name), runner.plan.resolved_stage.overwritten.get(name, frozenset())


def stacking_errors(runners: Sequence[Runner], window: Sequence[MicroBatch]) -> tuple[float, float]:
    """Compares the stacked students of several runs (students in one network) with each student alone.

    Args:
        runners: one training loop for each run.
        window: one micro-batch for each run. The comparison uses these batches.

    Returns:
        The largest relative difference in float64, and the largest relative difference in the precision of the runs.
    """
    first = runners[0]
    role, overwritten = _student(first)
    images = [_student_input(runner, batches) for runner, batches in zip(runners, window, strict=True)]
    models, dtype = [_student(runner)[0].model for runner in runners], next(role.model.parameters()).dtype
    exact = stacking_difference(models, role.features, overwritten, images, torch.float64)
    if dtype == torch.float64:
        return exact, exact
    return exact, stacking_difference(models, role.features, overwritten, images, dtype, first.eager.autocast())


def _student_input(runner: Runner, batches: MicroBatch) -> Tensor:
    source, field = runner.stage.roles[runner.stage.export].input.split(".", 1)
    return batches[source].fields[field]


class JointStep:
    """Step strategy that computes one step of several runs together. The students of the runs form one network.

    The argument of `run` contains one micro-batch for each run. After the construction of a `JointStep`, the
    parameters of every student are views of the stacked network's parameters.

    Args:
        runners: training loops of the runs. They have equal return values of `stacking_key`, and `stacking_obstacle`
            returns an empty string for each of them.

    Attributes:
        network: module list of the networks of all runs.
        draws_random: True once any run has drawn random numbers on the GPU.
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = list(runners)
        first = self.runners[0]
        self.device, self.export = first.device, first.stage.export
        self.source = first.network.sources[self.export]
        self.updates = [runner.updates[0] for runner in self.runners]
        self.network = nn.ModuleList(runner.network for runner in self.runners)
        role, overwritten = _student(first)
        self.stacked = StackedNetwork(
            [_student(runner)[0].model for runner in self.runners], role.features, overwritten
        )
        self.stacked.alias_parameters()
        stacked, separate = self.stacked.stacked_parameters(p for update in self.updates for p in update.parameters)
        self.inputs = [*stacked, *separate]
        self.draws_random = False

    def run(self, window: Window) -> None:
        """Executes one step of every run. `window` contains one micro-batch for each run."""
        losses = self._backward(window)
        for runner, batches, values in zip(self.runners, window, losses, strict=True):
            runner.timer.restart()
            runner.eager.run([batches], _add_to_meters(runner, values))
            runner.timer.end_section("optimizer")

    def _backward(self, window: Window) -> list[Tensor]:
        """Computes the gradients of all runs into `grad` of their parameters, and returns the losses of each run."""
        for runner, update in zip(self.runners, self.updates, strict=True):
            update.optimizer.zero_grad(set_to_none=True)
            runner.timer.restart()
        self.stacked.network.zero_grad(set_to_none=True)
        with self.runners[0].eager.autocast():
            features = self.stacked(
                [_student_input(r, batches) for r, batches in zip(self.runners, window, strict=True)]
            )
        self._end_section("student")
        totals, losses = [], []
        for runner, batches, student_features in zip(self.runners, window, features, strict=True):
            total, values = self._losses(runner, batches, student_features)
            totals.append(total)
            losses.append(values)
        for runner in self.runners:
            runner.timer.restart()
        torch.autograd.backward(totals, inputs=self.inputs)
        self.stacked.distribute_gradients()
        self._end_section("backward")
        return losses

    def _losses(self, runner: Runner, batches: MicroBatch, features: Mapping[Feature, Tensor]) -> tuple[Tensor, Tensor]:
        """Computes the losses of one run from the features of the run's student, under the run's own random seed.

        Returns:
            The total loss, and a tensor with the value of each loss term.
        """
        runner.timer.restart()
        [update] = runner.updates
        batch = batches[self.source].with_precomputed({(self.export, f): value for f, value in features.items()})
        batches = {**batches, self.source: batch}
        counts = runner.network.valid_counts([batches], update.wiring.terms)
        with self._seed_generators_for(runner), runner.eager.autocast():
            return runner.eager.compute_losses(batches, counts, update.wiring, 1.0)

    @contextlib.contextmanager
    def _seed_generators_for(self, runner: Runner) -> Iterator[None]:
        """Seeds torch's random generators with the seed of one run's next step, before the block runs.

        A CUDA graph cannot contain a change of the seed. Therefore the recording of a graph raises a RuntimeError if
        runs draw random numbers on the GPU.
        """
        on_cuda = self.device.type == "cuda"
        if on_cuda and torch.cuda.is_current_stream_capturing():
            if self.draws_random:
                raise RuntimeError("the runs draw random numbers, each run with a different seed")
            yield
            return
        runner.seed_generators()
        before = torch.cuda.get_rng_state(self.device) if on_cuda else None
        yield
        if before is not None:
            self.draws_random |= not torch.equal(before, torch.cuda.get_rng_state(self.device))

    def _end_section(self, name: str) -> None:
        for runner in self.runners:
            runner.timer.end_section(name)

    # Recording as a CUDA graph

    def variant(self) -> Hashable:
        return tuple(runner.eager.variant() for runner in self.runners)

    def take_grad_norm(self) -> list[Tensor | None] | None:
        norms = [runner.eager.take_grad_norm() for runner in self.runners]
        return norms if any(norm is not None for norm in norms) else None

    def put_grad_norm(self, norm: Sequence[Tensor | None] | None) -> None:
        for runner, run_norm in zip(self.runners, norm or [None] * len(self.runners), strict=True):
            runner.eager.put_grad_norm(run_norm)

    def discard_unfinished(self) -> None:
        for runner in self.runners:
            runner.eager.discard_unfinished()


def _add_to_meters(runner: Runner, losses: Tensor) -> Callable[[Update, Window], None]:
    """Returns a function for `EagerStep.run` that only logs losses, because the gradients are computed already."""
    return lambda update, window: runner.meters.add(losses, update.meter_indices)


def joint_strategy(joint: JointStep, notice: Callable[[str], None]) -> StepStrategy:
    """Returns a strategy that executes one step of several concurrent runs as a CUDA graph, or eagerly if that is
    impossible."""
    first = joint.runners[0]
    if not first.recipe.uses_cuda_graph(joint.device.type):
        return joint
    if not all(stays_on_device(update.optimizer) for update in joint.updates):
        return joint

    def eagerly(obstacle: str) -> StepStrategy:
        notice(f"the joint step of the runs cannot be recorded as a CUDA graph ({obstacle}); joint steps run eagerly.")
        return joint

    return CudaGraphStep(joint, CudaRecorder(joint.device), eagerly)
