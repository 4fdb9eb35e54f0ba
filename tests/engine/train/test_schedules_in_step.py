"""Schedules reach the step: weights, parameters and rates are the formula's at every step, also after a resume."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from helpers.plugin_parts import Scaled
from helpers.recipes import build_stage, plugin_registration, recipe_from_text, stage_plan  # noqa: F401

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
TOTAL, PER_EPOCH = 16, 4


def expected(step: int) -> dict[str, float]:
    """Everything that moves, at one step (from 0)."""
    epoch = step // PER_EPOCH
    return {
        "ce": 1 - step / TOTAL,
        "temperature": 1 + 4 * min(epoch / 3, 1),
        "kd": min((epoch + 1) / 2, 1.0),
        "scale": 1 + (1 + math.cos(math.pi * step / TOTAL)) / 2,
        "factor": (1 + math.cos(math.pi * step / TOTAL)) / 2,
    }


def found(run) -> dict[str, float]:
    terms = {name: run.network.term(name) for name in ("ce", "kd", "own")}
    groups = run.runner.updates[0].optimizer.param_groups
    assert_close(groups[1]["lr"], groups[0]["lr"] / 4, rtol=1e-12, atol=0)
    return {
        "ce": float(terms["ce"].weight),
        "temperature": float(terms["kd"].edges[0].term.temperature),
        "kd": float(terms["kd"].weight),
        "scale": float(terms["own"].edges[0].term.scale),
        "factor": groups[0]["lr"] / 0.4,
    }


def test_every_step_has_the_values_of_the_formula():
    run = build_stage(TEXT)
    windows = run.windows()
    for step in range(TOTAL):
        run.runner.begin_step()
        for key, value in expected(step).items():
            assert_close(found(run)[key], value, rtol=1e-6, atol=1e-7, msg=f"{key} at step {step}")
        run.runner.step(next(windows))


def test_a_resumed_run_has_the_values_of_its_place():
    first = build_stage(TEXT).step(10)
    second = build_stage(TEXT)
    second.runner.load_training_state(first.runner.training_state())
    second.runner.begin_step()
    for key, value in expected(10).items():
        assert_close(found(second)[key], value, rtol=1e-6, atol=1e-7, msg=key)
    assert expected(10) != expected(0)


def test_the_scheduled_values_are_the_ones_that_the_step_uses():
    """The loss of a step is the formula's, and a term reads the tensor that moves."""
    run = build_stage(TEXT)
    assert isinstance(run.network.term("own").edges[0].term, Scaled)
    windows = run.windows()
    for step in range(6):
        window = next(windows)
        run.runner.begin_step()
        image, label = window[0]["train"].fields["image"], window[0]["train"].fields["label"]
        ours, theirs = run.model()(image), run.model("teacher")(image)
        values = expected(step)
        t = values["temperature"]
        kd = (
            t
            * t
            * torch.nn.functional.kl_div(
                (ours / t).log_softmax(1), (theirs / t).log_softmax(1), reduction="batchmean", log_target=True
            )
        )
        total = (
            values["ce"] * torch.nn.functional.cross_entropy(ours, label)
            + values["kd"] * kd
            + 1e-3 * values["scale"] * ours.square().sum(1).mean()
        ).detach()
        run.runner.step(window)
        _, logged = run.runner.read_log()
        assert_close(logged["total"], total.item(), rtol=1e-5, atol=1e-6)
        assert_close(logged["terms"]["kd"]["weight"], values["kd"], rtol=1e-6, atol=0)
        assert_close(logged["lr"], 0.4 * values["factor"], rtol=1e-12, atol=0)


def test_a_rate_by_epoch_holds_for_the_whole_epoch():
    run = build_stage(
        TEXT.replace("{type: cosine, by: step}\nepochs", "{type: step, milestones: [1, 3], gamma: 0.1}\nepochs")
    )
    rates = []
    windows = run.windows()
    for _ in range(TOTAL):
        run.runner.begin_step()
        rates.append(run.runner.updates[0].optimizer.param_groups[0]["lr"])
        run.runner.step(next(windows))
    assert_close(rates, [0.4] * 4 + [0.04] * 8 + [0.004] * 4, rtol=1e-12, atol=0)


def test_an_update_of_its_own_optimiser_follows_the_schedule_from_its_own_rate():
    run = build_stage(
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
    assert_close(
        [u.optimizer.param_groups[0]["lr"] for u in run.runner.updates], [0.4 / 2, 0.01 / 2], rtol=1e-12, atol=0
    )
