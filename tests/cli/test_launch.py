"""`kdbench train` through Hydra: overrides and flags in any order, multirun, failures, plug-ins.

What trains is replaced by something that writes down what it was asked for.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdbench.cli.main import main
from kdbench.config.identity import identity
from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.errors import TrainingError

KD = """\
dataset: digits
teacher: digits_cnn
student: digits_mlp
epochs: 1
optimizer: {type: SGD, lr: 0.1}
terms: {ce: {type: cross_entropy}, kd: {type: kd}}
"""
HINT = """hint: {type: hint, student: layer1, teacher: [layer1, layer2]}}
vars: {maps: [layer1, layer2], length: 2}"""


@pytest.fixture
def asked(monkeypatch, tmp_path: Path) -> list[Recipe]:
    """The recipes that would have been trained; seed 13 fails as a user's mistake, seed 14 as a fault of ours."""
    import kdbench.cli.train

    (tmp_path / "kd.yaml").write_text(KD)
    recipes: list[Recipe] = []

    def run(recipe: Recipe) -> SimpleNamespace:
        if recipe.seed == 13:
            raise TrainingError("the loss of kd is not finite since step 7")
        if recipe.seed == 14:
            raise RuntimeError("a fault")
        recipes.append(recipe)
        return SimpleNamespace(summary={"export": "student"}, is_main=False)

    monkeypatch.setattr(kdbench.cli.train, "train_recipe", run)
    return recipes


def test_one_run_leaves_the_folder_the_working_directory_and_logging_alone(asked, tmp_path, capfd):
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    before = os.getcwd()
    assert main(["train", "kd.yaml", "seed=3", "terms.kd.temperature=2"]) == 0
    assert (asked[0].seed, asked[0].stages[0].terms["kd"].params) == (3, {"temperature": 2})
    assert os.getcwd() == before and [path.name for path in tmp_path.iterdir()] == ["kd.yaml"]
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == (handlers, level)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["kd.yaml", "-m", "seed=1,2", "epochs=2"],
        ["-m", "seed=1,2", "kd.yaml", "epochs=2"],
        ["seed=1,2", "epochs=2", "kd.yaml", "--multirun"],
    ],
)
def test_flags_overrides_and_the_recipe_come_in_any_order(asked, arguments: list[str]):
    assert main(["train", *arguments]) == 0
    assert [(recipe.seed, recipe.stages[0].epochs) for recipe in asked] == [(1, 2), (2, 2)]


def test_a_multirun_sweeps_terms_and_groups(asked, tmp_path):
    (tmp_path / "pair").mkdir()
    for name, model in (("one", "digits_cnn"), ("two", "digits_mlp")):
        (tmp_path / "pair" / f"{name}.yaml").write_text(f"student: {model}\n")
    (tmp_path / "kd.yaml").write_text(KD.replace("student: digits_mlp\n", ""))
    assert main(["train", "kd.yaml", "-m", "pair=one,two", "terms.kd.temperature=1,4"]) == 0
    told = [(r.stages[0].roles["student"].model.type, r.stages[0].terms["kd"].params["temperature"]) for r in asked]
    assert told == [("digits_cnn", 1), ("digits_cnn", 4), ("digits_mlp", 1), ("digits_mlp", 4)]
    assert main(["train", "kd.yaml", "-m", "pair=glob(t*)"]) == 0
    assert asked[-1].choices == {"pair": "two"}


def test_the_configs_of_a_multirun_stay_in_its_folder(asked, tmp_path):
    assert main(["train", "kd.yaml", "-m", "seed=1,2", "runs=r"]) == 0
    (folder,) = (tmp_path / "r" / "kd" / "multirun").iterdir()
    config = next(folder.glob("config-*"))
    assert {path.name for path in config.iterdir()} >= {"recipe.yaml", "origin.json"}
    assert json.loads((config / "origin.json").read_text())["name"] == "kd"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kd.yaml", "r"], "no outputs/, no multirun/"
    assert main(["train", "kd.yaml", "-m", "seed=1,2", "hydra.sweep.dir=elsewhere"]) == 0
    assert list((tmp_path / "elsewhere").glob("config-*"))


def test_a_mistake_in_a_later_job_is_found_before_the_first_begins(asked, capsys):
    assert main(["train", "kd.yaml", "-m", "terms.kd.temperature=1,2,hot"]) == 2
    assert asked == [] and "override 'terms.kd.temperature=hot'" in capsys.readouterr().err


def test_a_failed_job_leaves_the_others_and_ends_with_2(asked, capsys):
    assert main(["train", "kd.yaml", "-m", "seed=1,13,3"]) == 2
    assert [recipe.seed for recipe in asked] == [1, 3]
    err = capsys.readouterr().err
    assert "job 1: the loss of kd is not finite since step 7" in err and "Traceback" not in err


def test_faults_of_ours_keep_their_traceback(asked, capsys):
    assert main(["train", "kd.yaml", "seed=14"]) == 1
    assert "RuntimeError: a fault" in capsys.readouterr().err
    assert main(["train", "kd.yaml", "-m", "seed=14,1"]) == 1
    assert "RuntimeError: a fault" in capsys.readouterr().err and [recipe.seed for recipe in asked] == [1]


def test_a_failed_run_is_one_paragraph(asked, capsys):
    assert main(["train", "kd.yaml", "seed=13"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "kdbench: the loss of kd is not finite since step 7\n"


def test_the_composed_recipe_is_printed(asked, capsys):
    assert main(["train", "kd.yaml", "--cfg", "job", "terms.kd.temperature=3"]) == 0
    out = capsys.readouterr().out
    assert "temperature: 3" in out and "hydra" not in out and asked == []
    assert main(["train", "kd.yaml", "-c", "job", "-p", "terms.kd"]) == 0
    assert "type: kd" in capsys.readouterr().out
    assert main(["train", "kd.yaml", "--cfg", "hydra"]) == 0
    assert "sweeper" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra/launcher=none_such"], "none_such"),
        (["hydra.no_such_key=1"], "no_such_key"),
        (["-m", "seed=interval(1,2)"], "sweep"),
        (["-m", "--cfg", "job"], "exclude each other"),
    ],
)
def test_complaints_of_hydra_are_paragraphs(asked, arguments: list[str], said: str, capsys):
    assert main(["train", "kd.yaml", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("kdbench: ") and "Traceback" not in err


@pytest.mark.parametrize("flags", [[], ["-m"], ["-m", "hydra/launcher=concurrent"]])
def test_an_override_may_refer_to_a_list(asked, tmp_path, flags: list[str]):
    """It is kept as it was written, not as the list that it stands for, which is no override."""
    (tmp_path / "kd.yaml").write_text(KD.replace("kd: {type: kd}}", HINT))
    words = ["terms.hint.student='${vars.maps}'", "epochs='${vars.length}'"]
    assert main(["train", "kd.yaml", *words, *flags]) == 0
    expected = load_recipe("kd.yaml", words)
    edges = expected.stages[0].terms["hint"].edges
    assert [str(edge.student) for edge in edges] == ["student:layer1", "student:layer2"]
    assert asked[0].resolved == expected.resolved and identity(asked[0]) == identity(expected)
    assert [text.lstrip("+") for text in asked[0].overrides] == words


def test_another_process_can_compose_the_job_again(asked, tmp_path):
    """What joblib and submitit do: they load the sweep's configuration in a worker."""
    assert main(["train", "kd.yaml", "-m", "seed=1,2"]) == 0
    config = next((tmp_path / "runs" / "kd" / "multirun").glob("*/config-*"))
    code = (
        "import hydra, sys\n"
        "with hydra.initialize_config_dir(config_dir=sys.argv[1], version_base='1.3'):\n"
        "    print(hydra.compose('recipe', ['++seed=2']).seed)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "2", done.stderr


PLUGIN = '''
from kdbench.registry import TERMS

raise_when_imported = 1 / 0


@TERMS.register("own_term", space="row")
class OwnTerm:
    """A term of the user."""

    def __init__(self, width: int = 3) -> None: ...

    def forward(self, student, label): ...
'''


def test_a_plugin_adds_its_parts_without_being_imported(tmp_path):
    (tmp_path / "own_parts.py").write_text(PLUGIN)
    (tmp_path / "kd.yaml").write_text(KD.replace("{type: kd}", "{type: own_term, wdth: 2}"))
    run = [sys.executable, "-m", "kdbench"]
    without = subprocess.run([*run, "train", "kd.yaml"], capture_output=True, text=True)
    assert without.returncode == 2 and "no term 'own_term'" in without.stderr
    added = subprocess.run([*run, "train", "kd.yaml", "--plugin", "own_parts"], capture_output=True, text=True)
    assert added.returncode == 2 and "Did you mean 'width'?" in added.stderr
    listed = subprocess.run([*run, "--plugin=own_parts", "list", "terms"], capture_output=True, text=True)
    assert "own_term" in listed.stdout and listed.returncode == 0


def test_a_recipe_cannot_name_a_plugin(asked, tmp_path, capsys):
    (tmp_path / "kd.yaml").write_text(KD + "plugin: os\n")
    assert main(["train", "kd.yaml"]) == 2
    assert "unknown key 'plugin'" in capsys.readouterr().err
