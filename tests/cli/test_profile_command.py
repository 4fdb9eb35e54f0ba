"""`kdbench profile`: its table and files, teachers without weights, compiled steps, and errors for bad input."""

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

from helpers.recipes import plugin_registration, recipe_from_text, train_recipe_text  # noqa: F401
from kdbench.cli.main import main
from kdbench.engine.train import steps as steps_module
from kdbench.experiment.profile import NO_KERNELS_NOTICE, _warm_up_steps
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
def _short_peak_measurement(monkeypatch):
    monkeypatch.setattr(peaks, "PROBE_SECONDS", 0.0)


def write_recipe(text: str, name: str = "own") -> str:
    """Writes a recipe to the current folder; returns its path."""
    recipe_from_text(text, name=name)
    return f"{name}.yaml"


def test_profile_prints_a_table_and_writes_three_files(capsys):
    write_recipe(TEACHER, "teacher")
    assert main(["profile", write_recipe(STUDENT), "--steps", "4", "terms.kd.temperature=2", "device=cpu"]) == 0
    output = capsys.readouterr().out
    sections = ("forward teacher", "forward student", "term ce", "term kd", "backward", "through student", "optimizer")
    assert all(section in output for section in sections)
    assert "peak memory" in output and "measured: a product" in output
    folder = Path("runs/own/profile")
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.png", "trace.json"]
    result = read_json(folder / "profile.json")
    assert result["overrides"] == ["terms.kd.temperature=2", "device=cpu"] and result["torch"] == torch.__version__
    assert sum(section["fraction"] for section in result["sections"]) == pytest.approx(1, abs=1e-3)
    assert sum(section["flops"] for section in result["sections"]) == result["flops"] > 0
    assert sum(section["operations"] for section in result["sections"]) == result["operations"]
    backward = next(section for section in result["sections"] if section["section"] == "backward")
    assert sum(backward["through"].values()) == pytest.approx(backward["ms"], rel=1e-3)
    assert result["mfu"] == pytest.approx(result["flops_per_second"] / result["peak"]["flops_per_second"])
    assert any(
        event.get("cat") == "section" for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
    )
    assert (folder / "profile.png").read_bytes()[:4] == b"\x89PNG"


def test_untrained_teacher_is_not_trained_and_reported(capsys):
    write_recipe(TEACHER, "teacher")
    assert main(["profile", write_recipe(STUDENT), "--steps", "4", "--out", "there", "device=cpu"]) == 0
    assert "teacher is not trained yet; measured with initial weights" in capsys.readouterr().out
    assert not Path("runs").exists() and Path("there/profile.json").exists()


def test_weights_of_a_trained_teacher_are_loaded():
    teacher = train_recipe_text(TEACHER, "device=cpu")  # own.yaml, a different recipe from teacher.yaml
    write_recipe(TEACHER, "teacher")
    with open_stage(recipe_from_text(STUDENT, "device=cpu", name="student")) as stage:
        assert len(stage.missing_weights) == 1
        initial = stage.runner.network.role("teacher").model.state_dict()
    assert main(["train", "teacher.yaml", "device=cpu"]) == 0
    with open_stage(recipe_from_text(STUDENT, "device=cpu", name="student")) as stage:
        assert stage.missing_weights == ()
        trained = stage.runner.network.role("teacher").model.state_dict()
    assert any(not torch.equal(initial[name], value) for name, value in trained.items())
    assert not teacher.already_finished


def test_standard_error_is_empty():
    """Torch's profiler writes there from C++, hence a process of its own."""
    text = STUDENT.replace(", weights: {recipe: ./teacher.yaml}", "").replace("t_conv", "digits_mlp")
    write_recipe(text, "quiet")
    command = [sys.executable, "-m", "kdbench", "profile", "quiet.yaml", "--steps", "4", "device=cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0 and process.stderr == ""


def test_profiler_without_gpu_kernels_is_reported(monkeypatch, capsys):
    profile_steps = engine.profile_steps

    def profile_without_kernels(*args, **options):
        trace, profiler = profile_steps(*args, **options)
        return replace(trace, kernels=0.0, copies=0.0), profiler

    monkeypatch.setattr(engine, "profile_steps", profile_without_kernels)
    text = write_recipe(STUDENT.replace(", weights: {recipe: ./teacher.yaml}", ""))
    assert main(["profile", text, "--steps", "4", "device=cpu"]) == 0
    assert NO_KERNELS_NOTICE in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(engine, "profile_steps", profile_steps)
    assert main(["profile", text, "--steps", "4", "device=cpu"]) == 0
    assert NO_KERNELS_NOTICE not in " ".join(capsys.readouterr().out.split())


def test_compiled_step_is_timed_compiled_and_its_sections_eagerly(monkeypatch, capsys):
    torch._dynamo.reset()
    networks = []

    def compile_without_codegen(network, **options):
        networks.append(network)
        return torch.compile(network, backend="aot_eager", **options)

    monkeypatch.setattr(steps_module, "compile_network", compile_without_codegen)
    text = STUDENT.replace(", weights: {recipe: ./teacher.yaml}", "")
    assert main(["profile", write_recipe(text), "--steps", "4", "compile=true", "device=cpu"]) == 0
    assert len(networks) == 1 and "have no sections" in capsys.readouterr().out
    result = read_json("runs/own/profile/profile.json")
    sections = {section["section"] for section in result["sections"]}
    assert result["compile"] is True and {"forward student", "term kd"} <= sections


def test_prefetched_or_cached_teacher_is_timed_outside_the_step_and_has_a_section():
    text = STUDENT.replace(", weights: {recipe: ./teacher.yaml}", "")
    for mode in ("prefetch", "cache"):
        assert main(["profile", write_recipe(text), "--steps", "4", f"frozen_forward={mode}", "device=cpu"]) == 0
        result = read_json("runs/own/profile/profile.json")
        assert result["frozen_forward"] == {"teacher": mode}
        assert "forward teacher" in {section["section"] for section in result["sections"]}
        executed = result["flops_per_second"] * result["step"]["mean_ms"] / 1000
        assert executed == pytest.approx(result["flops"], rel=1e-3) or mode == "cache"
        assert executed < 0.95 * result["flops"] or mode == "prefetch", "outputs from a cache are not computed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits/kdd"], "digits/kd"),
        (["digits/kd", "--steps", "2"], "--steps must be at least 4"),
        (["digits/kd", "--steps", "many"], "--steps"),
        (["digits/kd", "--stage", "mian"], "Did you mean 'main'"),
        (["digits/kd", "terms.kd.temprature=2"], "temperature"),
        (["digits/kd", "device=cuda:99"], "device"),
        ([], "no recipe"),
    ],
)
def test_bad_input_is_reported_without_traceback(words, expected, capsys):
    assert main(["profile", *words]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "Traceback" not in captured.err and not captured.out


def test_stage_is_rejected_until_the_artifacts_that_it_reads_exist(capsys):
    name = write_recipe(STAGED)
    assert main(["profile", name, "--steps", "4", "device=cpu"]) == 2
    assert "reads artifacts of earlier stages" in capsys.readouterr().err
    assert main(["profile", name, "--steps", "4", "--stage", "label", "device=cpu"]) == 0
    assert main(["train", name, "device=cpu"]) == 0
    assert main(["profile", name, "--steps", "4", "device=cpu"]) == 0
    assert read_json("runs/own/profile/profile.json")["stage"] == "learn"


def test_unwritable_folder_is_reported(capsys):
    Path("taken").write_text("a file")
    assert main(["profile", "digits/kd", "--out", "taken", "device=cpu"]) == 2
    assert "taken cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uses_graph", "log_every", "expected"), [(True, 50, 50), (True, 2, 6), (True, 900, 6), (False, 50, 6)]
)
def test_cuda_graph_of_a_logging_step_is_captured_before_the_timed_steps(uses_graph, log_every, expected):
    """Capturing takes as long as hundreds of replays: among the timed steps it would be most of their mean."""
    runner = SimpleNamespace(
        stage=SimpleNamespace(log_every=log_every),
        recipe=SimpleNamespace(uses_cuda_graph=lambda device_type: uses_graph),
        device=torch.device("cpu"),
    )
    assert _warm_up_steps(runner, 300) == expected
