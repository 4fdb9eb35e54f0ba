"""The recipe that makes somebody's initial weights: how it is asked for, so that everybody asks for the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdbench.config.load import load_recipe
from kdbench.config.schema import PartConfig, Recipe, WeightsConfig


def teacher_recipe(weights: WeightsConfig, recipe: Recipe) -> Recipe:
    """The recipe whose student is wanted. It takes over where and how to run, nothing that changes results.

    It keeps every epoch that any role of any stage takes from it: whoever asks first, one run serves them all.
    """
    assert weights.recipe is not None
    overrides = []
    if weights.model is not None:
        overrides.append(f"student.model={_override_value(weights.model)}")
    told = load_recipe(weights.recipe, overrides)
    wanted = (role.weights for stage in recipe.stages for role in stage.roles.values() if role.weights is not None)
    alike = (own for own in (weights, *wanted) if (own.recipe, own.model) == (weights.recipe, weights.model))
    epochs = {*told.keep_epochs, *(own.epoch for own in alike if own.epoch is not None)}
    return replace(
        told,
        device=recipe.device,
        workers=recipe.workers,
        data_root=recipe.data_root,
        runs=recipe.runs,
        tensorboard=recipe.tensorboard,
        keep_epochs=tuple(sorted(epochs)),
    )


def _override_value(model: Any) -> str:
    if isinstance(model, PartConfig):
        model = {"type": model.type, **model.params}
    if isinstance(model, Mapping):
        return "{" + ",".join(f"{k}:{_override_value(v)}" for k, v in model.items()) + "}"
    if isinstance(model, list | tuple):
        return "[" + ",".join(_override_value(v) for v in model) + "]"
    return "null" if model is None else str(model).lower() if isinstance(model, bool) else str(model)
