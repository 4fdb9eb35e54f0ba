"""A joint step as one recording, with a tape of kernels in place of a CUDA graph."""

from __future__ import annotations

from helpers.kernel_tape import TapeRecorder
from helpers.recipes import build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.config.schema import Recipe
from kdbench.speed.concurrent.joint_step import JointStep, joint_strategy
from kdbench.speed.cuda_graph import CudaGraphStep

RECIPE = """
teacher: {model: {type: t_conv, norm: batch}}
student: {model: {type: t_conv, norm: batch}}
terms: {ce: cross_entropy, kd: {type: kd, temperature: 2}}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9, fused: true}
precision: float64
batch_size: 24
epochs: 4
"""


def test_recorded_joint_step_equals_single_runs_bit_for_bit(monkeypatch):
    monkeypatch.setattr(Recipe, "uses_cuda_graph", lambda self, device: True)  # keeps learning rates on the device
    monkeypatch.setattr("kdbench.speed.concurrent.joint_step.CudaRecorder", lambda device: TapeRecorder())
    stacked, single = ([build_stage(RECIPE, f"seed={seed}") for seed in (1, 2)] for _ in range(2))
    notices: list[str] = []
    strategy = joint_strategy(JointStep([stage.runner for stage in stacked]), notices.append)
    assert isinstance(strategy, CudaGraphStep)
    feeds = [stage.windows() for stage in stacked]
    for _ in range(12):
        window = [next(feed)[0] for feed in feeds]
        for stage in stacked:
            stage.runner.begin_step()
        strategy.run(window)
        for stage in stacked:
            stage.runner.meters.steps += 1
            stage.runner.progress.steps_done += 1
    assert len(strategy.recordings.recordings) >= 2, notices  # the full batch, and the smaller last one
    for stage, reference in zip(stacked, single, strict=True):
        reference.step(12)
        assert equal_weights(stage.weights(), reference.weights())
        values, expected = stage.runner.read_log()[1], reference.runner.read_log()[1]
        # Losses and gradient norms belong to the run itself, not to the stack.
        assert values["terms"] == expected["terms"] and values["grad_norm"] == expected["grad_norm"]
    assert not equal_weights(stacked[0].weights(), stacked[1].weights())
