"""Fixtures that write a recipe to the test's own folder and load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from helpers.recipe_texts import KD_RECIPE
from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.errors import ConfigError

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Returns load(text, *overrides, name="r.yaml") -> Recipe."""

    def load_text(text: str = KD_RECIPE, *overrides: str, name: str = "r.yaml") -> Recipe:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return load_recipe(name, overrides)

    return load_text


@pytest.fixture
def error_of(load: Load) -> Callable[..., str]:
    """Returns error_of(text, *overrides) -> message of the ConfigError."""

    def load_error(text: str = KD_RECIPE, *overrides: str) -> str:
        with pytest.raises(ConfigError) as raised:
            load(text, *overrides)
        return str(raised.value)

    return load_error
