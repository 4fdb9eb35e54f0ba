"""Schedules in a step: weights, parameters and learning rates equal the formula, also after a resume."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch.testing import assert_close

from helpers.plugin_parts import Scaled
from helpers.recipes import StageHarness, build_stage, plugin_registration  # noqa: F401

TEXT = """
student: t_linear
teacher: t_linear
terms:
  ce: {type: cross_entropy, weight: {type: linear, start: 1, end: 0, by: step}}
  kd: {type: kd, temperature: {type: linear, start: 1, end: 5, over: 3}, weight: {type: warmup, over: 2}}
  own: {type: t_scaled, scale: {type: cosine, start: 2, end: 1, by: step}, weight: 1.0e-3}
optimizer: {type: SGD, lr: 0.4, groups: [{type: bias, lr: 0.1}]}
scheduler: {type: cosine, by: step}
epochs: 4
batch_size: 16
"""
TOTAL_STEPS, STEPS_PER_EPOCH = 16, 4


def expected_values(step: int) -> dict[str, float]:
    """Returns all scheduled values at a step, counted from 0."""
    epoch = step // STEPS_PER_EPOCH
    return {
        "ce": 1 - step / TOTAL_STEPS,
        "temperature": 1 + 4 * min(epoch / 3, 1),
        "kd": min((epoch + 1) / 2, 1.0),
        "scale": 1 + (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2,
        "factor": (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2,
    }


def scheduled_values(stage: StageHarness) -> dict[str, float]:
    """Reads all scheduled values from terms and optimizer."""
    terms = {name: stage.network.term(name) for name in ("ce", "kd", "own")}
    groups = stage.runner.updates[0].optimizer.param_groups
    assert_close(groups[1]["lr"], groups[0]["lr"] / 4, rtol=1e-12, atol=0)
    return {
        "ce": float(terms["ce"].weight),
        "temperature": float(terms["kd"].edges[0].term.temperature),
        "kd": float(terms["kd"].weight),
        "scale": float(terms["own"].edges[0].term.scale),
        "factor": groups[0]["lr"] / 0.4,
    }


def test_every_step_uses_the_values_of_the_formula():
    stage = build_stage(TEXT)
    windows = stage.windows()
    for step in range(TOTAL_STEPS):
        stage.runner.begin_step()
        for key, value in expected_values(step).items():
            assert_close(scheduled_values(stage)[key], value, rtol=1e-6, atol=1e-7, msg=f"{key} at step {step}")
        stage.runner.step(next(windows))


def test_resumed_stage_has_the_values_of_its_step():
    first = build_stage(TEXT).step(10)
    second = build_stage(TEXT)
    second.runner.load_training_state(first.runner.training_state())
    second.runner.begin_step()
    for key, value in expected_values(10).items():
        assert_close(scheduled_values(second)[key], value, rtol=1e-6, atol=1e-7, msg=key)
    assert expected_values(10) != expected_values(0)


def test_losses_of_a_step_are_computed_with_the_scheduled_values():
    stage = build_stage(TEXT)
    assert isinstance(stage.network.term("own").edges[0].term, Scaled)
    windows = stage.windows()
    for step in range(6):
        window = next(windows)
        stage.runner.begin_step()
        image, label = window[0]["train"].fields["image"], window[0]["train"].fields["label"]
        student, teacher = stage.model()(image), stage.model("teacher")(image)
        values = expected_values(step)
        t = values["temperature"]
        log_p, log_q = (student / t).log_softmax(1), (teacher / t).log_softmax(1)
        kd = t * t * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        total = (
            values["ce"] * F.cross_entropy(student, label)
            + values["kd"] * kd
            + 1e-3 * values["scale"] * student.square().sum(1).mean()
        ).detach()
        stage.runner.step(window)
        _, logged = stage.runner.read_log()
        assert_close(logged["total"], total.item(), rtol=1e-5, atol=1e-6)
        assert_close(logged["terms"]["kd"]["weight"], values["kd"], rtol=1e-6, atol=0)
        assert_close(logged["lr"], 0.4 * values["factor"], rtol=1e-12, atol=0)


def test_rate_scheduled_by_epoch_is_constant_within_an_epoch():
    stage = build_stage(
        TEXT.replace("{type: cosine, by: step}\nepochs", "{type: step, milestones: [1, 3], gamma: 0.1}\nepochs")
    )
    rates = []
    windows = stage.windows()
    for _ in range(TOTAL_STEPS):
        stage.runner.begin_step()
        rates.append(stage.runner.updates[0].optimizer.param_groups[0]["lr"])
        stage.runner.step(next(windows))
    assert_close(rates, [0.4] * 4 + [0.04] * 8 + [0.004] * 4, rtol=1e-12, atol=0)


def test_schedule_multiplies_the_initial_rate_of_each_optimizer():
    stage = build_stage(
        """
        models: {a: t_linear, b: t_linear}
        terms: {ca: {type: cross_entropy, student: a}, cb: {type: cross_entropy, student: b}}
        updates:
          - {models: [a], terms: [ca]}
          - {models: [b], terms: [cb], optimizer: {type: Adam, lr: 0.01}}
        optimizer: {type: SGD, lr: 0.4}
        scheduler: {type: linear}
        export: a
        epochs: 4
        batch_size: 16
        """
    ).step(9)
    rates = [update.optimizer.param_groups[0]["lr"] for update in stage.runner.updates]
    assert_close(rates, [0.4 / 2, 0.01 / 2], rtol=1e-12, atol=0)
