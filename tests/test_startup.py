"""A run imports what it uses, and no sooner: the start of `digits/kd`, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.recipes import subprocess_environment

LATE = ("torchvision", "sklearn", "matplotlib", "tensorboard")

FIRST_STEP = """
import os, sys
from kdbench.report.console import ConsoleReporter
late, words = sys.argv[1].split(","), sys.argv[2:]  # Hydra takes over sys.argv

def progress(self, done, phase=""):
    print("imported:", *sorted(set(late) & set(sys.modules)), "after step", done, flush=True)
    os._exit(0)

ConsoleReporter.progress = progress
from kdbench.cli.main import main
sys.exit(main(["train", *words]))
"""


def imported_after_first_step(*words: str) -> set[str]:
    """Which of `LATE` a process has imported when its first training step is over. The teacher is not a trained one."""
    given = ["digits/kd", "teacher.weights=null", "teacher.accuracy=null", *words]
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, ",".join(LATE), *given],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("imported:")), None)
    assert line is not None and line.endswith("after step 1"), done.stdout + done.stderr
    return set(line.split()[1:-3])


def imported_by(code: str) -> set[str]:
    """Which of `LATE` a statement makes a process import."""
    told = f"import sys; before = set(sys.modules); {code}; print(*(set({LATE}) & set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", told], env=subprocess_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_nothing_that_the_first_step_does_without_is_imported_before_it():
    assert imported_after_first_step("tensorboard=false") == set()


def test_tensorboard_is_imported_when_it_is_written():
    """Also the control of the test above: what is imported before the first step is seen."""
    assert imported_after_first_step("tensorboard=true") == {"tensorboard"}


def test_matplotlib_is_imported_when_a_picture_is_drawn():
    draw = "import torch; from kdbench.report.figures import confusion"
    assert imported_by(draw) == set()
    assert imported_by(f"{draw}; confusion(torch.eye(3, dtype=torch.int64), list('abc'), title='')") == {"matplotlib"}


def test_torchvision_is_imported_when_a_network_of_it_is_built():
    listed = "from kdbench.registry import MODELS; MODELS.entry('torchvision/resnet18')"
    assert imported_by(listed) == set()
    assert imported_by(f"{listed}; MODELS.build('torchvision/resnet18', dict(), num_classes=10)") == {"torchvision"}


def test_scikit_learn_is_not_imported_even_for_its_digits():
    """`test_digits_halves_are_scikit_learns_images_once_each` compares what is read with what it would give."""
    assert imported_by("from kdbench.data.datasets.digits import Digits; Digits().load()") == set()
    assert imported_by("from sklearn.datasets import load_digits") == {"sklearn"}


def test_the_collector_rests_while_the_engine_is_imported_and_only_then():
    code = (
        "import gc, sys; from kdbench.cli.train import _import_engine; found = []\n"
        "gc.callbacks.append(lambda phase, info: found.append(info['generation'] == 2 and 'torch.nn' in sys.modules))\n"
        "_import_engine(); assert gc.isenabled() and not any(found), 'searched torch'\n"
        "kept = gc.get_freeze_count(); assert kept > 100_000, kept\n"
        "class Ring: pass\n"
        "ring = Ring(); ring.own = ring; del ring; _import_engine(); assert gc.get_freeze_count() == kept\n"
        "assert gc.collect() >= 1, 'garbage of later jobs stays'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
