"""Emulates a CUDA graph on the CPU: a tape of the kernels of a step, replayed on the recorded tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KernelTape(TorchDispatchMode):
    """Records every kernel with its arguments and results, and undoes its writes.

    As with a CUDA graph, recording has no effect on tensors, and a replay runs no Python of the step: it reads and
    writes the memory of the recording, and host numbers keep their recorded values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) == "aten._local_scalar_dense.default":
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name in ("running_mean", "running_var"):  # BatchNorm's schema does not mark these
                self.overwritten += [
                    (tensor, tensor.clone()) for tensor in tree_leaves(value) if isinstance(tensor, Tensor)
                ]
        result = func(*args, **kwargs)
        outputs = []
        if not any(out.alias_info is not None for out in func._schema.returns):
            outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.kernels.append((func, args, kwargs, outputs))
        return result

    def undo(self) -> None:
        """Restores the tensors that the recorded kernels wrote."""
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)
        self.overwritten.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs in self.kernels:
                result = func(*args, **kwargs)
                new_outputs = (tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
                for output, new_output in zip(outputs, new_outputs, strict=False):
                    output.copy_(new_output)


class TapeRecorder:
    """Records on a `KernelTape` in place of `kdbench.speed.cuda_graph.CudaRecorder`.

    Args:
        failures: the number of recordings that fail first.
    """

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.recordings = self.replays = self.releases = 0

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def release(self) -> None:
        self.releases += 1

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("an illegal operation was captured")
        tape, rng_state = KernelTape(), torch.get_rng_state()
        try:
            with tape:
                work()
        finally:
            torch.set_rng_state(rng_state)
            with torch.no_grad():
                tape.undo()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay
