"""`kdbench train` through Hydra: overrides and flags in any order, multirun, failures, plug-ins.

A function that records the recipes replaces the training.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdbench.cli.jobs import JobRecord, read_records
from kdbench.cli.main import main
from kdbench.cli.train import print_jobs
from kdbench.config.identity import identity
from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.errors import TrainingError
from kdbench.report.tables import RunGroup

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
def recipes(monkeypatch, tmp_path: Path) -> list[Recipe]:
    """Returns the recorded recipes. Seed 13 fails with a user error, seed 14 with a bug."""
    import kdbench.cli.train

    (tmp_path / "kd.yaml").write_text(KD)
    recorded: list[Recipe] = []

    def record(recipe: Recipe) -> SimpleNamespace:
        if recipe.seed == 13:
            raise TrainingError("the loss of kd is not finite since step 7")
        if recipe.seed == 14:
            raise RuntimeError("a bug")
        recorded.append(recipe)
        return SimpleNamespace(summary={"export": "student"}, is_main=False)

    monkeypatch.setattr(kdbench.cli.train, "train_recipe", record)
    return recorded


def test_single_run_changes_neither_folder_nor_working_directory_nor_logging(recipes, tmp_path, capfd):
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    working_directory = os.getcwd()
    assert main(["train", "kd.yaml", "seed=3", "terms.kd.temperature=2"]) == 0
    assert (recipes[0].seed, recipes[0].stages[0].terms["kd"].params) == (3, {"temperature": 2})
    assert os.getcwd() == working_directory and [path.name for path in tmp_path.iterdir()] == ["kd.yaml"]
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == (handlers, level)
    assert capfd.readouterr() == ("", "")


def test_temporary_configs_are_deleted_before_training(recipes, monkeypatch, tmp_path):
    """A killed run then leaves no folder behind."""
    import kdbench.cli.train

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    record = kdbench.cli.train.train_recipe
    folders: list[list[Path]] = []

    def record_folders(recipe: Recipe) -> object:
        folders.append(list((tmp_path / "temporary").iterdir()))
        return record(recipe)

    monkeypatch.setattr(kdbench.cli.train, "train_recipe", record_folders)
    assert main(["train", "kd.yaml"]) == 0
    assert folders == [[]] and len(recipes) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["kd.yaml", "-m", "seed=1,2", "epochs=2"],
        ["-m", "seed=1,2", "kd.yaml", "epochs=2"],
        ["seed=1,2", "epochs=2", "kd.yaml", "--multirun"],
    ],
)
def test_flags_overrides_and_recipe_are_accepted_in_any_order(recipes, arguments: list[str]):
    assert main(["train", *arguments]) == 0
    assert [(recipe.seed, recipe.stages[0].epochs) for recipe in recipes] == [(1, 2), (2, 2)]


def test_multirun_sweeps_terms_and_groups(recipes, tmp_path):
    (tmp_path / "pair").mkdir()
    for name, model in (("cnn", "digits_cnn"), ("mlp", "digits_mlp")):
        (tmp_path / "pair" / f"{name}.yaml").write_text(f"student: {model}\n")
    (tmp_path / "kd.yaml").write_text(KD.replace("student: digits_mlp\n", ""))
    assert main(["train", "kd.yaml", "-m", "pair=cnn,mlp", "terms.kd.temperature=1,4"]) == 0
    stages = [recipe.stages[0] for recipe in recipes]
    swept = [(stage.roles["student"].model.type, stage.terms["kd"].params["temperature"]) for stage in stages]
    assert swept == [("digits_cnn", 1), ("digits_cnn", 4), ("digits_mlp", 1), ("digits_mlp", 4)]
    assert main(["train", "kd.yaml", "-m", "pair=glob(m*)"]) == 0
    assert recipes[-1].group_choices == {"pair": "mlp"}


def test_configs_of_a_multirun_stay_in_its_folder(recipes, tmp_path):
    assert main(["train", "kd.yaml", "-m", "seed=1,2", "runs=r"]) == 0
    (folder,) = (tmp_path / "r" / "kd" / "multirun").iterdir()
    config = next(folder.glob("config-*"))
    assert {path.name for path in config.iterdir()} >= {"recipe.yaml", "origin.json"}
    assert json.loads((config / "origin.json").read_text())["name"] == "kd"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kd.yaml", "r"], "no outputs/, no multirun/"
    assert main(["train", "kd.yaml", "-m", "seed=1,2", "hydra.sweep.dir=elsewhere"]) == 0
    assert list((tmp_path / "elsewhere").glob("config-*"))


def test_mistake_in_a_later_job_is_reported_before_the_first_starts(recipes, capsys):
    assert main(["train", "kd.yaml", "-m", "terms.kd.temperature=1,2,hot"]) == 2
    assert recipes == [] and "override 'terms.kd.temperature=hot'" in capsys.readouterr().err


def test_failed_job_does_not_stop_the_other_jobs_and_exits_with_2(recipes, capsys):
    assert main(["train", "kd.yaml", "-m", "seed=1,13,3"]) == 2
    assert [recipe.seed for recipe in recipes] == [1, 3]
    err = capsys.readouterr().err
    assert "job 1: the loss of kd is not finite since step 7" in err and "Traceback" not in err


def test_bug_keeps_its_traceback(recipes, capsys):
    assert main(["train", "kd.yaml", "seed=14"]) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err
    assert main(["train", "kd.yaml", "-m", "seed=14,1"]) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err and [recipe.seed for recipe in recipes] == [1]


def test_failed_run_prints_one_paragraph(recipes, capsys):
    assert main(["train", "kd.yaml", "seed=13"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "kdbench: the loss of kd is not finite since step 7\n"


def test_composed_recipe_is_printed(recipes, capsys):
    assert main(["train", "kd.yaml", "--cfg", "job", "terms.kd.temperature=3"]) == 0
    out = capsys.readouterr().out
    assert "temperature: 3" in out and "hydra" not in out and recipes == []
    assert main(["train", "kd.yaml", "-c", "job", "-p", "terms.kd"]) == 0
    assert "type: kd" in capsys.readouterr().out
    assert main(["train", "kd.yaml", "--cfg", "hydra"]) == 0
    assert "sweeper" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["hydra/launcher=none_such"], "none_such"),
        (["hydra.no_such_key=1"], "no_such_key"),
        (["-m", "seed=interval(1,2)"], "sweep"),
        (["-m", "--cfg", "job"], "exclude each other"),
    ],
)
def test_error_of_hydra_is_one_paragraph(recipes, arguments: list[str], expected: str, capsys):
    assert main(["train", "kd.yaml", *arguments]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("kdbench: ") and "Traceback" not in err


@pytest.mark.parametrize("flags", [[], ["-m"], ["-m", "hydra/launcher=concurrent"]])
def test_override_may_refer_to_a_list(recipes, tmp_path, flags: list[str]):
    """The override is kept as text; the list that it refers to would not be a valid override."""
    (tmp_path / "kd.yaml").write_text(KD.replace("kd: {type: kd}}", HINT))
    overrides = ["terms.hint.student='${vars.maps}'", "epochs='${vars.length}'"]
    assert main(["train", "kd.yaml", *overrides, *flags]) == 0
    expected = load_recipe("kd.yaml", overrides)
    edges = expected.stages[0].terms["hint"].edges
    assert [str(edge.student) for edge in edges] == ["student:layer1", "student:layer2"]
    assert recipes[0].resolved == expected.resolved and identity(recipes[0]) == identity(expected)
    assert [text.lstrip("+") for text in recipes[0].overrides] == overrides


def test_worker_process_can_compose_the_job_from_the_configs_of_the_sweep(recipes, tmp_path):
    """joblib and submitit load the sweep's configs in a worker."""
    assert main(["train", "kd.yaml", "-m", "seed=1,2"]) == 0
    config = next((tmp_path / "runs" / "kd" / "multirun").glob("*/config-*"))
    code = (
        "import hydra, sys\n"
        "with hydra.initialize_config_dir(config_dir=sys.argv[1], version_base='1.3'):\n"
        "    print(hydra.compose('recipe', ['++seed=2']).seed)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, cwd="/")
    assert process.stdout.strip() == "2", process.stderr


PLUGIN = '''
from kdbench.registry import TERMS

raise_when_imported = 1 / 0


@TERMS.register("user_term", space="row")
class UserTerm:
    """A term of the user."""

    def __init__(self, width: int = 3) -> None: ...

    def forward(self, student, label): ...
'''


def test_plugin_adds_its_parts_without_being_imported(tmp_path):
    (tmp_path / "user_parts.py").write_text(PLUGIN)
    (tmp_path / "kd.yaml").write_text(KD.replace("{type: kd}", "{type: user_term, wdth: 2}"))
    command = [sys.executable, "-m", "kdbench"]
    without = subprocess.run([*command, "train", "kd.yaml"], capture_output=True, text=True)
    assert without.returncode == 2 and "no term 'user_term'" in without.stderr
    with_plugin = subprocess.run(
        [*command, "train", "kd.yaml", "--plugin", "user_parts"], capture_output=True, text=True
    )
    assert with_plugin.returncode == 2 and "Did you mean 'width'?" in with_plugin.stderr
    names = subprocess.run([*command, "--plugin=user_parts", "list", "terms"], capture_output=True, text=True)
    assert "user_term" in names.stdout and names.returncode == 0


def test_recipe_cannot_name_a_plugin(recipes, tmp_path, capsys):
    (tmp_path / "kd.yaml").write_text(KD + "plugin: os\n")
    assert main(["train", "kd.yaml"]) == 2
    assert "unknown key 'plugin'" in capsys.readouterr().err


def test_table_of_a_multirun_groups_jobs_by_their_overrides_without_seed(monkeypatch, capsys):
    import kdbench.cli.train

    groups: list[RunGroup] = []

    def aggregate(rows: list[RunGroup]) -> SimpleNamespace:
        groups.extend(rows)
        return SimpleNamespace(table=lambda: "TABLE")

    monkeypatch.setattr(kdbench.cli.train, "aggregate", aggregate)
    print_jobs(
        [
            JobRecord("lr=1 epochs=2", folder="a"),
            JobRecord("lr=2 epochs=2", folder="b"),
            JobRecord("lr=1 epochs=2", folder="c"),
            JobRecord("lr=2 epochs=2"),
            JobRecord("lr=3 epochs=2"),
        ]
    )
    assert [(group.label, list(group.folders)) for group in groups] == [
        ("lr=1", ["a", "c"]),
        ("lr=2 (1 of 2 finished)", ["b"]),
    ]
    output = capsys.readouterr().out
    assert "TABLE" in output and "lr=3: no job finished." in output


def test_table_of_a_multirun_over_seeds_has_one_row_with_all_overrides(monkeypatch):
    import kdbench.cli.train

    groups: list[RunGroup] = []
    table = SimpleNamespace(table=lambda: "")
    monkeypatch.setattr(kdbench.cli.train, "aggregate", lambda rows: groups.extend(rows) or table)
    print_jobs([JobRecord("lr=1", folder=name) for name in "ab"])
    print_jobs([JobRecord("", folder=name) for name in "ab"])
    assert [group.label for group in groups] == ["lr=1", "all jobs"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "is damaged (not JSON"),
        ("", "is damaged (not JSON: empty)"),
        ("[]", "is damaged: the content is of type list; expected a mapping"),
        ("{}", "is damaged: entry 'label' is missing"),
        ('{"label": "lr=1", "folder": 3}', "is damaged: entry 'folder' is of type int; expected str"),
    ],
)
def test_damaged_job_record_is_reported_by_name_and_left_out(tmp_path, capsys, content: str, reason: str):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/10.json").write_text('{"label": "lr=2", "folder": "b", "role": "student"}')
    (tmp_path / "jobs/2.json").write_text('{"label": "lr=1"}')
    (tmp_path / "jobs/3.json").write_text(content)
    assert read_records(tmp_path) == [JobRecord("lr=1"), JobRecord("lr=2", folder="b")]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{tmp_path}/jobs/3.json {reason}" in lines[0]
    assert lines[0].endswith("the table does not contain job 3.")
