"""GPU tests: a step never waits for the device, and CUDA-graph, compiled and low-precision steps equal eager ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close

from helpers.kills import kill_at_step
from helpers.recipes import (  # noqa: F401
    StageHarness,
    build_stage,
    comparable_results,
    differing_keys,
    plugin_registration,
    recipe_from_text,
    train_recipe_text,
)
from kdbench.engine.device import precision_settings
from kdbench.speed.cuda_graph import CudaGraphGradients, CudaGraphStep, CudaRecorder, graph_strategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)

PLAIN = """
student: {model: {type: t_conv, norm: batch}}
teacher: {model: {type: t_conv, norm: batch}}
terms:
  ce: {type: cross_entropy, weight: {type: linear, start: 1, end: 0.1, by: step}}
  kd: {type: kd, temperature: {type: linear, start: 1, end: 4, by: step}, weight: 0.9}
optimizer: {type: SGD, lr: 0.05, momentum: 0.9, weight_decay: 1e-3}
scheduler: {type: cosine, by: step}
augment: [{type: crop, padding: 1}, flip]
log_every: 3
epochs: 6
batch_size: 24
"""
DROPOUT = PLAIN.replace(
    "student: {model: {type: t_conv, norm: batch}}", "student: {model: {type: t_layers, dropout: 0.3}}"
)
EVERYTHING = """
student: {model: {type: t_layers, norm: batch}}
models: {shadow: {ema: student, decay: 0.9}, old: {snapshot: student, every: 1}}
terms:
  ce: cross_entropy
  kd: {type: kd, teacher: shadow, mask: labelled}
  back: {type: dkd, teacher: old}
optimizer: {type: AdamW, lr: 0.01}
label_fraction: 32
ema: 0.9
clip: 1.0
accumulate: 2
log_every: 2
epochs: 9
batch_size: 12
"""
GAME = """
models: {generator: {model: t_generator, input: noise.z}}
teacher: {model: t_layers, input: "generator:image"}
student: {model: {type: t_layers, norm: batch}, input: "generator:image"}
data: {noise: {type: gaussian, shape: [6], samples: 64}}
terms: {fool: {type: kd, weight: -1, teacher_grad: true}, mimic: kd}
updates: [{models: [generator], terms: [fool]}, {models: [student], terms: [mimic], repeat: 2}]
optimizer: {type: Adam, lr: 0.01}
epochs: 4
batch_size: 16
"""
RECIPES = {"plain": PLAIN, "dropout": DROPOUT, "everything": EVERYTHING, "game": GAME}


@contextmanager
def synchronisation_raises() -> Iterator[None]:
    """Makes every synchronisation of host and device raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def build_on_gpu(text: str, *overrides: str) -> StageHarness:
    return build_stage(recipe_from_text(text, *overrides), device=CUDA)


def use_graphs(stage: StageHarness) -> CudaGraphStep:
    """Lets a stage record its steps as CUDA graphs; returns the step strategy."""
    strategy = graph_strategy(stage.runner, CudaRecorder(CUDA))
    assert isinstance(strategy, CudaGraphStep), "the whole step can be recorded"
    stage.runner.use(strategy)
    return strategy


def replays_whole_steps(strategy: CudaGraphStep) -> bool:
    """Returns True if whole steps are recorded and the strategy has not been replaced by a fallback."""
    return strategy.replacement is None and bool(strategy.recordings.recordings)


def assert_steps_do_not_synchronise(stage: StageHarness, count: int) -> None:
    # The batches are loaded first: only the steps must not synchronize.
    windows = list(itertools.islice(stage.windows(), count))
    torch.cuda.synchronize()
    with synchronisation_raises():
        for window in windows:
            stage.runner.begin_step()
            stage.runner.step(window)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_step_does_not_wait_for_the_device(text, precision):
    with precision_settings(precision):
        stage = build_on_gpu(text, f"precision={precision}").step(2)
        assert_steps_do_not_synchronise(stage, 4)
    assert not stage.runner.read_log()[0].not_finite


def test_a_step_that_reads_a_value_on_the_host_raises():
    """Negative control of `synchronisation_raises`."""
    stage = build_on_gpu("student: t_layers\nterms: {t: t_reads_item}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n")
    window = next(stage.windows())
    stage.runner.begin_step()
    with synchronisation_raises(), pytest.raises(RuntimeError, match="synchroniz"):
        stage.runner.step(window)


@pytest.mark.parametrize("mode", ["cuda_graph", "true", "max"])
@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_recorded_run_has_the_weights_of_an_eager_run(text, mode):
    """Compiled kernels round differently, and compiled dropout draws other random numbers."""
    if mode != "cuda_graph" and text is DROPOUT:
        pytest.skip("compiled dropout draws other random numbers")
    torch.backends.cudnn.deterministic = True
    eager = build_on_gpu(text)
    total = eager.runner.progress.total_steps
    eager.step(total)
    recorded = build_on_gpu(text, f"compile={mode}")
    strategy = use_graphs(recorded)
    recorded.step(total)
    assert replays_whole_steps(strategy) and not recorded.notices
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if mode == "cuda_graph" else {"rtol": 1e-2, "atol": 1e-3}
    weights = recorded.weights()
    for name, value in eager.weights().items():
        assert_close(weights[name], value, **tolerance, msg=lambda message, name=name: f"{name}: {message}")


def test_a_recorded_fp16_run_keeps_its_loss_scale_on_the_device():
    stage = build_on_gpu(PLAIN, "compile=cuda_graph", "precision=fp16")
    strategy = use_graphs(stage)
    stage.step(stage.runner.progress.total_steps)
    assert replays_whole_steps(strategy)
    assert not stage.runner.read_log()[0].not_finite


def test_a_replay_does_not_wait_for_the_device():
    stage = build_on_gpu(PLAIN, "compile=cuda_graph")
    strategy = use_graphs(stage)
    stage.step(15)
    assert replays_whole_steps(strategy)
    assert_steps_do_not_synchronise(stage, 2)


def test_a_failed_recording_falls_back_to_eager_steps_and_restores_the_generator():
    """A failed capture leaves the allocator's pool and the generator in capture mode; both must be restored."""
    text = DROPOUT.replace("terms:\n", "terms:\n  t: t_reads_item\n")
    stage = build_on_gpu(text, "compile=cuda_graph")
    strategy = use_graphs(stage)
    stage.step(12)
    gradients = strategy.replacement
    assert isinstance(gradients, CudaGraphGradients) and not gradients.recordable
    assert not strategy.recordings.recordings and not gradients.recordings.recordings
    assert len(stage.notices) == 2
    assert "capturing" in stage.notices[0] and "already recording" not in stage.notices[1]
    torch.nn.functional.dropout(torch.ones(8, device=CUDA), 0.5)  # raises if the generator is still in capture mode
    recordable = build_on_gpu(DROPOUT, "compile=cuda_graph").step(4)
    recordable_strategy = use_graphs(recordable)
    recordable.step(8)
    assert replays_whole_steps(recordable_strategy)


@pytest.mark.parametrize("mode", ["false", "cuda_graph"])
def test_a_resumed_run_has_the_results_of_an_uninterrupted_run(mode):
    torch.backends.cudnn.deterministic = True
    overrides = ["device=cuda", f"compile={mode}", "checkpoint_every={steps: 4}", "tensorboard=false"]
    train_recipe_text(PLAIN, *overrides, "out=uninterrupted")
    with kill_at_step("main", 7):
        train_recipe_text(PLAIN, *overrides, "out=resumed")
    train_recipe_text(PLAIN, *overrides, "out=resumed")
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("resumed")) == []
