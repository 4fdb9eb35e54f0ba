"""Traces the module calls of one forward pass, with the tensors that enter and leave each module.

`trace_modules` also works on the meta device, where it needs neither memory nor arithmetic. Shape inference uses
the trace to size adapters and to find features that must be cloned. `kdbench inspect` prints the trace.
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
    """Shape and dtype of a tensor that enters or leaves a module.

    Attributes:
        shape: shape, including the batch dimension.
        dtype: element type.
        overwritten: whether a later operation (`out += x`, an in-place ReLU) wrote into the tensor. A hook that
            stores such a tensor has to clone it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    overwritten: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module in a forward pass.

    Attributes:
        path: the module's path in the model (`layer3.0.conv1`); empty for the model itself. For a module that is
            registered under several paths, the first path.
        type: name of the module's class.
        call: number of this call among the module's calls, from 1 (`@K` in a recipe).
        input: first tensor among the module's arguments, or None.
        output: the module's output, or the first tensor in a tuple, list or mapping; None if there is no tensor.
    """

    path: str
    type: str
    call: int
    input: TracedTensor | None
    output: TracedTensor | None


def first_tensor(value: Any) -> Tensor | None:
    """Returns the first tensor in `value`, or None if `value` contains no tensor.

    Args:
        value: a tensor, or a tuple, list or mapping, which is searched recursively. Any other value contains no
            tensor.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((tensor for item in value if (tensor := first_tensor(item)) is not None), None)


class _CallRecorder:
    """Hooks that record each module call with its first input tensor, its first output tensor, and their versions.

    A tensor's version counts in-place writes. A tensor whose version is higher at the end of the forward pass was
    overwritten. The recorder keeps all recorded tensors until the end of the forward pass.
    """

    def __init__(self) -> None:
        self._count_by_path: Counter[str] = Counter()
        self._open_calls: dict[str, list[int]] = {}  # path -> indices of its calls that have not returned
        self._calls: list[tuple[str, str, int]] = []
        self._inputs: dict[int, tuple[Tensor, int]] = {}
        self._outputs: dict[int, tuple[Tensor, int]] = {}

    def register(self, path: str, module: nn.Module) -> list[Any]:
        """Registers the hooks on one module and returns the handles of the hooks."""

        def pre_hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(path, type(module).__name__, (args, kwargs))

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self._leave(path, output)

        return [
            module.register_forward_pre_hook(pre_hook, with_kwargs=True),
            module.register_forward_hook(hook),
        ]

    def module_calls(self) -> list[ModuleCall]:
        """Returns the recorded module calls in the order in which they began. Valid after the forward pass."""
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
    """Runs `model(*inputs)` once without gradients and returns the module calls in the order in which they began.

    The hooks are removed after the run. The model runs in its current mode (train or eval). In train mode the
    statistics of normalisation layers are updated, except on the meta device. Exceptions of the model are not caught.

    Args:
        model: any module.
        inputs: the model's arguments, on the device of the model.

    Returns:
        One entry per call. The first entry is the model itself, with path "". A module that was not called has no
        entry.
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
