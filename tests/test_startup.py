"""Large libraries are imported only where they are used; measured in new processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.recipes import subprocess_environment

LATE = ("torchvision", "sklearn", "matplotlib", "tensorboard")

FIRST_STEP = """
import os, sys
from kdbench.report.console import ConsoleReporter
late, arguments = sys.argv[1].split(","), sys.argv[2:]  # Hydra takes over sys.argv

def progress(self, done, phase=""):
    print("imported:", *sorted(set(late) & set(sys.modules)), "after step", done, flush=True)
    os._exit(0)

ConsoleReporter.progress = progress
from kdbench.cli.main import main
sys.exit(main(["train", *arguments]))
"""


def imported_after_first_step(*overrides: str) -> set[str]:
    """Returns the libraries of `LATE` that a process has imported after its first step. The teacher is untrained."""
    arguments = ["digits/kd", "teacher.weights=null", "teacher.require=null", *overrides]
    process = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, ",".join(LATE), *arguments],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = next((line for line in process.stdout.splitlines() if line.startswith("imported:")), None)
    assert line is not None and line.endswith("after step 1"), process.stdout + process.stderr
    return set(line.split()[1:-3])


def run_code(code: str) -> str:
    """Runs code in a new process; returns its standard output."""
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def imported_by(code: str) -> set[str]:
    """Returns the libraries of `LATE` that a statement imports."""
    difference = f"set({LATE}) & set(sys.modules) - before"
    return set(run_code(f"import sys; before = set(sys.modules); {code}; print(*({difference}))").split())


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_first_step_imports_no_library_that_it_does_not_use():
    assert imported_after_first_step("tensorboard=false") == set()


def test_tensorboard_is_imported_when_it_is_written():
    """Also the control of the test above: a library that is imported before the first step is detected."""
    assert imported_after_first_step("tensorboard=true") == {"tensorboard"}


def test_matplotlib_is_imported_when_a_figure_is_drawn():
    import_only = "import torch; from kdbench.report.figures import draw_confusion"
    draw = "draw_confusion(torch.eye(3, dtype=torch.int64), list('abc'), title='')"
    assert imported_by(import_only) == set()
    assert imported_by(f"{import_only}; {draw}") == {"matplotlib"}


def test_torchvision_is_imported_when_one_of_its_networks_is_built():
    find = "from kdbench.registry import MODELS; MODELS.entry('torchvision/resnet18')"
    assert imported_by(find) == set()
    assert imported_by(f"{find}; MODELS.build('torchvision/resnet18', dict(), num_classes=10)") == {"torchvision"}


def test_scikit_learn_is_not_imported_for_its_digits():
    """tests/data/datasets/test_toy_datasets.py compares the images with scikit-learn's."""
    assert imported_by("from kdbench.data.datasets.digits import Digits; Digits().load()") == set()
    assert imported_by("from sklearn.datasets import load_digits") == {"sklearn"}


def test_garbage_collection_is_disabled_during_the_import_of_the_engine_only():
    run_code(
        "import gc, sys; from kdbench.cli.train import _import_engine; collections = []\n"
        "def record(phase, info): collections.append(info['generation'] == 2 and 'torch.nn' in sys.modules)\n"
        "gc.callbacks.append(record)\n"
        "_import_engine(); assert gc.isenabled() and not any(collections), 'torch was searched'\n"
        "frozen = gc.get_freeze_count(); assert frozen > 100_000, frozen\n"
        "class Ring: pass\n"
        "ring = Ring(); ring.itself = ring; del ring\n"
        "_import_engine(); assert gc.get_freeze_count() == frozen\n"
        "assert gc.collect() >= 1, 'garbage of later jobs stays'\n"
    )
