"""Tests the README: commands are valid, its recipe loads, its diagram, names and numbers are the project's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from kdbench.cli.diagram import draw_stage
from kdbench.cli.main import COMMANDS, main
from kdbench.cli.show import parts_page
from kdbench.config.load import load_recipe, recipe_names
from kdbench.experiment.artifacts import plan_stages
from kdbench.registry import DATASETS, MODELS, TERMS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Returns the arguments of all lines in bash blocks that run kdbench, without comments and redirections."""
    lines = [
        shlex.split(line, comments=True) for name, block in BLOCKS if name == "bash" for line in block.splitlines()
    ]
    starts = [(line, line.index("kdbench")) for line in lines if "kdbench" in line]
    arguments = [line[start + 1 :] for line, start in starts]
    return [line[: line.index(">")] if ">" in line else line for line in arguments]


QUICK_COMMANDS = [line for line in commands() if line[0] != "train"]
TRAIN_COMMANDS = [line for line in commands() if line[0] == "train"]


@pytest.fixture
def example_recipes(tmp_path) -> None:
    """Writes the README's recipe and the teacher of the example to the working folder."""
    (recipe,) = [block for language, block in BLOCKS if language == "yaml"]
    (tmp_path / "student.yaml").write_text(recipe, encoding="utf-8")
    teacher = ROOT / "examples" / "own_data" / "teacher.yaml"
    (tmp_path / "teacher.yaml").write_text(teacher.read_text(encoding="utf-8"), encoding="utf-8")


@pytest.mark.parametrize("arguments", QUICK_COMMANDS, ids=" ".join)
def test_quick_command_runs(arguments: list[str], capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("arguments", TRAIN_COMMANDS, ids=" ".join)
def test_train_command_has_a_valid_recipe_and_valid_overrides(arguments: list[str], example_recipes):
    recipe, *overrides = [argument for argument in arguments[1:] if argument != "-m"]
    # A sweep is checked with the first of its values; the launcher is no key of a recipe.
    values = [override.split(",")[0] for override in overrides if not override.startswith("hydra/")]
    assert load_recipe(recipe, values).stages


def test_bash_blocks_cover_every_command():
    mentioned = {line[0] for line in commands()} | set(re.findall(r"`kdbench (\w+)", TEXT))
    assert mentioned == set(COMMANDS)


def test_recipe_trains_the_models_of_the_example(example_recipes):
    example = yaml.safe_load((ROOT / "examples" / "own_data" / "student.yaml").read_text(encoding="utf-8"))
    recipe = yaml.safe_load(Path("student.yaml").read_text(encoding="utf-8"))
    assert {key: recipe[key] for key in ("dataset", "teacher", "student", "terms")} == {
        key: example[key] for key in ("dataset", "teacher", "student", "terms")
    }
    assert recipe.keys() <= example.keys()


def test_parts_page_is_the_generated_one():
    page = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    assert page == parts_page(), "run scripts/generate_docs"
    names = {name for registry in (TERMS, DATASETS, MODELS) for name in registry.entries if "/" not in name}
    assert names <= set(re.findall(r"`([^`\s]+)`", page))


def test_methods_page_is_linked_and_every_recipe_is_shipped():
    assert "(docs/methods.md)" in TEXT
    mentioned = set(re.findall(r"\b((?:digits|cifar100)/[a-z_]+)\b", TEXT))
    assert mentioned and mentioned <= set(recipe_names())


def test_diagram_is_that_of_a_recipe():
    diagrams = {
        "\n".join(draw_stage(plan)) + "\n"
        for name in ("digits/dafl", "digits/kd")
        for plan in plan_stages(load_recipe(name, []))
    }
    assert diagrams & {block for _, block in BLOCKS}


def test_quickstart_output_has_the_rows_of_the_script_and_a_significant_gain():
    block = next(block for language, block in BLOCKS if language == "console" and "quickstart" in block)
    matches = re.findall(r"^ (\w[\w, ]+?)\s+([\d.]+) ± ([\d.]+)", block, re.MULTILINE)
    rows = {label: (float(mean), float(deviation)) for label, mean, deviation in matches}
    assert list(rows) == ["teacher", "student, 50 labels", "student, all labels", "student, distilled"]
    assert rows["student, distilled"][0] - rows["student, 50 labels"][0] > 3 * rows["student, 50 labels"][1]
    recipe = yaml.safe_load((ROOT / "recipes/digits/kd.yaml").read_text(encoding="utf-8"))
    assert recipe["label_fraction"] == 50


def test_speeds_are_those_of_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/step.json").read_text(encoding="utf-8"))["kdbench_over"]
    text = " ".join(TEXT.split())
    speeds = re.findall(r"([\d.]+) \(([\d.]+) to ([\d.]+)\) times torchdistill", text)
    assert len(speeds) == 2
    for speed, name in zip(speeds, ("torchdistill", "torchdistill, teacher in eval"), strict=True):
        expected = [result[name][key] for key in ("median", "q1", "q3")]
        assert [float(number) for number in speed] == pytest.approx(expected, abs=0.0051)
