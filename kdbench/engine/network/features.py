"""Any input or output inside a model, by address, without editing the model."""

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
    """What to capture inside one role: a module path, which of its calls (from 1), and its output or its input.

    A tuple, because it is a key in the compiled step, where the compiler of torch 2.6 takes no dataclass.
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
    module, walked = model, []
    for part in path.split("."):
        children = dict(module.named_children())
        if part.lstrip("-").isdigit() and part.startswith("-") and len(children) >= -int(part):
            part = list(children)[int(part)]
        if part not in children:
            paths = [name for name, _ in model.named_modules() if name]
            kind = type(model).__name__
            raise ConfigError(f"{where}: {kind} has no module {path!r}.{suggest(path, paths)}".lstrip(": "))
        module = children[part]
        walked.append(part)
    return ".".join(walked), module


def model_output(output: Any, name: str = "logits") -> Tensor:
    """Returns the tensor that a model's output means by `name`: itself, its entry of that name, or its first tensor."""
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
    raise ConfigError(f"a model's output must hold a tensor called {name!r}; got {type(output).__name__}")


def module_state(model: nn.Module, feature: Feature) -> Tensor:
    """Returns what is read of a module without running it.

    `/stats`: running mean and variance of a BatchNorm, (2, channels). `/weights`: its parameters as one vector; of the
    whole model where the address names no module.
    """
    module = model if feature.is_output else find_module(model, feature.path)[1]
    if feature.side == "weights":
        return torch.cat([parameter.reshape(-1) for parameter in module.parameters()])
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ConfigError(f"{feature}: {type(module).__name__} keeps no running mean and variance")
    return torch.stack([mean, variance])


class _LastFeature(Exception):
    """Ends a forward once nothing that comes later is wanted."""


class FeatureExtractor:
    """Hooks on one model that keep the wanted features of each forward.

    Args:
        model: hooks are set on its modules; set them before compiling the model (later ones never fire).
        features: what to keep.
        overwritten: features that an in-place operation overwrites later in the forward: these are cloned.
        stop: end the forward once the last wanted feature is there. Only when the output itself is not wanted.
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
        self.inner = tuple(feature for feature in self.features if not feature.is_output)
        self.stop = stop and len(self.inner) == len(self.features) > 0
        self.active = False
        self.kept: dict[Feature, Tensor] = {}
        self.calls: dict[str, int] = {}
        by_module: dict[tuple[str, str], list[Feature]] = {}
        for feature in self.inner:
            by_module.setdefault((find_module(model, feature.path)[0], feature.side), []).append(feature)
        self.handles = []
        for (path, side), wanted in by_module.items():
            module, hook = model.get_submodule(path), self._hook(path, wanted, overwritten)
            # An input is taken before the module runs: an in-place module overwrites it.
            add = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
            self.handles.append(add(hook, with_kwargs=True))

    def _hook(self, path: str, wanted: list[Feature], overwritten: frozenset[Feature]) -> Any:
        repeated = any(feature.call != 1 for feature in wanted)
        counter = f"{path}/{wanted[0].side}"

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], *output: Any) -> None:
            if not self.active:
                return
            call = 1
            if repeated:
                call = self.calls.get(counter, 0) + 1
                self.calls[counter] = call
            for feature in wanted:
                if feature.call == call and feature not in self.kept:
                    value = model_output(output[0] if output else (*inputs, *named.values()))
                    self.kept[feature] = value.clone() if feature in overwritten else value
            if self.stop and len(self.kept) == len(self.inner) and not self._compiler_drops_rest():
                raise _LastFeature

        return hook

    def _compiler_drops_rest(self) -> bool:
        """Whether the compiler, which cannot follow a raise in torch 2.6, leaves out what nobody reads by itself."""
        return not TRACES_RAISE and torch.compiler.is_compiling() and not self.model.training

    def __call__(self, *inputs: Tensor) -> dict[Feature, Tensor]:
        """Runs the model and returns the wanted features."""
        self.kept = {}
        self.calls = {}
        self.active = True
        try:
            output = self.model(*inputs)
        except _LastFeature:
            output = None
        finally:
            self.active = False
        result = self.kept
        self.kept = {}  # a feature kept here would keep the whole autograd graph alive
        for feature in self.features:
            if feature.is_output:
                result[feature] = model_output(output, feature.path)
        return result

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
