"""Recipe examples in the docstrings of models, weight transforms, artifact builders and selectors."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import yaml

from helpers.recipes import recipe_from_text
from kdbench.registry import ARTIFACTS, MODELS, SELECTORS, WEIGHT_TRANSFORMS, Entry

REGISTRIES = (MODELS, WEIGHT_TRANSFORMS, ARTIFACTS, SELECTORS)
ENTRIES = [entry for registry in REGISTRIES for entry in registry.entries.values() if "Example" in entry.doc]

RECIPE: dict[str, Any] = {
    "student": {"model": "digits_resnet"},
    "teacher": {"model": "digits_resnet"},
    "terms": {"ce": "cross_entropy", "kd": "kd"},
    "optimizer": {"type": "SGD", "lr": 0.1},
    "epochs": 1,
}
NOISE = {"noise": {"type": "gaussian", "shape": [64], "samples": 64}}
MASK = {"mask": {"type": "gaussian", "shape": [16], "samples": 64}}
BODY = {"body": {"model": "digits_resnet"}}
COMPANIONS: dict[str, dict[str, Any]] = {
    "cosine_head": {"models": BODY},
    "dual_head": {"models": BODY},
    "generate": {"data": NOISE, "models": {"generator": {"model": "latent_generator", "input": "noise.z"}}},
    "hidden_patches": {"data": MASK},
    "image_bank": {"data": NOISE},
    "latent_generator": {"data": NOISE},
    "masked_vit": {"data": MASK},
    "residual_branch": {"models": {"trunk": {"model": "residual_trunk"}}},
}
"""Roles and sources that the example of a part refers to."""


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.module.split('.')[-1]}-{entry.name}" for entry in ENTRIES])
def test_the_example_of_a_part_loads_as_a_recipe(entry: Entry):
    text = textwrap.dedent(entry.doc.split("Example (recipe):\n")[1])
    example = yaml.safe_load(text)
    assert entry.name in text
    recipe = recipe_from_text(yaml.safe_dump({**RECIPE, **COMPANIONS.get(entry.name, {}), **example}))
    assert recipe.stages


def test_every_artifact_builder_selector_and_weight_transform_has_an_example():
    for registry in (ARTIFACTS, SELECTORS, WEIGHT_TRANSFORMS):
        assert all("Example (recipe):" in entry.doc for entry in registry.entries.values())
