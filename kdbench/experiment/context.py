"""What stands before a run's first step: its identity, folder, teachers and plans, and each stage put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kdbench.config.identity import identity
from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.loading.build import build_sources
from kdbench.data.loading.source import Source
from kdbench.engine.distributed.sharding import shard_roles
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build import build_network
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.weight_loader import WeightLoader
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.runner import Runner
from kdbench.errors import UserError
from kdbench.experiment.artifacts import (
    artifact_tensors,
    describe_stages,
    find_artifact_files,
    plan_stages,
    reads_artifacts,
)
from kdbench.experiment.manifest import dataset_checksums, external_identity, uses_channels_last
from kdbench.experiment.teacher_run import teacher_recipe
from kdbench.files import read_json
from kdbench.run_folder import RunFolder
from kdbench.speed.cuda_graph import use_cuda_graph
from kdbench.speed.teacher_cache.frozen_forward import CACHE_FOLDER, FrozenForwardPlan, plan_frozen_forward


class RunContext:
    """A recipe on a device, ready to be run or looked into. Nothing here trains, and nothing writes into the folder.

    Args:
        world: this process among all.

    Attributes:
        teachers: the runs whose students are somebody's initial weights here, by stage and role.
        plans: of all stages, once `plan` was called.
    """

    def __init__(self, recipe: Recipe, device: torch.device, world: World) -> None:
        self.recipe, self.device, self.world = recipe, device, world
        self.plans: list[StagePlan] = []
        self.described_stages = describe_stages(recipe)
        self.channels_last = uses_channels_last(recipe, self.described_stages[0].specs)
        self.teachers = {
            (stage.name, name): RunContext(teacher_recipe(role.weights, recipe), device, world)
            for stage in recipe.stages
            for name, role in stage.roles.items()
            if role.weights is not None and role.weights.recipe is not None
        }
        if any(spec.problem for stage in self.described_stages for spec in stage.specs.values()):
            self.plan()  # before anything is downloaded for a recipe that cannot run
        self.checksums = dataset_checksums(recipe)
        made = {key: teacher.identity for key, teacher in self.teachers.items()}
        self.identity = identity(recipe, external_identity(recipe, self.checksums, made, world.size))
        self.folder = RunFolder(recipe.out or Path(recipe.runs) / recipe.name / self.identity)
        self._open_sources: list[Source] = []

    # The run as a whole

    def status(self) -> str:
        """How far this run has come.

        Raises:
            UserError: the folder holds another run, or something that is no run.
        """
        status = ""
        with self.world.sync_errors():
            if self.world.is_main:
                status = self.folder.status()
                told = read_json(self.folder.manifest).get("identity") if status != "new" else self.identity
                if told != self.identity:
                    raise UserError(
                        f"{self.folder} holds another run (identity {told}, this one is {self.identity}). Choose "
                        "another folder with out=DIR, or start anew with fresh=true."
                    )
        return self.world.broadcast(status)

    def plan(self) -> None:
        """Rehearses every stage: what is found here would otherwise be found after the teacher was trained."""
        self.plans = self.plans or plan_stages(self.recipe, self.described_stages, world_size=self.world.size)

    # One stage

    def stage_plan(self, position: int) -> StagePlan:
        """The plan of a stage at its begin, when everything that it reads has been made."""
        if reads_artifacts(self.recipe.stages[position]):
            made = find_artifact_files(self.recipe, self.folder)
            self.described_stages = describe_stages(self.recipe, made)
            self.plans = plan_stages(
                self.recipe, self.described_stages, artifact_files=made, world_size=self.world.size, earlier_plans=self.plans
            )
        return self.plans[position]

    def sources(self, stage: StageConfig, world: World | None = None) -> dict[str, Source]:
        """Opens a stage's sources: this process's part of them, or that of another `world`."""
        world = world or self.world
        sources = build_sources(
            stage.data,
            validation=stage.validation,
            seed=self.recipe.seed,
            device=self.device,
            data_root=self.recipe.data_root,
            rank=world.rank,
            world_size=world.size,
            workers=self.recipe.workers,
            dtype=torch.float64 if stage.precision == "float64" else torch.float32,
            channels_last=self.channels_last,
            artifact_files=find_artifact_files(self.recipe, self.folder),
        )
        self._open_sources += sources.values()
        return sources

    def close(self) -> None:
        """Closes every source that was opened here."""
        for source in self._open_sources:
            source.close()

    def network(self, plan: StagePlan, notice: Callable[[str], None]) -> tuple[Network, WeightLoader]:
        """Builds a stage's network on the device, with the weights that it starts from."""
        stage = plan.stage
        preparation = WeightLoader(
            self.recipe,
            stage,
            plan,
            self.world,
            stage_files={s.name: self.folder.stage(s.name) for s in self.recipe.stages},
            teacher_files=self._teacher_files(stage),
            channels_last=self.channels_last,
            notice=notice,
        )
        network = build_network(
            stage,
            plan.resolved_stage,
            seed=self.recipe.seed,
            device=self.device,
            world=self.world,
            prepare=preparation,
            artifacts=artifact_tensors(stage, find_artifact_files(self.recipe, self.folder)),
        )
        if stage.precision == "float64":
            network.double()
        return network, preparation

    def _teacher_files(self, stage: StageConfig) -> dict[str, Path]:
        """Role -> the checkpoint of the recipe that its weights name."""
        files = {}
        for (stage_name, name), teacher in self.teachers.items():
            weights = stage.roles[name].weights if stage_name == stage.name else None
            if weights is None:
                continue
            files[name] = teacher.folder.last if weights.epoch is None else teacher.folder.epoch(weights.epoch)
            if not files[name].exists():
                raise UserError(
                    f"{weights.location}: {teacher.folder} holds no {files[name].name}: it was trained without keeping "
                    f"it. Train it anew: kdbench train {weights.recipe} keep_epochs=[{weights.epoch}] fresh=true"
                )
        return files

    def runner(
        self, network: Network, plan: StagePlan, sources: Mapping[str, Source], notice: Callable[[str], None]
    ) -> Runner:
        """Whatever sums over the ranks begins here; before, one of them may have failed alone."""
        if plan.sharded_roles and self.world.size > 1:
            shard_roles(network, plan.sharded_roles, self.device, self.world)
            also = "; the step is not compiled" if self.recipe.uses_compiler else ""
            notice(f"{' and '.join(plan.sharded_roles)} lie in {self.world.size} parts, one in each process{also}.")
        elif plan.sharded_roles:
            notice("shard: there is one process only, so every network lies in it whole.")
        for source in sources.values():
            source.notice = notice
        per_epoch = self.feed(plan, sources).steps_per_epoch
        runner = Runner(plan, self.recipe, network, self.device, steps_per_epoch=per_epoch, world=self.world)
        runner.say = notice
        use_cuda_graph(runner)
        return runner

    def feed(self, plan: StagePlan, sources: Mapping[str, Source]) -> Feed:
        """A stage's batches, with every role in the step."""
        read = {name: sources[name] for name in plan.resolved_stage.step_sources(plan.stage)}
        return Feed(read, plan.train_source, plan.stage.accumulate)

    def frozen_forward_plan(
        self,
        runner: Runner,
        sources: Mapping[str, Source],
        on_change: Callable[[FrozenForwardPlan], None] = lambda arrangement: None,
    ) -> FrozenForwardPlan:
        """A stage's batches as the recipe asks for them, with what runs outside the step in them."""
        feed = self.feed(runner.plan, sources)
        return plan_frozen_forward(feed, runner, self.recipe, Path(self.recipe.runs) / CACHE_FOLDER, on_change)
