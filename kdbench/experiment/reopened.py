"""Opens an existing run without training: evaluates its result again, or builds one stage to measure its steps."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdbench.config.load import load_resolved
from kdbench.config.schema import Recipe
from kdbench.engine.device import precision_settings, resolve_device
from kdbench.engine.distributed.world import World
from kdbench.engine.evaluation.evaluator import Evaluator
from kdbench.engine.state import checkpoint
from kdbench.engine.state.run_state import History
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.notices import CollectedNotices
from kdbench.engine.train.runner import Runner
from kdbench.errors import CheckpointError, ConfigError, UserError, suggest
from kdbench.experiment.artifacts import find_artifact_files, reads_artifacts
from kdbench.experiment.context import RunContext
from kdbench.report.tracking import Tracker
from kdbench.run_folder import RunFolder, read_manifest
from kdbench.speed.teacher_cache.frozen_forward import FrozenForwardPlan


def reevaluate(
    folder: RunFolder, *, device: str | None = None, data_root: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates the exported role, its moving average and the frozen roles of a run on the evaluation splits.

    Args:
        device: device that replaces the recipe's device.
        data_root: folder of datasets that replaces the recipe's.

    Returns:
        role -> split -> metric -> value.

    Raises:
        UserError: the run has not reached its last stage, or its files or data cannot be read.
    """
    recipe = load_resolved(folder.recipe)
    changes: dict[str, Any] = {"out": str(folder.path)}
    changes |= {"device": device} if device else {}
    changes |= {"data_root": data_root} if data_root else {}
    recipe = replace(recipe, **changes)
    # The identity is read from the run: a new one would differ for a run of several processes or on other data.
    identity = read_manifest(folder.manifest)["identity"]
    torch_device = resolve_device(recipe.device)
    with (
        precision_settings(recipe.stages[0].precision),
        contextlib.closing(RunContext(recipe, torch_device, World(), identity=identity)) as context,
        tempfile.TemporaryDirectory() as scratch,
    ):
        context.plan()
        stages = [stage.name for stage in recipe.stages]
        state, _ = checkpoint.load(folder.last, identity=identity, stages=stages)
        if state is None:
            raise CheckpointError(f"{folder.last} does not exist: the run has no checkpoint yet. Train it first.")
        plan = context.stage_plan(-1)
        stage = plan.stage
        if state.stage != stage.name:
            raise UserError(f"{folder} is in stage {state.stage!r}; train it to its last stage before evaluating it.")
        tracker = Tracker(scratch, is_main=False)
        notices = CollectedNotices()
        sources = context.open_sources(stage, notice=notices.notice)
        evaluator = Evaluator(recipe, stage, plan, sources, context.world, torch_device, tracker, History())
        network, _ = context.build_network(plan, notices)
        runner = context.build_runner(network, plan, sources, notices)
        runner.load_training_state(state, folder.last)
        evaluator.evaluate_frozen_roles(runner.network, 0)
        evaluator.evaluate_trained_roles(runner, 0, 0)
        return {**evaluator.history.evaluations[-1]["metrics"], **evaluator.history.frozen}


@dataclass(frozen=True)
class OpenStage:
    """A stage that is ready for its first step.

    Attributes:
        recipe: the recipe, from which missing weights were removed.
        runner: the stage's runner.
        frozen_forward: plan of frozen roles as the recipe asks for it, with its feed of batches. Frozen roles may run
            outside the step.
        feed: batches for steps in which all roles run.
        missing_weights: one message per role whose weights are not trained yet.
        notices: collected messages of the engine.
    """

    recipe: Recipe
    runner: Runner
    frozen_forward: FrozenForwardPlan
    feed: Feed
    missing_weights: tuple[str, ...]
    notices: CollectedNotices


@contextlib.contextmanager
def open_stage(recipe: Recipe, stage: str | None = None) -> Iterator[OpenStage]:
    """Builds a stage as `run` does, without training and without writing files.

    Roles whose weights are not trained yet (by a teacher run or an earlier stage) keep random initial weights.

    Args:
        stage: name of the stage; None: the last stage that has steps.

    Raises:
        UserError: there is no such stage, the stage reads an artifact that does not exist yet, or the recipe cannot
            be run.
    """
    device = resolve_device(recipe.device)
    names = [config.name for config in recipe.stages if config.epochs != 0 and config.steps != 0]
    if not names or (stage is not None and stage not in names):
        problem = f"no stage {stage!r} that trains.{suggest(stage or '', names)}" if stage else "no stage trains"
        raise ConfigError(f"{recipe.name}: {problem}")
    position = [config.name for config in recipe.stages].index(stage or names[-1])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        context = RunContext(recipe, device, World())
        missing_weights = _find_missing_weights(context, position)
        if missing_weights:
            # A run without the missing weights. It has the folder and identity of the original run, to read its files.
            recipe = _without_weights(recipe, position, set(missing_weights), str(context.folder))
            context = RunContext(recipe, device, World(), identity=context.identity)
        with precision_settings(recipe.stages[position].precision), contextlib.closing(context):
            context.plan()
            plan = context.stage_plan(position)
            notices = CollectedNotices()
            sources = context.open_sources(plan.stage, notice=notices.notice)
            network, _ = context.build_network(plan, notices)
            runner = context.build_runner(network, plan, sources, notices)
            frozen_forward, feed = context.frozen_forward_plan(runner, sources), context.build_feed(plan, sources)
            yield OpenStage(recipe, runner, frozen_forward, feed, tuple(missing_weights.values()), notices)


def _without_weights(recipe: Recipe, position: int, role_names: set[str], folder: str) -> Recipe:
    stages = list(recipe.stages)
    roles = {
        name: replace(role, weights=None) if name in role_names else role
        for name, role in stages[position].roles.items()
    }
    stages[position] = replace(stages[position], roles=roles)
    return replace(recipe, stages=tuple(stages), out=folder)


def _find_missing_weights(context: RunContext, position: int) -> dict[str, str]:
    """Returns a message for each role of a stage whose weights are not trained yet.

    Raises:
        UserError: an artifact that the stage needs is missing.
    """
    recipe, folder = context.recipe, context.folder
    stage, earlier_stages = recipe.stages[position], recipe.stages[:position]
    artifact_files = find_artifact_files(recipe, folder)
    required = [f"{earlier.name}.{name}" for earlier in earlier_stages for name in earlier.artifacts]
    if reads_artifacts(stage) and any(name not in artifact_files for name in required):
        raise UserError(
            f"stage {stage.name!r} of {recipe.name} reads artifacts of earlier stages, which {folder} does not have "
            "yet. Train the recipe until that stage begins, or choose another stage with --stage."
        )
    messages = {}
    for name, role in stage.roles.items():
        teacher = context.teachers.get((stage.name, name))
        if teacher is not None and teacher.status() != "finished":
            messages[name] = f"{name}: {teacher.recipe.name} is not trained yet; measured with initial weights"
        earlier_stage = role.weights.stage if role.weights is not None else None
        if earlier_stage is not None and not folder.stage(earlier_stage).exists():
            messages[name] = f"{name}: stage {earlier_stage!r} is not trained yet; measured with initial weights"
    return messages
