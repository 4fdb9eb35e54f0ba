"""Runs with prefetched or cached frozen roles: equal to the inline run, resumable, named in manifest and notices."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.frozen_teacher import BATCH_TERMS, DATA, FEATURES, close, recipe_text
from helpers.recipes import (  # noqa: F401
    TESTS,
    QuietConsole,
    comparable_results,
    differing_keys,
    plugin_registration,
    subprocess_environment,
    torchrun_command,
    train_recipe_text,
)
from kdbench.data.loading.batch import Window
from kdbench.data.loading.decode import ImageReader
from kdbench.engine.train.runner import Runner
from kdbench.files import read_json


def student_weights(folder: str) -> dict[str, Tensor]:
    return torch.load(f"{folder}/checkpoints/last.pt", weights_only=True)["models"]["student"]


def test_notice_and_manifest_contain_the_mode_of_each_frozen_role():
    notices = {
        "inline": "",
        "prefetch": "teacher is prefetched (for 4 steps at once, 32 rows)",
        "cache": "teacher is cached (teacher_cache/",
    }
    for mode, expected in notices.items():
        console = QuietConsole()
        train_recipe_text(recipe_text(f"out: {mode}\nfrozen_forward: {mode}\n"), data=DATA, console=console)
        texts = [text for text in console.notices if "frozen roles" in text]
        assert len(texts) == (1 if expected else 0) and all(expected in text for text in texts)
        manifest = read_json(f"{mode}/manifest.json")
        assert manifest["frozen_forward"]["main"]["teacher"]["mode"] == mode
        assert manifest["sessions"][0]["frozen_forward"] == f"{mode}, 32 rows"
        content = Path(mode, "manifest.json").read_text().replace(manifest["sessions"][0]["command"], "")
        assert str(Path.cwd()) not in content
    for mode in ("prefetch", "cache"):
        assert close(student_weights(mode), student_weights("inline"))


class Killed(BaseException):
    """Ends a run inside a step."""


def kill_before(step: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a recipe and ends the run before the given step."""
    original = Runner.step

    def run_step(self: Runner, window: Window) -> None:
        if self.progress.steps_done == step:
            raise Killed
        original(self, window)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Runner, "step", run_step)
        train_recipe_text(text, data=DATA)


@pytest.mark.parametrize("mode", ["prefetch", "cache"])
@pytest.mark.parametrize("step", [3, 6, 11])
def test_run_killed_inside_a_block_resumes_to_the_same_bits(monkeypatch, mode, step):
    """In float32, where another shape of the block would give other bits."""
    extra = FEATURES + f"checkpoint_every: {{steps: 1}}\nfrozen_forward: {mode}\nruns: runs-{mode}\nout: "
    train_recipe_text(recipe_text(extra + "uninterrupted\n", exact=False), data=DATA)
    kill_before(step, recipe_text(extra + "killed\n", exact=False), monkeypatch)
    train_recipe_text(recipe_text(extra + "killed\n", exact=False), data=DATA)
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("killed")) == []


def test_run_resumed_in_another_mode_shows_a_notice(monkeypatch):
    extra = "checkpoint_every: {steps: 1}\nout: run\nfrozen_forward: "
    kill_before(6, recipe_text(extra + "prefetch\n"), monkeypatch)
    console = QuietConsole()
    train_recipe_text(recipe_text(extra + "inline\n"), data=DATA, console=console)
    assert any("prefetch, 32 rows" in text and "inline, 32 rows" in text for text in console.notices)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_prefetching_reads_each_image_file_once(workers, monkeypatch):
    folder = Path("pets/train")
    for label, name in itertools.product(("ant", "bee"), range(13)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(name))
        Image.fromarray(pixels.numpy()).save(folder / label / f"{name}.png")
    data = (
        "dataset: {type: image_folder, root: pets, resident: false, size: 8}\n"
        "data: {eval: {dataset: {type: synthetic, shape: [3, 8, 8], classes: 2, samples: 8}}}\n"
    )
    reads: list[int] = []
    original = ImageReader.read

    def read(self: ImageReader, index: int, *args: Any) -> Any:
        reads.append(index)
        return original(self, index, *args)

    monkeypatch.setattr(ImageReader, "read", read)
    reads_by_mode = {}
    for mode in ("inline", "prefetch"):
        reads.clear()
        text = recipe_text(f"workers: {workers}\nout: {mode}\nfrozen_forward: {mode}\nlabel_fraction: null\n")
        train_recipe_text(text, data=data)
        reads_by_mode[mode] = sorted(reads)
    assert close(student_weights("prefetch"), student_weights("inline"))
    # Worker processes count in memory of their own.
    assert reads_by_mode["inline"] == reads_by_mode["prefetch"] and (workers or len(reads) >= 52)


@pytest.mark.slow
def test_two_processes_equal_their_inline_run():
    """Each rank prefetches and caches its own rows; with 61 samples one row is repeated."""
    files = []
    for mode in ("inline", "prefetch", "cache"):
        files.append(f"{mode}.yaml")
        Path(files[-1]).write_text(DATA + recipe_text(BATCH_TERMS + f"out: {mode}\nfrozen_forward: {mode}\n"))
    command = torchrun_command(str(TESTS / "helpers" / "distributed_worker.py"), *files)
    process = subprocess.run(
        command, env=subprocess_environment(), cwd=os.getcwd(), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    for mode in ("prefetch", "cache"):
        assert read_json(f"{mode}/manifest.json")["frozen_forward"]["main"]["teacher"]["mode"] == mode
        assert close(student_weights(mode), student_weights("inline"))
