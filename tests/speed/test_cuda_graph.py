"""A captured run is the run: recordings read each batch, follow every schedule, and what cannot be recorded is told."""

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
from kdbench.speed import cuda_graph as capture_module
from kdbench.speed.cuda_graph import WARM_UP, CudaGraphStep

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
AHEAD = """
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
def graphs_here(monkeypatch):
    """Lets a CPU have graphs, so that optimisers keep on the device what they can."""
    monkeypatch.setattr(Recipe, "captures", lambda self, device_type: self.compile is not False)


def captured(text: str, recorder: TapeRecorder | None = None) -> tuple[StageHarness, CudaGraphStep, TapeRecorder, list[str]]:
    run = build_stage(recipe_from_text(text, "compile=cuda_graph"))
    said: list[str] = []
    run.runner.say = said.append
    recorder = recorder or TapeRecorder()
    return run, CudaGraphStep(run.runner, recorder), recorder, said


def steps(run: StageHarness, count: int) -> list[dict]:
    """Goes on and reads the log wherever a line would stand."""
    lines = []
    for window in itertools.islice(run.windows(), count):
        run.runner.begin_step()
        run.runner.step(window)
        if run.runner.logs_at(run.runner.steps_done):
            lines.append({k: v for k, v in run.runner.read()[1].items() if k != "shares"})
    return lines


def equal(one: StageHarness, other: StageHarness) -> bool:
    left, right = one.runner.state_dict(), other.runner.state_dict()
    return repr(_bits(left)) == repr(_bits(right))


def _bits(tree):
    if isinstance(tree, torch.Tensor):
        return (str(tree.dtype), tree.tolist())
    if isinstance(tree, dict):
        left_out = ("lr", "foreach", "fused", "capturable", "initial_lr")
        return {key: _bits(value) for key, value in tree.items() if key not in left_out}
    return [_bits(item) for item in tree] if isinstance(tree, list | tuple) else tree


WHOLE = {"plain": PLAIN, "everything": EVERYTHING, "game": GAME, "virtual": AHEAD.replace("FUSED", "fused: true")}


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_a_captured_run_is_the_run_bit_for_bit(text):
    plain = build_stage(recipe_from_text(text, "compile=cuda_graph"))
    total = plain.runner.total_steps
    expected = steps(plain, total)
    run, _, recorder, said = captured(text)
    assert steps(run, total) == expected
    assert equal(run, plain) and not said
    shapes = {tuple(next(iter(b.values()))["index"].shape for b in w) for w in itertools.islice(run.feed.windows(0), 9)}
    assert recorder.replays == total - WARM_UP * len(shapes) > 3
    assert recorder.recordings <= 2 * len(shapes)  # with and without the gradient norm


@pytest.mark.parametrize("stale", ["batch", "rate"])
def test_a_recording_that_kept_its_batch_or_its_rate_would_be_noticed(stale, monkeypatch):
    """Negative control of the test above."""
    plain = build_stage(recipe_from_text(PLAIN, "compile=cuda_graph"))
    steps(plain, 12)
    run, of, _, _ = captured(PLAIN)
    if stale == "batch":
        replay = of._replay
        monkeypatch.setattr(of, "_replay", lambda recorded, window, *rest: replay(recorded, recorded.window, *rest))
    else:
        monkeypatch.setattr("kdbench.engine.train.runner.set_lr_factor", lambda optimizer, factor: None)
    steps(run, 12)
    assert not equal(run, plain)


def test_a_run_goes_on_from_a_checkpoint_of_the_other_way():
    text = PLAIN.replace("lr: 0.1,", "lr: 0.125,").replace("scheduler: {type: cosine, by: step}", "")
    plain = build_stage(recipe_from_text(text, "compile=cuda_graph"))  # 0.125 is the same in float32, as the rate is on a device
    steps(plain, 15)
    middle = build_stage(recipe_from_text(text)).step(4)  # eager, learning rates as numbers
    assert isinstance(middle.runner.updates[0].optimizer.param_groups[0]["lr"], float)
    run, _, recorder, _ = captured(text)
    run.runner.load_state_dict(middle.runner.state_dict())
    assert isinstance(run.runner.updates[0].optimizer.param_groups[0]["lr"], torch.Tensor)
    steps(run, 11)
    assert recorder.replays and equal(run, plain)
    back = build_stage(recipe_from_text(text))
    back.runner.load_state_dict(run.runner.state_dict())
    assert isinstance(back.runner.updates[0].optimizer.param_groups[0]["lr"], float)


def test_an_optimizer_that_counts_on_the_host_stays_outside():
    text = PLAIN.replace("fused: true", "foreach: true")
    plain = build_stage(recipe_from_text(text, "compile=cuda_graph"))
    expected = steps(plain, 14)
    run, of, recorder, said = captured(text)
    assert steps(run, 14) == expected and equal(run, plain)
    assert recorder.replays and not of.whole
    assert len(said) == 1 and "SGD" in said[0] and "optimiser runs as it is" in said[0]


def test_the_rate_of_a_virtual_step_moves_where_the_optimiser_stays_outside():
    text = AHEAD.replace("FUSED", "foreach: true")
    plain = build_stage(recipe_from_text(text, "compile=cuda_graph"))
    expected = steps(plain, 14)
    run, of, recorder, said = captured(text)
    assert steps(run, 14) == expected and equal(run, plain)
    assert recorder.replays and not of.whole and len(said) == 1


class Counting(nn.Module):
    """A model that counts its forwards on the host and changes with them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.model(image) / self.seen


def test_a_part_that_counts_on_the_host_is_not_captured(monkeypatch):
    def counting() -> StageHarness:
        run = build_stage(recipe_from_text(PLAIN, "compile=cuda_graph"))
        teacher = run.network.role("teacher")
        teacher.model = teacher.extractor.model = Counting(teacher.model)
        return run

    plain = counting()
    steps(plain, 10)
    run, said = counting(), []
    run.runner.say = said.append
    recorder = TapeRecorder()
    CudaGraphStep(run.runner, recorder)
    steps(run, 10)
    assert equal(run, plain) and recorder.replays == 0
    assert "seen changes from step to step on the host" in said[0]
    monkeypatch.setattr(capture_module, "_changed", lambda before, after: "")  # negative control
    blind = counting()
    CudaGraphStep(blind.runner, TapeRecorder())
    steps(blind, 10)
    assert not equal(blind, plain)


@pytest.mark.parametrize("fails", [1, 9])
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(fails):
    plain = build_stage(recipe_from_text(PLAIN, "compile=cuda_graph"))
    steps(plain, 15)
    run, _, recorder, said = captured(PLAIN, TapeRecorder(fails))
    steps(run, 15)
    assert equal(run, plain)
    assert "whole step cannot be one CUDA graph (an illegal operation was captured)" in said[0]
    assert (recorder.replays > 0) == (fails == 1)
    assert len(said) == (1 if fails == 1 else 2) and (fails == 1 or "goes on without" in said[1])


def test_recordings_that_are_dropped_are_never_joined_by_new_ones_in_their_memory(monkeypatch):
    """Torch lets no graph into a pool whose graphs are all gone while something still lies in it."""
    run, of, recorder, said = captured(PLAIN)
    steps(run, 8)
    assert of.recorded and not recorder.forgotten
    monkeypatch.setattr(capture_module, "_changed", lambda before, after: "something")
    of.recorded.clear()
    steps(run, 10)
    assert recorder.forgotten == len(said) == 2  # the whole step, then forward and backward


class FakeCuda:
    """Stands for torch.cuda where the end of a capture that broke off raises, as CUDA's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools = itertools.count(1)
        self.captures: list[tuple[object, bool]] = []
        self.left: list[object] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device_index=0, device=device))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(self.pools)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def end(self, device, pool):
        if pool not in self.left:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.left.remove(pool)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        if pool in self.left:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.left.append(pool)
        try:
            yield
        except ArithmeticError:  # breaks the capture: the end raises, and does not close the pool
            self.captures.append((pool, False))
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        except BaseException:
            self.left.remove(pool)
            raise
        self.left.remove(pool)
        self.captures.append((pool, True))


@pytest.mark.parametrize("error", [ArithmeticError, ValueError], ids=["breaks the capture", "does not"])
def test_after_a_capture_that_broke_off_another_succeeds_and_the_first_cause_is_told(error, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = capture_module.CudaRecorder(CPU)

    def work() -> None:
        raise error("this reads the device")

    with pytest.raises((RuntimeError, ValueError)) as raised:
        recorder.record(work)
    assert capture_module._first_cause(raised.value) == "this reads the device"
    assert not cuda.left and cuda.captures[-1][1]  # nothing is open, and a capture has been done to its end
    recorder.record(lambda: None)
    pools = [pool for pool, _ in cuda.captures]
    assert len(set(pools)) == len(pools)


def test_a_cpu_says_that_it_has_no_graphs(monkeypatch):
    monkeypatch.setattr(Recipe, "captures", lambda self, device_type: False)
    run, said = build_stage(recipe_from_text(PLAIN, "compile=cuda_graph")), []
    run.runner.say = said.append
    capture_module.use_cuda_graph(run.runner)
    assert len(said) == 1 and "CPU has no graphs" in said[0]
    assert run.runner.perform == run.runner.execute


def test_a_gpu_too_old_for_bf16_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 has 7\.5\. Write precision=fp16"):
        check_precision("bf16", torch.device("cuda"))
    check_precision("fp16", torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    """`torch.cuda.manual_seed` seeds the current device: dropout on another one would draw anew in every run."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    resolve_device("cuda")
    resolve_device("cpu")
    assert chosen == []
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and chosen == [torch.device("cuda", 1)]
