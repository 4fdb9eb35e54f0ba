"""Two processes follow one process with the doubled batch. gloo on the CPU; every recipe is trained once, up front."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers.recipes import (  # noqa: F401
    TESTS,
    build_stage,
    comparable_results,
    differing_keys,
    flatten_tree,
    plugin_registration,
    rank_commands,
    run_command,
    subprocess_environment,
    torchrun_command,
    train_recipe_text,
    two_node_commands,
)
from helpers.sharding import CAN_SHARD, needs_sharding
from kdbench.config.load import load_recipe
from kdbench.experiment.reopened import reevaluate
from kdbench.files import read_json, read_json_lines
from kdbench.run_folder import RunFolder

DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 61}\n"
"""61 = 3 * 16 + 13: the last batch is ragged, and one of its rows is repeated to make two ranks equal."""

COMMON = """
student: {model: {type: t_conv, norm: NORM}}
teacher: {model: {type: t_conv, norm: group}}
terms: TERMS
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
label_fraction: 20
epochs: 4
batch_size: BATCH
log_every: 1
tensorboard: false
"""
MASKED = "{ce: cross_entropy, kd: {type: kd, temperature: 2}}"
COUPLED = (
    "{ce: cross_entropy, dist: dist, rkd: {type: rkd, student: pool, teacher: pool, weight: 0.02}, "
    "sp: {type: sp, student: {path: conv2, adapter: conv1x1}, teacher: conv2, weight: 10}}"
)
REMEMBERING = "{own: {type: self_target, alpha: 0.5}, last: {type: last_batch, temperature: 2, weight: 0.1}}"
QUEUED = (
    "{taid: {type: taid, least: 0.3, rate: 0.1}, mean: {type: temporal_ensemble, weight: 5}, "
    "queue: {type: queue_similarity, size: 300, student: pool, teacher: pool, candidates: batch}}"
)
ROUTED = (
    "{ce: cross_entropy, kd: {type: kd, teacher: [teacher, second], route: {type: top_k, k: 2, read: 'student:pool'}}, "
    "balance: {type: load_balance, student: 'term:kd.gate', weight: 3}, "
    "rkd: {type: rkd, student: 'student:logits', teacher: 'teacher:logits', weight: 0.02, sample_weight: disagreement}}"
)
GATED = (
    "{kd: {type: kd, sample_weight: {type: learnt, by: gate}}, ce: {type: cross_entropy, sample_weight: {type: learnt, by: gate, "
    "complement: true}}, rkd: {type: rkd, student: pool, teacher: pool, weight: 0.02}, "
    "held: {type: cross_entropy, student: judge}}"
)
AHEAD = (
    "models: {judge: {reuse: student, input: held.image}, gate: {model: {type: t_linear, num_classes: 1}}}\n"
    "data: {held: {subset: {type: random, amount: 24}}}\nprecision: float64\n"
    "updates: [[{models: [gate], terms: [held], inner_step: {models: [student], terms: [kd, ce, rkd]}}, "
    "{models: [student], terms: [kd, ce, rkd]}]]\n"
)
PARTED = (
    "{ce: cross_entropy, kd: {type: kd, temperature: 2}, "
    "hint: {type: hint, student: {path: blocks.1, adapter: conv1x1}, teacher: blocks.1}}"
)
IN_PARTS = "models: {second: {model: t_blocks, frozen: true}}\nshard: true\nprecision: float64\n"
CASES = {
    "group": ("group", MASKED, ""),
    "coupled": ("group", COUPLED, "precision: float64\n"),
    "synced": ("batch", COUPLED, "sync_batchnorm: true\nema: 0.9\nclip: 0.5\n"),
    "apart": ("batch", MASKED, "models: {shadow: {ema: student, decay: 0.8}}\nema: 0.9\n"),
    "remembering": ("group", REMEMBERING, "precision: float64\n"),
    "queued": ("group", QUEUED, "precision: float64\n"),
    "routed": ("group", ROUTED, "models: {second: {model: t_conv, frozen: true}}\nprecision: float64\n"),
    "ahead": ("group", GATED, AHEAD),
    "ahead_synced": ("batch", GATED, AHEAD + "sync_batchnorm: true\n"),
    "parted": ("group", PARTED, IN_PARTS + "clip: 0.3\nfrozen_forward: cache\n"),
    "parted_synced": ("batch", PARTED, IN_PARTS + "sync_batchnorm: true\naccumulate: 2\n"),
    "accumulated": ("group", MASKED, "accumulate: 2\nvalidation: 12\n"),
}
CASES = {name: case for name, case in CASES.items() if CAN_SHARD or not name.startswith("parted")}


def cases(*names: str) -> list:
    """Names of cases as parameters; those in parts are skipped, with the reason, where torch cannot part."""
    return [pytest.param(name, marks=needs_sharding) if name.startswith("parted") else name for name in names]


def text_of(case: str, batch: int, out: str) -> str:
    norm, terms, extra = CASES[case]
    text = (
        COMMON.replace("t_conv", "t_blocks" if "shard" in extra else "t_conv")
        .replace("NORM", norm)
        .replace("TERMS", terms)
        .replace("BATCH", str(batch))
    )
    return DATA + text + extra + f"out: {out}\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Trains every case with one process and with two; `<case>/one` and `<case>/two` are the folders."""
    folder = tmp_path_factory.mktemp("distributed")
    files = []
    for case in CASES:
        files.append(folder / f"{case}.yaml")
        files[-1].write_text(text_of(case, 8, str(folder / case / "two")))
    words = torchrun_command(str(TESTS / "helpers" / "distributed_worker.py"), *map(str, files))
    done = subprocess.run(words, env=subprocess_environment(), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    here = Path.cwd()
    os.chdir(folder)
    try:
        for case in CASES:
            train_recipe_text(text_of(case, 16, str(folder / case / "one")), data="")
    finally:
        os.chdir(here)
    return folder


def tree(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.pt", weights_only=True)


SAME = [
    "group",
    "coupled",
    "synced",
    "accumulated",
    "remembering",
    "queued",
    "routed",
    "parted",
    "parted_synced",
    "ahead",
    "ahead_synced",
]


@pytest.mark.parametrize("case", cases(*SAME))
def test_two_processes_follow_the_doubled_batch(runs, case):
    one, two = tree(runs / case / "one"), tree(runs / case / "two")
    assert one["step"] == two["step"] >= 8
    for key in ("models", "average", "terms"):
        ours, theirs = dict(flat_tensors(one[key])), dict(flat_tensors(two[key]))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            near = 1e-6 if value.dtype == torch.float32 else 1e-12
            other = theirs[name]
            if name.endswith(".queue"):  # the same rows; those of one batch stand in the order of the ranks
                value, other = (rows[rows[:, 0].argsort()] for rows in (value, other))
            assert_close(other, value, rtol=near, atol=near, msg=lambda text, name=name: f"{name}: {text}")


def flat_tensors(value, prefix=""):
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flat_tensors(item, f"{prefix}.{key}")


def test_without_synchronisation_batchnorm_is_per_rank_and_the_manifest_says_so(runs):
    """Also the negative control of the test above: here the weights differ."""
    one, two = tree(runs / "apart" / "one"), tree(runs / "apart" / "two")
    assert not torch.allclose(
        one["models"]["student"]["conv1.weight"], two["models"]["student"]["conv1.weight"], atol=1e-5
    )
    words = {name: read_json(runs / name / "two" / "manifest.json")["training"]["main"]["batchnorm"] for name in CASES}
    assert "per rank" in words["apart"] and "over all 2 ranks" in words["synced"]
    assert read_json(runs / "apart" / "two" / "manifest.json")["training"]["main"]["effective_batch"] == {"train": 16}


@pytest.mark.parametrize("case", cases(*SAME))
def test_the_logs_tell_the_same_losses_and_scores(runs, case):
    one, two = (read_json_lines(runs / case / which / "metrics.jsonl") for which in ("one", "two"))
    assert [line["event"] for line in one] == [line["event"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        if ours["event"] == "train":
            assert_close(theirs["total"], ours["total"], rtol=1e-5, atol=1e-5)
            assert_close(theirs["grad_norm"], ours["grad_norm"], rtol=1e-4, atol=1e-5)
            for name, term in ours["terms"].items():
                assert_close(theirs["terms"][name]["loss"], term["loss"], rtol=1e-5, atol=1e-5)
        else:
            assert (ours["role"], ours["split"], ours["epoch"]) == (theirs["role"], theirs["split"], theirs["epoch"])
            for name, value in ours["metrics"].items():
                assert_close(theirs["metrics"][name], value, rtol=1e-4, atol=1e-4)


def test_only_one_process_writes(runs):
    for case in CASES:
        lines = read_json_lines(runs / case / "two" / "metrics.jsonl")
        steps = [line["step"] for line in lines if line["event"] == "train"]
        assert steps == sorted(set(steps)), "every step is logged once"
        assert read_json(runs / case / "two" / "manifest.json")["sessions"][0]["world_size"] == 2
    assert not list(runs.rglob("*.tmp"))


def test_two_processes_are_another_run_than_one(runs):
    identities = {read_json(runs / "group" / which / "manifest.json")["identity"] for which in ("one", "two")}
    assert len(identities) == 2


@pytest.fixture
def moved(runs, monkeypatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("apart", "parted"))
def test_torchrun_of_the_command_line_is_resumed_with_the_same_bits(moved, case):
    """BatchNorm apart on each rank, an average and a teacher that follow; networks in parts: a resume has it all."""
    Path("alive").unlink(missing_ok=True)
    file, out = f"{case}2.yaml", f"resumed_{case}"
    Path(file).write_text(text_of(case, 8, out))
    dies = "terms.odd={type: t_dies, at: 7}"
    short = run_command(file, "checkpoint_every.steps=1", dies, processes=2)
    assert short.returncode != 0 and tree(Path(out))["step"] == 6
    # The term that dies is part of the identity: the same command goes on, and this time it does not die.
    Path("alive").touch()
    again = run_command(file, "checkpoint_every.steps=1", dies, processes=2)
    assert again.returncode == 0, again.stderr
    whole = run_command(file, f"out=undisturbed_{case}", dies, processes=2)
    assert whole.returncode == 0, whole.stderr
    assert differing_keys(comparable_results(out), comparable_results(f"undisturbed_{case}")) == []


@pytest.mark.parametrize("case", cases("parted", "parted_synced"))
def test_what_was_trained_in_parts_is_evaluated_by_one_process(moved, case):
    lines = [line for line in read_json_lines(Path(case) / "two" / "metrics.jsonl") if line["event"] == "evaluation"]
    student = (line for line in reversed(lines) if (line["role"], line["split"]) == ("student", "test"))
    logged = next(line["metrics"] for line in student if "nll" in line["metrics"])
    found = reevaluate(RunFolder(Path(case) / "two"))["student"]["test"]
    assert found.keys() == logged.keys()
    for name, value in logged.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", cases("parted", "parted_synced"))
def test_a_state_of_parts_is_loaded_whole_by_one_process(moved, case):
    """Another number of processes is another run; but its weights and moments are the same tree."""
    state = tree(Path(case) / "two")
    alone = build_stage(load_recipe(f"{case}.yaml")).runner
    alone.load_state_dict(state)
    again = alone.state_dict()
    assert list(flatten_tree(again["models"])) == list(flatten_tree(state["models"]))
    ours, theirs = (dict(flatten_tree(found["optimizers"][0]["state"])) for found in (again, state))
    assert ours == theirs and any("momentum_buffer" in name for name in ours)


def test_two_nodes_are_two_processes(moved):
    """`--nnodes 2`, both on this machine, with a rendezvous of their own: the bits of two processes on one node."""
    Path("again").mkdir()
    Path("again/group.yaml").write_text(text_of("group", 8, "nodes"))
    nodes = [
        subprocess.Popen(words, env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words in two_node_commands("-m", "kdbench", "train", "again/group.yaml", "--plugin", "helpers.plugin_parts")
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert differing_keys(comparable_results("nodes"), comparable_results(Path("group") / "two")) == []


def test_what_only_the_first_process_sees_is_told_by_all(moved):
    """A locked folder; without an agreement the second would wait in a sum. No torchrun here: it ends all others as
    soon as one process has gone, which may be before that one has said its words."""
    Path("locked.yaml").write_text(text_of("group", 8, "locked"))
    with RunFolder("locked").lock():
        pair = [
            subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for words, env in rank_commands("-m", "kdbench", "train", "locked.yaml", "--plugin", "helpers.plugin_parts")
        ]
        first, second = (process.communicate(timeout=120)[1] for process in pair)
    assert [process.returncode for process in pair] == [2, 2], (first, second)
    assert "\nkdbench: locked is in use by process" in f"\n{first}"
    assert "\nkdbench: process 0 of 2: locked is in use by process" in f"\n{second}"


def test_under_torchrun_a_locked_folder_ends_every_process_in_words(moved):
    Path("taken.yaml").write_text(text_of("group", 8, "taken"))
    with RunFolder("taken").lock():
        done = run_command("taken.yaml", processes=2, timeout=120)
    assert done.returncode != 0 and "taken is in use by process" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_a_mistake_ends_every_process_with_words_and_without_hanging(moved):
    Path("wrong.yaml").write_text(text_of("group", 8, "wrong").replace("kd: {type: kd", "kd: {type: kdd"))
    done = run_command("wrong.yaml", processes=2, timeout=90)
    assert done.returncode != 0 and "Did you mean 'kd'" in done.stderr and "exitcode  : 2" in done.stderr
    Path("nan.yaml").write_text(text_of("group", 8, "nan").replace("ce: cross_entropy", "ce: {type: t_nan, at: 3}"))
    done = run_command("nan.yaml", processes=2, timeout=90)
    assert done.returncode != 0 and "not finite since step 3" in done.stderr and "exitcode  : 2" in done.stderr
