"""The manifest: what a reader needs to trust and repeat a run, and what changed between its sessions."""

import platform

import torch

from kdbench.config.schema import Recipe
from kdbench.experiment import manifest
from kdbench.experiment.manifest import amend_manifest, finish_manifest, git_state, write_manifest
from kdbench.files import read_json
from kdbench.run_folder import RunFolder


def recipe(**changes) -> Recipe:
    facts = {"name": "digits/kd", "file": "kd.yaml", "stages": (), "resolved": {}, "places": {}, "seed": 3}
    return Recipe(**{**facts, **changes})


def write(path, **changes) -> list[str]:
    facts = {
        "recipe": recipe(overrides=("seed=3",)),
        "identity": "ab12",
        "device": "cpu",
        "training": {"effective_batch": 64, "lr": 0.1, "batchnorm": "per rank"},
        "data": {"train": {"dataset": "digits", "checksum": "c0ffee"}},
        "roles": {"teacher": {"parameters": 100, "weights": {"sha256": "77"}}},
        "parts": {"kd": 1},
    }
    return write_manifest(path, **{**facts, **changes})


def test_holds_what_a_repeat_needs_and_no_hostname(tmp_path):
    folder = RunFolder(tmp_path)
    assert write(folder.manifest) == []
    told = read_json(folder.manifest)
    session = told["sessions"][0]
    assert told["status"] == "running" and told["finished"] is None and told["seed"] == 3
    assert told["recipe"]["overrides"] == ["seed=3"] and told["training"]["effective_batch"] == 64
    assert session["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"python", "kdbench", "torchvision", "hydra-core", "omegaconf", "numpy"} <= set(session["versions"])
    assert session["threads"] == torch.get_num_threads() and session["device"].startswith("cpu (")
    assert platform.node() not in folder.manifest.read_text() or len(platform.node()) < 4
    assert folder.is_run and folder.status() == "interrupted"


def test_facts_that_are_known_later_are_merged_in(tmp_path):
    path = tmp_path / "manifest.json"
    write(path)
    amend_manifest(path, {"roles": {"teacher": {"accuracy": {"test": 98.1}}}})
    finish_manifest(path, "finished")
    told = read_json(path)
    assert told["roles"]["teacher"] == {"parameters": 100, "weights": {"sha256": "77"}, "accuracy": {"test": 98.1}}
    assert told["status"] == "finished" and told["finished"] >= told["started"]


def test_a_failure_says_why(tmp_path):
    path = tmp_path / "manifest.json"
    write(path)
    finish_manifest(path, "failed", "the loss of term 'kd' is not finite")
    told = read_json(path)
    assert told["status"] == "failed" and told["finished"] is None and "kd" in told["reason"]


def test_another_session_is_added_and_what_changes_bits_is_said(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write(path)
    amend_manifest(path, {"roles": {"teacher": {"accuracy": {"test": 98.1}}}})
    first = read_json(path)
    assert write(path) == []
    monkeypatch.setattr(manifest, "_threads", lambda: 64)
    changes = write(path, world_size=2)
    assert changes == [
        f"threads was {torch.get_num_threads()}, is 64: the run goes on, but not to the same bits.",
        "world size was 1, is 2: the run goes on, but not to the same bits.",
    ]
    told = read_json(path)
    assert len(told["sessions"]) == 3 and told["started"] == first["started"]
    assert told["roles"]["teacher"]["accuracy"] == {"test": 98.1}


def test_git_is_asked_only_about_kdbenchs_own_checkout():
    state = git_state()
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["dirty"], bool))


def test_a_copy_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    import subprocess

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    package = tmp_path / "site-packages" / "kdbench" / "results"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    monkeypatch.setattr(manifest, "__file__", str(package / "manifest.py"))
    assert git_state() is None
