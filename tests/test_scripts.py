"""The scripts: valid syntax, exit codes, CI, the quickstart, and the check of names and prose."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
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
BASH_SCRIPTS = [
    path for path in sorted((ROOT / "scripts").iterdir()) if path.read_bytes().startswith(b"#!/usr/bin/env bash")
]
BASH = shutil.which("bash") or "bash"


def load_script(name: str) -> ModuleType:
    """Imports a Python script."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses find the module of their annotations there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load_script("quickstart")


@pytest.fixture(scope="module")
def check_prose() -> ModuleType:
    return load_script("check_prose")


def run_bash(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs bash with further environment variables."""
    environment = {**os.environ, **variables}
    return subprocess.run([BASH, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "path", [*BASH_SCRIPTS, ROOT / ".ci" / "run", ROOT / "scripts" / "environment.sh"], ids=lambda path: path.name
)
def test_script_has_valid_syntax(path: Path, tmp_path):
    assert run_bash("-n", str(path), cwd=tmp_path).stderr == ""


def test_commands_of_the_readme_exist_and_are_executable():
    assert {"quickstart", "test"} <= {path.name for path in BASH_SCRIPTS}
    assert all(os.access(path, os.X_OK) for path in [*BASH_SCRIPTS, ROOT / ".ci" / "run"])


def test_ci_runs_exactly_scripts_test():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) == 1 and code[0].endswith('/../scripts/test"')


@pytest.mark.parametrize("name", ["test", "matrix"])
def test_unknown_argument_is_rejected_from_any_folder(name: str, tmp_path):
    process = run_bash(str(ROOT / "scripts" / name), "--nonsense", cwd=tmp_path)
    assert process.returncode == 1
    assert "unknown argument '--nonsense'" in process.stderr


def test_machine_without_a_supported_python_is_reported(tmp_path):
    """The checkout has no .venv, and PATH contains nothing but an old Python."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("dirname", "basename"):
        (programs / name).symlink_to(shutil.which(name) or name)
    (programs / "python3").write_text(f"#!{BASH}\nexit 1\n", encoding="utf-8")  # an old version fails the check so
    (programs / "python3").chmod(0o755)
    process = run_bash(str(checkout / "scripts" / "quickstart"), cwd=tmp_path, PATH=str(programs), PYTHON="")
    assert process.returncode == 1
    assert "no Python 3.10 or newer found" in process.stderr
    assert not (checkout / ".venv").exists()


def test_failed_step_fails_scripts_test_after_all_steps_ran(tmp_path):
    """In this checkout ruff fails and all other tools succeed."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, code in (("python", 0), ("ruff", 1), ("basedpyright", 0), ("kdbench", 0)):
        (programs / name).write_text(f"#!{BASH}\nexit {code}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    (checkout / "pyproject.toml").write_text("", encoding="utf-8")
    process = run_bash(str(checkout / "scripts" / "test"), cwd=tmp_path)
    assert process.returncode == 1
    assert "FAILED: lint,format" in process.stdout
    steps = [line.removeprefix("-- ") for line in process.stdout.splitlines() if line.startswith("-- ")]
    assert steps == ["lint", "format", "prose", "types", "tests"]


def test_tests_of_every_extra_are_run():
    """`scripts/test --extras` names each extra of pyproject.toml, and each of them has a marked test."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader; newer ones run this test")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"].keys() - {"test"}
    listed = re.search(r'--extras\) extras="([^"]*)"', (ROOT / "scripts" / "test").read_text(encoding="utf-8"))
    assert listed is not None and set(listed[1].split()) == extras
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f'@pytest.mark.extra("{extra}")' in tests for extra in extras)


def test_weight_zero_in_quickstart_equals_the_baseline():
    """The student gets equal bits whether the term of the teacher is dropped or has weight 0."""
    weights = []
    for override in ("baseline=true", "terms.kd.weight=0"):
        settings = ["epochs=2", "runs=runs", "device=cpu", "tensorboard=false", "fresh=true"]
        recipe = load_recipe("digits/kd", [override, *settings, f"out={override.partition('=')[0]}"])
        if override != "baseline=true":
            recipe = load_recipe("digits/kd", [override, *settings, "teacher.weights=null", "teacher.require=null"])
        outcome = run(recipe)
        weights.append(torch.load(outcome.folder.last, weights_only=True)["models"]["student"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_commands_that_quickstart_prints_are_valid(quickstart):
    for kind in quickstart.KINDS:
        load_recipe(kind.recipe, kind.overrides)
        assert kind.command.startswith(f"kdbench train {kind.recipe}")


def test_table_of_quickstart_fits_80_columns(quickstart):
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
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "runs" / "quickstart" / "table.json").read_text(encoding="utf-8"))
    top1 = {row["label"]: row["top1"]["mean"] for row in rows}
    assert top1["student, distilled"] > top1["student, 50 labels"] + 10
    assert top1["student, distilled"] > top1["student, all labels"]
    assert f"Runs: {tmp_path}" in output
    assert quickstart.main(["--runs", str(tmp_path / "runs"), "--seeds", "2"]) == 0, "a repeated call prints the table"


def test_code_keeps_the_rules_of_names_prose_and_lengths(check_prose):
    report = check_prose.check([ROOT / name for name in check_prose.FOLDERS])
    assert not any(rule.broken for rule in report.rules.values()), report.text()


# Joined from short strings, so that the check finds no violation in this file.
VIOLATIONS = {
    "NAMES": "found = 1\n",
    "OTHER_NAMES": "def select(given): ...\n",
    "HEADLESS_DOCSTRINGS": '"""Which rows."""\n',
    "DOCSTRINGS": 'class A:\n    """Tells."""\n',
    "MESSAGES": "text = " + repr(" ".join(("the", "file", "lies", "here"))) + "\n",
    "COMMENTS": "x = 1  " + "# computed anew\n",
    "BODIES": "def long():\n" + "    x = 1  # a reason\n" * 61,
    "UNCOMMENTED": "def long():\n" + "    x = 1\n" * 41,
    "MODULES": "x = 1\n" * 501,
}


@pytest.mark.parametrize("rule", VIOLATIONS)
def test_prose_check_detects_a_violation_of_the_rule(rule: str, check_prose, tmp_path, capsys):
    (tmp_path / "module.py").write_text(VIOLATIONS[rule], encoding="utf-8")
    assert check_prose.main([str(tmp_path)]) == 1
    name = getattr(check_prose, rule)
    assert f"ABOVE {name}" in capsys.readouterr().out
    broken = {key for key, value in check_prose.check([tmp_path]).rules.items() if value.broken}
    assert broken == {name}, "no other rule is broken"


def test_prose_check_detects_unfit_packages(check_prose, tmp_path):
    (tmp_path / "alone").mkdir()
    for path in (tmp_path / "alone" / "__init__.py", tmp_path / "alone" / "module.py"):
        path.write_text("", encoding="utf-8")
    rules = check_prose.check([tmp_path]).rules
    assert rules[check_prose.PACKAGES].broken and rules[check_prose.PACKAGE_DOCSTRINGS].broken


def test_prose_check_accepts_clean_code(check_prose, tmp_path):
    """The control of the violations: equal code with good names and words."""
    text = (
        '"""Selects rows."""\n\n\ndef select(rows):\n    """Returns the largest row."""\n'
        "    largest = max(rows)  # ties: the first\n    return largest\n"
    )
    (tmp_path / "module.py").write_text(text, encoding="utf-8")
    assert check_prose.main([str(tmp_path)]) == 0
