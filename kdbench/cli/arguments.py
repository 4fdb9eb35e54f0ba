"""Splits the words of a command line into a recipe and overrides."""

from __future__ import annotations

from collections.abc import Sequence

from kdbench.errors import ConfigError


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the recipe and the overrides of a command line, in any order. The recipe is the word without `=` or `~`.

    Raises:
        ConfigError: there is no recipe, or more than one.
    """
    recipes = [word for word in arguments if word and "=" not in word and not word.startswith("~")]
    overrides = [word for word in arguments if word and word not in recipes]
    if not recipes:
        raise ConfigError("no recipe: expected a name of `kdbench list recipes`, or the path of a YAML file.")
    if len(recipes) > 1:
        raise ConfigError(f"expected one recipe, got {', '.join(recipes)}. An override is written key=value.")
    return recipes[0], overrides
