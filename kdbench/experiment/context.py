"""The context of a run: identity, folder, teacher runs and plans. The context builds the objects of each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kdbench.config.identity import identity as recipe_identity
from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.loading.build import build_sources
from kdbench.data.loading.source import Source
from kdbench.engine.distributed.sharding import shard_roles
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build import build_network
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.weight_loader import RunFile, WeightLoader
from kdbench.engine.timer import SectionTimer
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.notices import Notices
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
from kdbench.run_folder import RunFolder, read_manifest
from kdbench.speed.cuda_graph import use_cuda_graphs
from kdbench.speed.teacher_cache.frozen_forward import CACHE_FOLDER, FrozenForwardPlan, plan_frozen_forward


class RunContext:
    """A recipe on a device, ready to be trained or inspected.

    The context itself does not train and does not write into the run folder.

    Args:
        recipe: the checked recipe.
        device: the device of all tensors.
        world: rank of this process and number of processes.
        identity: identity (hash) of an existing run whose folder is read. None: the identity is computed from recipe,
            data, teachers and world size.

    Attributes:
        teachers: (stage, role) -> context of the run that trains the role's initial weights.
        plans: plans of all stages, set by `plan`.
        checksums: `STAGE.SOURCE` -> digest of the dataset.

    Raises:
        ConfigError: the data does not fit the recipe.
        DataError: a dataset is missing or damaged.
    """

    def __init__(self, recipe: Recipe, device: torch.device, world: World, *, identity: str | None = None) -> None:
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
        self.identity = identity if identity is not None else self._compute_identity()
        self.folder = RunFolder(recipe.out or Path(recipe.runs) / recipe.name / self.identity)
        self._open_sources: list[Source] = []

    def _compute_identity(self) -> str:
        teacher_identities = {key: teacher.identity for key, teacher in self.teachers.items()}
        external = external_identity(self.recipe, self.checksums, teacher_identities, self.world.size)
        return recipe_identity(self.recipe, external)

    # The run

    def status(self) -> str:
        """Returns whether the run is new, interrupted or finished. The result is equal on every rank.

        Raises:
            UserError: the folder belongs to another run, or is not a run folder.
        """
        status = ""
        with self.world.sync_errors():
            if self.world.is_main:
                status = self.folder.status()
                identity = self._manifest_identity()
                if identity not in (None, self.identity):
                    raise UserError(
                        f"{self.folder} belongs to another run (identity {identity}, this run has {self.identity}). "
                        "Choose another folder with out=DIR, or train again with fresh=true."
                    )
        return self.world.broadcast(status)

    def _manifest_identity(self) -> str | None:
        """Returns the identity (hash of the run) in the manifest, or None if the manifest is missing or damaged.

        The checkpoint contains the identity too.
        """
        try:
            return read_manifest(self.folder.manifest)["identity"]
        except UserError:
            return None

    def plan(self) -> None:
        """Plans every stage. An error of a later stage is thus raised before a teacher is trained."""
        self.plans = self.plans or plan_stages(self.recipe, self.described_stages, world_size=self.world.size)

    # One stage

    def stage_plan(self, position: int) -> StagePlan:
        """Returns the plan of a stage at its start. All artifacts that the stage reads must exist."""
        if reads_artifacts(self.recipe.stages[position]):
            artifact_files = find_artifact_files(self.recipe, self.folder)
            self.described_stages = describe_stages(self.recipe, artifact_files)
            self.plans = plan_stages(
                self.recipe,
                self.described_stages,
                artifact_files=artifact_files,
                world_size=self.world.size,
                earlier_plans=self.plans,
            )
        return self.plans[position]

    def open_sources(
        self, stage: StageConfig, world: World | None = None, *, notice: Callable[[str], None] = print
    ) -> dict[str, Source]:
        """Opens a stage's sources.

        Args:
            world: rank and number of processes, which determine the samples of this rank; None: `self.world`.
        """
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
            notice=notice,
        )
        self._open_sources += sources.values()
        return sources

    def close(self) -> None:
        """Closes every source that this context opened."""
        for source in self._open_sources:
            source.close()

    def build_network(self, plan: StagePlan, notices: Notices) -> tuple[Network, WeightLoader]:
        """Builds a stage's network on the device and loads its initial weights.

        Raises:
            CheckpointError: initial weights cannot be read or do not match the model.
        """
        stage = plan.stage
        loader = WeightLoader(
            self.recipe,
            stage,
            plan,
            self.world,
            stage_files={s.name: RunFile(self.folder.stage(s.name), self.identity) for s in self.recipe.stages},
            teacher_files=self._teacher_files(stage),
            channels_last=self.channels_last,
            notice=notices.notice,
        )
        # Host time of a section means something only where the host waits for each operation: on the CPU, uncompiled.
        sharded = bool(plan.sharded_roles) and self.world.size > 1
        timed = self.device.type == "cpu" and (sharded or not self.recipe.uses_compiler)
        network = build_network(
            stage,
            plan.resolved_stage,
            seed=self.recipe.seed,
            device=self.device,
            world=self.world,
            prepare=loader,
            artifacts=artifact_tensors(stage, find_artifact_files(self.recipe, self.folder)),
            timer=SectionTimer(timed),
        )
        # The loader has converted the models; this converts terms and adapters.
        if stage.precision == "float64":
            network.double()
        return network, loader

    def _teacher_files(self, stage: StageConfig) -> dict[str, RunFile]:
        """Returns role -> model file of the teacher run, for each role with `weights: {recipe: ...}`."""
        files = {}
        for (stage_name, name), teacher in self.teachers.items():
            weights = stage.roles[name].weights if stage_name == stage.name else None
            if weights is None:
                continue
            path = teacher.folder.last if weights.epoch is None else teacher.folder.epoch(weights.epoch)
            if not path.exists():
                keep_epoch = "" if weights.epoch is None else f" keep_epochs=[{weights.epoch}]"
                raise UserError(
                    f"{weights.location}: {teacher.folder} has no {path.name}: the run did not keep it, or it was "
                    f"removed. Train it again: kdbench train {weights.recipe}{keep_epoch} fresh=true"
                )
            files[name] = RunFile(path, teacher.identity)
        return files

    def build_runner(
        self, network: Network, plan: StagePlan, sources: Mapping[str, Source], notices: Notices
    ) -> Runner:
        """Builds the runner of a stage, with sharded roles and the step strategy of the recipe.

        Every rank must call this method, because it begins collective operations. Operations that can fail on one
        rank alone must come before it.
        """
        if plan.sharded_roles and self.world.size > 1:
            shard_roles(network, plan.sharded_roles, self.device, self.world)
            compiler = "; the step is not compiled" if self.recipe.uses_compiler else ""
            notices.notice(f"{' and '.join(plan.sharded_roles)} sharded over {self.world.size} processes{compiler}.")
        elif plan.sharded_roles:
            notices.notice("shard: has no effect with one process.")
        per_epoch = self.build_feed(plan, sources).steps_per_epoch
        runner = Runner(plan, self.recipe, network, self.device, steps_per_epoch=per_epoch, notices=notices)
        use_cuda_graphs(runner)
        return runner

    def build_feed(self, plan: StagePlan, sources: Mapping[str, Source]) -> Feed:
        """Returns a feed of a stage's batches for steps in which all roles run."""
        step_sources = {name: sources[name] for name in plan.resolved_stage.step_sources(plan.stage)}
        return Feed(step_sources, plan.train_source, plan.stage.accumulate)

    def frozen_forward_plan(
        self,
        runner: Runner,
        sources: Mapping[str, Source],
        on_decision: Callable[[FrozenForwardPlan], None] = lambda plan: None,
    ) -> FrozenForwardPlan:
        """Decides how frozen networks run, and returns the decision with a matching feed of batches.

        Frozen networks run in the step or are prefetched, or their outputs are read from a cache.
        """
        feed = self.build_feed(runner.plan, sources)
        return plan_frozen_forward(feed, runner, self.recipe, Path(self.recipe.runs) / CACHE_FOLDER, on_decision)
