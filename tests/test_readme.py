"""Tests the README: its quick commands run, its tables list the registered parts, its recipes are the example."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from kdbench.cli.diagram import draw_stage
from kdbench.cli.main import COMMANDS, main
from kdbench.config.load import load_recipe, recipe_names
from kdbench.experiment.artifacts import plan_stages
from kdbench.registry import DATASETS, MODELS, TERMS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands(language: str) -> list[str]:
    """Returns the lines of one language's code blocks that start with `kdbench`, without comments."""
    lines = [line for name, block in BLOCKS if name == language for line in block.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.startswith("kdbench ")]


def table(header: str) -> list[list[str]]:
    """Returns the cells of the table whose first column has this header."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"\| {header} \|", line))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def names(header: str) -> list[str]:
    """Returns the names in backticks in the first column of a table."""
    return [name for row in table(header) for name in re.findall(r"`([^`]+)`", row[0])]


QUICK = [
    pytest.param(command, marks=[pytest.mark.slow] if "--all" in command else [], id=command)
    for command in commands("bash")
]


@pytest.mark.parametrize("command", QUICK)
def test_quick_command_runs(command: str, capsys):
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_quick_commands_cover_list_show_inspect_and_check():
    assert {command.split()[1] for command in commands("bash")} >= {"list", "show", "inspect", "check"}


@pytest.mark.parametrize("command", [c for c in commands("") if "digits/" in c or "cifar100/" in c])
def test_command_with_a_shipped_recipe_is_valid(command: str):
    arguments = [argument for argument in shlex.split(command)[2:] if argument != "-m"]
    assert load_recipe(arguments[0], arguments[1:]).stages


def test_tables_list_the_registered_parts():
    assert sorted(names("terms")) == sorted(TERMS.entries)
    assert sorted(names("dataset")) == sorted(DATASETS.entries)
    models = [name for name in names("models") if not name.endswith("/NAME")]
    assert sorted(models) == sorted(name for name in MODELS.entries if "/" not in name)
    assert sorted(names("recipes")) == recipe_names()


def test_diagram_is_that_of_the_recipe():
    recipe = load_recipe("digits/dafl", [])
    (plan,) = plan_stages(recipe)
    assert "\n".join(draw_stage(plan)) + "\n" in [block for _, block in BLOCKS]


def test_every_command_is_listed():
    line = next(line for line in TEXT.splitlines() if line.startswith("Commands: "))
    assert set(re.findall(r"`(\w+)`", line)) == set(COMMANDS)


def test_recipes_are_those_of_the_example():
    recipes = [block for language, block in BLOCKS if language == "yaml"]
    assert recipes == [
        (ROOT / f"examples/own_data/{name}.yaml").read_text(encoding="utf-8") for name in ("teacher", "student")
    ]


def test_quickstart_output_has_the_rows_of_the_script_and_a_significant_gain():
    block = next(block for language, block in BLOCKS if language == "console" and "quickstart" in block)
    matches = re.findall(r"^ (\w[\w, ]+?)\s+([\d.]+) ± ([\d.]+)", block, re.MULTILINE)
    rows = {label: (float(mean), float(deviation)) for label, mean, deviation in matches}
    assert list(rows) == ["teacher", "student, 50 labels", "student, all labels", "student, distilled"]
    assert rows["student, distilled"][0] - rows["student, 50 labels"][0] > 3 * rows["student, 50 labels"][1]
    recipe = yaml.safe_load((ROOT / "recipes/digits/kd.yaml").read_text(encoding="utf-8"))
    assert recipe["label_fraction"] == 50


def test_speeds_are_those_of_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/step.json").read_text(encoding="utf-8"))
    contenders = ("torchdistill", "torchdistill, teacher in eval", "bare", "bare, tuned")
    rows = table("kdbench is")
    assert len(rows) == len(contenders)
    for column, ratios in enumerate((result["kdbench_over"], result["kdbench_compiled_over"])):
        for row, name in zip(rows, contenders, strict=True):
            numbers = tuple(float(number) for number in re.findall(r"[\d.]+", row[column]))
            assert numbers == pytest.approx([ratios[name][key] for key in ("median", "q1", "q3")], abs=0.0051)
