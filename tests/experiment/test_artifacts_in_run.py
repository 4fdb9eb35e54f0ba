"""Artifacts in complete runs: later stages read them, a killed run builds the missing ones, budgets hold."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from helpers.kills import KilledRun, kill_at_step, kill_at_write
from helpers.quick import only_quick
from helpers.recipes import (  # noqa: F401
    QuietConsole,
    comparable_results,
    differing_keys,
    equal_weights,
    flatten_tree,
    plugin_registration,
    recipe_from_text,
    run_command,
    train_recipe_text,
)
from kdbench.config.load import load_recipe
from kdbench.data.datasets.synthetic import Synthetic
from kdbench.engine.train.runner import Runner
from kdbench.errors import ConfigError, UserError
from kdbench.experiment.artifacts import find_artifact_files, plan_stages, read_artifact
from kdbench.files import read_json
from kdbench.run_folder import RunFolder

COMMON = """
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
batch_size: 16
log_every: 2
checkpoint_every: {steps: 2}
tensorboard: false
"""
ARTIFACT_ENTRIES = ("format", "identity", "kind", "checksum", "provenance", "value")
ROUNDS = (
    """
student: {model: {type: t_layers, norm: batch, dropout: 0.2}, weights: {stage: previous}}
teacher: {model: {type: t_layers, hidden: 16}}
terms: {ce: cross_entropy}
"""
    + COMMON
    + """
label_fraction: {artifact: query.labels, initial: 8}
stages:
  active:
    rounds: 2
    stages:
      query:
        epochs: 1
        artifacts:
          labels: {type: choose, by: {type: entropy, student: student}, budget: 18, count: 8}
          memory: {type: reservoir, memory: 9}
          soft: {type: soft_labels, teacher: teacher}
          means: {type: class_means, features: "teacher:layer2"}
      train:
        epochs: 2
        data: {train: {artifact: query.soft}, extra: {subset: {artifact: query.memory}, batch_size: 4}}
        terms:
          ce: cross_entropy
          soft: {type: logit_mse, student: student, teacher: train.soft}
out: OUT
"""
)


def artifact_entries(folder: str | Path) -> dict[str, Any]:
    """Returns the entries of all artifacts of a run, flattened."""
    files = sorted((Path(folder) / "stages").glob("*.pt"))
    assert not list(Path(folder).rglob("*.tmp"))
    return {f"{f.name}:{key}": value for f in files for key, value in flatten_tree(torch.load(f, weights_only=True))}


def all_results(folder: str) -> dict[str, Any]:
    """Returns results and artifacts of a run, and the provenance of the artifacts."""
    provenance = flatten_tree(read_json(f"{folder}/manifest.json")["artifacts"])
    manifest = {f"manifest:{key}": value for key, value in provenance}
    return comparable_results(folder) | artifact_entries(folder) | manifest


def content(folder: str, name: str) -> Mapping[str, Any]:
    return read_artifact(RunFolder(folder).artifact(*name.rsplit(".", 1))).content


@pytest.fixture
def expected() -> dict[str, Any]:
    """Results of an uninterrupted run in the folder `expected`."""
    train_recipe_text(ROUNDS.replace("OUT", "expected"))
    return all_results("expected")


def test_a_loop_killed_in_its_second_round_ends_with_the_same_bits(expected):
    with kill_at_step("train@2", 3):
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    tree = torch.load("run/checkpoints/last.pt", weights_only=True)
    assert (tree["stage"], sorted(tree["finished_stages"])) == ("train@2", ["query@1", "query@2", "train@1"])
    steps: list[str] = []
    original_step = Runner.step

    def recording_step(self, window):
        steps.append(f"{self.stage.name} {self.progress.steps_done}")
        original_step(self, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "step", recording_step)
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    assert steps == [f"train@2 {n}" for n in range(2, 8)], "no other stage is trained again"
    assert differing_keys(expected, all_results("run")) == []
    assert any(key.startswith("query@2.labels.pt:index") for key in expected)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_loop_killed_at_any_write_ends_with_the_same_bits(expected, seed):
    draws, kills = random.Random(seed), 0
    for kills in range(200):
        with kill_at_write(draws.randint(5, 80) + 2 * kills), suppress(KilledRun):
            train_recipe_text(ROUNDS.replace("OUT", "run"))
            break
    assert kills >= 2
    assert differing_keys(expected, all_results("run")) == []


def test_only_missing_artifacts_are_built(expected):
    """A kill between two artifacts leaves the folder like this."""
    with kill_at_step("train@2", 0):
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    for name in ("soft", "means"):
        RunFolder("run").artifact("query@2", name).unlink()
    modified = RunFolder("run").artifact("query@2", "labels").stat().st_mtime_ns
    train_recipe_text(ROUNDS.replace("OUT", "run"))
    assert RunFolder("run").artifact("query@2", "labels").stat().st_mtime_ns == modified
    assert differing_keys(expected, all_results("run")) == []


@pytest.mark.parametrize("damage", only_quick(["bytes", "another run", *ARTIFACT_ENTRIES], "bytes", "another run"))
def test_a_damaged_artifact_is_built_again(expected, damage):
    with kill_at_step("train@2", 0):
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    path = RunFolder("run").artifact("query@2", "means")
    if damage == "bytes":
        path.write_bytes(b"PK nothing")
    else:
        tree = torch.load(path, weights_only=True)
        replaced_entries = {"identity": "of another run", "value": tree["value"] + 1} if damage == "another run" else {}
        torch.save({key: value for key, value in {**tree, **replaced_entries}.items() if key != damage}, path)
    train_recipe_text(ROUNDS.replace("OUT", "run"))
    assert differing_keys(expected, all_results("run")) == []


def test_budget_and_memory_are_never_exceeded(expected, monkeypatch):
    assert [len(content("expected", f"query@{n}.labels")["index"]) for n in (1, 2)] == [16, 18]
    assert [len(content("expected", f"query@{n}.memory")["index"]) for n in (1, 2)] == [9, 9]
    first, second = (set(content("expected", f"query@{n}.labels")["index"].tolist()) for n in (1, 2))
    assert first < second
    num_labels: dict[str, int] = {}
    original_step = Runner.step

    def counting_step(self, window):
        batches = [micro_batch["train"].fields for micro_batch in window]
        if "labelled" in batches[0]:
            labels = sum(int(fields["labelled"].sum()) for fields in batches)
            num_labels[self.stage.name] = num_labels.get(self.stage.name, 0) + labels
        original_step(self, window)

    monkeypatch.setattr(Runner, "step", counting_step)
    train_recipe_text(ROUNDS.replace("OUT", "counted"))
    # Labels in one epoch of query and in two epochs of train: first the initial ones, then with the queried ones.
    assert num_labels == {"query@1": 8, "train@1": 2 * 16, "query@2": 16, "train@2": 2 * 18}


def test_a_stage_reads_a_dataset_artifact(expected):
    artifact = read_artifact(RunFolder("expected").artifact("query@1", "soft"))
    assert artifact.content["images"].shape == (64, 1, 8, 8) and artifact.kind == "dataset"
    manifest = read_json("expected/manifest.json")
    assert manifest["data"]["train@1.train"]["samples"] == 64
    entry = manifest["artifacts"]["query@1.soft"]
    assert entry["builder"] == "soft_labels" and entry["source"]["name"] == "train"
    assert entry["checksum"] == artifact.checksum
    assert entry["roles"]["teacher"] == manifest["roles"]["teacher"]["weights"]["sha256"]
    assert entry["summary"] == {"soft": 64, "hard": 0, "dropped": 0}
    assert manifest["parts"]["artifact soft_labels"] == 1 and manifest["parts"]["selector entropy"] == 1


def test_a_stage_reads_a_subset_artifact(monkeypatch):
    text = ROUNDS.replace("rounds: 2", "rounds: 1").replace(
        "data: {train: {artifact: query.soft}, extra: {subset: {artifact: query.memory}, batch_size: 4}}",
        "label_fraction: null\n        batch_size: 3\n        data: {train: {subset: {artifact: query.memory}}}",
    )
    text = text.replace("\n          soft: {type: logit_mse, student: student, teacher: train.soft}", "")
    positions: set[int] = set()
    original_step = Runner.step

    def recording_step(self, window):
        if self.stage.name == "train@1":
            positions.update(window[0]["train"].fields["index"].tolist())
        original_step(self, window)

    monkeypatch.setattr(Runner, "step", recording_step)
    train_recipe_text(text.replace("OUT", "run"))
    assert positions == set(content("run", "query@1.memory")["index"].tolist())


def test_artifacts_are_a_function_of_recipe_and_seed():
    train_recipe_text(ROUNDS.replace("OUT", "first"))
    train_recipe_text(ROUNDS.replace("OUT", "second"), "log_every=3", "checkpoint_every=null")
    train_recipe_text(ROUNDS.replace("OUT", "other"), "seed=2")
    assert differing_keys(artifact_entries("first"), artifact_entries("second")) == []
    assert differing_keys(artifact_entries("first"), artifact_entries("other"))


def test_fresh_begins_without_artifacts(expected):
    path = RunFolder("expected").artifact("query@1", "means")
    path.write_bytes(b"of an earlier run")
    train_recipe_text(ROUNDS.replace("OUT", "expected"), "fresh=true")
    assert path.read_bytes() != b"of an earlier run"
    assert differing_keys(expected, all_results("expected")) == []


MEANS = (
    """
student: {model: {type: t_layers}, weights: {stage: previous}}
teacher: {model: t_layers}
epochs: 1
"""
    + COMMON
    + """
stages:
  look:
    terms: {ce: cross_entropy}
    artifacts: {logits: {type: outputs, value: teacher}, means: {type: class_means, features: "teacher:layer2"}}
  learn: {terms: {ce: cross_entropy, nd: {type: nd, student: layer2, teacher: layer2, means: "artifact:look.means"}}}
out: run
"""
)


def test_a_term_reads_a_tensor_artifact(networks):
    train_recipe_text(MEANS)
    logits, means = content("run", "look.logits")["value"], content("run", "look.means")["value"]
    assert logits.shape == (64, 4) and means.shape == (4, 12)
    teacher = networks[-1].role("teacher").model
    rows = Synthetic(shape=(1, 8, 8), classes=4, samples=64).load()
    images = (rows.images.float() / 255 - 0.5) / 0.2
    with torch.no_grad():
        features = teacher.layer2(teacher.layer1(images.flatten(1)))
        assert_close(logits, teacher(images))
    for c in range(4):
        assert_close(means[c], features[rows.labels == c].mean(0))
    buffers = [buffer for buffer in networks[-1].term("nd").buffers() if buffer.shape == means.shape]
    assert len(buffers) == 1 and torch.equal(buffers[0], means)


@pytest.fixture
def networks(monkeypatch) -> list[Any]:
    """Collects the networks that a run trains, in order."""
    networks: list[Any] = []
    original_init = Runner.__init__

    def recording_init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        networks.append(self.network)

    monkeypatch.setattr(Runner, "__init__", recording_init)
    return networks


SEARCH = (
    """
student: {model: {artifact: find.net}}
teacher: {model: {type: t_conv}}
epochs: 1
terms: {ce: cross_entropy, kd: kd}
"""
    + COMMON
    + """
stages:
  find:
    epochs: 0
    student: {model: t_linear}
    artifacts:
      net:
        type: search
        teacher: "teacher:conv2"
        feature: conv2
        candidates: {a: {type: t_conv, norm: batch}, b: t_conv}
  train: {}
out: run
"""
)


def test_the_model_of_a_search_is_trained():
    """The plan uses the first candidate; the search may select another one."""
    loaded = recipe_from_text(SEARCH)
    role = loaded.stages[1].roles["student"]
    assert role.model is not None and (role.artifact, role.model.params) == ("find.net", {"norm": "batch"})
    assert plan_stages(loaded)[1].roles["student"].parameters > 0
    outcome = train_recipe_text(SEARCH)
    model = content("run", "find.net")
    scores = read_json("run/manifest.json")["artifacts"]["find.net"]["summary"]["scores"]
    assert set(scores) == {"a", "b"}
    best = max(scores, key=scores.get)
    assert model["params"] == ({"norm": "batch"} if best == "a" else {})
    weights = torch.load("run/checkpoints/last.pt", weights_only=True)["models"]["student"]
    assert ("norm1.running_mean" in weights) == (best == "a")
    assert outcome.summary["models"]["student"]["model"] == "t_conv"


MIXED = (
    """
models:
  a: {model: t_conv}
  b: {model: t_conv}
  old: {model: {type: t_conv, norm: batch}, frozen: true}
  head: {reuse: "old:conv1"}
export: a
terms: {ce: {type: cross_entropy, student: [a, b]}, kd: {type: kd, student: a, teacher: old}}
epochs: 1
"""
    + COMMON
    + """
stages:
  apart: {}
  merged:
    epochs: 0
    models: {a: {weights: {stage: apart, role: [a, b]}}, old: {weights: {stage: apart}}, head: null}
out: run
"""
)


def test_later_stages_load_averaged_weights_and_frozen_roles():
    train_recipe_text(MIXED)
    apart = torch.load("run/checkpoints/stage_apart.pt", weights_only=True)["models"]
    merged = torch.load("run/checkpoints/last.pt", weights_only=True)["models"]
    for name, value in merged["a"].items():
        assert_close(value, (apart["a"][name] + apart["b"][name]) / 2)
    roles = read_json("run/manifest.json")["roles"]
    assert roles["a"]["weights"]["source"] == "stage apart, mean of a and b"
    assert roles["old"]["weights"]["source"] == "stage apart"
    assert "norm1.running_mean" in apart["old"], "the state before BatchNorm was folded"


def test_later_stages_load_a_module_of_a_frozen_role():
    text = MIXED.replace(
        "models: {a: {weights: {stage: apart, role: [a, b]}}, old: {weights: {stage: apart}}, head: null}",
        "models: {a: {weights: {stage: apart, role: head, rename: {'': 'conv1.'}, strict: false}}}",
    )
    train_recipe_text(text)
    apart = torch.load("run/checkpoints/stage_apart.pt", weights_only=True)["models"]
    merged = torch.load("run/checkpoints/last.pt", weights_only=True)["models"]["a"]
    assert set(apart["head"]) == {"weight", "bias"}
    assert all(torch.equal(merged[f"conv1.{name}"], value) for name, value in apart["head"].items())
    assert torch.equal(apart["head"]["weight"], apart["old"]["conv1.weight"])


def test_networks_of_different_shape_are_not_averaged():
    text = MIXED.replace("b: {model: t_conv}", "b: {model: {type: t_conv, norm: batch}}")
    with pytest.raises(UserError, match=r"weights of 'a' and 'b' cannot be averaged: they differ in "):
        train_recipe_text(text)


@pytest.mark.parametrize(
    ("valid", "invalid", "message"),
    [
        ("budget: 18", "budget: 65", "labels: choose has a budget of 65, but its source has only 64 samples"),
        ("memory: 9", "memory: 0", "reservoir: memory must be at least 1, got 0"),
        (
            "{type: soft_labels, teacher: teacher}",
            '{type: soft_labels, teacher: "teacher:layer9"}',
            "no module 'layer9'",
        ),
        ("type: class_means,", "type: class_means, source: eval,", ""),
    ],
)
def test_impossible_artifacts_are_rejected_by_the_plan(valid, invalid, message):
    loaded = recipe_from_text(ROUNDS.replace("OUT", "run").replace(valid, invalid))
    if message:
        with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
            plan_stages(loaded)
    else:
        plan_stages(loaded)


def test_an_artifact_of_noise_cannot_read_a_role_with_image_input():
    noise = "data: {noise: {type: gaussian, shape: [4], batch_size: 8}}\nstages:"
    text = ROUNDS.replace("OUT", "run").replace("stages:", noise, 1)
    text = text.replace("{type: soft_labels, teacher", "{type: soft_labels, source: noise, teacher")
    with pytest.raises(ConfigError, match=r"source 'noise', which has no field 'image' for role 'teacher'"):
        plan_stages(recipe_from_text(text))


def test_planning_needs_no_artifact_files():
    loaded = recipe_from_text(ROUNDS.replace("OUT", "run"))
    plans = plan_stages(loaded)
    assert [plan.stage.name for plan in plans] == ["query@1", "train@1", "query@2", "train@2"]
    assert plans[1].specs["train"].fields["soft"] == ((4,), "float32") and not Path("run").exists()
    train_recipe_text(ROUNDS.replace("OUT", "run"))
    files = find_artifact_files(loaded, RunFolder("run"))
    assert set(files) == {f"query@{n}.{name}" for n in (1, 2) for name in ("labels", "memory", "soft", "means")}


@pytest.mark.slow
def test_two_processes_build_the_artifacts_of_one():
    """Compares artifacts that depend on no training. Rank 0 writes them, both ranks read them."""
    for out, count, size in (("single", 1, 16), ("parallel", 2, 8)):
        recipe_from_text(
            ROUNDS.replace("OUT", out).replace("batch_size: 16", f"batch_size: {size}").replace("norm: batch, ", "")
        )
        process = run_command("own.yaml", processes=count)
        assert process.returncode == 0, process.stderr
    for name in ("soft", "means", "memory"):
        single, parallel = (dict(flatten_tree(content(out, f"query@1.{name}"))) for out in ("single", "parallel"))
        assert [key for key in single if single[key] != parallel[key]] == []
    assert len(content("parallel", "query@2.labels")["index"]) == 18


def test_a_finished_run_can_be_evaluated_again():
    from kdbench.experiment.reopened import reevaluate

    outcome = train_recipe_text(SEARCH)
    scores = reevaluate(RunFolder("run"))
    last = outcome.summary["last"]["metrics"]["student"]["test"]
    assert scores["student"]["test"]["top1"] == last["top1"]
    assert load_recipe("own.yaml").stages[1].roles["student"].artifact == "find.net"
    assert json.dumps(read_json("run/manifest.json")["artifacts"])
