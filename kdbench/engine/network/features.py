"""Feature extraction: any input or output inside a model, by address, without editing the model."""

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
    """The address of a feature inside one role: a module path, the number of the call (from 1), output or input.

    A named tuple, because it is a dictionary key in the compiled step: the compiler of torch 2.6 rejects dataclasses.
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
    """Returns the full path and the module that `path` names; negative indices count from the end (`blocks.-1`).

    Raises:
        ConfigError: no such module; the message names the nearest path.
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
    """Returns a tensor of a model's output: the output itself, its entry called `name`, or its first tensor."""
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
    """Reads a value of a module without running it.

    Returns:
        `/stats`: running mean and variance of a BatchNorm, (2, channels). `/weights`: the parameters of the module, or
        of the whole model where the address names no module, as one vector (parameters,).
    """
    module = model if feature.is_output else find_module(model, feature.path)[1]
    if feature.side == "weights":
        return torch.cat([parameter.reshape(-1) for parameter in module.parameters()])
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ConfigError(f"{feature}: {type(module).__name__} has no running mean and variance")
    return torch.stack([mean, variance])


class _LastFeature(Exception):
    """Ends a forward once all features have been extracted."""


class FeatureExtractor:
    """Extracts features of each forward of one model, by hooks.

    Args:
        model: hooks are registered on its modules; register before compiling (later hooks never run).
        features: to extract.
        overwritten: features that an in-place operation overwrites later in the forward; they are cloned.
        stop: end the forward once the last feature is available. Has no effect where the output itself is a feature.

    Attributes:
        features: without duplicates, in order.
        inner_features: all features but the model's output.
        handles: of the hooks.
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
        """Returns whether the compiler removes the unused rest of the forward; torch 2.6 cannot trace the exception."""
        return not TRACES_RAISE and torch.compiler.is_compiling() and not self.model.training

    def __call__(self, *inputs: Tensor) -> dict[Feature, Tensor]:
        """Runs the model and returns the features."""
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
