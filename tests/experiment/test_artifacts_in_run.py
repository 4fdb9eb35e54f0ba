"""What stages make, in whole runs: later stages read it, a killed run makes the rest, and budgets hold."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from helpers.kills import KilledRun, kill_at_step, kill_at_write
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


def made(folder: str | Path) -> dict[str, Any]:
    """Everything that a run made, leaf by leaf."""
    files = sorted((Path(folder) / "stages").glob("*.pt"))
    assert not list(Path(folder).rglob("*.tmp"))
    return {f"{f.name}:{key}": value for f in files for key, value in flatten_tree(torch.load(f, weights_only=True))}


def everything(folder: str) -> dict[str, Any]:
    manifest = {f"manifest:{key}": value for key, value in flatten_tree(read_json(f"{folder}/manifest.json")["made"])}
    return comparable_results(folder) | made(folder) | manifest


def content(folder: str, name: str) -> dict[str, Any]:
    return read_artifact(RunFolder(folder).artifact(*name.rsplit(".", 1)))


@pytest.fixture
def whole() -> dict[str, Any]:
    train_recipe_text(ROUNDS.replace("OUT", "whole"))
    return everything("whole")


def test_a_loop_that_is_killed_in_its_second_round_ends_with_the_same_bits(whole):
    with kill_at_step("train@2", 3):
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    tree = torch.load("run/checkpoints/last.pt", weights_only=True)
    assert (tree["stage"], sorted(tree["finished"])) == ("train@2", ["query@1", "query@2", "train@1"])
    seen: list[str] = []
    step = Runner.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "step", lambda self, w: (seen.append(f"{self.stage.name} {self.done}"), step(self, w)))
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    assert seen == [f"train@2 {n}" for n in range(2, 8)], "no other stage is trained again"
    assert differing_keys(whole, everything("run")) == []
    assert any(key.startswith("query@2.labels.pt:index") for key in whole)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_loop_that_is_killed_at_any_write_ends_with_the_same_bits(whole, seed):
    draws, kills = random.Random(seed), 0
    for kills in range(200):
        with kill_at_write(draws.randint(5, 80) + 2 * kills), suppress(KilledRun):
            train_recipe_text(ROUNDS.replace("OUT", "run"))
            break
    assert kills >= 2
    assert differing_keys(whole, everything("run")) == []


def test_what_is_missing_is_made_and_nothing_else(whole):
    """As a kill in the middle of making leaves it."""
    with kill_at_step("train@2", 0):
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    for name in ("soft", "means"):
        RunFolder("run").artifact("query@2", name).unlink()
    kept = RunFolder("run").artifact("query@2", "labels").stat().st_mtime_ns
    train_recipe_text(ROUNDS.replace("OUT", "run"))
    assert RunFolder("run").artifact("query@2", "labels").stat().st_mtime_ns == kept
    assert differing_keys(whole, everything("run")) == []


def test_a_damaged_thing_is_made_again(whole):
    with kill_at_step("train@2", 0):
        train_recipe_text(ROUNDS.replace("OUT", "run"))
    RunFolder("run").artifact("query@2", "means").write_bytes(b"PK nothing")
    train_recipe_text(ROUNDS.replace("OUT", "run"))
    assert differing_keys(whole, everything("run")) == []


def test_the_budget_and_the_memory_are_never_exceeded(whole, monkeypatch):
    assert [len(content("whole", f"query@{n}.labels")["index"]) for n in (1, 2)] == [16, 18]
    assert [len(content("whole", f"query@{n}.memory")["index"]) for n in (1, 2)] == [9, 9]
    first, second = (set(content("whole", f"query@{n}.labels")["index"].tolist()) for n in (1, 2))
    assert first < second
    known: dict[str, int] = {}
    step = Runner.step

    def stepping(self, window):
        train_ = [batch["train"] for batch in window]
        if "labelled" in train_[0]:
            known[self.stage.name] = known.get(self.stage.name, 0) + sum(int(b["labelled"].sum()) for b in train_)
        step(self, window)

    monkeypatch.setattr(Runner, "step", stepping)
    train_recipe_text(ROUNDS.replace("OUT", "again"))
    # labels shown in one epoch of query and in two of train: the first ones, then those that were asked for
    assert known == {"query@1": 8, "train@1": 2 * 16, "query@2": 16, "train@2": 2 * 18}


def test_a_stage_reads_the_dataset_that_another_made(whole):
    stored = content("whole", "query@1.soft")
    assert stored["images"].shape == (64, 1, 8, 8) and stored["kind"] == "dataset"
    manifest = read_json("whole/manifest.json")
    assert manifest["data"]["train@1.train"]["samples"] == 64
    told = manifest["made"]["query@1.soft"]
    assert (
        told["maker"] == "soft_labels" and told["source"]["name"] == "train" and told["checksum"] == stored["checksum"]
    )
    assert told["roles"]["teacher"] == manifest["roles"]["teacher"]["weights"]["sha256"]
    assert told["summary"] == {"soft": 64, "hard": 0, "left out": 0}
    assert manifest["parts"]["maker soft_labels"] == 1 and manifest["parts"]["selector entropy"] == 1


def test_a_stage_reads_the_choice_that_another_made(monkeypatch):
    text = ROUNDS.replace("rounds: 2", "rounds: 1").replace(
        "data: {train: {artifact: query.soft}, extra: {subset: {artifact: query.memory}, batch_size: 4}}",
        "label_fraction: null\n        batch_size: 3\n        data: {train: {subset: {artifact: query.memory}}}",
    )
    text = text.replace("\n          soft: {type: logit_mse, student: student, teacher: train.soft}", "")
    seen: set[int] = set()
    step = Runner.step

    def stepping(self, window):
        if self.stage.name == "train@1":
            seen.update(window[0]["train"]["index"].tolist())
        step(self, window)

    monkeypatch.setattr(Runner, "step", stepping)
    train_recipe_text(text.replace("OUT", "run"))
    assert seen == set(content("run", "query@1.memory")["index"].tolist())


def test_made_things_are_a_function_of_recipe_and_seed():
    train_recipe_text(ROUNDS.replace("OUT", "one"))
    train_recipe_text(ROUNDS.replace("OUT", "two"), "log_every=3", "checkpoint_every=null")
    train_recipe_text(ROUNDS.replace("OUT", "other"), "seed=2")
    assert differing_keys(made("one"), made("two")) == []
    assert differing_keys(made("one"), made("other"))


def test_fresh_begins_without_what_was_made(whole):
    made = RunFolder("whole").artifact("query@1", "means")
    made.write_bytes(b"left by the run before")
    train_recipe_text(ROUNDS.replace("OUT", "whole"), "fresh=true")
    assert made.read_bytes() != b"left by the run before"
    assert differing_keys(whole, everything("whole")) == []


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


def test_a_term_reads_the_tensor_that_another_stage_made(networks):
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
    read = [buffer for name, buffer in networks[-1].term("nd").named_buffers() if name.endswith("made")]
    assert len(read) == 1 and torch.equal(read[0], means)


@pytest.fixture
def networks(monkeypatch) -> list[Any]:
    """Every network that a run builds."""
    built: list[Any] = []
    begin = Runner.__init__

    def beginning(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        built.append(self.network)

    monkeypatch.setattr(Runner, "__init__", beginning)
    return built


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


def test_the_model_that_was_found_is_what_is_trained():
    """The candidate with the teacher's own architecture is not the first one, which the plan rehearses."""
    loaded = recipe_from_text(SEARCH)
    role = loaded.stages[1].roles["student"]
    assert role.model is not None and (role.artifact, role.model.params) == ("find.net", {"norm": "batch"})
    assert plan_stages(loaded)[1].roles["student"].parameters > 0
    outcome = train_recipe_text(SEARCH)
    found = content("run", "find.net")
    scores = read_json("run/manifest.json")["made"]["find.net"]["summary"]["scores"]
    assert set(scores) == {"a", "b"}
    chosen = max(scores, key=scores.get)
    assert found["params"] == ({"norm": "batch"} if chosen == "a" else {})
    weights = torch.load("run/checkpoints/last.pt", weights_only=True)["models"]["student"]
    assert ("norm1.running_mean" in weights) == (chosen == "a")
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


def test_weights_are_averaged_and_frozen_roles_are_handed_on():
    train_recipe_text(MIXED)
    apart = torch.load("run/checkpoints/stage_apart.pt", weights_only=True)["models"]
    merged = torch.load("run/checkpoints/last.pt", weights_only=True)["models"]
    for name, value in merged["a"].items():
        assert_close(value, (apart["a"][name] + apart["b"][name]) / 2)
    roles = read_json("run/manifest.json")["roles"]
    assert roles["a"]["weights"]["source"] == "stage apart, mean of a and b"
    assert roles["old"]["weights"]["source"] == "stage apart"
    assert "norm1.running_mean" in apart["old"], "as it was before its BatchNorm was folded"


def test_a_part_of_a_frozen_role_is_handed_on():
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
    ("right", "wrong", "said"),
    [
        ("budget: 18", "budget: 65", "labels: choose has a budget of 65, but its source has only 64 samples"),
        ("memory: 9", "memory: 0", "reservoir: memory must be 1 or more"),
        (
            "{type: soft_labels, teacher: teacher}",
            '{type: soft_labels, teacher: "teacher:layer9"}',
            "no module 'layer9'",
        ),
        ("type: class_means,", "type: class_means, source: eval,", ""),
    ],
)
def test_what_cannot_be_made_is_refused_by_check(right, wrong, said):
    loaded = recipe_from_text(ROUNDS.replace("OUT", "run").replace(right, wrong))
    if said:
        with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
            plan_stages(loaded)
    else:
        plan_stages(loaded)


def test_a_maker_over_noise_cannot_ask_a_role_that_sees_images():
    noise = "data: {noise: {type: gaussian, shape: [4], batch_size: 8}}\nstages:"
    text = ROUNDS.replace("OUT", "run").replace("stages:", noise, 1)
    text = text.replace("{type: soft_labels, teacher", "{type: soft_labels, source: noise, teacher")
    with pytest.raises(ConfigError, match=r"source 'noise', which has no field 'image' for role 'teacher'"):
        plan_stages(recipe_from_text(text))


def test_check_needs_nothing_that_is_made():
    loaded = recipe_from_text(ROUNDS.replace("OUT", "run"))
    plans = plan_stages(loaded)
    assert [plan.stage.name for plan in plans] == ["query@1", "train@1", "query@2", "train@2"]
    assert plans[1].specs["train"].fields["soft"] == ((4,), "float32") and not Path("run").exists()
    train_recipe_text(ROUNDS.replace("OUT", "run"))
    files = find_artifact_files(loaded, RunFolder("run"))
    assert set(files) == {f"query@{n}.{name}" for n in (1, 2) for name in ("labels", "memory", "soft", "means")}


def test_two_processes_make_what_one_makes():
    """What depends on no training: the teacher's soft labels and class means. One process writes, both read."""
    for out, count, size in (("one", 1, 16), ("two", 2, 8)):
        recipe_from_text(ROUNDS.replace("OUT", out).replace("batch_size: 16", f"batch_size: {size}").replace("norm: batch, ", ""))
        done = run_command("own.yaml", processes=count)
        assert done.returncode == 0, done.stderr
    for name in ("soft", "means", "memory"):
        one, two = (dict(flatten_tree(content(out, f"query@1.{name}"))) for out in ("one", "two"))
        assert [k for k in one if one[k] != two[k] and not k.startswith("provenance")] == []
    assert len(content("two", "query@2.labels")["index"]) == 18


def test_a_finished_run_can_be_measured_again():
    from kdbench.experiment.reopened import reevaluate

    outcome = train_recipe_text(SEARCH)
    scores = reevaluate(RunFolder("run"))
    last = outcome.summary["last"]["metrics"]["student"]["test"]
    assert scores["student"]["test"]["top1"] == last["top1"]
    assert load_recipe("own.yaml").stages[1].roles["student"].artifact == "find.net"
    assert json.dumps(read_json("run/manifest.json")["made"])
