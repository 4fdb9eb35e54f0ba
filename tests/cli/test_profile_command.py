"""`kdbench profile`: what it prints and leaves, what it does not train, and what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.recipes import SYNTHETIC_DATA, QuietConsole, plugin_registration, recipe_from_text, train_recipe_text  # noqa: F401
from kdbench.cli.main import main
from kdbench.engine.train import runner as runner_module
from kdbench.experiment.profile import _warm_up_steps
from kdbench.experiment.reopened import open_stage
from kdbench.files import read_json
from kdbench.speed.profiling import peaks
from kdbench.speed.profiling import profiler as engine

STUDENT = """
teacher: {model: t_conv, weights: {recipe: ./teacher.yaml}}
student: {model: t_conv}
terms: {ce: {type: cross_entropy, weight: 0.1}, kd: {type: kd, weight: 0.9}}
optimizer: {type: SGD, lr: 0.1}
epochs: 2
batch_size: 16
"""
TEACHER = "student: t_conv\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\nbatch_size: 16\n"
STAGED = """
student: {model: t_conv}
stages:
  label: {epochs: 1, artifacts: {seen: {type: reservoir, memory: 32}}, terms: {ce: cross_entropy}}
  learn: {epochs: 1, data: {train: {subset: {artifact: label.seen}}}, terms: {ce: cross_entropy}}
optimizer: {type: SGD, lr: 0.1}
batch_size: 16
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(peaks, "PROBE_SECONDS", 0.0)


def written(text: str, name: str = "own") -> str:
    recipe_from_text(text, name=name)
    return f"{name}.yaml"


def test_prints_a_table_and_leaves_three_files(capsys):
    written(TEACHER, "teacher")
    assert main(["profile", written(STUDENT), "--steps", "4", "terms.kd.temperature=2", "device=cpu"]) == 0
    told = capsys.readouterr().out
    for word in (
        "forward teacher",
        "forward student",
        "term ce",
        "term kd",
        "backward",
        "through student",
        "optimiser",
    ):
        assert word in told
    assert "peak memory" in told and "measured: a product" in told
    folder = Path("runs/own/profile")
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.png", "trace.json"]
    result = read_json(folder / "profile.json")
    assert result["overrides"] == ["terms.kd.temperature=2", "device=cpu"] and result["torch"] == torch.__version__
    assert sum(part["share"] for part in result["parts"]) == pytest.approx(1, abs=1e-3)
    assert sum(part["flops"] for part in result["parts"]) == result["flops"] > 0
    assert sum(part["operations"] for part in result["parts"]) == result["operations"]
    backward = next(part for part in result["parts"] if part["part"] == "backward")
    assert sum(backward["through"].values()) == pytest.approx(backward["ms"], rel=1e-3)
    assert result["mfu"] == pytest.approx(result["flops_per_second"] / result["peak"]["flops_per_second"])
    assert any(event.get("cat") == "part" for event in json.loads((folder / "trace.json").read_text())["traceEvents"])
    assert (folder / "profile.png").read_bytes()[:4] == b"\x89PNG"


def test_trains_no_teacher_and_says_so(capsys):
    written(TEACHER, "teacher")
    assert main(["profile", written(STUDENT), "--steps", "4", "--out", "there", "device=cpu"]) == 0
    assert "teacher is not trained yet; its initial weights stand in" in capsys.readouterr().out
    assert not Path("runs").exists() and Path("there/profile.json").exists()


def test_takes_a_teacher_that_is_trained():
    teacher = train_recipe_text(TEACHER, "device=cpu")  # own.yaml, another recipe than the one that is asked for
    written(TEACHER, "teacher")
    with open_stage(recipe_from_text(STUDENT, "device=cpu", name="student")) as found:
        assert len(found.missing_weights) == 1
        fresh = found.runner.network.role("teacher").model.state_dict()
    assert main(["train", "teacher.yaml", "device=cpu"]) == 0
    with open_stage(recipe_from_text(STUDENT, "device=cpu", name="student")) as found:
        assert found.missing_weights == ()
        learnt = found.runner.network.role("teacher").model.state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in learnt.items())
    assert not teacher.already_finished


def test_nothing_is_said_on_stderr():
    """Of torch's profiler, which writes there by itself; hence another process."""
    written(STUDENT.replace(", weights: {recipe: ./teacher.yaml}", "").replace("t_conv", "digits_mlp"), "quiet")
    command = [sys.executable, "-m", "kdbench", "profile", "quiet.yaml", "--steps", "4", "device=cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""


def test_a_profiler_that_sees_no_kernel_on_a_gpu_is_told_of(monkeypatch, capsys):
    traced = engine.profile_steps

    def blind(*args, **options):
        seen, profiler = traced(*args, **options)
        return replace(seen, kernels=0.0, copies=0.0), profiler

    monkeypatch.setattr(engine, "profile_steps", blind)
    text = written(STUDENT.replace(", weights: {recipe: ./teacher.yaml}", ""))
    assert main(["profile", text, "--steps", "4", "device=cpu"]) == 0
    assert "saw nothing that ran on the GPU" in capsys.readouterr().out
    monkeypatch.setattr(engine, "profile_steps", traced)
    assert main(["profile", text, "--steps", "4", "device=cpu"]) == 0
    assert "saw nothing" not in capsys.readouterr().out


def test_a_compiled_step_is_timed_as_it_runs_and_its_parts_without(monkeypatch, capsys):
    torch._dynamo.reset()
    compiled = []

    def compiling(network, **options):
        compiled.append(network)
        return torch.compile(network, backend="aot_eager", **options)

    monkeypatch.setattr(runner_module, "compiled", compiling)
    text = STUDENT.replace(", weights: {recipe: ./teacher.yaml}", "")
    assert main(["profile", written(text), "--steps", "4", "compile=true", "device=cpu"]) == 0
    assert len(compiled) == 1 and "captured step has no parts" in capsys.readouterr().out
    result = read_json("runs/own/profile/profile.json")
    assert result["compile"] is True and {"forward student", "term kd"} <= {part["part"] for part in result["parts"]}


def test_a_teacher_that_runs_elsewhere_is_timed_there_and_taken_apart_in_the_step(capsys):
    text = STUDENT.replace(", weights: {recipe: ./teacher.yaml}", "")
    for mode in ("ahead", "table"):
        assert main(["profile", written(text), "--steps", "4", f"frozen_forward={mode}", "device=cpu"]) == 0
        told = read_json("runs/own/profile/profile.json")
        assert told["frozen_forward"] == {"teacher": mode}
        assert "forward teacher" in {part["part"] for part in told["parts"]}
        executed = told["flops_per_second"] * told["step"]["mean_ms"] / 1000
        assert executed == pytest.approx(told["flops"], rel=1e-3) or mode == "table"
        assert executed < 0.95 * told["flops"] or mode == "ahead", "what is read from a table was not computed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits/kdd"], "digits/kd"),
        (["digits/kd", "--steps", "2"], "--steps must be at least 4"),
        (["digits/kd", "--steps", "many"], "--steps"),
        (["digits/kd", "--stage", "mian"], "Did you mean 'main'"),
        (["digits/kd", "terms.kd.temprature=2"], "temperature"),
        (["digits/kd", "device=cuda:99"], "device"),
        ([], "which recipe"),
    ],
)
def test_bad_input_is_answered_in_words(words, expected, capsys):
    assert main(["profile", *words]) == 2
    told = capsys.readouterr()
    assert expected in told.err and "Traceback" not in told.err and not told.out


def test_a_stage_that_reads_what_is_not_made_yet_is_refused_until_it_is(capsys):
    name = written(STAGED)
    assert main(["profile", name, "--steps", "4", "device=cpu"]) == 2
    assert "reads what earlier stages make" in capsys.readouterr().err
    assert main(["profile", name, "--steps", "4", "--stage", "label", "device=cpu"]) == 0
    assert main(["train", name, "device=cpu"]) == 0
    assert main(["profile", name, "--steps", "4", "device=cpu"]) == 0
    assert read_json("runs/own/profile/profile.json")["stage"] == "learn"


def test_a_folder_that_cannot_be_written_to_is_told(capsys):
    Path("taken").write_text("a file")
    assert main(["profile", "digits/kd", "--out", "taken", "device=cpu"]) == 2
    assert "taken cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("captures", "log_every", "expected"), [(True, 50, 50), (True, 2, 6), (True, 900, 6), (False, 50, 6)]
)
def test_a_recording_for_the_log_is_made_before_anything_is_timed(captures, log_every, expected):
    """Recording takes as long as hundreds of replays: within the timed steps it would be most of their mean."""
    runner = SimpleNamespace(
        stage=SimpleNamespace(log_every=log_every),
        recipe=SimpleNamespace(captures=lambda device_type: captures),
        device=torch.device("cpu"),
    )
    assert _warm_up_steps(runner, 300) == expected
