"""A run that is killed anywhere ends with the same bits as an undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from helpers.kills import KilledRun, kill_at_step, kill_at_write
from helpers.recipes import (  # noqa: F401
    SYNTHETIC_DATA,
    comparable_results,
    differing_keys,
    plugin_registration,
    recipe_from_text,
    subprocess_environment,
    train_command,
    train_recipe_text,
)
from kdbench.engine.train.runner import Runner

TEACHER = """
student: {model: {type: t_layers, hidden: 16, norm: batch, dropout: 0.1}}
terms: {ce: cross_entropy}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
epochs: 2
batch_size: 16
checkpoint_every: {steps: 3}
tensorboard: false
"""
RECIPE = """
student: {model: {type: t_layers, norm: batch, dropout: 0.3}}
teacher: {model: {type: t_layers, hidden: 16, norm: batch, dropout: 0.1}, weights: {recipe: ./teacher.yaml}}
models: {shadow: {ema: student, decay: 0.9}, old: {snapshot: student, every: 1}}
terms:
  ce: {type: cross_entropy, weight: {type: linear, start: 1, end: 0.5, by: step}}
  kd: {type: kd, temperature: {type: linear, start: 4, end: 1}}
  self: {type: kd, teacher: shadow, weight: 0.1}
  past: {type: hint, student: {path: layer1, adapter: linear}, teacher: old:layer2, weight: 0.1}
optimizer: {type: AdamW, lr: 0.01, groups: [{type: norm, weight_decay: 0}]}
scheduler: {type: cosine, by: step}
label_fraction: 16
validation: 0.25
ema: 0.9
clip: 1.0
epochs: 3
batch_size: 16
log_every: 2
checkpoint_every: {steps: STEPS}
tensorboard: false
out: OUT
"""
STAGES = """
student: {model: {type: t_layers, norm: batch, dropout: 0.3}}
teacher: {model: {type: t_layers, hidden: 16}}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
batch_size: 16
log_every: 2
checkpoint_every: {steps: 3}
tensorboard: false
stages:
  hint: {epochs: 2, terms: {hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: layer2}}}
  distil: {epochs: 2, student: {weights: {stage: hint}}, terms: {ce: cross_entropy, kd: kd}}
out: OUT
"""


def text_of(steps: int = 2, out: str = "run") -> str:
    Path("teacher.yaml").write_text(SYNTHETIC_DATA + TEACHER)
    return RECIPE.replace("STEPS", str(steps)).replace("OUT", out)


def until_it_ends(text: str, seed: int) -> int:
    """Repeats a command that is killed again and again, on average a little later each time; returns how often."""
    draws = random.Random(seed)
    for kills in range(200):
        with kill_at_write(draws.randint(5, 50) + 2 * kills), suppress(KilledRun):
            train_recipe_text(text)
            return kills
    raise AssertionError("it never ended")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_is_killed_at_any_write_ends_with_the_same_bits(steps):
    train_recipe_text(text_of(steps, "whole"), "runs=whole-runs")
    whole = comparable_results("whole")
    assert any(key.startswith("metrics:") for key in whole) and any("optimizers" in key for key in whole)
    kills = until_it_ends(text_of(steps) + "runs: runs\n", steps)
    assert kills >= 4
    assert differing_keys(whole, comparable_results("run")) == []
    teachers = [next(Path(runs, "teacher").iterdir()) for runs in ("whole-runs", "runs")]
    assert differing_keys(comparable_results(teachers[0]), comparable_results(teachers[1])) == []


def test_a_run_of_several_stages_goes_on_in_its_stage():
    train_recipe_text(STAGES.replace("OUT", "whole"))
    assert until_it_ends(STAGES.replace("OUT", "run"), 4) >= 2
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


def test_the_second_stage_starts_from_what_the_first_one_left(monkeypatch):
    started: list[dict] = []
    seen: list[str] = []
    begin, step = Runner.__init__, Runner.step

    def beginning(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        started.append({n: v.clone() for n, v in self.network.role("student").model.state_dict().items()})

    monkeypatch.setattr(Runner, "__init__", beginning)
    with kill_at_step("distil", 5):
        train_recipe_text(STAGES.replace("OUT", "run"))
    artefact = torch.load("run/checkpoints/stage_hint.pt", weights_only=True)["models"]["student"]
    assert len(started) == 2 and all(torch.equal(artefact[name], started[1][name]) for name in artefact)
    assert any(not torch.equal(started[0][name], started[1][name]) for name in artefact)
    tree = torch.load("run/checkpoints/last.pt", weights_only=True)
    assert (tree["stage"], tree["step"], tree["finished"]) == ("distil", 4, {"hint": 8})

    monkeypatch.setattr(Runner, "step", lambda self, w: (seen.append(f"{self.stage.name} {self.done}"), step(self, w)))
    train_recipe_text(STAGES.replace("OUT", "run"))
    assert seen == [f"distil {n}" for n in range(4, 8)], "the first stage is not trained again"


@pytest.mark.parametrize("forgotten", ["", "step", "optimizers", "average", "models", "terms", "meters"])
def test_leaving_out_part_of_the_state_is_noticed(monkeypatch, forgotten):
    """Negative control: the comparison sees each part of what a checkpoint holds, and nothing when all is there."""
    settings = ("log_every=3", "checkpoint_every.steps=2")  # the checkpoint of step 4 stands within a log interval
    train_recipe_text(text_of(out="whole"), *settings)
    with kill_at_step("main", 5):
        train_recipe_text(text_of(), *settings)
    original = Runner.load_state_dict

    def forgetting(self, state):
        fresh = {**self.state_dict(), "step": 3}
        original(self, {**state, **({forgotten: fresh[forgotten]} if forgotten else {})})

    monkeypatch.setattr(Runner, "load_state_dict", forgetting)
    train_recipe_text(text_of(), *settings)
    assert bool(differing_keys(comparable_results("whole"), comparable_results("run"))) is bool(forgotten)


def test_the_draws_of_the_model_do_not_depend_on_what_was_drawn_before(monkeypatch):
    """Dropout goes on with the same masks although the generators start anew."""
    train_recipe_text(text_of(out="whole"))
    with kill_at_step("main", 6):
        train_recipe_text(text_of())
    torch.manual_seed(12345)
    torch.rand(77)
    train_recipe_text(text_of())
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []
    monkeypatch.setattr(
        "kdbench.engine.train.runner.derive", lambda *key: 1
    )  # negative control: other draws, other bits
    train_recipe_text(text_of(out="other"))
    assert differing_keys(comparable_results("whole"), comparable_results("other"))


def killed_by_signal(words: list[str], most: int, longest: float, seed: int) -> int:
    """Starts a command and kills it with SIGKILL after a random time, until it ends by itself; returns the kills.

    After `most` kills it is left alone.
    """
    draws = random.Random(seed)
    for kills in range(most + 1):
        process = subprocess.Popen(
            train_command(*words), env=subprocess_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _, said = process.communicate(timeout=draws.uniform(0.3, 1.0) * longest if kills < most else 600)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            continue
        assert process.returncode == 0, said
        return kills
    raise AssertionError("unreachable")


def run_whole(words: list[str]) -> float:
    """Runs a command undisturbed and returns its seconds."""
    began = time.monotonic()
    assert killed_by_signal(words, 0, 0, 0) == 0
    return time.monotonic() - began


def test_sigkill_at_random_moments_of_a_small_run():
    Path("teacher.yaml").write_text(SYNTHETIC_DATA + TEACHER.replace("epochs: 2", "epochs: 8"))
    text = RECIPE.replace("STEPS", "2").replace("OUT", "x").replace("epochs: 3", "epochs: 16")
    Path("own.yaml").write_text(SYNTHETIC_DATA + text)
    seconds = run_whole(["own.yaml", "out=whole", "runs=one"])
    kills = killed_by_signal(["own.yaml", "out=run", "runs=two"], 3, seconds, seed=1)
    assert kills >= 1
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


@pytest.mark.slow
def test_sigkill_twenty_times_in_digits_kd():
    """As often as the issue asks; the teacher's training is among what is killed."""
    settings = ["digits/kd", "checkpoint_every.steps=2"]
    seconds = run_whole([*settings, "out=whole", "runs=whole-runs"])
    kills = attempts = 0
    while kills < 20:
        words = [*settings, f"out=run{attempts}", f"runs=runs{attempts}"]
        kills += killed_by_signal(words, 20 - kills, 0.6 * seconds, seed=attempts)
        assert differing_keys(comparable_results("whole"), comparable_results(f"run{attempts}")) == []
        teachers = [next(Path(runs, "digits", "teacher").iterdir()) for runs in ("whole-runs", f"runs{attempts}")]
        assert differing_keys(comparable_results(teachers[0]), comparable_results(teachers[1])) == []
        attempts += 1
    assert kills == 20
