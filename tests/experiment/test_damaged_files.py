"""Damaged run files are rejected by name with exit code 2, or recovered with the bits of an undamaged run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kills import kill_at_step
from helpers.quick import only_quick
from helpers.recipes import (  # noqa: F401
    SYNTHETIC_DATA,
    comparable_results,
    differing_keys,
    plugin_registration,
    train_recipe_text,
)
from kdbench.cli.main import main
from kdbench.engine.state.run_state import ModelFile, RunState
from kdbench.engine.train.runner import Runner
from kdbench.files import read_json, write_json

COMMON = """
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
batch_size: 16
log_every: 2
checkpoint_every: {steps: 2}
tensorboard: false
"""
RECIPE = (
    """
student: {model: {type: t_layers, norm: batch, dropout: 0.2}}
teacher: {model: t_layers}
ema: 0.9
clip: 1.0
"""
    + COMMON
    + """
stages:
  first: {epochs: 1, terms: {ce: cross_entropy}, artifacts: {means: {type: class_means, features: "teacher:layer2"}}}
  second:
    epochs: 2
    student: {weights: {stage: first}}
    terms: {ce: cross_entropy, nd: {type: nd, student: layer2, teacher: layer2, means: "artifact:first.means"}}
out: run
"""
)


LAST, BEST, STAGE, ARTIFACT = (
    "checkpoints/last.pt",
    "checkpoints/best.pt",
    "checkpoints/stage_first.pt",
    "stages/first.means.pt",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of a finished run, of a run that stopped in its second stage, and of one with another seed."""
    base = tmp_path_factory.mktemp("runs")
    folders = {name: base / name for name in ("finished", "interrupted", "other_seed")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        train_recipe_text(RECIPE)
        Path("run").rename("finished")
        with kill_at_step("second", 5):
            train_recipe_text(RECIPE)
        Path("run").rename("interrupted")
        with kill_at_step("second", 5):
            train_recipe_text(RECIPE, "seed=7")
        Path("run").rename("other_seed")
    return folders


@pytest.fixture
def repeat(runs, capsys) -> Callable[..., tuple[int, str]]:
    """Copies a run, damages a file in it, and runs a command; returns the exit code and the output."""

    def run(name: str, file: str = "", damage: Callable[[Path], None] | None = None, *command: str) -> tuple[int, str]:
        Path("own.yaml").write_text(SYNTHETIC_DATA + RECIPE)
        shutil.copytree(runs[name], "run")
        if damage is not None:
            damage(Path("run") / file)
        code = main(list(command or ("train", "own.yaml")))
        captured = capsys.readouterr()
        output = " ".join((captured.out + captured.err).split())
        assert "Traceback" not in output
        return code, output

    return run


# Kinds of damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def write(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove_json_entry(entry: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        write_json(path, {key: value for key, value in read_json(path).items() if key != entry})

    return damage


def change_json(**entries: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        write_json(path, {**read_json(path), **entries})

    return damage


def remove_entry(entry: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tree = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in tree.items() if key != entry}, path)

    return damage


def change(**entries: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **entries}, path)

    return damage


def change_nested(entry: str, **entries: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tree = torch.load(path, weights_only=True)
        torch.save({**tree, entry: {**tree[entry], **entries}}, path)

    return damage


def in_both_checkpoints(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage_both(path: Path) -> None:
        damage(path)
        damage(path.with_name("last.pt.previous"))

    return damage_both


UNREADABLE = {
    "cut": cut,
    "empty": write(b""),
    "list": write(b"[]"),
    "not UTF-8": write(b"\xff\xfe"),
    "deeply nested": write(b"[" * 100_000),
}


STATE_ENTRIES = [field.name for field in fields(RunState)]


MODEL_ENTRIES = [field.name for field in fields(ModelFile) if field.name != "epoch"]


RECOVERED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    **{
        f"manifest, {kind}": ("manifest.json", damage, "manifest.json is damaged")
        for kind, damage in UNREADABLE.items()
    },
    **{
        f"manifest without {entry}": (
            "manifest.json",
            remove_json_entry(entry),
            f"manifest.json is damaged: entry '{entry}'",
        )
        for entry in ("format", "identity", "status")
    },
    "manifest, status": ("manifest.json", change_json(status=3), "manifest.json is damaged: entry 'status'"),
    "manifest, sessions": ("manifest.json", change_json(sessions={}), "manifest.json is damaged: entry 'sessions'"),
    "manifest removed": ("manifest.json", Path.unlink, "resuming from stage second, step 4"),
    **{
        f"last.pt, {kind}": (LAST, damage, "last.pt is damaged or not a checkpoint")
        for kind, damage in UNREADABLE.items()
    },
    **{
        f"last.pt without {entry}": (LAST, remove_entry(entry), f"last.pt is {PROBLEM}")
        for entry, PROBLEM in [
            (entry, f"damaged: entry '{entry}' is missing" if entry != "format" else "not a checkpoint of kdbench")
            for entry in STATE_ENTRIES
        ]
    },
    "last.pt, tensor": (LAST, lambda path: torch.save(torch.zeros(3), path), "last.pt is not a checkpoint of kdbench"),
    "last.pt, other version": (LAST, change(format=1), "last.pt is a checkpoint of another version of kdbench"),
    "last.pt, step too large": (LAST, change(step=10**9), "last.pt is damaged: entry 'step' is 1000000000"),
    "last.pt, step negative": (LAST, change(step=-1), "last.pt is damaged: entry 'step' is -1"),
    "last.pt, stage": (LAST, change(stage="third"), "last.pt is damaged: entry 'stage' is 'third'"),
    "last.pt, finished stages": (LAST, change(finished_stages={}), "last.pt is damaged: entry 'finished_stages'"),
    "last.pt, history": (
        LAST,
        change_nested("history", best={"second": {}}),
        "last.pt is damaged: entry 'history.best",
    ),
    **{f"best.pt, {kind}": (BEST, damage, "best.pt is damaged") for kind, damage in UNREADABLE.items()},
    "best.pt removed": (BEST, Path.unlink, "there is no checkpoint run/checkpoints/best.pt"),
    **{f"resolved.yaml, {kind}": ("resolved.yaml", damage, "") for kind, damage in UNREADABLE.items()},
}


REJECTED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "manifest of another run": ("manifest.json", change_json(identity="abc"), "run belongs to another run"),
    "last.pt without a role": (LAST, change(models={}), "last.pt is damaged: entry 'models'"),
    "last.pt without terms": (LAST, change(terms={}), "last.pt is damaged: entry 'terms'"),
    "last.pt without optimizers": (LAST, change(optimizers=[]), "last.pt is damaged: entry 'optimizers'"),
    "last.pt, optimizer": (LAST, change(optimizers=[{"state": {}}]), "last.pt is damaged: entry 'optimizers'"),
    "last.pt, meters": (LAST, change_nested("meters", sums=torch.zeros(1)), "last.pt is damaged: entry 'meters'"),
    "last.pt, weights": (LAST, change_nested("models", student={}), "last.pt is damaged: entry 'models.student'"),
    "last.pt, length": (LAST, change(total_steps=10**9), "last.pt is damaged: entry 'total_steps'"),
    "both checkpoints cut": (LAST, in_both_checkpoints(cut), "last.pt.previous is damaged"),
    "both checkpoints without step": (LAST, in_both_checkpoints(remove_entry("step")), "train again with fresh=true"),
    **{f"stage file, {kind}": (STAGE, damage, "stage_first.pt is damaged") for kind, damage in UNREADABLE.items()},
    **{f"stage file without {entry}": (STAGE, remove_entry(entry), "stage_first.pt is ") for entry in MODEL_ENTRIES},
    "stage file of another run": (STAGE, change(identity="abc"), "stage_first.pt belongs to another run"),
    **{f"artifact, {kind}": (ARTIFACT, damage, "first.means.pt is damaged") for kind, damage in UNREADABLE.items()},
    **{
        f"artifact without {entry}": (ARTIFACT, remove_entry(entry), "first.means.pt is ")
        for entry in ("format", "identity", "kind", "checksum", "provenance", "value")
    },
    "artifact of another kind": (
        ARTIFACT,
        change(kind="subset", index=torch.zeros(1)),
        "first.means.pt is an artifact of",
    ),
    **{
        f"{file} is a folder": (file, replace_by_folder, f"{file} is a folder")
        for file in ("manifest.json", "resolved.yaml", "metrics.jsonl", LAST, BEST, STAGE, ARTIFACT)
    },
}


@pytest.mark.parametrize("name", ["interrupted", "finished"])
def test_an_undamaged_run_has_the_expected_bits(name, repeat, runs):
    """Control: the checks below report no undamaged file."""
    code, output = repeat(name)
    assert code == 0 and "damaged" not in output
    assert differing_keys(comparable_results(runs["finished"]), comparable_results("run")) == []


@pytest.mark.parametrize(
    "name", only_quick(RECOVERED, *(f"{file}, {kind}" for file in ("manifest", "last.pt") for kind in UNREADABLE))
)
def test_a_recoverable_file_is_reported_and_the_bits_are_equal(name, repeat, runs):
    file, damage, message = RECOVERED[name]
    code, output = repeat("interrupted", file, damage)
    assert code == 0 and message in output
    assert differing_keys(comparable_results(runs["finished"]), comparable_results("run")) == []


@pytest.mark.parametrize("name", REJECTED)
def test_an_unrecoverable_file_is_rejected_by_name(name, repeat):
    file, damage, message = REJECTED[name]
    code, output = repeat("interrupted", file, damage)
    assert code == 2 and message in output and not Path("run/summary.json").exists()


def test_the_checkpoint_of_another_run_is_rejected(repeat, runs):
    code, output = repeat("interrupted", LAST, lambda path: shutil.copy(runs["other_seed"] / LAST, path))
    assert code == 2 and "last.pt belongs to another run" in output


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("file", ["manifest.json", "summary.json"])
def test_a_damaged_file_of_a_finished_run_is_written_again(kind, file, repeat, runs):
    code, output = repeat("finished", file, UNREADABLE[kind])
    assert code == 0 and f"{file} is damaged" in output
    assert differing_keys(comparable_results(runs["finished"]), comparable_results("run")) == []


def test_a_cut_log_is_reported_and_other_results_are_equal(repeat, runs):
    code, output = repeat("interrupted", "metrics.jsonl", cut)
    assert code == 0 and "Part of the logs in run is missing" in output
    differences = differing_keys(comparable_results(runs["finished"]), comparable_results("run"))
    assert all(key.startswith("metrics:") for key in differences)


def test_a_removed_folder_ends_the_run_by_name(repeat, monkeypatch):
    original_step = Runner.step

    def step(self: Runner, window: Any) -> None:
        original_step(self, window)
        shutil.rmtree("run", ignore_errors=True)

    monkeypatch.setattr(Runner, "step", step)
    code, output = repeat("interrupted")
    assert code == 2 and "last.pt cannot be written: the folder run/checkpoints does not exist" in output


TEACHER = "student: t_layers\nterms: {ce: cross_entropy}\nepochs: 1\n" + COMMON
STUDENT = (
    "student: t_layers\nteacher: {model: t_layers, weights: {recipe: ./teacher.yaml}}\nterms: {kd: kd}\nepochs: 1\n"
    + COMMON
    + "out: run\n"
)


@pytest.mark.parametrize("kind", ["cut", "list"])
@pytest.mark.parametrize("file", ["manifest.json", "summary.json"])
def test_a_damaged_file_of_a_teacher_run_is_written_again(kind, file):
    Path("teacher.yaml").write_text(SYNTHETIC_DATA + TEACHER)
    train_recipe_text(STUDENT)
    (teacher,) = Path("runs/teacher").iterdir()
    expected, expected_teacher = comparable_results("run"), comparable_results(teacher)
    UNREADABLE[kind](teacher / file)
    train_recipe_text(STUDENT, "fresh=true")
    assert differing_keys(expected, comparable_results("run")) == []
    assert differing_keys(expected_teacher, comparable_results(teacher)) == []


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("summary.json", write(b"[]")),
        ("manifest.json", cut),
        ("resolved.yaml", write(b"\xff\xfe")),
        (LAST, in_both_checkpoints(remove_entry("models"))),
        (LAST, change(models={})),
    ],
)
def test_evaluating_a_damaged_run_is_rejected_by_name(file, damage, repeat):
    code, output = repeat("finished", file, damage, "evaluate", "run")
    assert code == 2 and Path(file).name in output
