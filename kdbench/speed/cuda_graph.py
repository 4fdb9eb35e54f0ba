"""Training steps as CUDA graphs: a step is recorded once for each batch shape, then replayed without Python."""

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
"""Number of eager steps before a recording. They compile, select convolution algorithms and create optimizer state."""

Key: TypeAlias = tuple[Hashable, ...]


class GraphRecorder(Protocol):
    """Interface of a recorder of GPU work. `CudaRecorder` implements the interface with CUDA graphs."""

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context manager in which warm-up, recording and replay must run."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the GPU work of a function, and returns a function that replays this work in the same memory.

        The recording does not execute the work.
        """
        ...

    def release(self) -> None:
        """Releases the memory of all recordings, which must not be replayed again. New recordings are possible."""
        ...


class CudaRecorder:
    """Recorder of CUDA graphs that share one memory pool. It records them on a separate CUDA stream.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.broken: list[torch.cuda.CUDAGraph] = []  # torch's allocators may need their streams at any later time

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
        self.pool = torch.cuda.graph_pool_handle()  # torch adds no graph to a pool whose graphs are all deleted

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
        """Resets the memory allocator and the random generator of torch after a failed capture.

        After a failure, torch ends the capture on the stream only. The allocator still reserves the memory pool for
        the capture. The generator of an older torch still treats every random number as recorded, and raises at the
        next one outside of a capture. A successful capture resets the generator.
        """
        with contextlib.suppress(RuntimeError):  # not open: the work raised without breaking the capture
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
        self.release()
        with contextlib.suppress(RuntimeError):
            self._record(lambda: torch.zeros(1, device=self.stream.device))
        self.release()


class GraphableWork(Protocol):
    """GPU work that can be recorded as a CUDA graph: a training step of one run, or of several concurrent runs."""

    @property
    def network(self) -> nn.Module:
        """Modules of the step. Their Python attributes (numbers on the host) must not change from step to step."""
        ...

    def run(self, window: Window) -> None:
        """Executes one training step eagerly, on a window (the micro-batches of the step)."""
        ...

    def variant(self) -> Hashable:
        """Returns a key for the kind of the next step, such as whether the step measures the gradient norm.

        Two steps with equal keys and equal batch shapes execute the same operations, and can share a recording.
        """
        ...

    def take_grad_norm(self) -> Any:
        """Removes and returns the gradient norm of the last step; returns None if the step did not measure the norm."""
        ...

    def put_grad_norm(self, norm: Any) -> None:
        """Sets the gradient norm that `take_grad_norm` returns."""
        ...

    def discard_unfinished(self) -> None:
        """Discards the partial results of a step that did not finish, such as a step whose recording failed."""
        ...


@dataclass
class Recording:
    """One recorded graph with the memory that the graph reads and writes.

    Attributes:
        window: the batches that the graph reads.
        replay: function that executes the graph.
        gradients: gradients that the graph writes, for an optimizer that runs outside of the graph.
        grad_norm: gradient norm that the graph writes; None if the graph does not compute a gradient norm.
    """

    window: list[dict[str, Batch]]
    replay: Callable[[], None]
    gradients: list[Tensor | None]
    grad_norm: Any


class Recordings:
    """Recorded CUDA graphs of one kind of work, such as a training step, with warm-up and replay.

    A recording reads its batch from its own memory, so each new batch is copied to this memory before a replay.
    Learning rates, loss weights and all other numbers that change from step to step are tensors, which the training
    loop fills before the step. Each batch shape has its own recording. Each combination of host-side conditions (for
    example, whether the step measures the gradient norm) has its own recording too.

    Args:
        work: the work to record.
        recorder: recorder of the work.
    """

    def __init__(self, work: GraphableWork, recorder: GraphRecorder) -> None:
        self.work, self.recorder = work, recorder
        self.recordings: dict[Key, Recording] = {}
        self.warm_up_steps: Counter[Key] = Counter()
        self.host_state: dict[str, tuple[int, Any]] = {}

    def warm_up(self, shape: Key, function: Callable[[], None]) -> bool:
        """Calls `function` and returns True in the first `WARM_UP` steps of a batch shape. Later, returns False."""
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
        """Records the work on one window (the micro-batches of a step).

        Args:
            key: key under which the recording is stored: the batch shape and the conditions on the host.
            window: the micro-batches. The recording reads copies of them.
            function: function that executes the work on a window.
            parameters: parameters whose gradients the recording writes for an optimizer outside of the graph.

        Returns:
            An empty string, or the reason why the work cannot be recorded.
        """
        change = _first_change(self.host_state, host_state(self.work.network))
        if change:
            return f"the module attribute {change} changes from step to step on the host"
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
        """Copies a window (the micro-batches of a step) into the memory of a recording, and executes the recording."""
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
    """Step strategy that records whole training steps: for each batch shape, a few eager steps, then only replays.

    Args:
        work: the training step.
        recorder: recorder of the step. Tests use a recorder that needs no GPU.
        fallback: function that is called if the step cannot be recorded. The argument is the reason, and the return
            value is the strategy to use instead.
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
    """Step strategy that executes forward and backward as a CUDA graph, and the optimizer eagerly.

    Args:
        eager: strategy that executes a step eagerly.
        recorder: recorder of forward and backward. Tests use a recorder that needs no GPU.
        notices: object that shows a message to the user if forward and backward cannot be recorded.
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
    """Configures a runner (training loop) to use CUDA graphs, if recipe, device and number of processes allow them.

    If the recipe requests CUDA graphs and the runner cannot use them, the user receives a message with the reason.
    """
    notice = runner.notices.notice
    if not runner.recipe.uses_cuda_graph(runner.device.type):
        if runner.recipe.compile == "cuda_graph":
            notice(f"cuda_graph: device {runner.device.type} has no CUDA graphs; steps run eagerly.")
    elif runner.world.size > 1:
        notice("cuda_graph: a run of several processes cannot record its steps; steps run eagerly.")
    elif runner.progress.total_steps:
        runner.use(graph_strategy(runner, CudaRecorder(runner.device)))


def graph_strategy(runner: Runner, recorder: GraphRecorder) -> StepStrategy:
    """Returns a strategy that records the whole step as a CUDA graph, or, if that is impossible, forward and backward
    only."""

    def gradients_only(obstacle: str) -> StepStrategy:
        runner.notices.notice(
            f"cuda_graph: the whole step cannot be recorded ({obstacle}); forward and backward are recorded, the "
            "optimizer runs eagerly."
        )
        return CudaGraphGradients(runner.eager, recorder, runner.notices)

    obstacle = _known_obstacle(runner)
    return gradients_only(obstacle) if obstacle else CudaGraphStep(runner.eager, recorder, gradients_only)


def _known_obstacle(runner: Runner) -> str:
    """Returns the reason why a runner's optimizer cannot be recorded, or an empty string."""
    for update in runner.updates:
        if not stays_on_device(update.optimizer):
            return f"optimizer {type(update.optimizer).__name__} reads its learning rate or step count on the host"
    return ""


def _root_cause(error: BaseException) -> str:
    """Returns the message of the first error in a chain of errors.

    The first error contains the cause: torch raises a second, unspecific error when it ends a failed graph capture.
    """
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def shape_of(window: Window) -> Key:
    """Returns the names, shapes and dtypes of all tensors of a window (the micro-batches of a step).

    Windows with equal return values can share one CUDA graph.
    """
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
    """Returns the module attributes that a CUDA graph cannot change: Python numbers and strings, addresses of tensors.

    Returns:
        Path of the attribute -> (0, value) for a number or string, and (id, address) for a tensor.
    """
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
