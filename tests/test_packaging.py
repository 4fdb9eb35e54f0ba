"""The metadata of the package: version, licence, supported versions, entry points, type information."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kdbench

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def minimum_versions(text: str) -> dict[str, str]:
    """Returns the minimum version of each dependency."""
    return dict(re.findall(r'^\s*"([a-z-]+)>=([\d.]+)', text, re.MULTILINE))


def test_newest_release_in_the_changelog_is_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## \[(\S+)\]", text, re.MULTILINE)
    releases = [entry for entry in entries if entry != "Unreleased"]
    assert releases[0] == kdbench.__version__ and "Unreleased" not in entries[1:]


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in PROJECT


def test_matrix_tests_the_oldest_supported_versions():
    matrix = (ROOT / "scripts" / "matrix").read_text(encoding="utf-8")
    minimum = minimum_versions(PROJECT)
    assert f'"torch=={minimum["torch"]}.0"' in matrix and f'"torchvision=={minimum["torchvision"]}.0"' in matrix
    python = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert python is not None and f"interpreter {python[1]})" in matrix


def test_program_and_module_print_the_same_version():
    process = subprocess.run([sys.executable, "-m", "kdbench", "--version"], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == f"kdbench {kdbench.__version__}"
    assert 'kdbench = "kdbench.cli.main:main"' in PROJECT


def test_type_checkers_find_the_types_of_the_package():
    """PEP 561: the marker file belongs to the package and to its wheel."""
    assert (ROOT / "kdbench" / "py.typed").is_file()
    assert re.search(r'^kdbench = \[.*"py.typed".*\]', PROJECT, re.MULTILINE)


def test_type_checker_is_strict_for_the_modules_that_everything_imports():
    table = PROJECT.split("[tool.pyright]")[1].split("\n[")[0]
    assert 'typeCheckingMode = "standard"' in table
    strict = set(re.findall(r'"(kdbench/\w+\.py)"', table))
    assert strict == {f"kdbench/{name}.py" for name in ("errors", "registry", "randomness", "files")}
