"""Two processes train like one process with the doubled batch. gloo on the CPU; each case is trained once, up front."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from kdbench.engine.state.run_state import RunState
from kdbench.experiment.reopened import reevaluate
from kdbench.files import read_json, read_json_lines
from kdbench.run_folder import RunFolder

DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 61}\n"
"""61 = 3 * 16 + 13: the last batch is smaller, and one of its rows is repeated to give two ranks equal batches."""

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
ROW_TERMS = "{ce: cross_entropy, kd: {type: kd, temperature: 2}}"
BATCH_TERMS = (
    "{ce: cross_entropy, dist: dist, rkd: {type: rkd, student: pool, teacher: pool, weight: 0.02}, "
    "sp: {type: sp, student: {path: conv2, adapter: conv1x1}, teacher: conv2, weight: 10}}"
)
SAMPLE_MEMORY_TERMS = "{own: {type: self_target, alpha: 0.5}, last: {type: last_batch, temperature: 2, weight: 0.1}}"
QUEUE_TERMS = (
    "{taid: {type: taid, least: 0.3, rate: 0.1}, mean: {type: temporal_ensemble, weight: 5}, "
    "queue: {type: queue_similarity, size: 300, student: pool, teacher: pool, candidates: batch}}"
)
ROUTED_TERMS = (
    "{ce: cross_entropy, kd: {type: kd, teacher: [teacher, second], route: {type: top_k, k: 2, read: 'student:pool'}}, "
    "balance: {type: load_balance, student: 'term:kd.gate', weight: 3}, "
    "rkd: {type: rkd, student: 'student:logits', teacher: 'teacher:logits', weight: 0.02, sample_weight: disagreement}}"
)
GATED_TERMS = (
    "{kd: {type: kd, sample_weight: {type: learnt, by: gate}}, "
    "ce: {type: cross_entropy, sample_weight: {type: learnt, by: gate, complement: true}}, "
    "rkd: {type: rkd, student: pool, teacher: pool, weight: 0.02}, "
    "held: {type: cross_entropy, student: judge}}"
)
INNER_STEP = (
    "models: {judge: {reuse: student, input: held.image}, gate: {model: {type: t_linear, num_classes: 1}}}\n"
    "data: {held: {subset: {type: random, amount: 24}}}\nprecision: float64\n"
    "updates: [[{models: [gate], terms: [held], inner_step: {models: [student], terms: [kd, ce, rkd]}}, "
    "{models: [student], terms: [kd, ce, rkd]}]]\n"
)
BLOCK_TERMS = (
    "{ce: cross_entropy, kd: {type: kd, temperature: 2}, "
    "hint: {type: hint, student: {path: blocks.1, adapter: conv1x1}, teacher: blocks.1}}"
)
SHARDED = "models: {second: {model: t_blocks, frozen: true}}\nshard: true\nprecision: float64\n"
CASES = {
    "group": ("group", ROW_TERMS, ""),
    "coupled": ("group", BATCH_TERMS, "precision: float64\n"),
    "synced": ("batch", BATCH_TERMS, "sync_batchnorm: true\nema: 0.9\nclip: 0.5\n"),
    "per_rank": ("batch", ROW_TERMS, "models: {shadow: {ema: student, decay: 0.8}}\nema: 0.9\n"),
    "sample_memory": ("group", SAMPLE_MEMORY_TERMS, "precision: float64\n"),
    "queues": ("group", QUEUE_TERMS, "precision: float64\n"),
    "routed": ("group", ROUTED_TERMS, "models: {second: {model: t_conv, frozen: true}}\nprecision: float64\n"),
    "inner_step": ("group", GATED_TERMS, INNER_STEP),
    "inner_step_synced": ("batch", GATED_TERMS, INNER_STEP + "sync_batchnorm: true\n"),
    "sharded": ("group", BLOCK_TERMS, SHARDED + "clip: 0.3\nfrozen_forward: cache\n"),
    "sharded_synced": ("batch", BLOCK_TERMS, SHARDED + "sync_batchnorm: true\naccumulate: 2\n"),
    "accumulated": ("group", ROW_TERMS, "accumulate: 2\nvalidation: 12\n"),
}
"""Name -> normalisation of the student, terms, further keys."""

CASES = {name: case for name, case in CASES.items() if CAN_SHARD or not name.startswith("sharded")}

EQUAL_CASES = [
    "group",
    "coupled",
    "synced",
    "accumulated",
    "sample_memory",
    "queues",
    "routed",
    "sharded",
    "sharded_synced",
    "inner_step",
    "inner_step_synced",
]
"""Cases in which two processes equal one; in `per_rank` each rank normalises by its own rows."""


def case_params(*names: str) -> list[Any]:
    """Returns cases as test parameters; sharded ones are skipped if torch does not support them."""
    return [pytest.param(name, marks=needs_sharding) if name.startswith("sharded") else name for name in names]


def recipe_text(case: str, batch_size: int, out: str) -> str:
    norm, terms, extra = CASES[case]
    text = (
        COMMON.replace("t_conv", "t_blocks" if "shard" in extra else "t_conv")
        .replace("NORM", norm)
        .replace("TERMS", terms)
        .replace("BATCH", str(batch_size))
    )
    return DATA + text + extra + f"out: {out}\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Trains every case with one process and with two, in the folders `<case>/one` and `<case>/two`."""
    folder = tmp_path_factory.mktemp("distributed")
    files = []
    for case in CASES:
        files.append(folder / f"{case}.yaml")
        files[-1].write_text(recipe_text(case, 8, str(folder / case / "two")))
    command = torchrun_command(str(TESTS / "helpers" / "distributed_worker.py"), *map(str, files))
    process = subprocess.run(
        command, env=subprocess_environment(), cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    working_folder = Path.cwd()
    os.chdir(folder)
    try:
        for case in CASES:
            train_recipe_text(recipe_text(case, 16, str(folder / case / "one")), data="")
    finally:
        os.chdir(working_folder)
    return folder


@pytest.fixture
def runs_folder(runs, monkeypatch) -> Path:
    """Makes the folder of the trained cases the working folder."""
    monkeypatch.chdir(runs)
    return runs


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/last.pt", weights_only=True)


def flatten_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flatten_tensors(item, f"{prefix}.{key}")


@pytest.mark.parametrize("case", case_params(*EQUAL_CASES))
def test_weights_of_two_processes_equal_one_process_with_the_doubled_batch(runs, case):
    single, double = checkpoint(runs / case / "one"), checkpoint(runs / case / "two")
    assert single["step"] == double["step"] >= 8
    for key in ("models", "average", "terms"):
        expected, actual = dict(flatten_tensors(single[key])), dict(flatten_tensors(double[key]))
        assert expected.keys() == actual.keys()
        for name, expected_value in expected.items():
            value = actual[name]
            if name.endswith(".queue"):  # the same rows, but within a batch in the order of the ranks
                value, expected_value = (rows[rows[:, 0].argsort()] for rows in (value, expected_value))
            tolerance = 1e-6 if value.dtype == torch.float32 else 1e-12
            assert_close(
                value, expected_value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_without_synchronisation_batchnorm_is_per_rank_and_the_manifest_says_so(runs):
    """Also the negative control of the test above: here the weights differ."""
    trees = [checkpoint(runs / "per_rank" / name) for name in ("one", "two")]
    weights = [tree["models"]["student"]["conv1.weight"] for tree in trees]
    assert not torch.allclose(*weights, atol=1e-5)
    training = {name: read_json(runs / name / "two" / "manifest.json")["training"]["main"] for name in CASES}
    assert "per rank" in training["per_rank"]["batchnorm"] and "over all 2 ranks" in training["synced"]["batchnorm"]
    assert training["per_rank"]["effective_batch"] == {"train": 16}


@pytest.mark.parametrize("case", case_params(*EQUAL_CASES))
def test_logged_losses_and_metrics_equal_one_process(runs, case):
    single, double = (read_json_lines(runs / case / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["event"] for line in single] == [line["event"] for line in double]
    for expected, line in zip(single, double, strict=True):
        if expected["event"] == "train":
            assert_close(line["total"], expected["total"], rtol=1e-5, atol=1e-5)
            assert_close(line["grad_norm"], expected["grad_norm"], rtol=1e-4, atol=1e-5)
            for name, term in expected["terms"].items():
                assert_close(line["terms"][name]["loss"], term["loss"], rtol=1e-5, atol=1e-5)
        else:
            keys = ("role", "split", "epoch")
            assert [line[key] for key in keys] == [expected[key] for key in keys]
            for name, value in expected["metrics"].items():
                assert_close(line["metrics"][name], value, rtol=1e-4, atol=1e-4)


def test_only_one_process_writes_files(runs):
    for case in CASES:
        lines = read_json_lines(runs / case / "two" / "metrics.jsonl")
        steps = [line["step"] for line in lines if line["event"] == "train"]
        assert steps == sorted(set(steps)), "every step is logged once"
        assert read_json(runs / case / "two" / "manifest.json")["sessions"][0]["world_size"] == 2
    assert not list(runs.rglob("*.tmp"))


def test_number_of_processes_is_part_of_the_identity(runs):
    identities = {read_json(runs / "group" / name / "manifest.json")["identity"] for name in ("one", "two")}
    assert len(identities) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", case_params("per_rank", "sharded"))
def test_interrupted_torchrun_resumes_to_the_same_bits(runs_folder, case):
    """With per-rank BatchNorm, a moving average and an EMA teacher; and with sharded networks."""
    Path("alive").unlink(missing_ok=True)
    file, out = f"{case}2.yaml", f"resumed_{case}"
    Path(file).write_text(recipe_text(case, 8, out))
    crash = "terms.odd={type: t_dies, at: 7}"
    interrupted = run_command(file, "checkpoint_every.steps=1", crash, processes=2)
    assert interrupted.returncode != 0 and checkpoint(Path(out))["step"] == 6
    # The crashing term is part of the identity: the same command resumes, and the file stops it from crashing again.
    Path("alive").touch()
    resumed = run_command(file, "checkpoint_every.steps=1", crash, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    uninterrupted = run_command(file, f"out=uninterrupted_{case}", crash, processes=2)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert differing_keys(comparable_results(out), comparable_results(f"uninterrupted_{case}")) == []


@pytest.mark.parametrize("case", case_params("sharded", "sharded_synced"))
def test_one_process_evaluates_a_sharded_run_to_the_logged_metrics(runs_folder, case):
    lines = [line for line in read_json_lines(Path(case) / "two" / "metrics.jsonl") if line["event"] == "evaluation"]
    student = (line for line in reversed(lines) if (line["role"], line["split"]) == ("student", "test"))
    logged = next(line["metrics"] for line in student if "nll" in line["metrics"])
    metrics = reevaluate(RunFolder(Path(case) / "two"))["student"]["test"]
    assert metrics.keys() == logged.keys()
    for name, value in logged.items():
        assert_close(metrics[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", case_params("sharded", "sharded_synced"))
def test_one_process_loads_the_state_of_a_sharded_run(runs_folder, case):
    """Another number of processes is another run, but weights and momentum have the same names and shapes."""
    path = RunFolder(Path(case) / "two").last
    state = RunState.from_tree(torch.load(path, weights_only=True), path)
    runner = build_stage(load_recipe(f"{case}.yaml")).runner
    runner.load_training_state(state)
    loaded = runner.training_state()
    assert list(flatten_tree(loaded.models)) == list(flatten_tree(state.models))
    optimizers = [dict(flatten_tree(tree.optimizers[0]["state"])) for tree in (loaded, state)]
    assert optimizers[0] == optimizers[1] and any("momentum_buffer" in name for name in optimizers[0])


@pytest.mark.slow
def test_two_nodes_equal_two_processes_on_one_node(runs_folder):
    """`--nnodes 2` with both nodes on this machine."""
    Path("again").mkdir()
    Path("again/group.yaml").write_text(recipe_text("group", 8, "nodes"))
    nodes = [
        subprocess.Popen(
            command, env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in two_node_commands(
            "-m", "kdbench", "train", "again/group.yaml", "--plugin", "helpers.plugin_parts"
        )
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert differing_keys(comparable_results("nodes"), comparable_results(Path("group") / "two")) == []


def test_error_that_only_the_first_process_sees_ends_all(runs_folder):
    """A locked folder; the second process would otherwise wait in a collective.

    Without torchrun, which ends all processes as soon as one has ended, possibly before it has printed its error.
    """
    Path("locked.yaml").write_text(recipe_text("group", 8, "locked"))
    with RunFolder("locked").lock():
        processes = [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command, env in rank_commands(
                "-m", "kdbench", "train", "locked.yaml", "--plugin", "helpers.plugin_parts"
            )
        ]
        first, second = (process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], (first, second)
    assert "\nkdbench: locked is in use by process" in f"\n{first}"
    assert "\nkdbench: process 0 of 2: locked is in use by process" in f"\n{second}"


def test_locked_folder_ends_torchrun_with_a_message(runs_folder):
    Path("busy.yaml").write_text(recipe_text("group", 8, "busy"))
    with RunFolder("busy").lock():
        process = run_command("busy.yaml", processes=2, timeout=120)
    assert process.returncode != 0 and "busy is in use by process" in process.stderr
    assert "exitcode  : 2" in process.stderr


def test_mistakes_end_every_process_with_a_message_and_without_hanging(runs_folder):
    Path("wrong.yaml").write_text(recipe_text("group", 8, "wrong").replace("kd: {type: kd", "kd: {type: kdd"))
    process = run_command("wrong.yaml", processes=2, timeout=90)
    assert process.returncode != 0 and "Did you mean 'kd'" in process.stderr and "exitcode  : 2" in process.stderr
    text = recipe_text("group", 8, "nan").replace("ce: cross_entropy", "ce: {type: t_nan, at: 3}")
    Path("nan.yaml").write_text(text)
    process = run_command("nan.yaml", processes=2, timeout=90)
    assert process.returncode != 0 and "not finite since step 3" in process.stderr
    assert "exitcode  : 2" in process.stderr
