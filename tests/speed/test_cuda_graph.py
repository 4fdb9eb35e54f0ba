"""Recorded steps equal eager steps bit for bit; steps that cannot be recorded run eagerly, with a notice."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.kernel_tape import TapeRecorder
from helpers.recipes import CPU, StageHarness, build_stage, plugin_registration, recipe_from_text  # noqa: F401
from kdbench.config.schema import Recipe
from kdbench.engine.device import check_precision, resolve_device
from kdbench.errors import ConfigError
from kdbench.speed import cuda_graph
from kdbench.speed.cuda_graph import WARM_UP, CudaGraphGradients, CudaGraphStep, Recordings, graph_strategy

PLAIN = """
student: {model: {type: t_layers, norm: batch, dropout: 0.2}}
teacher: {model: {type: t_layers, hidden: 16}}
terms:
  ce: {type: cross_entropy, weight: {type: linear, start: 1, end: 0.1, by: step}}
  kd: {type: kd, temperature: {type: linear, start: 1, end: 4, by: step}, weight: 0.9}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9, weight_decay: 1e-3, fused: true}
scheduler: {type: cosine, by: step}
log_every: 3
epochs: 6
batch_size: 24
precision: float64
"""
"""64 samples in batches of 24, 24 and 16."""

EVERYTHING = """
student: {model: {type: t_layers, norm: batch}}
models: {shadow: {ema: student, decay: 0.9}, old: {snapshot: student, every: 1}}
terms:
  ce: cross_entropy
  kd: {type: kd, teacher: shadow, mask: labelled}
  back: {type: dkd, teacher: old}
optimizer: {type: AdamW, lr: 0.01, fused: true}
label_fraction: 32
ema: 0.9
clip: 1.0
accumulate: 2
log_every: 2
epochs: 9
batch_size: 12
precision: float64
"""

GAME = """
models: {generator: {model: t_generator, input: noise.z}}
teacher: {model: t_layers, input: "generator:image"}
student: {model: {type: t_layers, norm: batch}, input: "generator:image"}
data: {noise: {type: gaussian, shape: [6], samples: 64}}
terms: {fool: {type: kd, weight: -1, teacher_grad: true}, mimic: kd}
updates: [{models: [generator], terms: [fool]}, {models: [student], terms: [mimic], repeat: 2}]
optimizer: {type: SGD, lr: 0.05, momentum: 0.9, fused: true}
epochs: 3
batch_size: 16
precision: float64
"""
BILEVEL = """
models: {judge: {reuse: student, input: held.image}, gate: {model: {type: t_linear, num_classes: 1}}}
data: {held: {subset: {type: balanced, amount: 0.5}}}
student: {model: {type: t_layers, norm: batch}}
teacher: {model: t_layers}
terms: {kd: {type: kd, sample_weight: {type: learnt, by: gate}}, held: {type: cross_entropy, student: judge}}
updates:
  - {models: [gate], terms: [held], inner_step: {models: [student], terms: [kd]}}
  - {models: [student], terms: [kd]}
optimizer: {type: SGD, lr: 0.05, momentum: 0.9, FUSED}
scheduler: {type: cosine, by: step}
epochs: 3
batch_size: 16
precision: float64
"""


@pytest.fixture(autouse=True)
def cuda_graphs_on_cpu(monkeypatch):
    """Treats the CPU as a device with CUDA graphs, so that optimizers keep their state on the device."""
    monkeypatch.setattr(Recipe, "uses_cuda_graph", lambda self, device_type: self.compile is not False)


def build_eager(text: str) -> StageHarness:
    return build_stage(recipe_from_text(text, "compile=cuda_graph"))


def build_recorded(text: str, recorder: TapeRecorder | None = None) -> tuple[StageHarness, TapeRecorder]:
    """Builds a stage that records its steps."""
    stage, recorder = build_eager(text), recorder or TapeRecorder()
    stage.runner.use(graph_strategy(stage.runner, recorder))
    return stage, recorder


def take_steps(stage: StageHarness, count: int) -> list[dict]:
    """Takes steps, and returns the values of every log line."""
    lines = []
    for window in itertools.islice(stage.windows(), count):
        stage.runner.begin_step()
        stage.runner.step(window)
        if stage.runner.progress.logs_after(stage.runner.progress.steps_done):
            values = stage.runner.read_log()[1]
            lines.append({key: value for key, value in values.items() if key != "time_fractions"})
    return lines


def equal_state(first: StageHarness, second: StageHarness) -> bool:
    """Returns whether the training states of two stages are equal bit for bit."""
    states = [_comparable(vars(stage.runner.training_state())) for stage in (first, second)]
    return repr(states[0]) == repr(states[1])


def _comparable(tree):
    if isinstance(tree, torch.Tensor):
        return (str(tree.dtype), tree.tolist())
    if isinstance(tree, dict):
        device_settings = ("lr", "foreach", "fused", "capturable", "initial_lr")
        return {key: _comparable(value) for key, value in tree.items() if key not in device_settings}
    return [_comparable(item) for item in tree] if isinstance(tree, list | tuple) else tree


WHOLE_STEP = {
    "plain": PLAIN,
    "everything": EVERYTHING,
    "game": GAME,
    "inner step": BILEVEL.replace("FUSED", "fused: true"),
}


@pytest.mark.parametrize("text", WHOLE_STEP.values(), ids=WHOLE_STEP)
def test_recorded_run_equals_eager_run_bit_for_bit(text):
    eager = build_eager(text)
    total = eager.runner.progress.total_steps
    expected = take_steps(eager, total)
    stage, recorder = build_recorded(text)
    assert take_steps(stage, total) == expected
    assert equal_state(stage, eager) and not stage.notices
    windows = itertools.islice(stage.feed.windows(0), 9)
    shapes = {tuple(next(iter(batches.values())).size for batches in window) for window in windows}
    assert recorder.replays == total - WARM_UP * len(shapes) > 3
    assert recorder.recordings <= 2 * len(shapes)  # with and without the gradient norm


@pytest.mark.parametrize("stale", ["batch", "rate"])
def test_stale_batch_or_rate_changes_the_run(stale, monkeypatch):
    """Negative control of the test above."""
    eager = build_eager(PLAIN)
    take_steps(eager, 12)
    stage, _ = build_recorded(PLAIN)
    if stale == "batch":
        replay = Recordings.replay
        recorded_batch = lambda self, key, window, *rest: replay(self, key, self.recordings[key].window, *rest)  # noqa: E731
        monkeypatch.setattr(Recordings, "replay", recorded_batch)
    else:
        monkeypatch.setattr("kdbench.engine.train.runner.set_lr_factor", lambda optimizer, factor: None)
    take_steps(stage, 12)
    assert not equal_state(stage, eager)


def test_checkpoint_of_an_eager_run_continues_recorded_and_vice_versa():
    # 0.125 is exact in float32, the precision of a learning rate on the device.
    text = PLAIN.replace("lr: 0.1,", "lr: 0.125,").replace("scheduler: {type: cosine, by: step}", "")
    eager = build_eager(text)
    take_steps(eager, 15)
    middle = build_stage(recipe_from_text(text)).step(4)  # learning rates as numbers
    assert isinstance(middle.runner.updates[0].optimizer.param_groups[0]["lr"], float)
    stage, recorder = build_recorded(text)
    stage.runner.load_training_state(middle.runner.training_state())
    assert isinstance(stage.runner.updates[0].optimizer.param_groups[0]["lr"], torch.Tensor)
    take_steps(stage, 11)
    assert recorder.replays and equal_state(stage, eager)
    continued = build_stage(recipe_from_text(text))
    continued.runner.load_training_state(stage.runner.training_state())
    assert isinstance(continued.runner.updates[0].optimizer.param_groups[0]["lr"], float)


def test_optimizer_that_counts_on_the_host_stays_outside_of_the_graph():
    text = PLAIN.replace("fused: true", "foreach: true")
    eager = build_eager(text)
    expected = take_steps(eager, 14)
    stage, recorder = build_recorded(text)
    assert take_steps(stage, 14) == expected and equal_state(stage, eager)
    assert recorder.replays and isinstance(stage.runner.strategy, CudaGraphGradients)
    assert len(stage.notices) == 1 and "SGD" in stage.notices[0] and "optimizer runs eagerly" in stage.notices[0]


def test_rate_of_an_inner_step_follows_its_schedule_outside_of_the_graph():
    text = BILEVEL.replace("FUSED", "foreach: true")
    eager = build_eager(text)
    expected = take_steps(eager, 14)
    stage, recorder = build_recorded(text)
    assert take_steps(stage, 14) == expected and equal_state(stage, eager)
    assert recorder.replays and isinstance(stage.runner.strategy, CudaGraphGradients) and len(stage.notices) == 1


class Counting(nn.Module):
    """A model that counts its forwards on the host and changes with them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards = model, 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return self.model(image) / self.forwards


def test_model_that_counts_on_the_host_is_not_recorded(monkeypatch):
    def build_counting() -> StageHarness:
        stage = build_eager(PLAIN)
        teacher = stage.network.role("teacher")
        teacher.model = teacher.extractor.model = Counting(teacher.model)
        return stage

    eager = build_counting()
    take_steps(eager, 10)
    stage, recorder = build_counting(), TapeRecorder()
    stage.runner.use(graph_strategy(stage.runner, recorder))
    take_steps(stage, 10)
    assert equal_state(stage, eager) and recorder.replays == 0
    assert "forwards changes from step to step on the host" in stage.notices[0]
    monkeypatch.setattr(cuda_graph, "_first_change", lambda before, after: "")  # negative control
    unchecked = build_counting()
    unchecked.runner.use(graph_strategy(unchecked.runner, TapeRecorder()))
    take_steps(unchecked, 10)
    assert not equal_state(unchecked, eager)


@pytest.mark.parametrize("failures", [1, 9])
def test_failed_recording_falls_back_with_a_notice(failures):
    eager = build_eager(PLAIN)
    take_steps(eager, 15)
    stage, recorder = build_recorded(PLAIN, TapeRecorder(failures))
    take_steps(stage, 15)
    assert equal_state(stage, eager)
    assert "whole step cannot be recorded (an illegal operation was captured)" in stage.notices[0]
    gradients_recorded = failures == 1
    assert (recorder.replays > 0) == gradients_recorded and len(stage.notices) == (1 if gradients_recorded else 2)
    assert gradients_recorded or "steps run eagerly" in stage.notices[1]


def test_memory_of_dropped_recordings_is_released_before_new_ones(monkeypatch):
    """torch admits no graph into a memory pool whose graphs are all gone while it still contains tensors."""
    stage, recorder = build_recorded(PLAIN)
    take_steps(stage, 8)
    strategy = stage.runner.strategy
    assert isinstance(strategy, CudaGraphStep) and strategy.recordings.recordings and not recorder.releases
    monkeypatch.setattr(cuda_graph, "_first_change", lambda before, after: "something")
    strategy.recordings.recordings.clear()
    take_steps(stage, 10)
    assert recorder.releases == len(stage.notices) == 2  # for the whole step, then for forward and backward


class FakeCuda:
    """Emulates torch.cuda: the end of a broken capture raises and leaves its memory pool open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools = itertools.count(1)
        self.captures: list[tuple[object, bool]] = []
        self.open_pools: list[object] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device_index=0, device=device))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(self.pools)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def end(self, device, pool):
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        if pool in self.open_pools:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.open_pools.append(pool)
        try:
            yield
        except ArithmeticError:  # breaks the capture: the end raises, and does not close the pool
            self.captures.append((pool, False))
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        except BaseException:
            self.open_pools.remove(pool)
            raise
        self.open_pools.remove(pool)
        self.captures.append((pool, True))


@pytest.mark.parametrize("error", [ArithmeticError, ValueError], ids=["breaks the capture", "does not"])
def test_recording_succeeds_after_a_broken_capture_and_the_root_cause_is_reported(error, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = cuda_graph.CudaRecorder(CPU)

    def work() -> None:
        raise error("this reads the device")

    with pytest.raises((RuntimeError, ValueError)) as raised:
        recorder.record(work)
    assert cuda_graph._root_cause(raised.value) == "this reads the device"
    assert not cuda.open_pools and cuda.captures[-1][1]  # nothing is open, and the last capture is complete
    recorder.record(lambda: None)
    pools = [pool for pool, _ in cuda.captures]
    assert len(set(pools)) == len(pools)


def test_device_without_cuda_graphs_runs_eagerly_with_a_notice(monkeypatch):
    monkeypatch.setattr(Recipe, "uses_cuda_graph", lambda self, device_type: False)
    stage = build_eager(PLAIN)
    cuda_graph.use_cuda_graphs(stage.runner)
    assert len(stage.notices) == 1 and "device cpu has no CUDA graphs" in stage.notices[0]
    assert stage.runner.strategy is stage.runner.eager


def test_bf16_on_an_old_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 has 7\.5\. Use precision=fp16"):
        check_precision("bf16", torch.device("cuda"))
    check_precision("fp16", torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))


def test_named_gpu_becomes_the_current_device(monkeypatch):
    """`torch.cuda.manual_seed` seeds the current device only; dropout on another one would differ in every run."""
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    resolve_device("cuda")
    resolve_device("cpu")
    assert devices == []
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and devices == [torch.device("cuda", 1)]
