"""A stacked step as one recording, tried with a tape of kernels in the place of a CUDA graph."""

from __future__ import annotations

from helpers.kernel_tape import TapeRecorder
from helpers.recipes import build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.config.schema import Recipe
from kdbench.speed.concurrent.joint_step import JointStep, _Recorded

TEXT = """
teacher: {model: {type: t_conv, norm: batch}}
student: {model: {type: t_conv, norm: batch}}
terms: {ce: cross_entropy, kd: {type: kd, temperature: 2}}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9, fused: true}
precision: float64
batch_size: 24
epochs: 4
"""


def test_a_recorded_stack_gives_the_bits_of_each_run_alone(monkeypatch):
    monkeypatch.setattr(Recipe, "captures", lambda self, device: True)  # learning rates live on the device
    monkeypatch.setattr("kdbench.speed.concurrent.joint_step.CudaRecorder", lambda device: TapeRecorder())
    runs, singles = ([build_stage(TEXT, f"seed={seed}") for seed in (1, 2)] for _ in range(2))
    said: list[str] = []
    joint = JointStep([run.runner for run in runs], said.append)
    recorded = getattr(joint.perform, "__self__", None)
    assert isinstance(recorded, _Recorded)
    windows = [run.windows() for run in runs]
    for _ in range(12):
        batches = [next(own)[0] for own in windows]
        for run in runs:
            run.runner.begin_step()
        joint.perform(batches)
        for run in runs:
            run.runner.meters.steps += 1
            run.runner.steps_done += 1
    assert len(recorded.recorded) >= 2, said  # the whole batch, and the smaller one
    for run, single in zip(runs, singles, strict=True):
        single.step(12)
        assert equal_weights(run.weights(), single.weights())
        own, alone = run.runner.read()[1], single.runner.read()[1]
        assert own["terms"] == alone["terms"] and own["grad_norm"] == alone["grad_norm"]  # its losses, not another's
    assert not equal_weights(runs[0].weights(), runs[1].weights())
