"""Splits the words of a command line into a recipe and overrides (`key=value`)."""

from __future__ import annotations

from collections.abc import Sequence

from kdbench.errors import ConfigError


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the recipe and the list of overrides of a command line.

    The recipe is the only word that contains no `=` and does not begin with `~`; it may be at any position.

    Raises:
        ConfigError: the command line names no recipe, or more than one.
    """
    recipes = [word for word in arguments if word and "=" not in word and not word.startswith("~")]
    overrides = [word for word in arguments if word and word not in recipes]
    if not recipes:
        raise ConfigError("no recipe: expected a name that `kdbench list recipes` prints, or the path of a YAML file.")
    if len(recipes) > 1:
        raise ConfigError(f"expected one recipe, got {', '.join(recipes)}. An override is written key=value.")
    return recipes[0], overrides
