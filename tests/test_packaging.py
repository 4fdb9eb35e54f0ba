"""What the package says of itself agrees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kdbench

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def requirements(text: str) -> dict[str, str]:
    return dict(re.findall(r'^\s*"([a-z-]+)>=([\d.]+)', text, re.MULTILINE))


def test_the_newest_entry_of_the_changelog_is_the_version():
    entries = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert entries[0] == kdbench.__version__


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in PROJECT


def test_the_matrix_tries_the_oldest_versions_that_are_promised():
    matrix = (ROOT / "scripts" / "matrix").read_text(encoding="utf-8")
    least = requirements(PROJECT)
    assert f'"torch=={least["torch"]}.0"' in matrix and f'"torchvision=={least["torchvision"]}.0"' in matrix
    python = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert python is not None and f"interpreter {python[1]})" in matrix


def test_the_program_and_the_module_are_the_same():
    done = subprocess.run([sys.executable, "-m", "kdbench", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"kdbench {kdbench.__version__}"
    assert 'kdbench = "kdbench.cli.main:main"' in PROJECT
