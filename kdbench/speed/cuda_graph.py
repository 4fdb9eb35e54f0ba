"""A training step as a CUDA graph: recorded once for each shape of batch, then replayed without Python."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from kdbench.engine.network.operands import Batch
from kdbench.engine.train.optimizers import stays_on_device
from kdbench.engine.train.runner import Runner
from kdbench.engine.train.updates import Update

WARM_UP = 3
"""Steps that run as they stand before one is recorded: they compile, choose convolutions and make optimisers' state."""


Shape: TypeAlias = tuple[Any, ...]


class GraphRecorder(Protocol):
    """Records what the device does."""

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Where warm-up, recording and replay happen."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the work without doing it; returns what does it, on the memory that it was recorded with."""
        ...

    def forget(self) -> None:
        """Is told that nothing which was recorded will be replayed any more; further recordings may follow."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, on a stream of their own.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.broken: list[torch.cuda.CUDAGraph] = []  # torch's allocators may ask them for their stream for good

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outside.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return self._recorded(work).replay
        except Exception:
            self._clean_up()
            raise

    def forget(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()  # torch lets no graph into a pool whose graphs are all gone

    def _recorded(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a gang's other members, and the thread that loads data, may go on with their own streams
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                work()
        except Exception:
            self.broken.append(graph)
            raise
        return graph

    def _clean_up(self) -> None:
        """Ends what torch leaves open when a capture breaks off: it then ends the stream's recording, and no more.

        The allocator still keeps the pool for it, and an older torch's generator still takes every draw for a recorded
        one and raises at the next that is not. A recording that succeeds puts the latter right.
        """
        with contextlib.suppress(RuntimeError):  # it was not open: the work raised without breaking the capture
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
        self.forget()
        with contextlib.suppress(RuntimeError):
            self._recorded(lambda: torch.zeros(1, device=self.stream.device))
        self.forget()


@dataclass
class RecordedStep:
    """One recording: the batch that it reads, and what it leaves where the host looks.

    gradients: of the update's parameters, where the optimiser runs outside of the recording.
    norm: the gradient norm, where the step measures it.
    """

    window: list[Batch]
    replay: Callable[[], None]
    gradients: list[Tensor | None]
    norm: Tensor | None


class CudaGraphStep:
    """Stands for a runner's steps: the first ones of each shape run as they are, one is recorded, the rest replay it.

    A recording reads its batch from memory of its own, into which each batch is copied; learning rates, scheduled
    weights and everything else that moves with the step are tensors that the runner fills before. What depends on the
    step otherwise (whether the gradient norm is measured) has a recording of its own, and so has the last, smaller
    batch.

    The whole step is one recording where everything in it stays on the device. Where the optimiser does not, forward
    and backward are recorded and the optimiser runs as it is; where that fails too, the step runs as it is. The run
    says which and why.

    Args:
        runner: whose `perform` or `differentiate` this takes over.
        recorder: records what the device does; another one in tests.
    """

    def __init__(self, runner: Runner, recorder: GraphRecorder) -> None:
        self.runner, self.recorder = runner, recorder
        self.recorded: dict[Shape, RecordedStep] = {}
        self.warm: Counter[Shape] = Counter()
        self.tensors: dict[str, tuple[int, Any]] = {}
        self.whole = True
        obstacle = _obstacle(runner)
        if obstacle:
            self._in_parts(obstacle)
        else:
            runner.perform = self._step

    # The whole step

    def _step(self, window: Sequence[Batch]) -> None:
        runner = self.runner
        shape = _shape(window)
        with self.recorder.apart():
            if self.warm[shape] < WARM_UP:
                self._watched(shape, lambda: runner.execute(window))
                return
            key = (shape, runner.logs_at(runner.steps_done + 1))
            if key not in self.recorded:
                obstacle = self._record(key, window, runner.execute)
                if obstacle:
                    self._in_parts(obstacle)
                    runner.execute(window)
                    return
            self._replay(self.recorded[key], window)

    # Forward and backward only

    def _in_parts(self, obstacle: str) -> None:
        self.whole = False
        self._forget()
        self.runner.perform = self.runner.execute
        self.runner.differentiate = self._gradients
        self.runner.say(
            f"capture: the whole step cannot be one CUDA graph ({obstacle}); forward and backward are captured, the "
            "optimiser runs as it is."
        )

    def _gradients(self, update: Update, window: Sequence[Batch]) -> None:
        runner = self.runner
        shape = (runner.updates.index(update), _shape(window))
        with self.recorder.apart():
            if self.warm[shape] < WARM_UP:
                self._watched(shape, lambda: runner.compute_gradients(update, window))
                return
            if shape not in self.recorded:
                obstacle = self._record(shape, window, lambda own: runner.compute_gradients(update, own), update.parameters)
                if obstacle:
                    self._stop(obstacle)
                    runner.compute_gradients(update, window)
                    return
            self._replay(self.recorded[shape], window, update.parameters)

    def _stop(self, obstacle: str) -> None:
        self._forget()
        self.runner.differentiate = self.runner.compute_gradients
        self.runner.say(f"capture: the step cannot be captured ({obstacle}); the run goes on without.")

    # Both

    def _forget(self) -> None:
        self.recorded.clear()
        self.recorder.forget()

    def _watched(self, shape: Shape, work: Callable[[], None]) -> None:
        """Runs a step as it is; before the last one, notes what a replay would take for unchanging."""
        self.warm[shape] += 1
        if self.warm[shape] == WARM_UP:
            self.tensors = host_state(self.runner.network)
        work()

    def _record(
        self,
        key: Shape,
        window: Sequence[Batch],
        work: Callable[[list[Batch]], None],
        parameters: Sequence[nn.Parameter] = (),
    ) -> str:
        """Records a step of this shape; returns why it could not, in words."""
        changed = _changed(self.tensors, host_state(self.runner.network))
        if changed:
            return f"{changed} changes from step to step on the host"
        own = [{s: {n: v.clone() for n, v in fields.items()} for s, fields in batch.items()} for batch in window]
        before, self.runner.grad_norm = self.runner.grad_norm, None
        try:
            replay = self.recorder.record(lambda: work(own))
        except Exception as error:
            self.runner.restart_scaler()
            return _first_cause(error)
        finally:
            norm, self.runner.grad_norm = self.runner.grad_norm, before
        gradients = [parameter.grad for parameter in parameters]
        self.recorded[key] = RecordedStep(own, replay, gradients, norm)
        return ""

    def _replay(self, recorded: RecordedStep, window: Sequence[Batch], parameters: Sequence[nn.Parameter] = ()) -> None:
        for own, given in zip(recorded.window, window, strict=True):
            for source, fields in given.items():
                for name, value in fields.items():
                    own[source][name].copy_(value)
        recorded.replay()
        for parameter, gradient in zip(parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        if recorded.norm is not None:
            self.runner.grad_norm = recorded.norm


def use_cuda_graph(runner: Runner) -> None:
    """Lets a runner's steps be recorded where its recipe asks for it and the device has graphs; else says why not."""
    if not runner.recipe.uses_cuda_graph(runner.device.type):
        if runner.recipe.compile == "cuda_graph":
            runner.say(
                f"capture: a {runner.device.type.upper()} has no graphs to capture a step in; steps run as they are."
            )
    elif runner.world.size > 1:
        runner.say("capture: with several processes a step is not captured; it runs as it is.")
    elif runner.total_steps:
        CudaGraphStep(runner, CudaRecorder(runner.device))


def _obstacle(runner: Runner) -> str:
    """Why the whole step cannot be recorded, as far as it is known beforehand; empty where nothing speaks against."""
    for update in runner.updates:
        if not stays_on_device(update.optimizer):
            return f"{type(update.optimizer).__name__} reads its learning rate or its step on the host"
    return ""


def _first_cause(error: BaseException) -> str:
    """What went wrong, in words. The end of a capture that broke off raises again, and says no more than that."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _shape(window: Sequence[Batch]) -> Shape:
    """What two batches must share to be done by one recording."""
    return tuple(
        (source, name, value.shape, value.dtype)
        for batch in window
        for source, fields in batch.items()
        for name, value in fields.items()
    )


def host_state(network: nn.Module) -> dict[str, tuple[int, Any]]:
    """What a replay cannot move: numbers that modules keep on the host, and where their tensors lie."""
    found: dict[str, tuple[int, Any]] = {}
    for path, module in network.named_modules():
        own: Mapping[str, Any] = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in own.items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = (id(value), value.data_ptr())
            elif isinstance(value, bool | int | float | str):
                found[f"{path}.{name}"] = (0, value)
    return found


def _changed(before: Mapping[str, tuple[int, Any]], after: Mapping[str, tuple[int, Any]]) -> str:
    return next((name for name in {**before, **after} if before.get(name) != after.get(name)), "")
