"""Loads a recipe: a name or path, and overrides, become a checked Recipe. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdbench.config.compose.hydra import ComposedRecipe, compose, compose_job
from kdbench.config.compose.layers import read_layers
from kdbench.config.parse.recipe import parse_recipe
from kdbench.config.paths import find_recipe, recipe_names
from kdbench.config.schema import Recipe
from kdbench.errors import ConfigError

__all__ = ["dump_recipe", "find_recipe", "load_job", "load_recipe", "load_resolved", "recipe_names"]


RESOLVED = "resolved.yaml"
"""The file of a run's folder that contains its resolved recipe."""


def load_recipe(recipe: str, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Loads a shipped recipe by name, or a file by path.

    Args:
        overrides: as on the command line, such as `terms.kd.temperature=2`.
        values: plain values by dotted key, such as {"student.model": {"type": "resnet20"}}. They are applied after the
            overrides and keep their types: the text "1e3" stays text.

    Raises:
        ConfigError: with every mistake in the recipe.
    """
    name, path = find_recipe(recipe)
    return validate(compose(read_layers(name, path, overrides), overrides, values))


def validate(composed: ComposedRecipe) -> Recipe:
    """Parses and checks a composed recipe."""
    return parse_recipe(composed, Path(composed.path).parent, (composed.path,))


def load_job(config: Any, folder: Path, hydra_config: Any) -> Recipe:
    """Parses the config of one job of Hydra's run or multirun.

    Args:
        config: the job's config, without Hydra's node.
        folder: the folder that `ConfigLayers.write` filled.
        hydra_config: Hydra's own node.
    """
    return validate(compose_job(config, folder, hydra_config))


def load_resolved(path: str | Path) -> Recipe:
    """Loads the resolved recipe of a run.

    Args:
        path: the run's folder, or its `resolved.yaml`.

    Raises:
        ConfigError: the file does not exist, or is not a valid recipe.
    """
    path = Path(path)
    path = path / RESOLVED if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: not the folder of a run; it contains no resolved recipe.")
    return load_recipe(str(path.resolve()))


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML: a self-contained recipe, with its source under `origin`."""
    data = {key: value for key, value in recipe.resolved.items() if key not in ("fresh", "origin")}
    origin: Mapping[str, Any] = {
        "name": recipe.name,
        "file": recipe.path,
        "choices": dict(recipe.group_choices),
        "overrides": list(recipe.overrides),
    }
    return yaml.safe_dump({**data, "origin": origin}, sort_keys=False, allow_unicode=True, width=120)
