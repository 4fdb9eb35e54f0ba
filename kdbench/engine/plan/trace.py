"""Traces the module calls of one forward, with the tensors that enter and leave each module.

`trace_modules` works on the meta device, where shapes cost neither memory nor arithmetic. Shape inference uses it to
size adapters and to find features that must be cloned; `kdbench inspect` prints it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TracedTensor:
    """A tensor that enters or leaves a module.

    Attributes:
        shape: with the batch dimension.
        dtype: its element type.
        overwritten: True if a later operation wrote into it (`out += x`, an in-place ReLU). A hook that keeps it has to
            clone it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    overwritten: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        path: the module's path in the model (`layer3.0.conv1`); empty for the model itself. A module that is registered
            under several paths has the first of them.
        type: the name of its class.
        call: number of this call of the module, from 1 (`@K` in a recipe).
        input: the first tensor of its arguments, or None.
        output: its output, or the first tensor in it if that is a tuple, list or mapping; None if there is no tensor.
    """

    path: str
    type: str
    call: int
    input: TracedTensor | None
    output: TracedTensor | None


def first_tensor(value: Any) -> Tensor | None:
    """Returns the value if it is a tensor, or the first tensor in a tuple, list or mapping; otherwise None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((tensor for item in value if (tensor := first_tensor(item)) is not None), None)


class _CallRecorder:
    """Hooks that record each call with its first input and output tensor, and the version of the tensors then.

    A tensor's version counts the in-place writes into it and into its base: a higher version at the end of the forward
    is an overwritten tensor. The recorder holds the tensors until then.
    """

    def __init__(self) -> None:
        self._count_by_path: Counter[str] = Counter()
        self._open_calls: dict[str, list[int]] = {}  # path -> indices of its calls that have not returned
        self._calls: list[tuple[str, str, int]] = []
        self._inputs: dict[int, tuple[Tensor, int]] = {}
        self._outputs: dict[int, tuple[Tensor, int]] = {}

    def register(self, path: str, module: nn.Module) -> list[Any]:
        """Registers the hooks; returns their handles."""

        def pre_hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(path, type(module).__name__, (args, kwargs))

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self._leave(path, output)

        return [
            module.register_forward_pre_hook(pre_hook, with_kwargs=True),
            module.register_forward_hook(hook),
        ]

    def module_calls(self) -> list[ModuleCall]:
        """Returns the calls in the order of their start; called after the forward."""
        return [
            ModuleCall(*call, _traced(self._inputs.get(index)), _traced(self._outputs.get(index)))
            for index, call in enumerate(self._calls)
        ]

    def _enter(self, path: str, kind: str, arguments: Any) -> None:
        index = len(self._calls)
        self._count_by_path[path] += 1
        self._open_calls.setdefault(path, []).append(index)
        self._calls.append((path, kind, self._count_by_path[path]))
        tensor = first_tensor(arguments)
        if tensor is not None:
            self._inputs[index] = (tensor, tensor._version)

    def _leave(self, path: str, output: Any) -> None:
        index = self._open_calls[path].pop()
        tensor = first_tensor(output)
        if tensor is not None:
            self._outputs[index] = (tensor, tensor._version)


def _traced(record: tuple[Tensor, int] | None) -> TracedTensor | None:
    if record is None:
        return None
    tensor, version = record
    return TracedTensor(tuple(tensor.shape), tensor.dtype, tensor._version != version)


def trace_modules(model: nn.Module, *inputs: Any) -> list[ModuleCall]:
    """Runs `model(*inputs)` once without gradients and returns its module calls in the order of their start.

    The hooks are removed afterwards, and the mode (train or eval) is the caller's choice. In train mode the statistics
    of normalisation layers are updated as in any forward, except on meta. Errors of the model's forward are not caught.

    Args:
        model: any module; nothing is computed on meta.
        inputs: its arguments, on the same device.

    Returns:
        One entry for each call; the first is the model itself, with path "". Modules that were not called have none.
    """
    recorder = _CallRecorder()
    handles = [handle for path, module in model.named_modules() for handle in recorder.register(path, module)]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.module_calls()
