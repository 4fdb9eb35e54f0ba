"""Loads a recipe by name or path, applies overrides, and checks the result. torch is not imported."""

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
    """Loads and checks a recipe.

    Args:
        overrides: overrides as on the command line, such as `terms.kd.temperature=2`.
        values: dotted key -> plain value, such as {"student.model": {"type": "resnet20"}}. The values are applied
            after the overrides. They keep their types, so the text "1e3" stays text.

    Raises:
        ConfigError: the recipe has mistakes. The message lists all of them.
    """
    name, path = find_recipe(recipe)
    return validate(compose(read_layers(name, path, overrides), overrides, values))


def validate(composed: ComposedRecipe) -> Recipe:
    """Checks a recipe that was merged with its group files and overrides, and converts it to a Recipe."""
    return parse_recipe(composed, Path(composed.path).parent, (composed.path,))


def load_job(config: Any, folder: Path, hydra_config: Any) -> Recipe:
    """Checks the config that Hydra composed for one job of its run or multirun, and converts it to a Recipe.

    Args:
        config: config of the job without the key `hydra`.
        folder: folder from which Hydra composed the job (see `ConfigLayers.write`).
        hydra_config: content of the key `hydra`.
    """
    return validate(compose_job(config, folder, hydra_config))


def load_resolved(path: str | Path) -> Recipe:
    """Loads the resolved recipe of a run.

    Args:
        path: folder of the run, or path of its file `resolved.yaml`.

    Raises:
        ConfigError: the file does not exist, or is not a valid recipe.
    """
    path = Path(path)
    path = path / RESOLVED if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; expected the folder of a run, which contains `{RESOLVED}`.")
    return load_recipe(str(path.resolve()))


def dump_recipe(recipe: Recipe) -> str:
    """Returns a recipe with all group files and overrides merged as YAML text, the content of `resolved.yaml`.

    The key `origin` contains the name and the path of the original recipe.
    """
    data = {key: value for key, value in recipe.resolved.items() if key not in ("fresh", "origin")}
    origin: Mapping[str, Any] = {
        "name": recipe.name,
        "file": recipe.path,
        "choices": dict(recipe.group_choices),
        "overrides": list(recipe.overrides),
    }
    return yaml.safe_dump({**data, "origin": origin}, sort_keys=False, allow_unicode=True, width=120)
