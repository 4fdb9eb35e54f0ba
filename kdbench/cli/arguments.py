"""Splits the words of a command line into recipe and overrides."""

from __future__ import annotations

from collections.abc import Sequence

from kdbench.errors import ConfigError


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Takes the recipe out of words in any order: it is the one that is no override."""
    words = [word for word in arguments if word and "=" not in word and not word.startswith("~")]
    overrides = [word for word in arguments if word and word not in words]
    if not words:
        from kdbench.config.paths import recipe_names

        known = ", ".join(recipe_names()) or "none are shipped"
        raise ConfigError(f"which recipe? Give the path of a YAML file, or one of: {known}.")
    if len(words) > 1:
        raise ConfigError(f"one recipe at a time, got {', '.join(words)}; an override is written key=value.")
    return words[0], overrides
