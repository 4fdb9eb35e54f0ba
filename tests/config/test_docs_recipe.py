"""docs/recipe.md: its tables equal the declared keys, and its examples load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdbench.cli.main import main
from kdbench.config.key_tables import key_tables, render_table, update_tables
from kdbench.config.parse.stages import TOP_LEVEL_KEYS
from kdbench.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_tables_equal_the_declared_keys():
    assert update_tables(PAGE) == PAGE, "write them with `kdbench schema --markdown docs/recipe.md`"


def test_page_has_every_table_once():
    assert sorted(re.findall(r"<!-- keys: (.*?) -->", PAGE)) == sorted(key_tables())


def test_every_key_of_the_top_level_except_origin_is_in_one_table():
    sections = {key.section for key in TOP_LEVEL_KEYS.values()} - {""}
    names = [name for section in sections for name in key_tables()[section]]
    assert sorted([*names, "origin"]) == sorted(TOP_LEVEL_KEYS)


def test_command_updates_the_tables_of_a_page(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- keys: view -->\nold\n<!-- end of keys -->\nafter\n")
    assert main(["schema", "--markdown", str(page)]) == 0
    table = render_table(key_tables()["view"])
    assert page.read_text() == f"before\n<!-- keys: view -->\n{table}<!-- end of keys -->\nafter\n"


def test_unknown_table_reports_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no table 'vew'\. Did you mean 'view'"):
        update_tables("<!-- keys: vew -->\n<!-- end of keys -->\n")


def test_first_example_loads(load):
    example = PAGE.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert list(load(example).stages[0].terms) == ["ce", "kd"]


def test_example_of_an_inner_step_loads(load):
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "inner_step" in block)
    top = "dataset: digits\nteacher: digits_cnn\nstudent: digits_mlp\nepochs: 1\noptimizer: {type: SGD, lr: 0.1}\n"
    stage = load(f"{top}data: {{held_out: {{}}}}\n{example}").stages[0]
    assert stage.updates[0].inner_step.terms == ("soft", "hard") and stage.updates[1].inner_step is None


def test_example_of_a_loop_loads(load):
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "rounds: 4" in block)
    stages = load(f"dataset: digits\noptimizer: {{type: SGD, lr: 0.1}}\nterms: [cross_entropy]\n{example}").stages
    assert [stage.name for stage in stages][:3] == ["train@1", "query@1", "train@2"] and len(stages) == 8
