"""Training steps as CUDA graphs: recorded once for each shape of batch, then replayed without Python."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from kdbench.data.loading.batch import Batch, Window
from kdbench.engine.train.notices import Notices
from kdbench.engine.train.optimizers import stays_on_device
from kdbench.engine.train.runner import Runner
from kdbench.engine.train.steps import EagerStep, StepStrategy
from kdbench.engine.train.updates import Update

WARM_UP = 3
"""Eager steps before a recording: they compile, select convolution algorithms and create optimizer state."""

Key: TypeAlias = tuple[Hashable, ...]


class GraphRecorder(Protocol):
    """Records device work."""

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which warm-up, recording and replay happen."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records work without executing it; returns a function that executes it on the recorded memory."""
        ...

    def release(self) -> None:
        """Releases the memory of all recordings: none of them will be replayed. Further recordings may follow."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool, on a stream of their own.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.broken: list[torch.cuda.CUDAGraph] = []  # torch's allocators may ask for their stream at any later time

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return self._record(work).replay
        except Exception:
            self._recover()
            raise

    def release(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()  # torch admits no graph into a pool whose graphs are all gone

    def _record(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: concurrent runs and the thread that loads data may use their own streams meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                work()
        except Exception:
            self.broken.append(graph)
            raise
        return graph

    def _recover(self) -> None:
        """Ends everything that torch leaves open when a capture fails: it ends the recording of the stream only.

        The allocator still reserves the pool for the capture, and the generator of an older torch still treats every
        draw as recorded and raises at the next draw outside of a capture. A successful recording resets the generator.
        """
        with contextlib.suppress(RuntimeError):  # not open: the work raised without breaking the capture
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
        self.release()
        with contextlib.suppress(RuntimeError):
            self._record(lambda: torch.zeros(1, device=self.stream.device))
        self.release()


class GraphableWork(Protocol):
    """Device work of a step that may be recorded: the eager step of one run, or the joint step of several."""

    @property
    def network(self) -> nn.Module:
        """The modules whose host state must not change from step to step."""
        ...

    def run(self, window: Window) -> None:
        """Executes the work."""
        ...

    def variant(self) -> Hashable:
        """Returns the property of the coming step that changes its operations, apart from the shape of its batch."""
        ...

    def take_grad_norm(self) -> Any:
        """Returns the gradient norm that the work left, and forgets it."""
        ...

    def put_grad_norm(self, norm: Any) -> None:
        """Sets the gradient norm."""
        ...

    def discard_unfinished(self) -> None:
        """Discards a step that began and did not finish."""
        ...


@dataclass
class Recording:
    """One recorded graph with the memory that it reads and writes.

    Attributes:
        window: the batches that it reads.
        gradients: of the update's parameters, where the optimizer runs outside of the graph.
        grad_norm: the gradient norm, in variants that measure it.
    """

    window: list[dict[str, Batch]]
    replay: Callable[[], None]
    gradients: list[Tensor | None]
    grad_norm: Any


class Recordings:
    """Warm-up, recording and replay, by shape of the batch.

    A recording reads its batch from memory of its own, into which each batch is copied. Learning rates, scheduled
    weights and everything else that changes with the step are tensors that the runner fills before the step. Whatever
    else depends on the step (whether the gradient norm is measured) has recordings of its own, and so has a smaller
    last batch.
    """

    def __init__(self, work: GraphableWork, recorder: GraphRecorder) -> None:
        self.work, self.recorder = work, recorder
        self.recordings: dict[Key, Recording] = {}
        self.warm_up_steps: Counter[Key] = Counter()
        self.host_state: dict[str, tuple[int, Any]] = {}

    def warm_up(self, shape: Key, function: Callable[[], None]) -> bool:
        """Executes the work eagerly if this shape is not warm yet; returns whether it did."""
        if self.warm_up_steps[shape] >= WARM_UP:
            return False
        self.warm_up_steps[shape] += 1
        if self.warm_up_steps[shape] == WARM_UP:
            self.host_state = host_state(self.work.network)
        function()
        return True

    def record(
        self,
        key: Key,
        window: Window,
        function: Callable[[Window], None],
        parameters: Sequence[nn.Parameter] = (),
    ) -> str:
        """Records the work for one shape; returns the reason why it cannot be recorded, or an empty string."""
        change = _first_change(self.host_state, host_state(self.work.network))
        if change:
            return f"{change} changes from step to step on the host"
        memory = [{source: _clone(batch) for source, batch in batches.items()} for batches in window]
        before = self.work.take_grad_norm()
        try:
            replay = self.recorder.record(lambda: function(memory))
        except Exception as error:
            self.work.discard_unfinished()
            return _root_cause(error)
        finally:
            grad_norm = self.work.take_grad_norm()
            self.work.put_grad_norm(before)
        gradients = [parameter.grad for parameter in parameters]
        self.recordings[key] = Recording(memory, replay, gradients, grad_norm)
        return ""

    def replay(self, key: Key, window: Window, parameters: Sequence[nn.Parameter] = ()) -> None:
        """Copies a batch into the recording's memory and executes the recording."""
        recording = self.recordings[key]
        for memory, batches in zip(recording.window, window, strict=True):
            for source, batch in batches.items():
                target = _tensors(memory[source])
                for name, value in _tensors(batch).items():
                    target[name].copy_(value)
        recording.replay()
        for parameter, gradient in zip(parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        if recording.grad_norm is not None:
            self.work.put_grad_norm(recording.grad_norm)

    def clear(self) -> None:
        self.recordings.clear()
        self.recorder.release()


class CudaGraphStep:
    """A step strategy: the first steps of each shape run eagerly, one is recorded, the others replay it.

    Args:
        work: the work to record, as a whole.
        recorder: records it; tests replace it.
        fallback: returns the strategy to use when the whole step cannot be recorded, given the reason.
    """

    def __init__(self, work: GraphableWork, recorder: GraphRecorder, fallback: Callable[[str], StepStrategy]) -> None:
        self.work, self.recorder, self.fallback = work, recorder, fallback
        self.recordings = Recordings(work, recorder)
        self.replacement: StepStrategy | None = None

    def run(self, window: Window) -> None:
        if self.replacement is not None:
            self.replacement.run(window)
            return
        shape = shape_of(window)
        with self.recorder.side_stream():
            if self.recordings.warm_up(shape, lambda: self.work.run(window)):
                return
            key = (shape, self.work.variant())
            if key not in self.recordings.recordings:
                obstacle = self.recordings.record(key, window, self.work.run)
                if obstacle:
                    self.recordings.clear()
                    self.replacement = self.fallback(obstacle)
                    self.work.run(window)
                    return
            self.recordings.replay(key, window)


class CudaGraphGradients:
    """A step strategy: forward and backward are recorded, the optimizer runs eagerly.

    Args:
        eager: the step.
        recorder: records the work; tests replace it.
        notices: receives a notice when nothing can be recorded.
    """

    def __init__(self, eager: EagerStep, recorder: GraphRecorder, notices: Notices) -> None:
        self.eager, self.recorder, self.notices = eager, recorder, notices
        self.recordings = Recordings(eager, recorder)
        self.recordable = True

    def run(self, window: Window) -> None:
        self.eager.run(window, self._compute_gradients if self.recordable else None)

    def _compute_gradients(self, update: Update, window: Window) -> None:
        if not self.recordable:
            self.eager.compute_gradients(update, window)
            return
        key = (self.eager.updates.index(update), *shape_of(window))
        with self.recorder.side_stream():
            if self.recordings.warm_up(key, lambda: self.eager.compute_gradients(update, window)):
                return
            if key not in self.recordings.recordings:
                obstacle = self.recordings.record(
                    key, window, lambda memory: self.eager.compute_gradients(update, memory), update.parameters
                )
                if obstacle:
                    self.recordings.clear()
                    self.recordable = False
                    self.notices.notice(f"cuda_graph: the step cannot be recorded ({obstacle}); steps run eagerly.")
                    self.eager.compute_gradients(update, window)
                    return
            self.recordings.replay(key, window, update.parameters)


def use_cuda_graphs(runner: Runner) -> None:
    """Lets a runner record its steps where the recipe asks for it and the device supports it; else reports why not."""
    notice = runner.notices.notice
    if not runner.recipe.uses_cuda_graph(runner.device.type):
        if runner.recipe.compile == "cuda_graph":
            notice(f"cuda_graph: device {runner.device.type} has no CUDA graphs; steps run eagerly.")
    elif runner.world.size > 1:
        notice("cuda_graph: steps are not recorded with several processes; they run eagerly.")
    elif runner.progress.total_steps:
        runner.use(graph_strategy(runner, CudaRecorder(runner.device)))


def graph_strategy(runner: Runner, recorder: GraphRecorder) -> StepStrategy:
    """Returns the strategy that records as much of a runner's step as can be recorded."""

    def gradients_only(obstacle: str) -> StepStrategy:
        runner.notices.notice(
            f"cuda_graph: the whole step cannot be recorded ({obstacle}); forward and backward are recorded, the "
            "optimizer runs eagerly."
        )
        return CudaGraphGradients(runner.eager, recorder, runner.notices)

    obstacle = _known_obstacle(runner)
    return gradients_only(obstacle) if obstacle else CudaGraphStep(runner.eager, recorder, gradients_only)


def _known_obstacle(runner: Runner) -> str:
    """Returns the reason, known beforehand, why the whole step cannot be recorded, or an empty string."""
    for update in runner.updates:
        if not stays_on_device(update.optimizer):
            return f"{type(update.optimizer).__name__} reads its learning rate or its step on the host"
    return ""


def _root_cause(error: BaseException) -> str:
    """Returns the message of the first error: the end of a broken capture raises again without naming the cause."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def shape_of(window: Window) -> Key:
    """Returns everything that two windows must share to be executed by one recording."""
    return tuple(
        (source, name, value.shape, value.dtype)
        for batches in window
        for source, batch in batches.items()
        for name, value in _tensors(batch).items()
    )


def _tensors(batch: Batch) -> dict[Hashable, Tensor]:
    return {**batch.fields, **batch.precomputed}


def _clone(batch: Batch) -> Batch:
    return Batch(
        {name: value.clone() for name, value in batch.fields.items()},
        {key: value.clone() for key, value in batch.precomputed.items()},
    )


def host_state(network: nn.Module) -> dict[str, tuple[int, Any]]:
    """Returns everything that a replay cannot change: numbers that modules keep on the host, addresses of tensors."""
    state: dict[str, tuple[int, Any]] = {}
    for path, module in network.named_modules():
        attributes: Mapping[str, Any] = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                state[f"{path}.{name}"] = (id(value), value.data_ptr())
            elif isinstance(value, bool | int | float | str):
                state[f"{path}.{name}"] = (0, value)
    return state


def _first_change(before: Mapping[str, tuple[int, Any]], after: Mapping[str, tuple[int, Any]]) -> str:
    return next((name for name in {**before, **after} if before.get(name) != after.get(name)), "")
