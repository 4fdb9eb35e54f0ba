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
from kdbench.engine.device import choose_device, describe_device, memory_in_words, precision_settings, refuse_precision
from kdbench.engine.distributed.world import World, join_world, own_gpu
from kdbench.engine.evaluation.evaluator import Judge
from kdbench.engine.network.roles import upstream_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state import checkpoint
from kdbench.engine.state.weight_loader import Preparation, handed_on
from kdbench.engine.state.weights import state_hash
from kdbench.engine.train.loop import History, Training
from kdbench.engine.train.runner import Runner
from kdbench.errors import TrainingError, UserError
from kdbench.experiment.artifacts import make_all
from kdbench.experiment.context import Setup
from kdbench.experiment.manifest import (
    amend_manifest,
    amend_session,
    data_facts,
    finish_manifest,
    part_versions,
    role_facts,
    source_facts,
    training_facts,
    write_manifest,
)
from kdbench.files import read_json, write_atomic, write_json
from kdbench.report.console import ConsoleView
from kdbench.report.summary import build_summary
from kdbench.report.tracking import Tracker
from kdbench.run_folder import RunFolder
from kdbench.speed.profiling.latency import latency
from kdbench.speed.teacher_cache.frozen_forward import Arrangement

Attend: TypeAlias = Callable[[Runner], None]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its folder, and the content of summary.json."""

    folder: RunFolder
    summary: Mapping[str, Any]
    repeated: bool
    """Whether it had been finished before and nothing was trained."""
    is_main: bool = True
    """Whether this process is the one that speaks."""


def run(recipe: Recipe, *, console: ConsoleView | None = None, attend: Attend | None = None) -> Outcome:
    """Trains a recipe to its end, or goes on where an earlier attempt stopped.

    Args:
        console: what the person sees.
        attend: gets the runner of each stage when it is ready for its first step (not those of teachers).

    Raises:
        UserError: anything that the user can mend; what was saved stays.
    """
    device = choose_device(recipe.device)
    for stage in recipe.stages:
        refuse_precision(stage.precision, device)
    with memory_in_words(device), join_world(device.type) as world:
        if device.type == "cuda" and world.size > 1:
            device = own_gpu(world)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the caller's draws stay as they were
            with world.together():
                setup = Setup(recipe, device, world)
            return _Run(setup, console, attend).run()


class _Run:
    """A run from where it stands to its end."""

    def __init__(self, setup: Setup, console: ConsoleView | None, attend: Attend | None = None) -> None:
        self.setup, self.console, self.attend = setup, console, attend
        self.recipe, self.device, self.world, self.folder = setup.recipe, setup.device, setup.world, setup.folder
        self.final = setup.recipe.stages[-1].name
        self.history = History()
        self.finished: dict[str, int] = {}  # stage -> its steps

    def run(self, *, wait: bool = False) -> Outcome:
        """Returns at once when the run is finished; else plans, sees to the teachers, and trains.

        Args:
            wait: wait for another process that is training the same run, as for a teacher that two students share.
        """
        if not self.recipe.fresh and self.setup.status() == "finished":
            return self._told()
        with self.world.together():
            self.setup.plan()
        for (_, name), teacher in self.setup.teachers.items():
            _Run(teacher, ConsoleView(prefix=f"{name}: ") if self.world.is_main else None).run(wait=True)
        told = (self.console or ConsoleView()).notice if wait else None
        with contextlib.ExitStack() as held:
            with self.world.together():
                if self.world.is_main:
                    held.enter_context(self.folder.lock(wait=told))
                    if self.recipe.fresh:
                        self.folder.clear()
            status = self.setup.status()  # another process may have finished it meanwhile
            if status == "finished":
                return self._told()
            tracker = Tracker(
                self.folder.path, main=self.world.is_main, tensorboard=self.recipe.tensorboard, console=self.console
            )
            try:
                with memory_in_words(self.device):
                    return self._train(tracker, resumed=status == "interrupted")
            except UserError as error:
                if self.world.is_main and self.folder.manifest.exists():
                    with contextlib.suppress(TrainingError):  # no space to say so: the first message stands
                        finish_manifest(self.folder.manifest, "failed", str(error))
                raise
            finally:
                tracker.close()
                self.setup.close()

    @property
    def steps_before(self) -> int:
        """Steps of the stages that are over."""
        return sum(self.finished.values())

    def _told(self) -> Outcome:
        return Outcome(self.folder, read_json(self.folder.summary), repeated=True, is_main=self.world.is_main)

    def _train(self, tracker: Tracker, *, resumed: bool) -> Outcome:
        if self.device.type == "cuda":  # an earlier run of this process (a teacher) refers to itself, with its memory
            gc.collect()
        tree, notice = self._saved() if resumed else (None, "")
        if tree is not None:
            tracker.load_state_dict(tree["tracker"])
            self.history = History(**tree["history"])
            self.finished = dict(tree["finished"])
        with self.world.together():
            self._announce(tracker, tree, notice)
        last: tuple[Judge, Runner] | None = None
        for position, stage in enumerate(self.recipe.stages):
            if stage.name in self.finished and stage.name != self.final:
                continue
            with self.world.together():
                plan = self.setup.plan_of(position)
            with precision_settings(stage.precision):
                last = self._train_stage(plan, tree, tracker)
        assert last is not None
        with precision_settings(last[1].stage.precision):
            return self._finish(*last, tracker)

    def _saved(self) -> tuple[dict[str, Any] | None, str]:
        """The newest checkpoint, which every process reads by itself.

        Raises:
            UserError: there are some but none is good, or a process reads another one than the first does.
        """
        with self.world.together():
            tree, notice = checkpoint.load(self.folder.last)
        own = "none" if tree is None else f"stage {tree['stage']}, step {tree['step']}"
        first = self.world.share(own)
        with self.world.together():
            if own != first:
                raise UserError(
                    f"{self.folder} holds another checkpoint here ({own}) than where the first process reads it "
                    f"({first}). All machines must see one folder of runs: set runs=DIR on a disk that they share."
                )
        return tree, notice

    def _train_stage(self, plan: StagePlan, tree: Mapping[str, Any] | None, tracker: Tracker) -> tuple[Judge, Runner]:
        stage = plan.stage
        with self.world.together():
            sources = self.setup.sources(stage)
            judge = Judge(self.recipe, stage, plan, sources, self.world, self.device, tracker, self.history)
            network, preparation = self.setup.network(plan, tracker.notice)
        runner = self.setup.runner(network, plan, sources, tracker.notice)
        if self.world.is_main:
            runner.record = lambda facts: amend_session(self.folder.manifest, facts)
        if tree is not None and tree["stage"] == stage.name:
            runner.load_state_dict(tree)
        else:
            measured = judge.frozen_roles(runner.network, self.steps_before)
            if self.world.is_main:
                facts: dict[str, Any] = {"roles": role_facts(plan, preparation.origins, measured)}
                amend_manifest(self.folder.manifest, facts | {"data": source_facts(stage, sources)})
        self._run_stage(runner, sources, judge, tracker)
        self._hand_on(runner, sources, preparation)
        if stage.name != self.final:
            self.finished[stage.name] = runner.total_steps
        return judge, runner

    def _announce(self, tracker: Tracker, tree: Mapping[str, Any] | None, notice: str) -> None:
        if self.world.is_main:
            write_atomic(self.folder.recipe, dump_recipe(self.recipe).encode())
            changes = write_manifest(
                self.folder.manifest,
                recipe=self.recipe,
                identity=self.setup.identity,
                device=str(self.device),
                world_size=self.world.size,
                training={s.name: training_facts(s, self.world.size) for s in self.recipe.stages},
                data=data_facts(self.recipe, [stage.specs for stage in self.setup.rehearsed], self.setup.checksums),
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

    def _run_stage(self, runner: Runner, sources: Mapping[str, Source], judge: Judge, tracker: Tracker) -> None:
        stage = runner.stage
        if self.attend is not None:
            self.attend(runner)
        tracker.stage(stage.name, stage.epochs, runner.total_steps, runner.done)

        def told(arrangement: Arrangement) -> None:
            if arrangement.words():
                tracker.notice(arrangement.words())
            self._record_frozen(stage, arrangement)

        arrangement = self.setup.arrangement(runner, sources, told)
        Training(
            runner,
            arrangement.windows,
            tracker,
            self.history,
            evaluate=lambda epoch: self._evaluate(runner, judge, epoch),
            checkpoint=lambda: self._save(runner, tracker),
            steps_before=self.steps_before,
        ).run()
        if arrangement.tables:
            self._record_frozen(stage, arrangement)
        if runner.total_steps == 0 and not judge.evaluated(stage.name):
            self._evaluate(runner, judge, 0)
            self._save(runner, tracker)

    def _record_frozen(self, stage: StageConfig, arrangement: Arrangement) -> None:
        """Writes down how roles that do not move are run: bits are the same only where this is the same."""
        if self.world.is_main:
            amend_manifest(self.folder.manifest, {"frozen_forward": {stage.name: arrangement.facts()}})

    def _hand_on(self, runner: Runner, sources: Mapping[str, Source], preparation: Preparation) -> None:
        """Leaves what later stages start from and read. One process writes it, the others wait and read the files."""
        stage = runner.stage
        state = self._weights(runner)
        with self.world.together():
            if self.world.is_main and len(self.recipe.stages) > 1:
                models = handed_on(self.recipe, stage, state["models"], preparation.kept)
                checkpoint.save(self.folder.stage(stage.name), {**state, "models": models})
            if self.world.is_main and stage.artifacts:
                whole = sources if self.world.size == 1 else self.setup.sources(stage, World())
                made = make_all(self.recipe, runner, runner.plan, whole, self.folder, preparation.origins)
                amend_manifest(self.folder.manifest, {"artifacts": made})

    def _evaluate(self, runner: Runner, judge: Judge, epoch: int) -> None:
        best = judge.moving_roles(runner, epoch, self.steps_before + runner.done)
        kept = epoch in self.recipe.keep_epochs and runner.stage.name == self.final
        if not best and not kept:
            return
        tree = {**self._weights(runner), "epoch": epoch}
        with self.world.together():
            for wanted, file in ((best, self.folder.best), (kept, self.folder.epoch(epoch))):
                if wanted and self.world.is_main:
                    checkpoint.save(file, tree)

    def _weights(self, runner: Runner) -> dict[str, Any]:
        state = runner.state_dict()
        kept = {name: state[name] for name in ("models", "baked", "average")}
        return {"export": runner.stage.export, **kept}

    def _save(self, runner: Runner, tracker: Tracker) -> None:
        tree = {
            **runner.state_dict(),
            "export": runner.stage.export,
            "identity": self.setup.identity,
            "stage": runner.stage.name,
            "finished": self.finished,
            "history": vars(self.history),
        }
        with self.world.together():
            if self.world.is_main:
                tree["tracker"] = tracker.state_dict()
                checkpoint.save(self.folder.last, tree, keep_previous=True)

    def _finish(self, judge: Judge, runner: Runner, tracker: Tracker) -> Outcome:
        plan = runner.plan
        scores = judge.final(runner, self.steps_before + runner.done)
        stage = runner.stage
        models: dict[str, Any] = {}
        for name, role in plan.roles.items():
            module = runner.network.role(name).model
            models[name] = {
                "model": role.model,
                "parameters": role.parameters,
                "flops": role.whole_flops,
                "weights_sha256": state_hash(module),
            }
            alone = upstream_role(role.config) is None and not role.config.extra_inputs
            if (
                alone
                and name not in runner.network.sharded
                and plan.specs[plan.layout.sources[name]].classes is not None
            ):
                models[name]["latency_ms"] = latency(module, judge.example())
        final = self.history.evaluations[-1] if self.history.evaluations else {}
        summary = build_summary(
            recipe=self.recipe,
            last={**final, "metrics": scores["moving"]},
            best=self.history.best.get(stage.name),
            frozen=scores["frozen"],
            models=models,
            wall_seconds=self.history.seconds,
            identity=self.setup.identity,
            export=stage.export,
            device=describe_device(self.device),
        )
        with self.world.together():
            if self.world.is_main:
                tracker.hparams({"seed": self.recipe.seed, **training_facts(stage, self.world.size)})
                write_json(self.folder.summary, summary)
                finish_manifest(self.folder.manifest, "finished")
        return Outcome(self.folder, summary, repeated=False, is_main=self.world.is_main)
