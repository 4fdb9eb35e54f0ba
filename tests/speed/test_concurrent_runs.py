"""A gang: each member's run is the run that it would be alone, whatever the others do."""

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
from kdbench.speed.concurrent.dispatcher import ConcurrentRun, Dispatcher, Stack
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
"""Batches of 24, 24 and 16: the last one of an epoch is smaller."""


def gang(jobs: Sequence[Recipe], stack: Stack) -> tuple[list[Outcome | BaseException], list[str]]:
    """Trains the jobs together; returns how each ended and what the gang said."""
    said: list[str] = []
    together: Dispatcher[Outcome] = Dispatcher([f"job {n}" for n in range(len(jobs))], CPU, stack=stack, say=said.append)

    def task(job: Recipe):
        return lambda member: run_experiment(job, console=QuietConsole(), on_stage_ready=member.attend)

    return together.run([task(job) for job in jobs]), said


def jobs_of(sweep: Sequence[Sequence[str]], folder: str, text: str = KD) -> list[Recipe]:
    return [recipe_from_text(text, *words, f"runs={folder}") for words in sweep]


def results(outcomes: Sequence[Outcome | BaseException]) -> list[dict]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [comparable_results(outcome.folder.path) for outcome in outcomes if isinstance(outcome, Outcome)]


ALONE: dict[str, dict] = {}
"""Results of runs alone, by identity: several tests compare with the same ones."""


def alone(jobs: Sequence[Recipe]) -> list[dict]:
    keys = [identity(job, {"log": job.stages[0].log_every}) for job in jobs]
    for key, job in zip(keys, jobs, strict=True):
        if key not in ALONE:
            ALONE[key] = comparable_results(run_experiment(job, console=QuietConsole()).folder.path)
    return [ALONE[key] for key in keys]


SEEDS = [["seed=1"], ["seed=2"], ["seed=3"]]
MIXED = [
    ["seed=1", "terms.kd.temperature=4"],
    ["seed=2", "terms.kd.weight=0.2"],
    ["seed=3", "optimizer.lr=0.02", "terms.hint=null"],
]


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("sweep", [SEEDS, MIXED])
def test_each_member_ends_with_the_bits_of_its_run_alone(stack: Stack, sweep):
    outcomes, said = gang(jobs_of(sweep, "together"), stack)
    together, single = results(outcomes), alone(jobs_of(sweep, "single"))
    for one, other in zip(together, single, strict=True):
        assert differing_keys(one, other) == [] and len(one) > 50
    assert differing_keys(together[0], together[1])  # a comparison that cannot fail would say so here too
    stacked = [text[:1] for text in said if "one stack (the same bits" in text]
    alike = "3" if sweep is SEEDS else "2"  # where a term is missing, other features are wanted
    assert stacked == ([alike] if stack else []), said


def test_a_joint_step_runs_the_students_once(monkeypatch):
    """What stacking is for: one forward of all students, and none of each."""
    calls: list[int] = []
    execute = JointStep.execute
    monkeypatch.setattr(JointStep, "execute", lambda self, window: (calls.append(len(window)), execute(self, window)))
    outcomes, _ = gang(jobs_of(SEEDS, "together"), True)
    results(outcomes)
    assert calls == [3] * 6


def test_gradients_that_go_to_the_wrong_member_change_its_result(monkeypatch):
    """The negative control of the whole: a stack that hands its parts out in another order."""

    def hand_out(self):
        for own, stacked, place in self._pairs():
            if isinstance(own, torch.nn.Parameter) and isinstance(place, slice):
                rows = own.shape[0]
                turned = slice((place.start + rows) % stacked.shape[0], (place.start + rows) % stacked.shape[0] + rows)
                own.grad = stacked.grad[turned]

    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.gap", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(StackedNetwork, "hand_out", hand_out)
    outcomes, _ = gang(jobs_of(SEEDS, "together"), True)
    single = alone(jobs_of(SEEDS, "single"))
    assert all(differing_keys(one, other) for one, other in zip(results(outcomes), single, strict=True))


def test_a_stack_that_gives_other_values_is_refused(monkeypatch):
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.gap", lambda *_: (1e-3, 1e-3))
    outcomes, said = gang(jobs_of(SEEDS, "together"), True)
    assert any("gives other values" in text for text in said)
    for one, other in zip(results(outcomes), alone(jobs_of(SEEDS, "single")), strict=True):
        assert differing_keys(one, other) == []


def told(outcome: Outcome | BaseException) -> dict:
    """What a run's manifest says of the gang that it was in; how its steps were done, by the first of them."""
    assert isinstance(outcome, Outcome)
    return read_json(outcome.folder.manifest)["sessions"][-1].get("gang", {})


@pytest.mark.parametrize("stack", [True, False])
def test_a_members_manifest_says_how_it_was_computed(stack: Stack):
    outcomes, _ = gang(jobs_of(MIXED, "together"), stack)
    facts = [told(outcome) for outcome in outcomes]
    assert [fact["label"] for fact in facts] == ["job 0", "job 1", "job 2"] == facts[0]["runs"]
    forms = [fact["from_step"]["main"]["0"] for fact in facts]
    assert [form["form"] for form in forms] == (["stacked"] * 2 if stack else ["unstacked"] * 2) + ["unstacked"]
    whys = ("stack: true; the same bits", "no two runs have students of one kind") if stack else ("stack: false",) * 2
    assert whys[0] in forms[0]["why"] and (whys[1] in forms[2]["why"] or "no other run" in forms[2]["why"])
    assert told(run_experiment(recipe_from_text(KD, "runs=single"), console=QuietConsole())) == {}, "a run alone was in none"


@pytest.mark.parametrize("stacked", [True, False])
def test_a_members_manifest_says_what_was_chosen_and_from_which_step_on(monkeypatch, stacked: bool):
    seconds = iter([1.0, 2.0] if stacked else [2.0, 1.0])
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.CHUNK", 1)
    monkeypatch.setattr("kdbench.speed.concurrent.dispatcher.CHUNKS", 4)
    monkeypatch.setattr(
        "kdbench.speed.concurrent.dispatcher.statistics", SimpleNamespace(median=lambda spent: next(seconds))
    )
    outcomes, said = gang(jobs_of(SEEDS, "together"), "auto")
    assert any(("as one stack" if stacked else "each by itself") in text for text in said)
    for outcome in outcomes:
        forms = told(outcome)["from_step"]["main"]
        assert forms["0"]["form"] == "both"
        assert forms["4"]["form"] == ("stacked" if stacked else "unstacked")
        assert "1000.0 ms" in forms["4"]["why"] and "2000.0 ms" in forms["4"]["why"]
        assert set(forms) - {"0", "4"} <= {"5"}, "a member that is left alone at the end says so"


def test_members_that_draw_keep_their_own_draws():
    """Dropout is no layer of a stack; with it the members take turns, and each draws by its own seed."""
    text = KD.replace(
        "student: {model: {type: t_conv, norm: batch}}", "student: {model: {type: t_layers, dropout: 0.3}}"
    )
    text = text.replace("  hint: {type: hint, student: conv2, teacher: conv2, weight: 0.1}\n", "")
    outcomes, said = gang(jobs_of(SEEDS, "together", text), True)
    assert any("Dropout" in text for text in said)
    for one, other in zip(results(outcomes), alone(jobs_of(SEEDS, "single", text)), strict=True):
        assert differing_keys(one, other) == []


@pytest.mark.parametrize("stack", [True, False])
def test_a_member_that_fails_is_told_and_the_others_end_as_alone(stack: Stack):
    sweep = [["seed=1"], ["seed=2", "optimizer.lr=1e300", "clip=null"], ["seed=3"]]
    outcomes, _ = gang(jobs_of(sweep, "together"), stack)
    assert isinstance(outcomes[1], TrainingError) and "not finite" in str(outcomes[1])
    single = alone(jobs_of([sweep[0], sweep[2]], "single"))
    for one, other in zip(results([outcomes[0], outcomes[2]]), single, strict=True):
        assert differing_keys(one, other) == []


@pytest.mark.parametrize("stack", [True, False])
def test_members_that_stand_at_different_steps_go_on_to_the_bits_of_an_undisturbed_run(monkeypatch, stack: Stack):
    sweep, settings = SEEDS, ["checkpoint_every.steps=1"]
    jobs = jobs_of([[*words, *settings] for words in sweep], "together")
    step = Runner.step
    stop = {1: 2, 2: 4}

    def stopping(self, window):
        if self.done == stop.get(self.recipe.seed):
            raise KeyboardInterrupt
        step(self, window)

    monkeypatch.setattr(Runner, "step", stopping)
    for job in jobs[:2]:
        with pytest.raises(KeyboardInterrupt):
            run_experiment(job, console=QuietConsole())
    monkeypatch.setattr(Runner, "step", step)
    outcomes, _ = gang(jobs, stack)
    single = alone(jobs_of([[*words, *settings] for words in sweep], "single"))
    for one, other in zip(results(outcomes), single, strict=True):
        assert differing_keys(one, other) == []
    again, _ = gang(jobs, stack)
    assert all(isinstance(outcome, Outcome) and outcome.already_finished for outcome in again)


def test_a_gang_leaves_the_process_as_it_was():
    torch.manual_seed(5)
    state, formats = torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32
    results(gang(jobs_of(SEEDS[:2], "together"), False)[0])
    assert torch.equal(state, torch.get_rng_state()) and torch.backends.cuda.matmul.allow_tf32 == formats


def test_members_share_the_memory_of_their_data(monkeypatch):
    from kdbench.data.loading import source

    kept: list[torch.Tensor] = []
    build = source.ResidentSource.__init__

    def noting(self, *given, **named):
        build(self, *given, **named)
        if self.name == "train":
            kept.append(self.images)

    monkeypatch.setattr(source.ResidentSource, "__init__", noting)
    results(gang(jobs_of(SEEDS, "together"), False)[0])
    assert len(kept) == 3 and len({image.data_ptr() for image in kept}) == 1
    results(gang(jobs_of(SEEDS[:1], "single"), False)[0])
    assert kept[-1].data_ptr() != kept[0].data_ptr()


def test_a_task_that_is_stopped_stops_the_others():
    together: Dispatcher[int] = Dispatcher(["a", "b"], CPU, say=lambda _: None)

    def first(member: ConcurrentRun) -> int:
        together.stopped = True
        together.turn(member)
        return 1

    ended = together.run([first, lambda member: 2])
    assert [type(one) for one in ended] == [KeyboardInterrupt, KeyboardInterrupt]


def test_labels_say_what_sets_the_jobs_apart():
    jobs = [["++seed=1", "++epochs=2"], ["++seed=2", "++epochs=2"]]
    assert job_labels(jobs) == ["seed=1", "seed=2"]
    assert job_labels([["++a=1"], ["++a=1"]]) == ["job 0", "job 1"]


# The launcher

SWEEP = ["-m", "hydra/launcher=concurrent", "hydra.launcher.stack=true"]


def write() -> None:
    Path("kd.yaml").write_text(SYNTHETIC_DATA + KD, encoding="utf-8")


def test_the_launcher_trains_a_sweep_and_prints_its_table(capfd):
    write()
    assert main(["train", "kd.yaml", "seed=1,2", "epochs=1", *SWEEP]) == 0
    out = capfd.readouterr().out
    assert "seed=1 │ " in out and "seed=2 │ " in out and "gang │ 2 runs step as one stack" in out
    assert out.index("seed=2 │ main  epoch") < out.index("Everything is in")  # both before the first summary
    assert re.search(r"epochs=1 +2 ", out)  # the table: both seeds in one row
    folders = re.findall(r"Everything is in (\S+)", out)
    write()
    assert main(["train", "kd.yaml", "seed=2", "epochs=1", "runs=single"]) == 0
    single = re.findall(r"Everything is in (\S+)", capfd.readouterr().out)
    assert differing_keys(comparable_results(folders[1]), comparable_results(single[0])) == []


def test_jobs_that_do_not_fit_are_told_and_train_apart(capfd):
    write()
    words = ["precision=float64,float32", "seed=1,2", "epochs=1", "hydra.launcher.size=2"]
    assert main(["train", "kd.yaml", *words, *SWEEP]) == 0
    out = capfd.readouterr().out
    assert "job 2 has other precision than the first" in out
    assert len(re.findall("Everything is in", out)) == 4


def test_a_failing_job_ends_the_sweep_with_2_and_leaves_the_others(capfd):
    write()
    assert main(["train", "kd.yaml", "optimizer.lr=0.1,1e300", "clip=null", "epochs=1", *SWEEP]) == 2
    captured = capfd.readouterr()
    assert "kdbench: job 1: " in captured.err and "not finite" in captured.err and "Traceback" not in captured.err
    assert len(re.findall("Everything is in", captured.out)) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra.launcher.stack=perhaps"], "expected auto, true or false"),
        (["hydra.launcher.size=0"], "a number from 1"),
        (["hydra.launcher.sise=2"], "sise"),
    ],
)
def test_mistakes_in_its_settings_are_paragraphs(words, said, capfd):
    write()
    assert main(["train", "kd.yaml", "-m", "seed=1,2", "hydra/launcher=concurrent", *words]) == 2
    err = capfd.readouterr().err
    assert said in err and err.startswith("kdbench: ") and "Traceback" not in err


def test_an_unknown_launcher_is_answered_with_the_known_ones(capfd):
    write()
    assert main(["train", "kd.yaml", "hydra/launcher=gnag"]) == 2
    assert "gang" in capfd.readouterr().err.replace("gnag", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_gang_that_is_killed_or_stopped_goes_on_to_the_same_bits(how):
    write()
    settings = ["epochs=40", "checkpoint_every.steps=1", "log_every=1"]
    words = ["-m", "kdbench", "train", "kd.yaml", "seed=1,2", *settings, *SWEEP, "--plugin", "helpers.plugin_parts"]
    process = subprocess.Popen(
        [sys.executable, *words],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit "ignored"
    )
    deadline = time.monotonic() + 100
    while len(list(Path("runs").glob("kd/*/checkpoints/last.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9), err
    assert "Traceback" not in err
    found = list(Path("runs").glob("kd/*/manifest.json"))
    assert len(found) == 2 and all(json.loads(path.read_text())["status"] != "finished" for path in found)
    done = subprocess.run([sys.executable, *words], env=subprocess_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr
    for folder in re.findall(r"Everything is in (\S+)", done.stdout):
        seed = json.loads((Path(folder) / "manifest.json").read_text())["seed"]
        [other] = alone([recipe_from_text(KD, f"seed={seed}", *settings, "runs=single", name="kd")])
        assert differing_keys(comparable_results(folder), other) == []
