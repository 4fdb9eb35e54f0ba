"""Declared contents of checkpoint files: every entry is required, typed and checked; another run's file is rejected."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.engine.state import checkpoint
from kdbench.engine.state.run_state import (
    ArtifactFile,
    ForeignRunError,
    History,
    ModelFile,
    RunState,
    report_misfit,
)
from kdbench.errors import CheckpointError

PATH = Path("run/checkpoints/last.pt")
WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3)}


def run_state(**changes: Any) -> RunState:
    evaluation = {"stage": "first", "epoch": 1, "step": 4, "metrics": {"student": {"test": {"top1": 50.0}}}}
    entries = {
        "identity": "ab12",
        "stage": "second",
        "finished_stages": {"first": 8},
        "export": "student",
        "history": History(1.5, [evaluation], {"first": {**evaluation, "selected_on": "test", "by": "top1"}}, {}),  # type: ignore[list-item, dict-item]
        "tracker": {"metrics.jsonl": 100},
        "step": 3,
        "total_steps": 12,
        "models": {"student": WEIGHTS},
        "effective": {},
        "average": None,
        "terms": {"kd": {}},
        "optimizers": [{"state": {}, "param_groups": []}],
        "scaler": {},
        "meters": {"sums": torch.zeros(4)},
        "grad_norm": torch.tensor(2.0),
    }
    return RunState(**{**entries, **changes})


MODEL_FILE = ModelFile(
    identity="ab12", export="student", models={"student": WEIGHTS}, effective={}, average=WEIGHTS, epoch=3
)
ARTIFACT_FILE = ArtifactFile(
    identity="ab12", kind="tensor", checksum="c0ffee", provenance={"stage": "first"}, content={"value": torch.ones(2)}
)


@pytest.mark.parametrize(
    "content", [run_state(), MODEL_FILE, ARTIFACT_FILE], ids=lambda content: type(content).__name__
)
def test_a_file_round_trips(content, tmp_path):
    checkpoint.save(tmp_path / "file.pt", content)
    tree = torch.load(tmp_path / "file.pt", weights_only=True)
    loaded = type(content).from_tree(tree, PATH, identity="ab12")
    assert str(loaded) == str(content)


@pytest.mark.parametrize("entry", [field.name for field in fields(RunState)])
def test_a_missing_entry_is_reported_by_file_and_entry(entry):
    tree = run_state().to_tree()
    assert RunState.from_tree(tree, PATH) == RunState.from_tree(dict(tree), PATH), (
        "control: the complete tree is accepted"
    )
    del tree[entry]
    with pytest.raises(CheckpointError, match=rf"run/checkpoints/last\.pt is .*entry '{entry}'"):
        RunState.from_tree(tree, PATH)


WRONG_VALUES = {
    "format": ["2", 1, True, None],
    "identity": [3, None],
    "stage": [None, ["second"]],
    "finished_stages": [["first"], {"first": "8"}, {1: 8}],
    "export": [1],
    "history": [[], {"seconds": "1"}, {"evaluations": [1]}, {"evaluations": [{}]}, {"best": {"first": {}}}],
    "tracker": [None, {"metrics.jsonl": 1.5}],
    "step": [1.5, "3", True, -1, 13, 10**9, torch.tensor(3)],
    "total_steps": [None, 2],
    "models": [[], {"student": []}, {1: {}}],
    "effective": [None],
    "average": [[], 0],
    "terms": [None, {"kd": 1}],
    "optimizers": [{}, [[]]],
    "scaler": [None],
    "meters": [[]],
    "grad_norm": [2.0],
}


@pytest.mark.parametrize(
    ("entry", "value"), [(entry, value) for entry in WRONG_VALUES for value in WRONG_VALUES[entry]]
)
def test_a_wrong_value_is_reported_by_file_and_entry(entry, value):
    tree = {**run_state().to_tree(), entry: value}
    name = "step" if entry == "total_steps" else entry  # a stage shorter than its position
    with pytest.raises(CheckpointError, match=rf"run/checkpoints/last\.pt is .*{name}"):
        RunState.from_tree(tree, PATH)


def test_every_entry_has_wrong_values_above():
    assert set(WRONG_VALUES) == {field.name for field in fields(RunState)}


@pytest.mark.parametrize("content", [None, [], 3, {}, torch.zeros(2), {"state_dict": {}}], ids=str)
@pytest.mark.parametrize("declaration", [RunState, ModelFile, ArtifactFile])
def test_content_of_another_program_is_rejected(declaration, content):
    with pytest.raises(CheckpointError, match=r"last\.pt is not a checkpoint of kdbench"):
        declaration.from_tree(content, PATH)


@pytest.mark.parametrize(
    "content", [run_state(), MODEL_FILE, ARTIFACT_FILE], ids=lambda content: type(content).__name__
)
def test_a_file_of_another_run_is_rejected(content):
    tree = content.to_tree()
    assert type(content).from_tree(tree, PATH) and type(content).from_tree(tree, PATH, identity="ab12")
    with pytest.raises(
        ForeignRunError, match=r"last\.pt belongs to another run \(identity ab12, expected cd34\).*fresh"
    ):
        type(content).from_tree(tree, PATH, identity="cd34")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stage": "third"}, "'stage' is 'third', but the stages of the recipe are first, second"),
        ({"stage": "first"}, "'finished_stages' contains first; expected no stage before stage 'first'"),
        ({"finished_stages": {}}, "'finished_stages' contains no stage; expected first before stage 'second'"),
        ({"step": 13}, "'step' is 13, but stage 'second' has 12 steps"),
    ],
)
def test_an_impossible_position_is_rejected(changes, problem):
    stages = ["first", "second"]
    assert RunState.from_tree(run_state().to_tree(), PATH, stages=stages).stage == "second"
    with pytest.raises(CheckpointError, match=problem):
        RunState.from_tree(run_state(**changes).to_tree(), PATH, stages=stages)


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("dataset", {"images": torch.zeros(1), "labels": torch.zeros(1), "classes": []}),
        ("subset", {"index": torch.zeros(1)}),
        ("tensor", {"value": torch.zeros(1)}),
        ("model", {"type": "t_conv", "params": {}}),
    ],
)
def test_the_content_of_an_artifact_has_the_entries_of_its_kind(kind, entries):
    tree = replace(ARTIFACT_FILE, kind=kind, content=entries).to_tree()
    assert ArtifactFile.from_tree(tree, PATH).content == entries
    for name in entries:
        for damaged in ({**tree, name: None}, {key: value for key, value in tree.items() if key != name}):
            with pytest.raises(CheckpointError, match=f"a {kind} needs an entry '{name}'"):
                ArtifactFile.from_tree(damaged, PATH)


def test_the_previous_checkpoint_is_tried_and_the_newest_is_reported(tmp_path):
    path = tmp_path / "last.pt"
    assert checkpoint.load(path) == (None, "")
    checkpoint.save(path, run_state(step=2), keep_previous=True)
    checkpoint.save(path, run_state(step=3), keep_previous=True)
    state, notice = checkpoint.load(path, identity="ab12", stages=["first", "second"])
    assert state is not None and (state.step, notice) == (3, "")
    torch.save({**run_state().to_tree(), "step": 10**9}, path)
    state, notice = checkpoint.load(path, identity="ab12", stages=["first", "second"])
    assert state is not None and state.step == 2
    assert "last.pt is damaged: entry 'step' is 1000000000" in notice and "from the previous checkpoint" in notice
    with pytest.raises(ForeignRunError):  # a file that was put there by mistake: nothing may be overwritten
        checkpoint.save(path, run_state(identity="cd34"))
        checkpoint.load(path, identity="ab12")


def test_a_misfit_names_file_and_entry_and_other_errors_pass():
    with (
        pytest.raises(CheckpointError, match=r"last\.pt is damaged: entry 'terms\.kd' does not fit the run"),
        report_misfit(PATH, "terms.kd"),
    ):
        torch.nn.Linear(2, 2).load_state_dict({})
    with pytest.raises(torch.OutOfMemoryError), report_misfit(PATH, "terms.kd"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OSError), report_misfit(PATH, "terms.kd"):
        raise OSError("of the disk")
