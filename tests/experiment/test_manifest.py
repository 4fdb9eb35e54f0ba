"""The manifest: entries to repeat a run, and changes between its sessions."""

import platform

import torch

from kdbench.config.schema import Recipe
from kdbench.experiment import manifest
from kdbench.experiment.manifest import amend_manifest, finish_manifest, git_state, write_manifest
from kdbench.files import read_json
from kdbench.run_folder import RunFolder


def recipe(**changes) -> Recipe:
    entries = {"name": "digits/kd", "file": "kd.yaml", "stages": (), "resolved": {}, "locations": {}, "seed": 3}
    return Recipe(**{**entries, **changes})


def write(path, **changes) -> list[str]:
    entries = {
        "recipe": recipe(overrides=("seed=3",)),
        "identity": "ab12",
        "device": "cpu",
        "training": {"effective_batch": 64, "lr": 0.1, "batchnorm": "per rank"},
        "data": {"train": {"dataset": "digits", "checksum": "c0ffee"}},
        "roles": {"teacher": {"parameters": 100, "weights": {"sha256": "77"}}},
        "parts": {"kd": 1},
    }
    return write_manifest(path, **{**entries, **changes})


def test_a_manifest_has_everything_to_repeat_a_run_and_no_hostname(tmp_path):
    folder = RunFolder(tmp_path)
    assert write(folder.manifest) == []
    content = read_json(folder.manifest)
    session = content["sessions"][0]
    assert content["status"] == "running" and content["finished"] is None and content["seed"] == 3
    assert content["recipe"]["overrides"] == ["seed=3"] and content["training"]["effective_batch"] == 64
    assert session["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"python", "kdbench", "torchvision", "hydra-core", "omegaconf", "numpy"} <= set(session["versions"])
    assert session["threads"] == torch.get_num_threads() and session["device"].startswith("cpu (")
    assert platform.node() not in folder.manifest.read_text() or len(platform.node()) < 4
    assert folder.is_run and folder.status() == "interrupted"


def test_later_entries_are_merged(tmp_path):
    path = tmp_path / "manifest.json"
    write(path)
    amend_manifest(path, {"roles": {"teacher": {"scores": {"test": 98.1}}}})
    finish_manifest(path, "finished")
    content = read_json(path)
    assert content["roles"]["teacher"] == {"parameters": 100, "weights": {"sha256": "77"}, "scores": {"test": 98.1}}
    assert content["status"] == "finished" and content["finished"] >= content["started"]


def test_a_failed_run_records_the_reason(tmp_path):
    path = tmp_path / "manifest.json"
    write(path)
    finish_manifest(path, "failed", "the loss of term 'kd' is not finite")
    content = read_json(path)
    assert content["status"] == "failed" and content["finished"] is None and "kd" in content["reason"]


def test_a_session_is_added_and_changes_of_the_platform_are_reported(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write(path)
    amend_manifest(path, {"roles": {"teacher": {"scores": {"test": 98.1}}}})
    first = read_json(path)
    assert write(path) == []
    monkeypatch.setattr(manifest, "_threads", lambda: 64)
    changes = write(path, world_size=2)
    effect = "the run continues, but its results may differ in the last bits."
    assert changes == [
        f"threads was {torch.get_num_threads()}, is 64: {effect}",
        f"world size was 1, is 2: {effect}",
    ]
    content = read_json(path)
    assert len(content["sessions"]) == 3 and content["started"] == first["started"]
    assert content["roles"]["teacher"]["scores"] == {"test": 98.1}


def test_the_git_state_is_of_kdbenchs_checkout():
    state = git_state()
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["dirty"], bool))


def test_a_copy_inside_another_repository_has_no_git_state(tmp_path, monkeypatch):
    import subprocess

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    package = tmp_path / "site-packages" / "kdbench" / "experiment"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    monkeypatch.setattr(manifest, "__file__", str(package / "manifest.py"))
    assert git_state() is None
