"""One run of a recipe, from its folder to its summary: teachers first, then its stages, checkpoints and logs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from kdbench.engine.state.weight_loader import WeightLoader, collect_stage_weights
from kdbench.engine.state.weights import state_hash
from kdbench.engine.train.loop import History, TrainingLoop
from kdbench.engine.train.runner import Runner
from kdbench.errors import TrainingError, UserError
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
from kdbench.files import read_json, write_atomic, write_json
from kdbench.report.console import ConsoleReporter
from kdbench.report.summary import build_summary
from kdbench.report.tracking import Tracker
from kdbench.run_folder import RunFolder
from kdbench.speed.profiling.latency import measure_latency
from kdbench.speed.teacher_cache.frozen_forward import FrozenForwardPlan

StageReadyCallback: TypeAlias = Callable[[Runner], None]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its folder, and the content of summary.json."""

    folder: RunFolder
    summary: Mapping[str, Any]
    already_finished: bool
    """Whether it had been finished before and nothing was trained."""
    is_main: bool = True
    """Whether this process is the one that speaks."""


def run(recipe: Recipe, *, console: ConsoleReporter | None = None, on_stage_ready: StageReadyCallback | None = None) -> Outcome:
    """Trains a recipe to its end, or goes on where an earlier attempt stopped.

    Args:
        console: what the person sees.
        attend: gets the runner of each stage when it is ready for its first step (not those of teachers).

    Raises:
        UserError: anything that the user can mend; what was saved stays.
    """
    device = resolve_device(recipe.device)
    for stage in recipe.stages:
        check_precision(stage.precision, device)
    with out_of_memory_as_training_error(device), init_world(device.type) as world:
        if device.type == "cuda" and world.size > 1:
            device = set_local_gpu(world)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the caller's draws stay as they were
            with world.sync_errors():
                setup = RunContext(recipe, device, world)
            return _Run(setup, console, on_stage_ready).run()


class _Run:
    """A run from where it stands to its end."""

    def __init__(self, context: RunContext, console: ConsoleReporter | None, on_stage_ready: StageReadyCallback | None = None) -> None:
        self.context, self.console, self.on_stage_ready = context, console, on_stage_ready
        self.recipe, self.device, self.world, self.folder = context.recipe, context.device, context.world, context.folder
        self.final_stage = context.recipe.stages[-1].name
        self.history = History()
        self.finished_stages: dict[str, int] = {}  # stage -> its steps

    def run(self, *, wait: bool = False) -> Outcome:
        """Returns at once when the run is finished; else plans, sees to the teachers, and trains.

        Args:
            wait: wait for another process that is training the same run, as for a teacher that two students share.
        """
        if not self.recipe.fresh and self.context.status() == "finished":
            return self._finished_outcome()
        with self.world.sync_errors():
            self.context.plan()
        for (_, name), teacher in self.context.teachers.items():
            _Run(teacher, ConsoleReporter(prefix=f"{name}: ") if self.world.is_main else None).run(wait=True)
        told = (self.console or ConsoleReporter()).notice if wait else None
        with contextlib.ExitStack() as held:
            with self.world.sync_errors():
                if self.world.is_main:
                    held.enter_context(self.folder.lock(on_wait=told))
                    if self.recipe.fresh:
                        self.folder.clear()
            status = self.context.status()  # another process may have finished it meanwhile
            if status == "finished":
                return self._finished_outcome()
            tracker = Tracker(
                self.folder.path, is_main=self.world.is_main, tensorboard=self.recipe.tensorboard, console=self.console
            )
            try:
                with out_of_memory_as_training_error(self.device):
                    return self._train(tracker, resumed=status == "interrupted")
            except UserError as error:
                if self.world.is_main and self.folder.manifest.exists():
                    with contextlib.suppress(TrainingError):  # no space to say so: the first message stands
                        finish_manifest(self.folder.manifest, "failed", str(error))
                raise
            finally:
                tracker.close()
                self.context.close()

    @property
    def steps_before(self) -> int:
        """Steps of the stages that are over."""
        return sum(self.finished_stages.values())

    def _finished_outcome(self) -> Outcome:
        return Outcome(self.folder, read_json(self.folder.summary), already_finished=True, is_main=self.world.is_main)

    def _train(self, tracker: Tracker, *, resumed: bool) -> Outcome:
        if self.device.type == "cuda":  # an earlier run of this process (a teacher) refers to itself, with its memory
            gc.collect()
        tree, notice = self._load_checkpoint() if resumed else (None, "")
        if tree is not None:
            tracker.load_state_dict(tree["tracker"])
            self.history = History(**tree["history"])
            self.finished_stages = dict(tree["finished"])
        with self.world.sync_errors():
            self._start_logs(tracker, tree, notice)
        last: tuple[Evaluator, Runner] | None = None
        for position, stage in enumerate(self.recipe.stages):
            if stage.name in self.finished_stages and stage.name != self.final_stage:
                continue
            with self.world.sync_errors():
                plan = self.context.stage_plan(position)
            with precision_settings(stage.precision):
                last = self._train_stage(plan, tree, tracker)
        assert last is not None
        with precision_settings(last[1].stage.precision):
            return self._write_summary(*last, tracker)

    def _load_checkpoint(self) -> tuple[dict[str, Any] | None, str]:
        """The newest checkpoint, which every process reads by itself.

        Raises:
            UserError: there are some but none is good, or a process reads another one than the first does.
        """
        with self.world.sync_errors():
            tree, notice = checkpoint.load(self.folder.last)
        own = "none" if tree is None else f"stage {tree['stage']}, step {tree['step']}"
        first = self.world.broadcast(own)
        with self.world.sync_errors():
            if own != first:
                raise UserError(
                    f"{self.folder} holds another checkpoint here ({own}) than where the first process reads it "
                    f"({first}). All machines must see one folder of runs: set runs=DIR on a disk that they share."
                )
        return tree, notice

    def _train_stage(self, plan: StagePlan, tree: Mapping[str, Any] | None, tracker: Tracker) -> tuple[Evaluator, Runner]:
        stage = plan.stage
        with self.world.sync_errors():
            sources = self.context.sources(stage)
            judge = Evaluator(self.recipe, stage, plan, sources, self.world, self.device, tracker, self.history)
            network, preparation = self.context.network(plan, tracker.notice)
        runner = self.context.runner(network, plan, sources, tracker.notice)
        if self.world.is_main:
            runner.record = lambda facts: amend_session(self.folder.manifest, facts)
        if tree is not None and tree["stage"] == stage.name:
            runner.load_state_dict(tree)
        else:
            measured = judge.evaluate_frozen_roles(runner.network, self.steps_before)
            if self.world.is_main:
                facts: dict[str, Any] = {"roles": role_entries(plan, preparation.origins, measured)}
                amend_manifest(self.folder.manifest, facts | {"data": source_entries(stage, sources)})
        self._run_stage(runner, sources, judge, tracker)
        self._write_stage_outputs(runner, sources, preparation)
        if stage.name != self.final_stage:
            self.finished_stages[stage.name] = runner.total_steps
        return judge, runner

    def _start_logs(self, tracker: Tracker, tree: Mapping[str, Any] | None, notice: str) -> None:
        if self.world.is_main:
            write_atomic(self.folder.recipe, dump_recipe(self.recipe).encode())
            changes = write_manifest(
                self.folder.manifest,
                recipe=self.recipe,
                identity=self.context.identity,
                device=str(self.device),
                world_size=self.world.size,
                training={s.name: training_entries(s, self.world.size) for s in self.recipe.stages},
                data=data_entries(self.recipe, [stage.specs for stage in self.context.described_stages], self.context.checksums),
                parts=part_versions(self.recipe),
            )
        else:
            changes = []
        where = f"stage {tree['stage']}, step {tree['step']}" if tree is not None else ""
        evaluation = self.recipe.stages[0].data.get("eval") or next(iter(self.recipe.stages[0].data.values()))
        dataset = open_dataset(evaluation, self.recipe.data_root)
        tracker.start(
            {
                "name": self.recipe.name,
                "folder": str(self.folder),
                "device": describe_device(self.device),
                "classes": getattr(dataset, "classes", None),
                "recipe": dump_recipe(self.recipe),
                **({"resumed": f"going on from {where}"} if where else {}),
            }
        )
        for text in (*filter(None, [notice]), *changes, *self.recipe.baseline_removed):
            tracker.notice(text)

    def _run_stage(self, runner: Runner, sources: Mapping[str, Source], judge: Evaluator, tracker: Tracker) -> None:
        stage = runner.stage
        if self.on_stage_ready is not None:
            self.on_stage_ready(runner)
        tracker.stage(stage.name, stage.epochs, runner.total_steps, runner.steps_done)

        def told(arrangement: FrozenForwardPlan) -> None:
            if arrangement.describe():
                tracker.notice(arrangement.describe())
            self._record_frozen_forward(stage, arrangement)

        arrangement = self.context.frozen_forward_plan(runner, sources, told)
        TrainingLoop(
            runner,
            arrangement.feed,
            tracker,
            self.history,
            evaluate=lambda epoch: self._evaluate(runner, judge, epoch),
            checkpoint=lambda: self._save_checkpoint(runner, tracker),
            steps_before=self.steps_before,
        ).run()
        if arrangement.cached_sources:
            self._record_frozen_forward(stage, arrangement)
        if runner.total_steps == 0 and not judge.has_evaluated(stage.name):
            self._evaluate(runner, judge, 0)
            self._save_checkpoint(runner, tracker)

    def _record_frozen_forward(self, stage: StageConfig, arrangement: FrozenForwardPlan) -> None:
        """Writes down how roles that do not move are run: bits are the same only where this is the same."""
        if self.world.is_main:
            amend_manifest(self.folder.manifest, {"frozen_forward": {stage.name: arrangement.manifest_entries()}})

    def _write_stage_outputs(self, runner: Runner, sources: Mapping[str, Source], preparation: WeightLoader) -> None:
        """Leaves what later stages start from and read. One process writes it, the others wait and read the files."""
        stage = runner.stage
        state = self._exported_weights(runner)
        with self.world.sync_errors():
            if self.world.is_main and len(self.recipe.stages) > 1:
                models = collect_stage_weights(self.recipe, stage, state["models"], preparation.frozen_states)
                checkpoint.save(self.folder.stage(stage.name), {**state, "models": models})
            if self.world.is_main and stage.artifacts:
                whole = sources if self.world.size == 1 else self.context.sources(stage, World())
                made = build_artifacts(self.recipe, runner, runner.plan, whole, self.folder, preparation.origins)
                amend_manifest(self.folder.manifest, {"artifacts": made})

    def _evaluate(self, runner: Runner, judge: Evaluator, epoch: int) -> None:
        best = judge.evaluate_trained_roles(runner, epoch, self.steps_before + runner.steps_done)
        kept = epoch in self.recipe.keep_epochs and runner.stage.name == self.final_stage
        if not best and not kept:
            return
        tree = {**self._exported_weights(runner), "epoch": epoch}
        with self.world.sync_errors():
            for wanted, file in ((best, self.folder.best), (kept, self.folder.epoch(epoch))):
                if wanted and self.world.is_main:
                    checkpoint.save(file, tree)

    def _exported_weights(self, runner: Runner) -> dict[str, Any]:
        state = runner.state_dict()
        kept = {name: state[name] for name in ("models", "baked", "average")}
        return {"export": runner.stage.export, **kept}

    def _save_checkpoint(self, runner: Runner, tracker: Tracker) -> None:
        tree = {
            **runner.state_dict(),
            "export": runner.stage.export,
            "identity": self.context.identity,
            "stage": runner.stage.name,
            "finished": self.finished_stages,
            "history": vars(self.history),
        }
        with self.world.sync_errors():
            if self.world.is_main:
                tree["tracker"] = tracker.state_dict()
                checkpoint.save(self.folder.last, tree, keep_previous=True)

    def _write_summary(self, judge: Evaluator, runner: Runner, tracker: Tracker) -> Outcome:
        plan = runner.plan
        scores = judge.final_evaluation(runner, self.steps_before + runner.steps_done)
        stage = runner.stage
        models: dict[str, Any] = {}
        for name, role in plan.roles.items():
            module = runner.network.role(name).model
            models[name] = {
                "model": role.model,
                "parameters": role.parameters,
                "flops": role.full_forward_flops,
                "weights_sha256": state_hash(module),
            }
            alone = upstream_role(role.config) is None and not role.config.extra_inputs
            if (
                alone
                and name not in runner.network.sharded
                and plan.specs[plan.resolved_stage.sources[name]].classes is not None
            ):
                models[name]["latency_ms"] = measure_latency(module, judge.example_input())
        final = self.history.evaluations[-1] if self.history.evaluations else {}
        summary = build_summary(
            recipe=self.recipe,
            last={**final, "metrics": scores["moving"]},
            best=self.history.best.get(stage.name),
            frozen=scores["frozen"],
            models=models,
            wall_seconds=self.history.seconds,
            identity=self.context.identity,
            export=stage.export,
            device=describe_device(self.device),
        )
        with self.world.sync_errors():
            if self.world.is_main:
                tracker.hparams({"seed": self.recipe.seed, **training_entries(stage, self.world.size)})
                write_json(self.folder.summary, summary)
                finish_manifest(self.folder.manifest, "finished")
        return Outcome(self.folder, summary, already_finished=False, is_main=self.world.is_main)
