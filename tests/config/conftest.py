"""Recipes written into the test's own folder."""

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
    """load(text, *overrides, name="r.yaml") -> Recipe."""

    def load_text(text: str = KD_RECIPE, *overrides: str, name: str = "r.yaml") -> Recipe:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return load_recipe(name, overrides)

    return load_text


@pytest.fixture
def fault(load: Load) -> Callable[..., str]:
    """fault(text, *overrides) -> what the ConfigError says."""

    def fault_of(text: str = KD_RECIPE, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return fault_of
