"""One run of a recipe, from its folder to its summary: the only place where the engine and the results meet."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kdbench.config.identity import identity
from kdbench.config.load import dump_recipe, load_resolved
from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.base import open_dataset
from kdbench.data.build import build_sources
from kdbench.data.source import Source
from kdbench.engine import checkpoint
from kdbench.engine.build import build_network
from kdbench.engine.device import choose_device, describe_device, precision_settings, refuse_precision
from kdbench.engine.distributed import World, join_world, own_gpu
from kdbench.engine.network import Network
from kdbench.engine.plan import StagePlan
from kdbench.engine.prepare import Preparation, handed_on
from kdbench.engine.roles import upstream_role
from kdbench.engine.runner import Runner
from kdbench.engine.shard import shard
from kdbench.engine.training import Feed, History, Training
from kdbench.engine.weights import state_hash
from kdbench.errors import ConfigError, TrainingError, UserError, nearest
from kdbench.files import read_json, write_atomic, write_json
from kdbench.results.console import ConsoleView
from kdbench.results.facts import (
    checksums,
    data_facts,
    outside_facts,
    part_versions,
    role_facts,
    source_facts,
    training_facts,
    uses_channels_last,
)
from kdbench.results.folder import RunFolder
from kdbench.results.judge import Judge
from kdbench.results.latency import latency
from kdbench.results.making import describe_stages, made_files, made_tensors, make_all, plan_stages, reads_made
from kdbench.results.manifest import amend_manifest, finish_manifest, write_manifest
from kdbench.results.provider import provider
from kdbench.results.summary import build_summary
from kdbench.results.tracking import Tracker
from kdbench.speed.capture import capture
from kdbench.speed.frozen import TABLES, Arrangement, arrange

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
    with join_world(device.type) as world:
        if device.type == "cuda" and world.size > 1:
            device = own_gpu(world)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the caller's draws stay as they were
            with world.together():
                experiment = _Experiment(recipe, device, world, console, attend)
            return experiment.run()


def reevaluate(
    folder: RunFolder, *, device: str | None = None, data_root: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures the exported role, its average and the frozen roles of a run on its evaluation splits.

    Returns:
        role -> split -> metric -> value.

    Raises:
        UserError: the folder's checkpoint or the data cannot be read.
    """
    recipe = load_resolved(folder.recipe)
    changes: dict[str, Any] = {"out": str(folder.path)}
    changes |= {"device": device} if device else {}
    changes |= {"data_root": data_root} if data_root else {}
    recipe = replace(recipe, **changes)
    chosen = choose_device(recipe.device)
    with precision_settings(recipe.stages[0].precision):
        return _Experiment(recipe, chosen, World(), None).reevaluate(folder)


@dataclass(frozen=True)
class Opened:
    """A stage that could begin to train.

    arrangement: the batches as the recipe asks for them, with what runs outside the step in them. feed: those with
    every role in the step. missing: whose weights are not there yet, in words.
    """

    recipe: Recipe
    runner: Runner
    arrangement: Arrangement
    feed: Feed
    missing: tuple[str, ...]


@contextlib.contextmanager
def opened(recipe: Recipe, stage: str | None = None) -> Iterator[Opened]:
    """Builds a stage as `run` does, for whoever measures its steps. Nothing is trained, and nothing is kept.

    Weights that are still to be trained (a teacher's, an earlier stage's) stay as the seed gives them.

    Args:
        stage: its name; None: the last stage that has steps.

    Raises:
        UserError: there is no such stage, it reads what an earlier stage has not made yet, or what `run` would raise.
    """
    device = choose_device(recipe.device)
    names = [one.name for one in recipe.stages if one.epochs != 0 and one.steps != 0]
    if not names or (stage is not None and stage not in names):
        wrong = f"no stage {stage!r} that trains.{nearest(stage or '', names)}" if stage else "no stage trains"
        raise ConfigError(f"{recipe.name}: {wrong}")
    position = [one.name for one in recipe.stages].index(stage or names[-1])
    with torch.random.fork_rng([device] if device.type == "cuda" else []), tempfile.TemporaryDirectory() as scratch:
        experiment = _Experiment(recipe, device, World(), None)
        missing = experiment.untrained(position)
        if missing:  # the same run, but for the weights that it would wait for
            told = recipe.stages[position]
            roles = {n: replace(r, weights=None) if n in missing else r for n, r in told.roles.items()}
            stages = [replace(told, roles=roles) if one is told else one for one in recipe.stages]
            recipe = replace(recipe, stages=tuple(stages), out=str(experiment.folder))
            experiment = _Experiment(recipe, device, World(), None)
        with precision_settings(recipe.stages[position].precision):
            try:
                runner, arrangement, feed = experiment.open(position, Tracker(scratch, main=False))
                yield Opened(recipe, runner, arrangement, feed, tuple(missing.values()))
            finally:
                for source in experiment.opened:
                    source.close()


class _Experiment:
    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        world: World,
        console: ConsoleView | None,
        attend: Attend | None = None,
    ) -> None:
        self.recipe, self.device, self.world, self.console, self.attend = recipe, device, world, console, attend
        self.plans: list[StagePlan] = []
        self.rehearsed = describe_stages(recipe)
        self.channels_last = uses_channels_last(recipe, self.rehearsed[0].specs)
        self.teachers = self._teachers()
        if any(spec.problem for stage in self.rehearsed for spec in stage.specs.values()):
            self._plan()  # before anything is downloaded for a recipe that cannot run
        self.checksums = checksums(recipe)
        made = {key: teacher.identity for key, teacher in self.teachers.items()}
        self.identity = identity(recipe, outside_facts(recipe, self.checksums, made, world.size))
        self.folder = RunFolder(recipe.out or Path(recipe.runs) / recipe.name / self.identity)
        self.final = recipe.stages[-1].name
        self.history = History()
        self.finished: dict[str, int] = {}  # stage -> its steps
        self.opened: list[Source] = []

    # Before training

    def _teachers(self) -> dict[tuple[str, str], _Experiment]:
        """The runs whose students are somebody's initial weights here, by stage and role."""
        found: dict[tuple[str, str], _Experiment] = {}
        for stage in self.recipe.stages:
            for name, role in stage.roles.items():
                if role.weights is not None and role.weights.recipe is not None:
                    view = ConsoleView(prefix=f"{name}: ") if self.world.is_main else None
                    told = provider(role.weights, self.recipe)
                    found[stage.name, name] = _Experiment(told, self.device, self.world, view)
        return found

    def _plan(self) -> None:
        """Rehearses every stage: what is found here would otherwise be found after the teacher was trained."""
        self.plans = self.plans or plan_stages(self.recipe, self.rehearsed, world_size=self.world.size)

    def _known(self, position: int) -> StagePlan:
        """The plan of a stage at its begin, when everything that it reads has been made."""
        if reads_made(self.recipe.stages[position]):
            made = made_files(self.recipe, self.folder)
            self.rehearsed = describe_stages(self.recipe, made)
            self.plans = plan_stages(
                self.recipe, self.rehearsed, made=made, world_size=self.world.size, before=self.plans
            )
        return self.plans[position]

    # The run

    def run(self, *, wait: bool = False) -> Outcome:
        """Returns at once when the run is finished; else plans, sees to the teachers, and trains.

        Args:
            wait: wait for another process that is training the same run, as for a teacher that two students share.
        """
        if not self.recipe.fresh and self._status() == "finished":
            return self._told()
        with self.world.together():
            self._plan()
        for teacher in self.teachers.values():
            teacher.run(wait=True)
        told = (self.console or ConsoleView()).notice if wait else None
        with contextlib.ExitStack() as held:
            with self.world.together():
                if self.world.is_main:
                    held.enter_context(self.folder.lock(wait=told))
                    if self.recipe.fresh:
                        self.folder.clear()
            status = self._status()  # another process may have finished it meanwhile
            if status == "finished":
                return self._told()
            tracker = Tracker(
                self.folder.path, main=self.world.is_main, tensorboard=self.recipe.tensorboard, console=self.console
            )
            try:
                return self._train(tracker, resumed=status == "interrupted")
            except UserError as error:
                if self.world.is_main and self.folder.manifest.exists():
                    with contextlib.suppress(TrainingError):  # no space to say so: the first message stands
                        finish_manifest(self.folder.manifest, "failed", str(error))
                raise
            finally:
                tracker.close()
                for source in self.opened:
                    source.close()

    def _status(self) -> str:
        """How far this run has come.

        Raises:
            UserError: the folder holds another run, or something that is no run.
        """
        status = ""
        with self.world.together():
            if self.world.is_main:
                status = self.folder.status()
                told = read_json(self.folder.manifest).get("identity") if status != "new" else self.identity
                if told != self.identity:
                    raise UserError(
                        f"{self.folder} holds another run (identity {told}, this one is {self.identity}). Choose "
                        "another folder with out=DIR, or start anew with fresh=true."
                    )
        return self.world.share(status)

    def _told(self) -> Outcome:
        return Outcome(self.folder, read_json(self.folder.summary), repeated=True, is_main=self.world.is_main)

    def _train(self, tracker: Tracker, *, resumed: bool) -> Outcome:
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
                plan = self._known(position)
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
            sources = self._sources(stage)
            judge = Judge(self.recipe, stage, plan, sources, self.world, self.device, tracker, self.history)
            network, preparation = self._network(stage, plan, tracker)
        runner = self._runner(network, stage, plan, sources, tracker)
        if tree is not None and tree["stage"] == stage.name:
            runner.load_state_dict(tree)
        else:
            measured = judge.frozen_roles(runner.network, self.steps_before)
            if self.world.is_main:
                facts: dict[str, Any] = {"roles": role_facts(plan, preparation.origins, measured)}
                amend_manifest(self.folder.manifest, facts | {"data": source_facts(stage, sources)})
        self._run_stage(runner, plan, sources, judge, tracker)
        self._hand_on(runner, plan, sources, preparation)
        if stage.name != self.final:
            self.finished[stage.name] = runner.total_steps
        return judge, runner

    @property
    def steps_before(self) -> int:
        """Steps of the stages that are over."""
        return sum(self.finished.values())

    def reevaluate(self, folder: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
        self._plan()
        tree, _ = checkpoint.load(folder.last)
        assert tree is not None
        self.folder = folder
        plan = self._known(-1)
        stage = plan.stage
        if tree["stage"] != stage.name:
            raise UserError(f"{folder} stands in stage {tree['stage']!r}; finish it before it is evaluated.")
        with tempfile.TemporaryDirectory() as scratch:
            tracker = Tracker(scratch, main=False)
            sources = self._sources(stage)
            judge = Judge(self.recipe, stage, plan, sources, self.world, self.device, tracker, History())
            network, _ = self._network(stage, plan, tracker)
            runner = self._runner(network, stage, plan, sources, tracker)
            runner.load_state_dict(tree)
            judge.frozen_roles(runner.network, 0)
            judge.moving_roles(runner, 0, 0)
            return {**judge.history.evaluations[-1]["metrics"], **judge.history.frozen}

    def untrained(self, position: int) -> dict[str, str]:
        """The roles of a stage whose weights are not there yet, with what is said of each.

        Raises:
            UserError: something else is not there yet, without which the stage cannot begin.
        """
        stage, earlier = self.recipe.stages[position], self.recipe.stages[:position]
        made = made_files(self.recipe, self.folder)
        wanted = [f"{one.name}.{name}" for one in earlier for name in one.make]
        if reads_made(stage) and any(name not in made for name in wanted):
            raise UserError(
                f"stage {stage.name!r} of {self.recipe.name} reads what earlier stages make, and {self.folder} does "
                "not hold it yet. Train the recipe until that stage begins, or choose another one with --stage."
            )
        found = {}
        for name, role in stage.roles.items():
            teacher = self.teachers.get((stage.name, name))
            if teacher is not None and teacher._status() != "finished":
                found[name] = f"{name}: {teacher.recipe.name} is not trained yet; its initial weights stand in"
            earlier_stage = role.weights.stage if role.weights is not None else None
            if earlier_stage is not None and not self.folder.stage(earlier_stage).exists():
                found[name] = f"{name}: stage {earlier_stage!r} is not trained yet; its initial weights stand in"
        return found

    def open(self, position: int, tracker: Tracker) -> tuple[Runner, Arrangement, Feed]:
        """A stage's runner before its first step, and its batches: as the recipe has them, and with all in the step."""
        self._plan()
        plan = self._known(position)
        sources = self._sources(plan.stage)
        network, _ = self._network(plan.stage, plan, tracker)
        runner = self._runner(network, plan.stage, plan, sources, tracker)
        tables = Path(self.recipe.runs) / TABLES
        arrangement = arrange(self._feed(plan.stage, plan, sources), runner, self.recipe, tables)
        return runner, arrangement, self._feed(plan.stage, plan, sources)

    def _announce(self, tracker: Tracker, tree: Mapping[str, Any] | None, notice: str) -> None:
        if self.world.is_main:
            write_atomic(self.folder.recipe, dump_recipe(self.recipe).encode())
            changes = write_manifest(
                self.folder.manifest,
                recipe=self.recipe,
                identity=self.identity,
                device=str(self.device),
                world_size=self.world.size,
                training={s.name: training_facts(s, self.world.size) for s in self.recipe.stages},
                data=data_facts(self.recipe, [stage.specs for stage in self.rehearsed], self.checksums),
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
        for text in (*filter(None, [notice]), *changes, *self.recipe.dropped):
            tracker.notice(text)

    def _network(self, stage: StageConfig, plan: StagePlan, tracker: Tracker) -> tuple[Network, Preparation]:
        preparation = Preparation(
            self.recipe,
            stage,
            plan,
            self.world,
            artefacts={s.name: self.folder.stage(s.name) for s in self.recipe.stages},
            produced=self._produced(stage),
            channels_last=self.channels_last,
            say=tracker.notice,
        )
        network = build_network(
            stage,
            plan.layout,
            seed=self.recipe.seed,
            device=self.device,
            world=self.world,
            prepare=preparation,
            made=made_tensors(stage, made_files(self.recipe, self.folder)),
        )
        if stage.precision == "float64":
            network.double()
        return network, preparation

    def _runner(
        self, network: Network, stage: StageConfig, plan: StagePlan, sources: Mapping[str, Source], tracker: Tracker
    ) -> Runner:
        """Whatever sums over the ranks begins here; before, one of them may have failed alone."""
        if plan.sharded and self.world.size > 1:
            shard(network, plan.sharded, self.device, self.world)
            also = "; the step is not compiled" if self.recipe.compiles else ""
            tracker.notice(f"{' and '.join(plan.sharded)} lie in {self.world.size} parts, one in each process{also}.")
        elif plan.sharded:
            tracker.notice("shard: there is one process only, so every network lies in it whole.")
        for source in sources.values():
            source.say = tracker.notice
        feed = self._feed(stage, plan, sources)
        runner = Runner(plan, self.recipe, network, self.device, steps_per_epoch=feed.steps_per_epoch, world=self.world)
        runner.say = tracker.notice
        capture(runner)
        return runner

    def _produced(self, stage: StageConfig) -> dict[str, Path]:
        """Role -> the checkpoint of the recipe that its weights name."""
        files = {}
        for (stage_name, name), teacher in self.teachers.items():
            weights = stage.roles[name].weights if stage_name == stage.name else None
            if weights is None:
                continue
            files[name] = teacher.folder.last if weights.epoch is None else teacher.folder.epoch(weights.epoch)
            if not files[name].exists():
                raise UserError(
                    f"{weights.place}: {teacher.folder} holds no {files[name].name}: it was trained without keeping "
                    f"it. Train it anew: kdbench train {weights.recipe} keep_epochs=[{weights.epoch}] fresh=true"
                )
        return files

    def _feed(self, stage: StageConfig, plan: StagePlan, sources: Mapping[str, Source]) -> Feed:
        read = {name: sources[name] for name in plan.layout.step_sources(stage)}
        return Feed(read, plan.train_source, stage.accumulate)

    def _run_stage(
        self, runner: Runner, plan: StagePlan, sources: Mapping[str, Source], judge: Judge, tracker: Tracker
    ) -> None:
        stage = runner.stage
        if self.attend is not None:
            self.attend(runner)
        tracker.stage(stage.name, stage.epochs, runner.total_steps, runner.done)

        def told(arrangement: Arrangement) -> None:
            if arrangement.words():
                tracker.notice(arrangement.words())
            self._record_frozen(stage, arrangement)

        tables = Path(self.recipe.runs) / TABLES
        arrangement = arrange(self._feed(stage, plan, sources), runner, self.recipe, tables, told)
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

    def _hand_on(
        self, runner: Runner, plan: StagePlan, sources: Mapping[str, Source], preparation: Preparation
    ) -> None:
        """Leaves what later stages start from and read. One process writes it, the others wait and read the files."""
        stage = plan.stage
        state = self._weights(runner)
        with self.world.together():
            if self.world.is_main and len(self.recipe.stages) > 1:
                models = handed_on(self.recipe, stage, state["models"], preparation.kept)
                checkpoint.save(self.folder.stage(stage.name), {**state, "models": models})
            if self.world.is_main and stage.make:
                whole = sources if self.world.size == 1 else self._sources(stage, World())
                made = make_all(self.recipe, runner, plan, whole, self.folder, preparation.origins)
                amend_manifest(self.folder.manifest, {"made": made})

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
            "identity": self.identity,
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
                "flops": role.flops,
                "weights_sha256": state_hash(module),
            }
            alone = upstream_role(role.config) is None and not role.config.also
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
            identity=self.identity,
            export=stage.export,
            device=describe_device(self.device),
        )
        with self.world.together():
            if self.world.is_main:
                tracker.hparams({"seed": self.recipe.seed, **training_facts(stage, self.world.size)})
                write_json(self.folder.summary, summary)
                finish_manifest(self.folder.manifest, "finished")
        return Outcome(self.folder, summary, repeated=False, is_main=self.world.is_main)

    def _sources(self, stage: StageConfig, world: World | None = None) -> dict[str, Source]:
        """Opens a stage's sources: this process's part of them, or that of another `world`."""
        world = world or self.world
        sources = build_sources(
            stage.data,
            validation=stage.validation,
            seed=self.recipe.seed,
            device=self.device,
            data_root=self.recipe.data_root,
            rank=world.rank,
            world=world.size,
            workers=self.recipe.workers,
            dtype=torch.float64 if stage.precision == "float64" else torch.float32,
            channels_last=self.channels_last,
            made=made_files(self.recipe, self.folder),
        )
        self.opened += sources.values()
        return sources
