"""The files of a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdbench.config.paths import recipe_names, shared_folder

ROOT = Path(__file__).parents[2]


def test_wheel_lists_every_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader; newer ones run this test")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "kdbench").rglob("*.py")}
    assert folders | {"kdbench._share.configs", "kdbench._share.recipes"} == set(settings["packages"])


def test_shipped_recipes_and_groups_exist():
    assert "digits/kd" in recipe_names()
    assert (shared_folder("configs") / "protocol" / "cifar_240_epochs.yaml").is_file()
