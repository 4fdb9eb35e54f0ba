"""The scripts: sound, usable from any folder, and saying what goes wrong by their exit code."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from kdbench.config.load import load_recipe
from kdbench.experiment.run import run
from kdbench.report.tables import MeanAndDeviation, SeedTable, SeedTableRow

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "scripts").iterdir()) if path.read_bytes().startswith(b"#!")]
BASH = shutil.which("bash") or "bash"


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def call(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, *words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "path", [*SCRIPTS, ROOT / ".ci" / "run", ROOT / "scripts" / "environment.sh"], ids=lambda p: p.name
)
def test_a_script_is_sound(path: Path, tmp_path):
    assert call("-n", str(path), cwd=tmp_path).stderr == ""


def test_the_two_commands_are_there_and_can_be_executed():
    assert {"quickstart", "test"} <= {path.name for path in SCRIPTS}
    assert all(os.access(path, os.X_OK) for path in [*SCRIPTS, ROOT / ".ci" / "run"])


def test_ci_calls_exactly_scripts_test():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) == 1 and code[0].endswith('/../scripts/test"')


@pytest.mark.parametrize("name", ["test", "matrix"])
def test_an_unknown_argument_is_refused_from_any_folder(name: str, tmp_path):
    done = call(str(ROOT / "scripts" / name), "--nonsense", cwd=tmp_path)
    assert done.returncode == 1
    assert "unknown argument '--nonsense'" in done.stderr


def test_a_machine_without_a_fitting_python_is_told_so(tmp_path):
    """A checkout without .venv, and a PATH with nothing but an old Python on it."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("dirname", "basename"):
        (programs / name).symlink_to(shutil.which(name) or name)
    (programs / "python3").write_text(f"#!{BASH}\nexit 1\n", encoding="utf-8")  # as one that is too old does
    (programs / "python3").chmod(0o755)
    done = call(str(checkout / "scripts" / "quickstart"), cwd=tmp_path, PATH=str(programs), PYTHON="")
    assert done.returncode == 1
    assert "no Python 3.10 or newer found" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_failed_step_fails_the_whole(tmp_path):
    """`scripts/test` in a checkout whose tools all fail but one: every step runs, and the exit code tells."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, code in (("python", 0), ("ruff", 1), ("basedpyright", 0), ("kdbench", 0)):
        (programs / name).write_text(f"#!{BASH}\nexit {code}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    (checkout / "pyproject.toml").write_text("", encoding="utf-8")
    done = call(str(checkout / "scripts" / "test"), cwd=tmp_path)
    assert done.returncode == 1
    assert "FAILED: lint,format" in done.stdout
    assert done.stdout.index("-- tests") > done.stdout.index("-- lint")


def test_the_weight_of_zero_in_quickstart_is_the_twin():
    """The student alone learns the same bits whether its teacher is left out or only weighs nothing."""
    weights = []
    for override in ("baseline=true", "terms.kd.weight=0"):
        settings = ["epochs=2", "runs=runs", "device=cpu", "tensorboard=false", "fresh=true"]
        recipe = load_recipe("digits/kd", [override, *settings, f"out={override.partition('=')[0]}"])
        if override != "baseline=true":
            recipe = load_recipe("digits/kd", [override, *settings, "teacher.weights=null", "teacher.accuracy=null"])
        outcome = run(recipe)
        weights.append(torch.load(outcome.folder.last, weights_only=True)["models"]["student"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_commands_that_quickstart_names_are_valid(quickstart):
    for kind in quickstart.KINDS:
        load_recipe(kind.recipe, kind.overrides)
        assert kind.command.startswith(f"kdbench train {kind.recipe}")


def test_the_table_of_quickstart_fits_80_columns(quickstart):
    spread = MeanAndDeviation((90.0, 100.0))
    lines = tuple(SeedTableRow(kind.label, 5, spread, spread, 42_698, 1.4e6, 12.345, ()) for kind in quickstart.KINDS)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(quickstart.compact(SeedTable(lines)))
    text = console.export_text()
    assert all(line.label in text for line in lines) and "…" not in text
    assert text.count("95.00 ± 7.07") == 8


@pytest.mark.slow
def test_quickstart_distils_with_a_gain(quickstart, tmp_path, capsys):
    assert quickstart.main(["--runs", str(tmp_path / "runs"), "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "runs" / "quickstart" / "table.json").read_text(encoding="utf-8"))
    top1 = {row["label"]: row["top1"]["mean"] for row in rows}
    assert top1["student, distilled"] > top1["student, 50 labels"] + 10
    assert top1["student, distilled"] > top1["student, all labels"]
    assert f"Runs: {tmp_path}" in said
    assert quickstart.main(["--runs", str(tmp_path / "runs"), "--seeds", "2"]) == 0, "a repeated call shows the table"
