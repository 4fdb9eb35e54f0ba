"""What happens inside a model during one forward pass: which modules are called, and what comes out of each.

`trace` works on the meta device, so that shapes cost neither memory nor arithmetic. The plan uses it to size adapters
and to find features that must be cloned; `kdbench inspect` prints it.
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
    """A tensor on its way into or out of a module.

    Attributes:
        shape: with the batch dimension.
        dtype: its element type.
        overwritten: something wrote into it after the module was done with it (`out += x`, an in-place ReLU): to keep
            the value that the module itself gave (or, for an input, was given), a hook has to clone it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    overwritten: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        path: where the module stands in the model (`layer3.0.conv1`); the model itself is the empty path. A module
            that is registered at several places has the first of its paths.
        type: the name of its class.
        call: which call of this module it is, from 1 (`@K` in a recipe).
        input: the first tensor among its arguments, or None when there is none.
        output: its output, or the first tensor of a tuple, list or mapping; None when there is none.
    """

    path: str
    type: str
    call: int
    input: TracedTensor | None
    output: TracedTensor | None


def first_tensor(value: Any) -> Tensor | None:
    """Returns the value itself if it is a tensor, else the first tensor in a tuple, list or mapping, else None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((found for item in value if (found := first_tensor(item)) is not None), None)


def trace_modules(model: nn.Module, *inputs: Any) -> list[ModuleCall]:
    """Runs `model(*inputs)` once without gradients and lists the calls of its modules in the order of their start.

    The model stays as it was: hooks are removed, its mode (train or eval) is the caller's choice. In train mode the
    statistics of normalisation layers move as in any forward pass; on the meta device there are none to move.
    An error of the model's own forward passes through unchanged.

    Args:
        model: any module; on `meta` nothing is computed.
        inputs: its arguments, on the same device.

    Returns:
        One entry per call; the model itself is the first, with path "". Modules that were not called are missing.
    """
    calls: Counter[str] = Counter()
    begun: list[tuple[str, str, int]] = []
    # Index into `begun` -> the tensor and the number of writes into it when the hook saw it. Keeping the tensors makes
    # the final comparison possible; a view counts together with the tensor that it looks at.
    entered: dict[int, tuple[Tensor, int]] = {}
    left: dict[int, tuple[Tensor, int]] = {}
    open_calls: dict[str, list[int]] = {}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[path] += 1
        open_calls.setdefault(path, []).append(len(begun))
        tensor = first_tensor((args, kwargs))
        if tensor is not None:
            entered[len(begun)] = (tensor, tensor._version)
        begun.append((path, type(module).__name__, calls[path]))

    def after(path: str, output: Any) -> None:
        index = open_calls[path].pop()
        tensor = first_tensor(output)
        if tensor is not None:
            left[index] = (tensor, tensor._version)

    handles = []
    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: before(path, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda module, args, output, path=path: after(path, output)))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()

    def signal(seen: tuple[Tensor, int] | None) -> TracedTensor | None:
        if seen is None:
            return None
        tensor, version = seen
        return TracedTensor(tuple(tensor.shape), tensor.dtype, tensor._version != version)

    return [ModuleCall(*call, signal(entered.get(i)), signal(left.get(i))) for i, call in enumerate(begun)]
