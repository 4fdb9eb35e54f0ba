"""Tests the example for a user's own class folders, on small generated images and without a network connection."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdbench.cli.main import main

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_data"
SMALL = ["dataset.size=32", "epochs=1", "batch_size=8"]


def write_images(root: Path) -> None:
    """Writes images of two classes, bright and dark squares on noise, with different sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name, level in (("bright", 220), ("dark", 20)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(40, 60, 2)
                image = rng.integers(80, 160, (height, width, 3), dtype=np.uint8)
                image[10:30, 10:30] = level
                Image.fromarray(image).save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")


@pytest.fixture
def example_folder(tmp_path) -> Path:
    """Copies the two recipes next to `photos/`, with smaller models and random weights, which need no download."""
    write_images(tmp_path / "photos")
    for name in ("teacher", "student"):
        text = (EXAMPLE / f"{name}.yaml").read_text(encoding="utf-8")
        text = text.replace(", weights: DEFAULT", "").replace("torchvision/resnet50", "torchvision/resnet18")
        text = (
            text.replace("size: 224", "size: 32")
            .replace("epochs: 20", "epochs: 1")
            .replace("padding: 16", "padding: 4")
        )
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_recipes_of_the_example_pass_the_check(example_folder, capsys):
    assert main(["check", "teacher.yaml"]) == 0
    assert (
        main(["check", "student.yaml", "terms.hint={type: hint, student: features.-1, teacher: layer4, weight: 10}"])
        == 0
    )
    out = capsys.readouterr().out
    assert "torchvision/mobilenet_v3_small" in out
    assert re.search(r"^train +image_folder train +36 +2 ", out, re.MULTILINE), "36 samples of 2 classes"


@pytest.mark.slow
def test_sweep_over_seeds_trains_the_teacher_once(example_folder, capsys):
    assert main(["train", "student.yaml", *SMALL[1:], "-m", "seed=1,2,3"]) == 0
    teachers = list(example_folder.glob("runs/teacher/*/summary.json"))
    students = [json.loads(path.read_text()) for path in example_folder.glob("runs/student/*/summary.json")]
    assert len(teachers) == 1
    assert sorted(student["seed"] for student in students) == [1, 2, 3]
    assert all("teacher" in student["frozen"] for student in students)
    assert main(["train", "student.yaml", *SMALL[1:], "baseline=true"]) == 0
    assert "baseline without teacher" in capsys.readouterr().out
