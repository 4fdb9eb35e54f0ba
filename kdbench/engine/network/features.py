"""Feature extraction: reads the input or output of any module of a model by hooks, without editing the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdbench.errors import ConfigError, Location, suggest

OUTPUT_NAMES = ("logits", "output", "image")
"""Names of a model's own output. When the output is a mapping or a named tuple, they name its entry."""


TRACES_RAISE = not torch.__version__.startswith("2.6.")


class Feature(NamedTuple):
    """The address of a feature inside one role, such as `layer3`, `layer3@2` (second call) or `layer3/in` (input).

    This class is a named tuple because features are dictionary keys in the compiled step, and the compiler of torch
    2.6 rejects dataclasses as keys.

    Attributes:
        path: path of the module. `logits` is the model's output.
        call: number of the module's call within one forward pass, from 1.
        side: output or input of the module, or its BatchNorm statistics (`stats`) or weights (`weights`).
    """

    path: str = "logits"
    call: int = 1
    side: Literal["out", "in", "stats", "weights"] = "out"

    def __str__(self) -> str:
        return f"{self.path}{f'@{self.call}' if self.call != 1 else ''}{'' if self.side == 'out' else '/' + self.side}"

    @property
    def is_output(self) -> bool:
        return self.path in OUTPUT_NAMES


def find_module(model: nn.Module, path: str, where: Location | str = "") -> tuple[str, nn.Module]:
    """Returns the full path of the module that `path` names, and the module.

    Args:
        path: module path, in which negative indices count from the end (`blocks.-1`).

    Raises:
        ConfigError: the model has no such module. The message names the nearest path.
    """
    module, names = model, []
    for part in path.split("."):
        children = dict(module.named_children())
        if part.lstrip("-").isdigit() and part.startswith("-") and len(children) >= -int(part):
            part = list(children)[int(part)]
        if part not in children:
            paths = [name for name, _ in model.named_modules() if name]
            kind = type(model).__name__
            raise ConfigError(f"{where}: {kind} has no module {path!r}.{suggest(path, paths)}".lstrip(": "))
        module = children[part]
        names.append(part)
    return ".".join(names), module


def model_output(output: Any, name: str = "logits") -> Tensor:
    """Returns one tensor of a model's output.

    The tensor is the output itself if it is a tensor, else the entry `name` of the output, else the output's first
    tensor.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        candidates: Iterable[Any] = [output[name]] if name in output else output.values()
    elif hasattr(output, name):
        candidates = [getattr(output, name)]
    else:
        candidates = output if isinstance(output, tuple | list) else ()
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    raise ConfigError(f"a model's output must contain a tensor called {name!r}; got {type(output).__name__}")


def module_state(model: nn.Module, feature: Feature) -> Tensor:
    """Returns the BatchNorm statistics or the weights of a module, without a forward pass.

    Returns:
        For `/stats`: running mean and variance of a BatchNorm, (2, channels). For `/weights`: all parameters of the
        module (of the whole model if the address names no module) as one vector (parameters,).
    """
    module = model if feature.is_output else find_module(model, feature.path)[1]
    if feature.side == "weights":
        return torch.cat([parameter.reshape(-1) for parameter in module.parameters()])
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ConfigError(f"{feature}: {type(module).__name__} has no running mean and variance")
    return torch.stack([mean, variance])


class _LastFeature(Exception):
    """Raised by a hook to end a forward pass once all features have been extracted."""


class FeatureExtractor:
    """Extracts features in each forward pass of one model, by hooks.

    Args:
        model: the model, on whose modules hooks are registered. It must not be compiled yet, because hooks of a
            compiled model do not run.
        features: the features to extract.
        overwritten: features that a later in-place operation overwrites. They are cloned.
        stop: whether the forward pass ends once the last feature is available. Has no effect if the model's
            output is a feature.

    Attributes:
        features: the features in their order, without duplicates.
        inner_features: all features except the model's output.
        handles: handles of the registered hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Iterable[Feature],
        *,
        overwritten: frozenset[Feature] = frozenset(),
        stop: bool = False,
    ) -> None:
        self.model = model
        self.features = tuple(dict.fromkeys(features))
        self.inner_features = tuple(feature for feature in self.features if not feature.is_output)
        self.stop = stop and len(self.inner_features) == len(self.features) > 0
        self.active = False
        self.values: dict[Feature, Tensor] = {}
        self.calls: dict[str, int] = {}
        by_module: dict[tuple[str, str], list[Feature]] = {}
        for feature in self.inner_features:
            by_module.setdefault((find_module(model, feature.path)[0], feature.side), []).append(feature)
        self.handles = []
        for (path, side), module_features in by_module.items():
            module, hook = model.get_submodule(path), self._hook(path, module_features, overwritten)
            # An input is taken before the module runs, because an in-place module overwrites it.
            register = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
            self.handles.append(register(hook, with_kwargs=True))

    def _hook(self, path: str, features: list[Feature], overwritten: frozenset[Feature]) -> Any:
        counts_calls = any(feature.call != 1 for feature in features)
        counter = f"{path}/{features[0].side}"

        def hook(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
            if not self.active:
                return
            call = 1
            if counts_calls:
                call = self.calls.get(counter, 0) + 1
                self.calls[counter] = call
            for feature in features:
                if feature.call == call and feature not in self.values:
                    value = model_output(output[0] if output else (*inputs, *kwargs.values()))
                    self.values[feature] = value.clone() if feature in overwritten else value
            complete = len(self.values) == len(self.inner_features)
            if self.stop and complete and not self._compiler_removes_rest():
                raise _LastFeature

        return hook

    def _compiler_removes_rest(self) -> bool:
        """Returns whether a hook need not raise `_LastFeature`, because the step is compiled by torch 2.6.

        The compiler removes unused operations itself, and the compiler of torch 2.6 cannot trace the exception.
        """
        return not TRACES_RAISE and torch.compiler.is_compiling() and not self.model.training

    def __call__(self, *inputs: Tensor) -> dict[Feature, Tensor]:
        """Runs the model on the given inputs and returns feature -> tensor."""
        self.values = {}
        self.calls = {}
        self.active = True
        try:
            output = self.model(*inputs)
        except _LastFeature:
            output = None
        finally:
            self.active = False
        result = self.values
        self.values = {}  # a reference here would keep the autograd graph of the whole step alive
        for feature in self.features:
            if feature.is_output:
                result[feature] = model_output(output, feature.path)
        return result

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()
