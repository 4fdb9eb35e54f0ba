"""Shortens shipped recipes, runs them, stops and resumes them, and reads their results.

A test of a method checks its property on such a run, and that the recipe without the mechanism fails the same check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.recipes import QuietConsole, comparable_results, differing_keys
from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe, StageConfig
from kdbench.engine.train.runner import Runner
from kdbench.experiment.run import Outcome
from kdbench.experiment.run import run as run_experiment
from kdbench.files import read_json, read_json_lines
from kdbench.run_folder import RunFolder


def short_recipe(name: str | Recipe, *overrides: str, steps: int | None = 2, teachers: bool = False) -> Recipe:
    """Loads a shipped recipe whose stages take a few steps each.

    Args:
        steps: the number of steps of every stage that trains; None keeps the recipe's length.
        teachers: True trains the recipes of initial weights first; False initialises these roles at random.
    """
    loaded = load_recipe(name, list(overrides)) if isinstance(name, str) else name
    stages = tuple(_short_stage(stage, steps, teachers) for stage in loaded.stages)
    return replace(loaded, stages=stages, tensorboard=False)


def _short_stage(stage: StageConfig, steps: int | None, teachers: bool) -> StageConfig:
    roles = stage.roles
    if not teachers:
        roles = {
            name: replace(role, require={}, weights=None) if role.weights and role.weights.recipe else role
            for name, role in roles.items()
        }
    if steps is None or not (stage.epochs or stage.steps):
        return replace(stage, roles=roles)
    return replace(stage, roles=roles, epochs=None, steps=steps, log_every=1)


def run_recipe(recipe: Recipe, out: str | Path) -> Outcome:
    """Runs a recipe to its end in this process, with run folder `out`."""
    return run_experiment(replace(recipe, out=str(out)), console=QuietConsole())


class StopRun(BaseException):
    """Ends a run between two steps, like a signal."""


@contextmanager
def stop_after_steps(steps: int) -> Iterator[None]:
    """Ends a run of this process after a number of steps, counted over all stages and teachers."""
    original_step, count = Runner.step, 0

    def counting_step(self: Runner, window: Any) -> None:
        nonlocal count
        original_step(self, window)
        count += 1
        if count == steps:
            raise StopRun

    Runner.step = counting_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Runner.step = original_step  # type: ignore[method-assign]


def resume_differences(recipe: Recipe, folder: Path, *stop_steps: int) -> list[str]:
    """Returns the differences between an uninterrupted run and runs that stop after given steps and resume.

    Checkpoints are written at every step, so that a run resumes in the middle of a stage.
    """
    checkpointed = replace(recipe, stages=tuple(replace(s, checkpoint_every={"steps": 1}) for s in recipe.stages))
    run_recipe(checkpointed, folder / "uninterrupted")
    expected = comparable_results(folder / "uninterrupted")
    differences: list[str] = []
    for steps in stop_steps:
        out = folder / f"stopped{steps}"
        try:
            with stop_after_steps(steps):
                run_recipe(checkpointed, out)
        except StopRun:
            pass
        else:
            raise AssertionError(f"the run has fewer than {steps} steps")
        run_recipe(checkpointed, out)
        differences += [f"after {steps}: {key}" for key in differing_keys(expected, comparable_results(out))]
    return differences


def saved_weights(outcome: Outcome | Path | str, role: str, stage: str | None = None) -> dict[str, Tensor]:
    """Loads the weights of a role at the end of a run or of one of its stages."""
    run = outcome.folder if isinstance(outcome, Outcome) else RunFolder(outcome)
    tree = torch.load(run.last if stage is None else run.stage(stage), weights_only=True)
    return tree["models"][role]


def top1_scores(outcome: Outcome, role: str = "student", split: str = "test") -> list[float]:
    """Returns the top-1 accuracy in percent of a role on a split, one value per evaluation."""
    lines = read_json_lines(outcome.folder.metrics)
    evaluations = [line for line in lines if line.get("role") == role and line.get("split") == split]
    return [line["metrics"]["top1"] for line in evaluations if "top1" in line["metrics"]]


def logged_losses(outcome: Outcome, term: str) -> list[float]:
    """Returns the unweighted loss of a term, one value per log line."""
    return [
        line["terms"][term]["loss"] for line in read_json_lines(outcome.folder.metrics) if term in line.get("terms", {})
    ]


def run_manifest(outcome: Outcome) -> Mapping[str, Any]:
    """Reads the manifest of a run."""
    return read_json(outcome.folder.manifest)
