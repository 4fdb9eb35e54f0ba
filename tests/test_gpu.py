"""On a GPU: nothing in a step waits for it, and captured, compiled and narrower steps are the step."""

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
from kdbench.speed.cuda_graph import CudaGraphStep, CudaRecorder

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
ALL = {"plain": PLAIN, "dropout": DROPOUT, "everything": EVERYTHING, "game": GAME}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Every synchronisation of host and device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(text: str, *overrides: str) -> StageHarness:
    return build_stage(recipe_from_text(text, *overrides), device=CUDA)


def steps(run: StageHarness, count: int) -> StageHarness:
    for window in itertools.islice(run.windows(), count):
        run.runner.begin_step()
        run.runner.step(window)
    return run


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_a_step_does_not_wait_for_the_device(text, precision):
    with precision_settings(precision):
        run = steps(on_gpu(text, f"precision={precision}"), 2)
        windows = list(itertools.islice(run.windows(), 4))
        torch.cuda.synchronize()
        with no_waiting():
            for window in windows:
                run.runner.begin_step()
                run.runner.step(window)
    assert not run.runner.read_log()[0].not_finite


def test_a_step_that_waits_would_be_noticed():
    """Negative control."""
    run = on_gpu("student: t_layers\nterms: {t: t_reads_item}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n")
    window = next(run.windows())
    run.runner.begin_step()
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        run.runner.step(window)


@pytest.mark.parametrize("how", ["capture", "true", "max"])
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_a_captured_run_is_the_run(text, how):
    """Compiled kernels round differently, and dropout that is compiled draws other numbers."""
    if how != "capture" and text is DROPOUT:
        pytest.skip("compiled dropout draws other numbers")
    torch.backends.cudnn.deterministic = True
    plain = on_gpu(text)
    total = plain.runner.progress.total_steps
    steps(plain, total)
    run, said = on_gpu(text, f"compile={how}"), []
    run.runner.say = said.append
    captured = CudaGraphStep(run.runner, CudaRecorder(CUDA))
    steps(run, total)
    assert captured.whole and captured.recorded and not said
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if how == "capture" else {"rtol": 1e-2, "atol": 1e-3}
    for name, value in plain.weights().items():
        assert_close(run.weights()[name], value, **tolerance, msg=lambda told, name=name: f"{name}: {told}")


def test_a_captured_fp16_run_keeps_its_scale_on_the_device():
    run = on_gpu(PLAIN, "compile=cuda_graph", "precision=fp16")
    captured = CudaGraphStep(run.runner, CudaRecorder(CUDA))
    steps(run, run.runner.progress.total_steps)
    assert captured.whole and captured.recorded
    assert not run.runner.read_log()[0].not_finite


def test_a_replay_does_not_wait_for_the_device():
    run = on_gpu(PLAIN, "compile=cuda_graph")
    captured = CudaGraphStep(run.runner, CudaRecorder(CUDA))
    steps(run, 15)
    assert captured.recorded
    windows = list(itertools.islice(run.windows(), 2))
    torch.cuda.synchronize()
    with no_waiting():
        for window in windows:
            run.runner.begin_step()
            run.runner.step(window)


def test_a_step_that_cannot_be_captured_goes_on_and_still_draws():
    """A capture that breaks off leaves the allocator's pool and the generator open; both have to be put right."""
    text = DROPOUT.replace("terms:\n", "terms:\n  t: t_reads_item\n")
    run, said = on_gpu(text, "compile=cuda_graph"), []
    run.runner.say = said.append
    captured = CudaGraphStep(run.runner, CudaRecorder(CUDA))
    steps(run, 12)
    assert not captured.whole and not captured.recorded and len(said) == 2
    assert "capturing" in said[0] and "already recording" not in said[1]
    torch.nn.functional.dropout(torch.ones(8, device=CUDA), 0.5)
    fine = steps(on_gpu(DROPOUT, "compile=cuda_graph"), 4)
    after = CudaGraphStep(fine.runner, CudaRecorder(CUDA))
    steps(fine, 8)
    assert after.whole and after.recorded


@pytest.mark.parametrize("how", ["false", "capture"])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(how):
    torch.backends.cudnn.deterministic = True
    words = ["device=cuda", f"compile={how}", "checkpoint_every={steps: 4}", "tensorboard=false"]
    train_recipe_text(PLAIN, *words, "out=whole")
    with kill_at_step("main", 7):
        train_recipe_text(PLAIN, *words, "out=run")
    train_recipe_text(PLAIN, *words, "out=run")
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []
