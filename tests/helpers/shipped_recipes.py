"""What tests of shipped recipes share: a shortened run of every stage, and a run that is stopped and goes on.

The commands and folders are those of a user; only lengths change. A method's test shows its property on these, and that
the same recipe with the mechanism switched off fails it.
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
    """A shipped recipe whose stages take a few steps each.

    Args:
        steps: of every stage that trains; None keeps the recipe's length.
        teachers: whether weights that another recipe makes are trained first; else they are drawn from the seed.
    """
    loaded = load_recipe(name, list(overrides)) if isinstance(name, str) else name
    stages = tuple(_shortened(stage, steps, teachers) for stage in loaded.stages)
    return replace(loaded, stages=stages, tensorboard=False)


def _shortened(stage: StageConfig, steps: int | None, teachers: bool) -> StageConfig:
    roles = stage.roles
    if not teachers:
        roles = {
            name: replace(role, accuracy=None, weights=None) if role.weights and role.weights.recipe else role
            for name, role in roles.items()
        }
    if steps is None or not (stage.epochs or stage.steps):
        return replace(stage, roles=roles)
    return replace(stage, roles=roles, epochs=None, steps=steps, log_every=1)


def run_recipe(recipe: Recipe, out: str | Path) -> Outcome:
    """Runs a recipe to its end in this process, into the folder `out`."""
    return run_experiment(replace(recipe, out=str(out)), console=QuietConsole())


class StopRun(BaseException):
    """Ends a run where it stands, as a signal does."""


@contextmanager
def stop_after_steps(steps: int) -> Iterator[None]:
    """Ends a run of this process after so many steps, counted over all stages and teachers."""
    step, count = Runner.step, 0

    def counted(self: Runner, window: Any) -> None:
        nonlocal count
        step(self, window)
        count += 1
        if count == steps:
            raise StopRun

    Runner.step = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Runner.step = step  # type: ignore[method-assign]


def resume_differences(recipe: Recipe, folder: Path, *after: int) -> list[str]:
    """What differs between an undisturbed run and one that is stopped after these steps and goes on; best: nothing.

    Checkpoints are written at every step, so that the run goes on in the midst of a stage.
    """
    often = replace(recipe, stages=tuple(replace(s, checkpoint_every={"steps": 1}) for s in recipe.stages))
    run_recipe(often, folder / "whole")
    whole = comparable_results(folder / "whole")
    found: list[str] = []
    for steps in after:
        out = folder / f"stopped{steps}"
        try:
            with stop_after_steps(steps):
                run_recipe(often, out)
        except StopRun:
            pass
        else:
            raise AssertionError(f"the run has fewer than {steps} steps")
        run_recipe(often, out)
        found += [f"after {steps}: {key}" for key in differing_keys(whole, comparable_results(out))]
    return found


def saved_weights(outcome: Outcome | Path | str, role: str, stage: str | None = None) -> dict[str, Tensor]:
    """The weights of a role as a run, or one of its stages, left them."""
    run = outcome.folder if isinstance(outcome, Outcome) else RunFolder(outcome)
    tree = torch.load(run.last if stage is None else run.stage(stage), weights_only=True)
    return tree["models"][role]


def top1_scores(outcome: Outcome, role: str = "student", split: str = "test") -> list[float]:
    """Top-1 in percent of a role on a split, evaluation after evaluation."""
    lines = read_json_lines(outcome.folder.metrics)
    found = [line for line in lines if line.get("role") == role and line.get("split") == split]
    return [line["metrics"]["top1"] for line in found if "top1" in line["metrics"]]


def logged_losses(outcome: Outcome, term: str) -> list[float]:
    """The unweighted loss of a term, log line after log line."""
    return [
        line["terms"][term]["loss"] for line in read_json_lines(outcome.folder.metrics) if term in line.get("terms", {})
    ]


def run_manifest(outcome: Outcome) -> Mapping[str, Any]:
    return read_json(outcome.folder.manifest)
