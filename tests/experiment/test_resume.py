"""A run that is killed at any moment and repeated ends with the bits of an uninterrupted run."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.kills import KilledRun, kill_at_step, kill_at_write
from helpers.quick import only_quick
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


def recipe_text(steps: int = 2, out: str = "run") -> str:
    Path("teacher.yaml").write_text(SYNTHETIC_DATA + TEACHER)
    return RECIPE.replace("STEPS", str(steps)).replace("OUT", out)


def train_with_kills(text: str, seed: int) -> int:
    """Repeats a run that is killed at a random write, a little later each time; returns the number of kills."""
    draws = random.Random(seed)
    for kills in range(200):
        with kill_at_write(draws.randint(5, 50) + 2 * kills), suppress(KilledRun):
            train_recipe_text(text)
            return kills
    raise AssertionError("the run never ended")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_killed_at_any_write_ends_with_the_same_bits(steps):
    train_recipe_text(recipe_text(steps, "expected"), "runs=expected-runs")
    expected = comparable_results("expected")
    assert any(key.startswith("metrics:") for key in expected) and any("optimizers" in key for key in expected)
    kills = train_with_kills(recipe_text(steps) + "runs: runs\n", steps)
    assert kills >= 4
    assert differing_keys(expected, comparable_results("run")) == []
    teachers = [next(Path(runs, "teacher").iterdir()) for runs in ("expected-runs", "runs")]
    assert differing_keys(comparable_results(teachers[0]), comparable_results(teachers[1])) == []


def test_a_run_of_several_stages_resumes_in_its_stage():
    train_recipe_text(STAGES.replace("OUT", "expected"))
    assert train_with_kills(STAGES.replace("OUT", "run"), 4) >= 2
    assert differing_keys(comparable_results("expected"), comparable_results("run")) == []


def test_the_second_stage_starts_from_the_weights_of_the_first(monkeypatch):
    initial_states: list[dict] = []
    steps: list[str] = []
    original_init, original_step = Runner.__init__, Runner.step

    def recording_init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        initial_states.append({n: v.clone() for n, v in self.network.role("student").model.state_dict().items()})

    monkeypatch.setattr(Runner, "__init__", recording_init)
    with kill_at_step("distil", 5):
        train_recipe_text(STAGES.replace("OUT", "run"))
    stage_weights = torch.load("run/checkpoints/stage_hint.pt", weights_only=True)["models"]["student"]
    first_stage, second_stage = initial_states
    assert all(torch.equal(stage_weights[name], second_stage[name]) for name in stage_weights)
    assert any(not torch.equal(first_stage[name], second_stage[name]) for name in stage_weights)
    tree = torch.load("run/checkpoints/last.pt", weights_only=True)
    assert (tree["stage"], tree["step"], tree["finished_stages"]) == ("distil", 4, {"hint": 8})

    def recording_step(self, window):
        steps.append(f"{self.stage.name} {self.progress.steps_done}")
        original_step(self, window)

    monkeypatch.setattr(Runner, "step", recording_step)
    train_recipe_text(STAGES.replace("OUT", "run"))
    assert steps == [f"distil {n}" for n in range(4, 8)], "the first stage is not trained again"


@pytest.mark.parametrize(
    "entry", only_quick(["", "step", "optimizers", "average", "models", "terms", "meters"], "", "optimizers")
)
def test_losing_an_entry_of_the_state_changes_the_results(monkeypatch, entry):
    """Negative control: the comparison detects each lost entry, and reports nothing for a complete state."""
    settings = ("log_every=3", "checkpoint_every.steps=2")  # the checkpoint of step 4 is inside a log interval
    train_recipe_text(recipe_text(out="expected"), *settings)
    with kill_at_step("main", 5):
        train_recipe_text(recipe_text(), *settings)
    original = Runner.load_training_state

    def load_incomplete_state(self, state, source):
        fresh = replace(self.training_state(), step=3)
        original(self, replace(state, **({entry: getattr(fresh, entry)} if entry else {})), source)

    monkeypatch.setattr(Runner, "load_training_state", load_incomplete_state)
    train_recipe_text(recipe_text(), *settings)
    assert bool(differing_keys(comparable_results("expected"), comparable_results("run"))) is bool(entry)


def test_random_numbers_of_the_model_do_not_depend_on_earlier_ones(monkeypatch):
    """Dropout has the same masks after a resume, although the generators start again."""
    train_recipe_text(recipe_text(out="expected"))
    with kill_at_step("main", 6):
        train_recipe_text(recipe_text())
    torch.manual_seed(12345)
    torch.rand(77)
    train_recipe_text(recipe_text())
    assert differing_keys(comparable_results("expected"), comparable_results("run")) == []
    monkeypatch.setattr(
        "kdbench.engine.train.runner.derive", lambda *key: 1
    )  # negative control: other random numbers, other bits
    train_recipe_text(recipe_text(out="other"))
    assert differing_keys(comparable_results("expected"), comparable_results("other"))


def train_with_sigkills(arguments: list[str], max_kills: int, longest: float, seed: int) -> int:
    """Repeats a command that gets SIGKILL after a random time until it ends; returns the number of kills.

    Args:
        max_kills: after this number of kills the command may end.
        longest: seconds until a kill, at most.
    """
    draws = random.Random(seed)
    for kills in range(max_kills + 1):
        process = subprocess.Popen(
            train_command(*arguments),
            env=subprocess_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=draws.uniform(0.3, 1.0) * longest if kills < max_kills else 600)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            continue
        assert process.returncode == 0, errors
        return kills
    raise AssertionError("unreachable")


def train_uninterrupted(arguments: list[str]) -> float:
    """Runs a command to its end; returns its seconds."""
    start = time.monotonic()
    assert train_with_sigkills(arguments, 0, 0, 0) == 0
    return time.monotonic() - start


def test_sigkill_at_random_moments_of_a_small_run():
    Path("teacher.yaml").write_text(SYNTHETIC_DATA + TEACHER.replace("epochs: 2", "epochs: 8"))
    text = RECIPE.replace("STEPS", "2").replace("OUT", "x").replace("epochs: 3", "epochs: 16")
    Path("own.yaml").write_text(SYNTHETIC_DATA + text)
    seconds = train_uninterrupted(["own.yaml", "out=expected", "runs=one"])
    kills = train_with_sigkills(["own.yaml", "out=run", "runs=two"], 3, seconds, seed=1)
    assert kills >= 1
    assert differing_keys(comparable_results("expected"), comparable_results("run")) == []


@pytest.mark.slow
def test_sigkill_twenty_times_in_digits_kd():
    """The kills also hit the training of the teacher."""
    settings = ["digits/kd", "checkpoint_every.steps=2"]
    seconds = train_uninterrupted([*settings, "out=expected", "runs=expected-runs"])
    kills = attempts = 0
    while kills < 20:
        arguments = [*settings, f"out=run{attempts}", f"runs=runs{attempts}"]
        kills += train_with_sigkills(arguments, 20 - kills, 0.6 * seconds, seed=attempts)
        assert differing_keys(comparable_results("expected"), comparable_results(f"run{attempts}")) == []
        teachers = [next(Path(runs, "digits", "teacher").iterdir()) for runs in ("expected-runs", f"runs{attempts}")]
        assert differing_keys(comparable_results(teachers[0]), comparable_results(teachers[1])) == []
        attempts += 1
    assert kills == 20
