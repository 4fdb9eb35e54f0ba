"""Concurrent runs: each ends with the result of the same run alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.recipes import (  # noqa: F401
    CPU,
    SYNTHETIC_DATA,
    QuietConsole,
    comparable_results,
    differing_keys,
    plugin_registration,
    recipe_from_text,
    subprocess_environment,
    train_recipe_text,
)
from kdbench.cli.concurrent_launcher import job_labels
from kdbench.cli.main import main
from kdbench.config.identity import identity
from kdbench.config.schema import Recipe
from kdbench.engine.train.runner import Runner
from kdbench.errors import TrainingError
from kdbench.experiment.run import Outcome
from kdbench.experiment.run import run as run_experiment
from kdbench.files import read_json
from kdbench.speed.concurrent.dispatcher import ConcurrentRun, Dispatcher, StackOption
from kdbench.speed.concurrent.joint_step import JointStep
from kdbench.speed.concurrent.stacked_network import StackedNetwork

KD = """
teacher: {model: {type: t_conv, norm: batch}}
student: {model: {type: t_conv, norm: batch}}
terms:
  ce: {type: cross_entropy, weight: 0.3}
  kd: {type: kd, temperature: 2}
  hint: {type: hint, student: conv2, teacher: conv2, weight: 0.1}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9, weight_decay: 0.001}
precision: float64
batch_size: 24
log_every: 2
clip: 1.0
ema: 0.9
epochs: 2
tensorboard: false
"""
"""Batches of 24, 24 and 16 samples: the last one of an epoch is smaller."""


def train_concurrently(jobs: Sequence[Recipe], stack: StackOption) -> tuple[list[Outcome | BaseException], list[str]]:
    """Returns the outcome or the exception of each job, and the notices of the dispatcher."""
    notices: list[str] = []
    labels = [f"job {n}" for n in range(len(jobs))]
    dispatcher: Dispatcher[Outcome] = Dispatcher(labels, CPU, stack=stack, notice=notices.append)

    def task(job: Recipe):
        return lambda run: run_experiment(job, console=QuietConsole(), on_stage_ready=run.join)

    return dispatcher.run_all([task(job) for job in jobs]), notices


def load_jobs(sweep: Sequence[Sequence[str]], folder: str, text: str = KD) -> list[Recipe]:
    return [recipe_from_text(text, *overrides, f"runs={folder}") for overrides in sweep]


def results(outcomes: Sequence[Outcome | BaseException]) -> list[dict]:
    """Returns the comparable results of runs; raises the first exception among the outcomes."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [comparable_results(outcome.folder.path) for outcome in outcomes if isinstance(outcome, Outcome)]


SINGLE_RESULTS: dict[str, dict] = {}
"""Results of runs that trained alone, by identity; several tests compare with the same ones."""


def train_alone(jobs: Sequence[Recipe]) -> list[dict]:
    """Returns the comparable results of jobs that train one after another."""
    keys = [identity(job, {"log": job.stages[0].log_every}) for job in jobs]
    for key, job in zip(keys, jobs, strict=True):
        if key not in SINGLE_RESULTS:
            SINGLE_RESULTS[key] = comparable_results(run_experiment(job, console=QuietConsole()).folder.path)
    return [SINGLE_RESULTS[key] for key in keys]


def assert_equal_to_alone(outcomes: Sequence[Outcome | BaseException], jobs: Sequence[Recipe]) -> None:
    for concurrent, single in zip(results(outcomes), train_alone(jobs), strict=True):
        assert differing_keys(concurrent, single) == [] and len(concurrent) > 50


SEEDS = [["seed=1"], ["seed=2"], ["seed=3"]]
MIXED = [
    ["seed=1", "terms.kd.temperature=4"],
    ["seed=2", "terms.kd.weight=0.2"],
    ["seed=3", "optimizer.lr=0.02", "terms.hint=null"],
]


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("sweep", [SEEDS, MIXED])
def test_concurrent_runs_equal_single_runs_bit_for_bit(stack: StackOption, sweep):
    outcomes, notices = train_concurrently(load_jobs(sweep, "concurrent"), stack)
    assert_equal_to_alone(outcomes, load_jobs(sweep, "single"))
    first, second, *_ = results(outcomes)
    assert differing_keys(first, second)  # negative control of the comparison
    stack_sizes = [text[:1] for text in notices if "one stack (the same bits" in text]
    expected = "3" if sweep is SEEDS else "2"  # a run without the term `hint` extracts other features
    assert stack_sizes == ([expected] if stack else []), notices


def test_joint_step_runs_all_students_in_one_forward(monkeypatch):
    window_sizes: list[int] = []
    run = JointStep.run
    monkeypatch.setattr(JointStep, "run", lambda self, window: (window_sizes.append(len(window)), run(self, window)))
    results(train_concurrently(load_jobs(SEEDS, "concurrent"), True)[0])
    assert window_sizes == [3] * 6


def test_gradients_of_another_run_change_the_result(monkeypatch):
    """Negative control: a stack that distributes its gradients in another order."""

    def distribute_gradients(self):
        for tensor, stacked, index in self._pairs():
            if isinstance(tensor, torch.nn.Parameter) and isinstance(index, slice):
                rows = tensor.shape[0]
                start = (index.start + rows) % stacked.shape[0]
                tensor.grad = stacked.grad[start : start + rows]

    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.stacking_errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(StackedNetwork, "distribute_gradients", distribute_gradients)
    outcomes, _ = train_concurrently(load_jobs(SEEDS, "concurrent"), True)
    single = train_alone(load_jobs(SEEDS, "single"))
    assert all(differing_keys(concurrent, alone) for concurrent, alone in zip(results(outcomes), single, strict=True))


def test_stack_with_other_values_is_rejected(monkeypatch):
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.stacking_errors", lambda *_: (1e-3, 1e-3))
    outcomes, notices = train_concurrently(load_jobs(SEEDS, "concurrent"), True)
    assert any("gives other values" in text for text in notices)
    assert_equal_to_alone(outcomes, load_jobs(SEEDS, "single"))


def concurrency_entry(outcome: Outcome | BaseException) -> dict:
    """Returns the manifest's entry about concurrent runs: labels, and how steps were executed from which step on."""
    assert isinstance(outcome, Outcome)
    return read_json(outcome.folder.manifest)["sessions"][-1].get("concurrent", {})


@pytest.mark.parametrize("stack", [True, False])
def test_manifest_states_how_the_steps_were_executed(stack: StackOption):
    outcomes, _ = train_concurrently(load_jobs(MIXED, "concurrent"), stack)
    entries = [concurrency_entry(outcome) for outcome in outcomes]
    assert [entry["label"] for entry in entries] == ["job 0", "job 1", "job 2"] == entries[0]["runs"]
    modes = [entry["from_step"]["main"]["0"] for entry in entries]
    assert [mode["form"] for mode in modes] == (["stacked"] * 2 if stack else ["unstacked"] * 2) + ["unstacked"]
    reasons = ("stack: true; the same bits", "no two students are equal") if stack else ("stack: false",) * 2
    assert reasons[0] in modes[0]["why"] and (reasons[1] in modes[2]["why"] or "no other run" in modes[2]["why"])
    single = run_experiment(recipe_from_text(KD, "runs=single"), console=QuietConsole())
    assert concurrency_entry(single) == {}


@pytest.mark.parametrize("stacked", [True, False])
def test_manifest_states_the_faster_mode_and_its_first_step(monkeypatch, stacked: bool):
    medians = iter([1.0, 2.0] if stacked else [2.0, 1.0])
    statistics = SimpleNamespace(median=lambda seconds: next(medians))
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.ROUNDS_PER_CHUNK", 1)
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.TRIAL_CHUNKS", 4)
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.statistics", statistics)
    outcomes, notices = train_concurrently(load_jobs(SEEDS, "concurrent"), "auto")
    assert any(("as one stack" if stacked else "separately") in text for text in notices)
    for outcome in outcomes:
        modes = concurrency_entry(outcome)["from_step"]["main"]
        assert modes["0"]["form"] == "both"
        assert modes["4"]["form"] == ("stacked" if stacked else "unstacked")
        assert "1000.0 ms" in modes["4"]["why"] and "2000.0 ms" in modes["4"]["why"]
        assert set(modes) - {"0", "4"} <= {"5"}, "the last run to finish has nobody left to stack with"


def test_runs_with_dropout_keep_their_random_numbers():
    """Dropout cannot be stacked: the runs alternate, and each draws with its own seed."""
    text = KD.replace(
        "student: {model: {type: t_conv, norm: batch}}", "student: {model: {type: t_layers, dropout: 0.3}}"
    )
    text = text.replace("  hint: {type: hint, student: conv2, teacher: conv2, weight: 0.1}\n", "")
    outcomes, notices = train_concurrently(load_jobs(SEEDS, "concurrent", text), True)
    assert any("Dropout" in notice for notice in notices)
    assert_equal_to_alone(outcomes, load_jobs(SEEDS, "single", text))


@pytest.mark.parametrize("stack", [True, False])
def test_failed_run_leaves_the_others_unchanged(stack: StackOption):
    sweep = [["seed=1"], ["seed=2", "optimizer.lr=1e300", "clip=null"], ["seed=3"]]
    outcomes, _ = train_concurrently(load_jobs(sweep, "concurrent"), stack)
    assert isinstance(outcomes[1], TrainingError) and "not finite" in str(outcomes[1])
    assert_equal_to_alone([outcomes[0], outcomes[2]], load_jobs([sweep[0], sweep[2]], "single"))


@pytest.mark.parametrize("stack", [True, False])
def test_interrupted_runs_continue_from_different_steps_to_the_same_bits(monkeypatch, stack: StackOption):
    sweep = [[*overrides, "checkpoint_every.steps=1"] for overrides in SEEDS]
    jobs = load_jobs(sweep, "concurrent")
    step = Runner.step
    interrupted_after = {1: 2, 2: 4}

    def interrupted_step(self, window):
        if self.progress.steps_done == interrupted_after.get(self.recipe.seed):
            raise KeyboardInterrupt
        step(self, window)

    monkeypatch.setattr(Runner, "step", interrupted_step)
    for job in jobs[:2]:
        with pytest.raises(KeyboardInterrupt):
            run_experiment(job, console=QuietConsole())
    monkeypatch.setattr(Runner, "step", step)
    outcomes, _ = train_concurrently(jobs, stack)
    assert_equal_to_alone(outcomes, load_jobs(sweep, "single"))
    repeated, _ = train_concurrently(jobs, stack)
    assert all(isinstance(outcome, Outcome) and outcome.already_finished for outcome in repeated)


def test_state_of_the_process_is_restored():
    torch.manual_seed(5)
    state, formats = torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32
    results(train_concurrently(load_jobs(SEEDS[:2], "concurrent"), False)[0])
    assert torch.equal(state, torch.get_rng_state()) and torch.backends.cuda.matmul.allow_tf32 == formats


def test_runs_share_the_memory_of_their_data(monkeypatch):
    from kdbench.data.loading import source

    images: list[torch.Tensor] = []
    build = source.ResidentSource.__init__

    def recording_init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if self.name == "train":
            images.append(self.images)

    monkeypatch.setattr(source.ResidentSource, "__init__", recording_init)
    results(train_concurrently(load_jobs(SEEDS, "concurrent"), False)[0])
    assert len(images) == 3 and len({tensor.data_ptr() for tensor in images}) == 1
    results(train_concurrently(load_jobs(SEEDS[:1], "single"), False)[0])
    assert images[-1].data_ptr() != images[0].data_ptr()


def test_interrupted_task_interrupts_all_tasks():
    dispatcher: Dispatcher[int] = Dispatcher(["a", "b"], CPU, notice=lambda _: None)

    def interrupting(run: ConcurrentRun) -> int:
        dispatcher.stopped = True
        dispatcher.pass_turn(run)
        return 1

    outcomes = dispatcher.run_all([interrupting, lambda run: 2])
    assert [type(outcome) for outcome in outcomes] == [KeyboardInterrupt, KeyboardInterrupt]


def test_labels_are_the_overrides_that_distinguish_jobs():
    jobs = [["++seed=1", "++epochs=2"], ["++seed=2", "++epochs=2"]]
    assert job_labels(jobs) == ["seed=1", "seed=2"]
    assert job_labels([["++a=1"], ["++a=1"]]) == ["job 0", "job 1"]


# The launcher

SWEEP = ["-m", "hydra/launcher=concurrent", "hydra.launcher.stack=true"]


def write_recipe() -> None:
    Path("kd.yaml").write_text(SYNTHETIC_DATA + KD, encoding="utf-8")


def test_launcher_trains_a_sweep_and_prints_its_table(capfd):
    write_recipe()
    assert main(["train", "kd.yaml", "seed=1,2", "epochs=1", *SWEEP]) == 0
    out = capfd.readouterr().out
    assert "seed=1 │ " in out and "seed=2 │ " in out and "concurrent │ 2 runs step as one stack" in out
    assert out.index("seed=2 │ main  epoch") < out.index("Everything is in")  # both before the first summary
    assert re.search(r"epochs=1 +2 ", out)  # the table: both seeds in one row
    folders = re.findall(r"Everything is in (\S+)", out)
    write_recipe()
    assert main(["train", "kd.yaml", "seed=2", "epochs=1", "runs=single"]) == 0
    single = re.findall(r"Everything is in (\S+)", capfd.readouterr().out)
    assert differing_keys(comparable_results(folders[1]), comparable_results(single[0])) == []


def test_jobs_with_other_precision_train_separately_with_a_notice(capfd):
    write_recipe()
    words = ["precision=float64,float32", "seed=1,2", "epochs=1", "hydra.launcher.size=2"]
    assert main(["train", "kd.yaml", *words, *SWEEP]) == 0
    out = capfd.readouterr().out
    assert "job 2 differs from the first job in precision" in out
    assert len(re.findall("Everything is in", out)) == 4


def test_failing_job_gives_exit_code_2_and_leaves_the_others(capfd):
    write_recipe()
    assert main(["train", "kd.yaml", "optimizer.lr=0.1,1e300", "clip=null", "epochs=1", *SWEEP]) == 2
    captured = capfd.readouterr()
    assert "kdbench: job 1: " in captured.err and "not finite" in captured.err and "Traceback" not in captured.err
    assert len(re.findall("Everything is in", captured.out)) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.launcher.stack=perhaps"], "expected auto, true or false"),
        (["hydra.launcher.size=0"], "a number from 1"),
        (["hydra.launcher.sise=2"], "sise"),
    ],
)
def test_wrong_launcher_setting_is_reported(overrides, message, capfd):
    write_recipe()
    assert main(["train", "kd.yaml", "-m", "seed=1,2", "hydra/launcher=concurrent", *overrides]) == 2
    err = capfd.readouterr().err
    assert message in err and err.startswith("kdbench: ") and "Traceback" not in err


def test_unknown_launcher_is_reported_with_the_known_ones(capfd):
    write_recipe()
    assert main(["train", "kd.yaml", "hydra/launcher=concurent"]) == 2
    assert "concurrent" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_sweep_continues_to_the_same_bits(signal_number):
    write_recipe()
    settings = ["epochs=40", "checkpoint_every.steps=1", "log_every=1"]
    words = ["-m", "kdbench", "train", "kd.yaml", "seed=1,2", *settings, *SWEEP, "--plugin", "helpers.plugin_parts"]
    process = subprocess.Popen(
        [sys.executable, *words],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background shell makes its children ignore it
    )
    deadline = time.monotonic() + 100
    while len(list(Path("runs").glob("kd/*/checkpoints/last.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -9), err
    assert "Traceback" not in err
    manifests = list(Path("runs").glob("kd/*/manifest.json"))
    assert len(manifests) == 2 and all(json.loads(path.read_text())["status"] != "finished" for path in manifests)
    repeated = subprocess.run(
        [sys.executable, *words], env=subprocess_environment(), capture_output=True, text=True, timeout=300
    )
    assert repeated.returncode == 0 and "resuming from" in repeated.stdout, repeated.stderr
    for folder in re.findall(r"Everything is in (\S+)", repeated.stdout):
        seed = json.loads((Path(folder) / "manifest.json").read_text())["seed"]
        [single] = train_alone([recipe_from_text(KD, f"seed={seed}", *settings, "runs=single", name="kd")])
        assert differing_keys(comparable_results(folder), single) == []
