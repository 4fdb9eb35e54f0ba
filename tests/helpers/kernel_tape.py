"""A CUDA graph for the CPU: a tape of the kernels of a step, on the very tensors that it was recorded with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KernelTape(TorchDispatchMode):
    """Notes every kernel with its arguments and results, and undoes what it did.

    As with a CUDA graph, recording changes nothing, and a replay runs no Python of the step: it reads and writes the
    memory of the recording, and what was a number on the host stays that number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) == "aten._local_scalar_dense.default":
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name in ("running_mean", "running_var"):  # BatchNorm's schema does not tell
                self.before += [(tensor, tensor.clone()) for tensor in tree_leaves(given) if isinstance(tensor, Tensor)]
        result = func(*args, **kwargs)
        made = []
        if not any(out.alias_info is not None for out in func._schema.returns):
            made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.kernels.append((func, args, kwargs, made))
        return result

    def undo(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.kernels:
                result = func(*args, **kwargs)
                for kept, new in zip(made, (t for t in tree_leaves(result) if isinstance(t, Tensor)), strict=False):
                    kept.copy_(new)


class TapeRecorder:
    """What `kdbench.speed.cuda_graph` records with here. `fails`: how many recordings fail first."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.recordings = self.replays = self.forgotten = 0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        yield

    def forget(self) -> None:
        self.forgotten += 1

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("an illegal operation was captured")
        tape, draws = KernelTape(), torch.get_rng_state()
        try:
            with tape:
                work()
        finally:
            torch.set_rng_state(draws)
            with torch.no_grad():
                tape.undo()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay
