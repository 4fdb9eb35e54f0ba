"""Wiring: a stage resolves once which roles run, with and without gradient; its steps read no configuration."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kdbench
from helpers.recipes import StageHarness, build_stage, plugin_registration, with_synthetic_data  # noqa: F401
from kdbench.config.load import load_recipe
from kdbench.config.schema import OperandConfig, RoleConfig, TermConfig
from kdbench.engine.network.features import Feature

CONFIG_FOLDER = str(Path(kdbench.__file__).parent / "config")
SCHEDULES = str(Path(CONFIG_FOLDER) / "schedules.py")
"""Schedules are functions of the step, so every step calls them."""

RECIPES = (
    "digits/kd",
    "digits/fitnets",  # features with an adapter
    "digits/ca_mkd",  # several teachers with routers
    "digits/dfad",  # adversarial updates
    "digits/tgeo_kd",  # an inner step
    "digits/acid",  # a selection of rows
    "digits/mean_teacher",
)


def build_small(name: str) -> StageHarness:
    return build_stage(with_synthetic_data(load_recipe(name, ["log_every=1000"]), samples=320, batch_size=8))


def take_step(stage: StageHarness) -> None:
    window = next(itertools.islice(stage.windows(), 1))
    stage.runner.begin_step()
    stage.runner.step(window)


def config_calls(stage: StageHarness) -> Counter[str]:
    """Takes a step and counts its calls of functions in `kdbench.config`, schedules excepted."""
    window = next(itertools.islice(stage.windows(), 1))
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(CONFIG_FOLDER) and file != SCHEDULES:
            calls[f"{Path(file).stem}.{frame.f_code.co_name}"] += 1

    sys.setprofile(count)
    try:
        stage.runner.begin_step()
        stage.runner.step(window)
    finally:
        sys.setprofile(None)
    return calls


def resolve_again(stage: StageHarness) -> None:
    """Resolves the wirings of all updates again."""
    stage.network._wirings.clear()
    for update in stage.runner.updates:
        update.wiring = stage.network.wiring(update.config.terms, update.config.models)


@pytest.mark.parametrize("name", RECIPES)
def test_second_step_calls_nothing_in_the_configuration(name):
    stage = build_small(name)
    take_step(stage)
    assert config_calls(stage) == {}


def test_step_that_resolves_its_wiring_calls_the_configuration():
    """Negative control of the test above."""
    stage = build_small("digits/acid")
    take_step(stage)
    stage.network._observer_wirings.clear()
    calls = config_calls(stage)
    assert calls["parts.feature_operands"] and calls["roles.upstream_roles"]


@pytest.mark.parametrize("name", RECIPES)
def test_steps_after_the_first_run_without_operands_of_terms_and_upstream_roles(name, monkeypatch):
    stage = build_small(name)
    take_step(stage)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the step resolves its wiring again")

    monkeypatch.setattr(TermConfig, "read_operands", fail)
    monkeypatch.setattr(OperandConfig, "feature_operands", fail)
    monkeypatch.setattr(RoleConfig, "upstream_roles", property(fail))
    take_step(stage)
    with pytest.raises(AssertionError, match="resolves its wiring again"):  # negative control
        resolve_again(stage)


GAME = """
models: {generator: {model: t_generator, input: noise.z}}
teacher: {model: t_layers, input: "generator:image"}
student: {model: t_layers, input: "generator:image"}
data: {noise: {type: gaussian, shape: [6], samples: 64}}
terms:
  fool: {type: kd, weight: -1, teacher_grad: true}
  mimic: kd
  small: {type: weight_distance, student: 'student:/weights', teacher: 'teacher:/weights', weight: 0.1}
updates: [{models: [generator], terms: [fool]}, {models: [student], terms: [mimic, small]}]
optimizer: {type: SGD, lr: 0.05}
epochs: 3
batch_size: 16
"""


def test_wiring_is_cached_by_terms_and_trained_roles():
    network = build_stage(GAME).network
    wiring = network.wiring(["fool"], ["generator"])
    assert network.wiring(iter(["fool"]), {"generator"}) is wiring
    assert network.wiring(["mimic"], ["generator"]) is not wiring  # control: other terms
    assert network.wiring(["fool"], ["student"]) is not wiring  # control: other roles
    assert network.wiring(["fool", "mimic"], ["student", "generator"]) is network.wiring(
        ["fool", "mimic"], ["generator", "student"]
    )


def test_updates_hold_the_wiring_of_their_terms():
    stage = build_stage(GAME)
    for update in stage.runner.updates:
        assert update.wiring is stage.network.wiring(update.config.terms, update.config.models)
        assert update.wiring.terms == update.config.terms
    first, second = stage.runner.updates
    assert first.wiring is not second.wiring


def test_wiring_runs_upstream_roles_first_and_downstream_roles_with_gradient():
    network = build_stage(GAME).network
    for_generator = network.wiring(["fool"], ["generator"])
    # Everything downstream of the generator runs with gradient, the frozen teacher included.
    assert {run.name: run.with_gradient for run in for_generator.runs} == dict.fromkeys(
        ("generator", "teacher", "student"), True
    )
    assert next(run.name for run in for_generator.runs) == "generator"
    for_student = network.wiring(["mimic"], ["student"])
    assert {run.name: run.with_gradient for run in for_student.runs} == {
        "generator": False,
        "teacher": False,
        "student": True,
    }
    inputs = {run.name: run.inputs for run in for_student.runs}
    assert inputs["generator"] == (("noise", "z"),)
    assert inputs["student"] == inputs["teacher"] == (("generator", Feature("image")),)


def test_wiring_contains_only_roles_that_its_terms_read():
    text = """
    student: t_layers
    teacher: t_layers
    models: {second: {model: t_layers, frozen: true}}
    terms: {ce: cross_entropy, kd: {type: kd, teacher: [teacher, second]}}
    optimizer: {type: SGD, lr: 0.1}
    epochs: 1
    """
    network = build_stage(text).network
    assert [run.name for run in network.wiring(["ce"], ["student"]).runs] == ["student"]
    assert {run.name for run in network.wiring(["ce", "kd"], ["student"]).runs} == {"student", "teacher", "second"}


def test_states_of_roles_are_read_without_a_run_of_the_role():
    network = build_stage(GAME).network
    wiring = network.wiring(["small"], ["student"])
    assert wiring.runs == ()
    assert {(state.role, state.feature.side): state.with_gradient for state in wiring.states} == {
        ("student", "weights"): True,
        ("teacher", "weights"): False,
    }
