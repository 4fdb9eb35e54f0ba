"""The loader: a recipe's name or path, and overrides, become a checked Recipe. torch is not imported."""

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
"""The file of a run's folder that holds its resolved recipe."""


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a shipped recipe by name, or a file by path, with overrides as on the command line.

    Raises:
        ConfigError: with every mistake in it.
    """
    name, path = find_recipe(recipe)
    return validate(compose(read_layers(name, path, overrides), overrides))


def validate(composed: ComposedRecipe) -> Recipe:
    """Checks a composed recipe."""
    return parse_recipe(composed, Path(composed.path).parent, (composed.path,))


def load_job(config: Any, folder: Path, hydra_config: Any) -> Recipe:
    """Turns the config of one job of Hydra's run or multirun into a Recipe.

    Args:
        config: the job's config, without Hydra's node.
        folder: where `Prepared.write` put the generated files.
        hydra_config: Hydra's own node.
    """
    return validate(compose_job(config, folder, hydra_config))


def load_resolved(path: str | Path) -> Recipe:
    """Loads the resolved recipe that a run keeps: the run's folder, or the `resolved.yaml` in it.

    Raises:
        ConfigError: there is none, or it is no recipe.
    """
    path = Path(path)
    path = path / RESOLVED if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: there is no resolved recipe; this is not the folder of a run.")
    return load_recipe(str(path.resolve()))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: a recipe by itself, with where it came from under `origin`."""
    data = {key: value for key, value in recipe.resolved.items() if key not in ("fresh", "origin")}
    origin: Mapping[str, Any] = {
        "name": recipe.name,
        "file": recipe.path,
        "choices": dict(recipe.group_choices),
        "overrides": list(recipe.overrides),
    }
    return yaml.safe_dump({**data, "origin": origin}, sort_keys=False, allow_unicode=True, width=120)
