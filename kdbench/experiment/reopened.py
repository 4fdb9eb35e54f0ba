"""A run opened without training it: its result measured again, or a stage built for whoever measures its steps."""

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
from kdbench.engine.train.loop import Feed, History
from kdbench.engine.train.runner import Runner
from kdbench.errors import ConfigError, UserError, suggest
from kdbench.experiment.artifacts import find_artifact_files, reads_artifacts
from kdbench.experiment.context import RunContext
from kdbench.report.tracking import Tracker
from kdbench.run_folder import RunFolder
from kdbench.speed.teacher_cache.frozen_forward import FrozenForwardPlan


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
    chosen = resolve_device(recipe.device)
    with (
        precision_settings(recipe.stages[0].precision),
        contextlib.closing(RunContext(recipe, chosen, World())) as setup,
        tempfile.TemporaryDirectory() as scratch,
    ):
        setup.plan()
        tree, _ = checkpoint.load(folder.last)
        assert tree is not None
        plan = setup.stage_plan(-1)
        stage = plan.stage
        if tree["stage"] != stage.name:
            raise UserError(f"{folder} stands in stage {tree['stage']!r}; finish it before it is evaluated.")
        tracker = Tracker(scratch, is_main=False)
        sources = setup.sources(stage)
        judge = Evaluator(recipe, stage, plan, sources, setup.world, chosen, tracker, History())
        network, _ = setup.network(plan, tracker.notice)
        runner = setup.runner(network, plan, sources, tracker.notice)
        runner.load_state_dict(tree)
        judge.evaluate_frozen_roles(runner.network, 0)
        judge.evaluate_trained_roles(runner, 0, 0)
        return {**judge.history.evaluations[-1]["metrics"], **judge.history.frozen}


@dataclass(frozen=True)
class OpenStage:
    """A stage that could begin to train.

    arrangement: the batches as the recipe asks for them, with what runs outside the step in them. feed: those with
    every role in the step. missing: whose weights are not there yet, in words.
    """

    recipe: Recipe
    runner: Runner
    frozen_forward: FrozenForwardPlan
    feed: Feed
    missing_weights: tuple[str, ...]


@contextlib.contextmanager
def open_stage(recipe: Recipe, stage: str | None = None) -> Iterator[OpenStage]:
    """Builds a stage as `run` does, for whoever measures its steps. Nothing is trained, and nothing is kept.

    Weights that are still to be trained (a teacher's, an earlier stage's) stay as the seed gives them.

    Args:
        stage: its name; None: the last stage that has steps.

    Raises:
        UserError: there is no such stage, it reads what an earlier stage has not made yet, or what `run` would raise.
    """
    device = resolve_device(recipe.device)
    names = [one.name for one in recipe.stages if one.epochs != 0 and one.steps != 0]
    if not names or (stage is not None and stage not in names):
        wrong = f"no stage {stage!r} that trains.{suggest(stage or '', names)}" if stage else "no stage trains"
        raise ConfigError(f"{recipe.name}: {wrong}")
    position = [one.name for one in recipe.stages].index(stage or names[-1])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        setup = RunContext(recipe, device, World())
        missing = _find_missing_weights(setup, position)
        if missing:  # the same run, but for the weights that it would wait for
            told = recipe.stages[position]
            roles = {n: replace(r, weights=None) if n in missing else r for n, r in told.roles.items()}
            stages = [replace(told, roles=roles) if one is told else one for one in recipe.stages]
            recipe = replace(recipe, stages=tuple(stages), out=str(setup.folder))
            setup = RunContext(recipe, device, World())
        with precision_settings(recipe.stages[position].precision), contextlib.closing(setup):
            setup.plan()
            plan = setup.stage_plan(position)
            sources = setup.sources(plan.stage)
            network, _ = setup.network(plan, _ignore_notice)
            runner = setup.runner(network, plan, sources, _ignore_notice)
            arrangement, feed = setup.frozen_forward_plan(runner, sources), setup.feed(plan, sources)
            yield OpenStage(recipe, runner, arrangement, feed, tuple(missing.values()))


def _ignore_notice(text: str) -> None:
    """What is told of a stage that is opened and not trained."""


def _find_missing_weights(setup: RunContext, position: int) -> dict[str, str]:
    """The roles of a stage whose weights are not there yet, with what is said of each.

    Raises:
        UserError: something else is not there yet, without which the stage cannot begin.
    """
    recipe, folder = setup.recipe, setup.folder
    stage, earlier = recipe.stages[position], recipe.stages[:position]
    made = find_artifact_files(recipe, folder)
    wanted = [f"{one.name}.{name}" for one in earlier for name in one.artifacts]
    if reads_artifacts(stage) and any(name not in made for name in wanted):
        raise UserError(
            f"stage {stage.name!r} of {recipe.name} reads what earlier stages make, and {folder} does not hold it yet. "
            "Train the recipe until that stage begins, or choose another one with --stage."
        )
    found = {}
    for name, role in stage.roles.items():
        teacher = setup.teachers.get((stage.name, name))
        if teacher is not None and teacher.status() != "finished":
            found[name] = f"{name}: {teacher.recipe.name} is not trained yet; its initial weights stand in"
        earlier_stage = role.weights.stage if role.weights is not None else None
        if earlier_stage is not None and not folder.stage(earlier_stage).exists():
            found[name] = f"{name}: stage {earlier_stage!r} is not trained yet; its initial weights stand in"
    return found
