"""docs/recipe.md names every key that the loader takes, and its whole recipes load."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from kdbench.config.schema import Published, Recipe, RoleConfig, StageConfig, WeightsConfig

TEXT = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
NOT_KEYS = {
    *("name", "file", "path", "resolved", "places", "choices", "overrides", "dropped"),  # of Recipe
    *("place", "roles", "mode", "of", "also", "every_steps", "transforms"),  # spelled otherwise
}


@pytest.mark.parametrize("part", [Recipe, StageConfig, RoleConfig, WeightsConfig, Published])
def test_every_field_of_the_schema_is_documented(part: type):
    words = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`[^`]*`|```.*?```", TEXT, re.DOTALL))))
    assert {item.name for item in dataclasses.fields(part)} - NOT_KEYS <= words


def test_the_first_example_loads(load):
    example = TEXT.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert list(load(example).stages[0].terms) == ["ce", "kd"]
