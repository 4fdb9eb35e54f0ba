"""Loads the recipe that `weights: {recipe: ...}` names, in a form that is equal for all students of this teacher.

All students therefore share one teacher run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdbench.config.load import load_recipe
from kdbench.config.schema import PartConfig, Recipe, WeightsConfig


def teacher_recipe(weights: WeightsConfig, recipe: Recipe) -> Recipe:
    """Loads the recipe of a teacher run, whose trained student provides the initial weights of a role.

    Settings that do not change results (device, folders, workers) are copied from `recipe`. The teacher run saves
    every epoch whose weights some role of `recipe` loads, so that one teacher run serves all roles.
    """
    assert weights.recipe is not None
    values = {} if weights.model is None else {"student.model": _plain_value(weights.model)}
    teacher = load_recipe(weights.recipe, values=values)
    all_weights = [role.weights for stage in recipe.stages for role in stage.roles.values() if role.weights is not None]
    same_teacher = [
        item for item in (weights, *all_weights) if (item.recipe, item.model) == (weights.recipe, weights.model)
    ]
    epochs = {*teacher.keep_epochs, *(item.epoch for item in same_teacher if item.epoch is not None)}
    return replace(
        teacher,
        device=recipe.device,
        workers=recipe.workers,
        data_root=recipe.data_root,
        runs=recipe.runs,
        tensorboard=recipe.tensorboard,
        keep_epochs=tuple(sorted(epochs)),
    )


def _plain_value(value: Any) -> Any:
    """Converts nested part configurations to plain mappings and lists."""
    if isinstance(value, PartConfig):
        return _plain_value({"type": value.type, **value.params})
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    return value
