"""Runs a recipe: its teacher runs, then its stages with checkpoints and logs, then the summary."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kdbench.config.load import dump_recipe
from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.describe import open_dataset
from kdbench.data.loading.source import Source
from kdbench.engine.device import (
    check_precision,
    describe_device,
    out_of_memory_as_training_error,
    precision_settings,
    resolve_device,
)
from kdbench.engine.distributed.world import World, init_world, set_local_gpu
from kdbench.engine.evaluation.evaluator import Evaluator
from kdbench.engine.network.roles import upstream_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state import checkpoint
from kdbench.engine.state.run_state import History, ModelFile, RunState
from kdbench.engine.state.weight_loader import WeightLoader, collect_stage_weights
from kdbench.engine.state.weights import read_checkpoint, state_hash
from kdbench.engine.train.loop import TrainingLoop
from kdbench.engine.train.runner import Runner
from kdbench.errors import CheckpointError, UserError
from kdbench.experiment.artifacts import build_artifacts
from kdbench.experiment.context import RunContext
from kdbench.experiment.manifest import (
    amend_manifest,
    amend_session,
    data_entries,
    finish_manifest,
    part_versions,
    role_entries,
    source_entries,
    training_entries,
    write_manifest,
)
from kdbench.files import write_atomic, write_json
from kdbench.report.console import ConsoleReporter
from kdbench.report.summary import build_summary
from kdbench.report.tracking import Tracker
from kdbench.run_folder import RunFolder, read_summary
from kdbench.speed.profiling.latency import measure_latency
from kdbench.speed.teacher_cache.frozen_forward import FrozenForwardPlan

StageReadyCallback: TypeAlias = Callable[[Runner], None]


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        folder: the run folder.
        summary: content of summary.json.
        already_finished: whether the run had finished before, so that nothing was trained.
        is_main: whether this process is rank 0, which prints.
    """

    folder: RunFolder
    summary: Mapping[str, Any]
    already_finished: bool
    is_main: bool = True


def run(
    recipe: Recipe, *, console: ConsoleReporter | None = None, on_stage_ready: StageReadyCallback | None = None
) -> Outcome:
    """Trains a recipe to its end, or resumes an interrupted run from its last checkpoint.

    Args:
        console: console that shows the progress; None: a new console on standard output.
        on_stage_ready: function that is called with the runner of each stage before its first step. Teacher runs do
            not call it.

    Raises:
        UserError: the user can fix the error. All saved files stay intact.
    """
    device = resolve_device(recipe.device)
    for stage in recipe.stages:
        check_precision(stage.precision, device)
    with out_of_memory_as_training_error(device), init_world(device.type) as world:
        if device.type == "cuda" and world.size > 1:
            device = set_local_gpu(world)
        # The caller's random generators keep their state.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with world.sync_errors():
                context = RunContext(recipe, device, world)
            return _Run(context, console, on_stage_ready).run()


class RunNotices:
    """Receiver of the engine's reports: shows messages through the tracker and merges entries into the manifest.

    Args:
        tracker: tracker that shows the messages.
        manifest: path of the manifest; None on a rank that does not write it.
    """

    def __init__(self, tracker: Tracker, manifest: Path | None = None) -> None:
        self.tracker, self.manifest = tracker, manifest

    def notice(self, text: str) -> None:
        self.tracker.notice(text)

    def record(self, entries: Mapping[str, Any]) -> None:
        if self.manifest is not None:
            amend_session(self.manifest, entries)


class _Run:
    """One run of a recipe, from its current status (new, interrupted or finished) to its end."""

    def __init__(
        self, context: RunContext, console: ConsoleReporter | None, on_stage_ready: StageReadyCallback | None = None
    ) -> None:
        self.context, self.console, self.on_stage_ready = context, console, on_stage_ready
        self.recipe, self.device = context.recipe, context.device
        self.world, self.folder = context.world, context.folder
        self.final_stage = context.recipe.stages[-1].name
        self.history = History()
        self.finished_stages: dict[str, int] = {}  # stage -> its steps

    def run(self, *, wait: bool = False) -> Outcome:
        """Plans the stages, trains missing teachers, then trains the stages. Returns at once if the run is finished.

        Args:
            wait: whether to wait for another process that trains the same run (such as a teacher that two students
                share).
        """
        if not self.recipe.fresh and self.context.status() == "finished":
            return self._finished_outcome()
        with self.world.sync_errors():
            self.context.plan()
        for (_, name), teacher in self.context.teachers.items():
            _Run(teacher, ConsoleReporter(prefix=f"{name}: ") if self.world.is_main else None).run(wait=True)
        on_wait = (self.console or ConsoleReporter()).notice if wait else None
        with contextlib.ExitStack() as stack:
            with self.world.sync_errors():
                if self.world.is_main:
                    stack.enter_context(self.folder.lock(on_wait=on_wait))
                    if self.recipe.fresh:
                        self.folder.clear()
            status = self.context.status()  # read again: another process may have finished the run before the lock
            if status == "finished":
                return self._finished_outcome()
            tracker = Tracker(
                self.folder.path, is_main=self.world.is_main, tensorboard=self.recipe.tensorboard, console=self.console
            )
            try:
                with out_of_memory_as_training_error(self.device):
                    return self._train(tracker, resumed=status == "interrupted")
            except UserError as error:
                if self.world.is_main:
                    # Without a manifest, or when the disk fails, the first error is the one to report.
                    with contextlib.suppress(UserError):
                        finish_manifest(self.folder.manifest, "failed", str(error))
                raise
            finally:
                tracker.close()
                self.context.close()

    @property
    def steps_before(self) -> int:
        """The number of steps in all finished stages."""
        return sum(self.finished_stages.values())

    def _finished_outcome(self) -> Outcome:
        summary = read_summary(self.folder.summary)
        return Outcome(self.folder, summary, already_finished=True, is_main=self.world.is_main)

    def _train(self, tracker: Tracker, *, resumed: bool) -> Outcome:
        if self.device.type == "cuda":  # reference cycles of an earlier run (a teacher) still hold GPU memory
            gc.collect()
        state, notice = self._load_checkpoint() if resumed else (None, "")
        if state is not None:
            tracker.load_state_dict(state.tracker)
            self.history = state.history
            self.finished_stages = dict(state.finished_stages)
        with self.world.sync_errors():
            self._start_logs(tracker, state, notice)
        trained: tuple[Evaluator, Runner] | None = None
        for position, stage in enumerate(self.recipe.stages):
            if stage.name in self.finished_stages and stage.name != self.final_stage:
                continue
            with self.world.sync_errors():
                plan = self.context.stage_plan(position)
            with precision_settings(stage.precision):
                trained = self._train_stage(plan, state, tracker)
        assert trained is not None
        evaluator, runner = trained
        with precision_settings(runner.stage.precision):
            return self._write_summary(evaluator, runner, tracker)

    def _load_checkpoint(self) -> tuple[RunState | None, str]:
        """Reads the newest intact checkpoint. Every rank reads the file.

        Raises:
            UserError: no checkpoint is intact, or the ranks read different checkpoints.
        """
        stages = [stage.name for stage in self.recipe.stages]
        with self.world.sync_errors():
            state, notice = checkpoint.load(self.folder.last, identity=self.context.identity, stages=stages)
        position = "none" if state is None else f"stage {state.stage}, step {state.step}"
        main_position = self.world.broadcast(position)
        with self.world.sync_errors():
            if position != main_position:
                raise UserError(
                    f"{self.folder} has another checkpoint here ({position}) than on rank 0 ({main_position}). All "
                    "machines must use one folder of runs: set runs=DIR on a disk that they share."
                )
            if notice and self.world.is_main:
                checkpoint.restore_previous(self.folder.last)
        return state, notice

    def _train_stage(self, plan: StagePlan, state: RunState | None, tracker: Tracker) -> tuple[Evaluator, Runner]:
        stage = plan.stage
        notices = RunNotices(tracker, self.folder.manifest if self.world.is_main else None)
        with self.world.sync_errors():
            sources = self.context.open_sources(stage, notice=notices.notice)
            evaluator = Evaluator(self.recipe, stage, plan, sources, self.world, self.device, tracker, self.history)
            network, loader = self.context.build_network(plan, notices)
        runner = self.context.build_runner(network, plan, sources, notices)
        if state is not None and state.stage == stage.name:
            # An evaluation with another number of processes may count different steps, but a resumed run may not.
            if state.total_steps != runner.progress.total_steps:
                raise CheckpointError(
                    f"{self.folder.last} is damaged: entry 'total_steps' is {state.total_steps}, but stage "
                    f"{stage.name!r} has {runner.progress.total_steps} steps"
                )
            runner.load_training_state(state, self.folder.last)
        else:
            frozen_scores = evaluator.evaluate_frozen_roles(runner.network, self.steps_before)
            if self.world.is_main:
                entries: dict[str, Any] = {"roles": role_entries(plan, loader.origins, frozen_scores)}
                amend_manifest(self.folder.manifest, entries | {"data": source_entries(stage, sources)})
        self._run_stage(runner, sources, evaluator, tracker)
        self._write_stage_outputs(runner, sources, loader)
        if stage.name != self.final_stage:
            self.finished_stages[stage.name] = runner.progress.total_steps
        return evaluator, runner

    def _start_logs(self, tracker: Tracker, state: RunState | None, notice: str) -> None:
        """Writes the resolved recipe and the manifest, and prints the header of the run with its notices."""
        messages = [notice] if notice else []
        if self.world.is_main:
            messages += [f"{problem}; the file is written again." for problem in self.folder.problems()]
            messages += self._best_file_problems(state)
            write_atomic(self.folder.recipe, dump_recipe(self.recipe).encode())
            specs = [stage.specs for stage in self.context.described_stages]
            messages += write_manifest(
                self.folder.manifest,
                recipe=self.recipe,
                identity=self.context.identity,
                device=str(self.device),
                world_size=self.world.size,
                training={s.name: training_entries(s, self.world.size) for s in self.recipe.stages},
                data=data_entries(self.recipe, specs, self.context.checksums),
                parts=part_versions(self.recipe),
            )
        # The class names label the figures; they come from the evaluation source if there is one.
        data = self.recipe.stages[0].data
        dataset = open_dataset(data.get("eval") or next(iter(data.values())), self.recipe.data_root)
        position = "" if state is None else f"resuming from stage {state.stage}, step {state.step}"
        tracker.start(
            {
                "name": self.recipe.name,
                "folder": str(self.folder),
                "device": describe_device(self.device),
                "classes": getattr(dataset, "classes", None),
                "recipe": dump_recipe(self.recipe),
                **({"resumed": position} if position else {}),
            }
        )
        for text in (*messages, *self.recipe.baseline_removed):
            tracker.notice(text)

    def _best_file_problems(self, state: RunState | None) -> list[str]:
        """Returns a message if a resumed run needs best.pt but the file cannot be read.

        It is written again by a better epoch.
        """
        best = None if state is None else state.history.best.get(state.stage)
        if best is None:
            return []
        try:
            ModelFile.from_tree(read_checkpoint(self.folder.best), self.folder.best, identity=self.context.identity)
            return []
        except CheckpointError as error:
            effect = f"the weights of epoch {best['epoch']} are lost; the file is written again after a better epoch."
            return [f"{error}; {effect}"]

    def _run_stage(self, runner: Runner, sources: Mapping[str, Source], evaluator: Evaluator, tracker: Tracker) -> None:
        stage = runner.stage
        if self.on_stage_ready is not None:
            self.on_stage_ready(runner)
        tracker.stage(stage.name, stage.epochs, runner.progress.total_steps, runner.progress.steps_done)

        def on_decision(frozen_forward: FrozenForwardPlan) -> None:
            description = frozen_forward.describe()
            if description:
                tracker.notice(description)
            self._record_frozen_forward(stage, frozen_forward)

        frozen_forward = self.context.frozen_forward_plan(runner, sources, on_decision)
        TrainingLoop(
            runner,
            frozen_forward.feed,
            tracker,
            self.history,
            evaluate=lambda epoch: self._evaluate(runner, evaluator, epoch),
            checkpoint=lambda: self._save_checkpoint(runner, tracker),
            steps_before=self.steps_before,
        ).run()
        if frozen_forward.cached_sources:  # the numbers of rows are final now
            self._record_frozen_forward(stage, frozen_forward)
        if runner.progress.total_steps == 0 and not evaluator.has_evaluated(stage.name):
            self._evaluate(runner, evaluator, 0)
            self._save_checkpoint(runner, tracker)

    def _record_frozen_forward(self, stage: StageConfig, frozen_forward: FrozenForwardPlan) -> None:
        """Records in the manifest how frozen roles run.

        A resumed run has equal results only if they run in the same way.
        """
        if self.world.is_main:
            amend_manifest(self.folder.manifest, {"frozen_forward": {stage.name: frozen_forward.manifest_entries()}})

    def _write_stage_outputs(self, runner: Runner, sources: Mapping[str, Source], loader: WeightLoader) -> None:
        """Writes the weights and artifacts that later stages read.

        Rank 0 writes, and the other ranks wait for rank 0.
        """
        stage = runner.stage
        model_file = runner.training_state().model_file(self.context.identity, stage.export)
        with self.world.sync_errors():
            if self.world.is_main and len(self.recipe.stages) > 1:
                models = collect_stage_weights(self.recipe, stage, model_file.models, loader.frozen_states)
                checkpoint.save(self.folder.stage(stage.name), replace(model_file, models=models))
            if self.world.is_main and stage.artifacts:
                # An artifact is built from all samples, so rank 0 opens the sources without sharding.
                all_sources = sources if self.world.size == 1 else self.context.open_sources(stage, World())
                provenance = build_artifacts(
                    self.recipe, runner, all_sources, self.folder, loader.origins, self.context.identity
                )
                amend_manifest(self.folder.manifest, {"artifacts": provenance})

    def _evaluate(self, runner: Runner, evaluator: Evaluator, epoch: int) -> None:
        stage = runner.stage
        is_best = evaluator.evaluate_trained_roles(runner, epoch, self.steps_before + runner.progress.steps_done)
        keeps_epoch = epoch in self.recipe.keep_epochs and stage.name == self.final_stage
        if not is_best and not keeps_epoch:
            return
        model_file = runner.training_state().model_file(self.context.identity, stage.export, epoch)
        with self.world.sync_errors():
            for writes, path in ((is_best, self.folder.best), (keeps_epoch, self.folder.epoch(epoch))):
                if writes and self.world.is_main:
                    checkpoint.save(path, model_file)

    def _save_checkpoint(self, runner: Runner, tracker: Tracker) -> None:
        training_state = runner.training_state()
        with self.world.sync_errors():
            if self.world.is_main:
                state = RunState(
                    **vars(training_state),
                    identity=self.context.identity,
                    stage=runner.stage.name,
                    finished_stages=self.finished_stages,
                    export=runner.stage.export,
                    history=self.history,
                    tracker=tracker.state_dict(),
                )
                checkpoint.save(self.folder.last, state, keep_previous=True)

    def _write_summary(self, evaluator: Evaluator, runner: Runner, tracker: Tracker) -> Outcome:
        scores = evaluator.final_evaluation(runner, self.steps_before + runner.progress.steps_done)
        stage = runner.stage
        evaluations = self.history.evaluations
        last: dict[str, Any] = dict(evaluations[-1]) if evaluations else {}
        summary = build_summary(
            recipe=self.recipe,
            last={**last, "metrics": scores["trained"]},
            best=self.history.best.get(stage.name),
            frozen=scores["frozen"],
            models=_model_entries(runner, evaluator),
            wall_seconds=self.history.seconds,
            identity=self.context.identity,
            export=stage.export,
            device=describe_device(self.device),
        )
        with self.world.sync_errors():
            if self.world.is_main:
                tracker.hparams({"seed": self.recipe.seed, **training_entries(stage, self.world.size)})
                # The manifest is written last: a run counts as finished if the manifest says so and the summary exists.
                write_json(self.folder.summary, summary)
                finish_manifest(self.folder.manifest, "finished")
        return Outcome(self.folder, summary, already_finished=False, is_main=self.world.is_main)


def _model_entries(runner: Runner, evaluator: Evaluator) -> dict[str, dict[str, Any]]:
    """Returns role -> number of parameters, FLOPs, hash of the weights and latency, for the summary."""
    plan = runner.plan
    entries: dict[str, dict[str, Any]] = {}
    for name, role in plan.roles.items():
        module = runner.network.role(name).model
        entries[name] = {
            "model": role.model,
            "parameters": role.parameters,
            "flops": role.full_forward_flops,
            "weights_sha256": state_hash(module),
        }
        sees_images_alone = (
            upstream_role(role.config) is None
            and not role.config.extra_inputs
            and plan.specs[plan.resolved_stage.sources[name]].classes is not None
        )
        if sees_images_alone and name not in runner.network.sharded:
            entries[name]["latency_ms"] = measure_latency(module, evaluator.example_input())
    return entries
