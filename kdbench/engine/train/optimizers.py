"""Builds optimizers of torch.optim with their parameter groups, and saves and loads their state."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdbench.config.schema import OptimizerConfig
from kdbench.engine.distributed.dtensor import is_sharded
from kdbench.engine.network.features import find_module
from kdbench.errors import ConfigError, Location, suggest
from kdbench.registry import OPTIMIZERS, Entry

UNSUPPORTED = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it accepts sparse gradients only",
}
"""Optimizers of torch.optim that the training step cannot use, with the reason."""


FUSED = ("SGD", "Adam", "AdamW")
"""Optimizers with one kernel for the whole update on CUDA, which also applies the loss scale of fp16 on the device."""


def build_optimizer(
    config: OptimizerConfig,
    modules: Mapping[str, nn.Module],
    only: Collection[nn.Parameter] | None = None,
    *,
    capture: bool = False,
) -> Optimizer:
    """Builds the optimizer of one update (a set of trained networks with their loss terms).

    The first parameter group contains the parameters that no entry of `config.groups` matches. It is followed by one
    group per entry, in the order of the recipe; empty groups are omitted. Within a group, parameters are in the order
    of `modules` and of their `named_parameters`, so that the same recipe always yields the same optimizer state. Each
    group has the key `initial_lr` for `set_lr_factor`. Unless the recipe chooses `foreach` or `fused`, the fused
    implementation is used on CUDA if the optimizer has one, otherwise the multi-tensor implementation (`foreach`).

    An entry's `path` names a module or a parameter, with the role (`student.layer4`) or without (`layer4`, in every
    role that has one); negative indices count from the end. An entry's `type` is the class of a module (all
    parameters inside the module match), `norm` (all normalisation layers) or `bias`. An entry with `path` and `type`
    matches the parameters that match both. `norm` and `bias` may match no parameter, because they state a policy. It
    is an error if a path or a class matches no parameter.

    Args:
        config: type, parameters and groups of the optimizer.
        modules: role or term name -> module whose parameters may train.
        only: parameters that a term of this update reaches; None: all. Parameters with `requires_grad=False` are
            always left out.
        capture: whether to keep learning rate and step count on the device, as a CUDA graph needs. Ignored if the
            optimizer does not support that (see `stays_on_device`).

    Raises:
        ConfigError: unknown optimizer or parameter, a value that the optimizer rejects, an entry of `groups` that
            matches nothing, or nothing to train.
    """
    entry = OPTIMIZERS.check(config.type, config.params, config.location)
    if config.type in UNSUPPORTED:
        raise ConfigError(f"{config.location}: optimizer {config.type!r} is not supported: {UNSUPPORTED[config.type]}.")
    allowed = None if only is None else {id(parameter) for parameter in only}
    candidates = [p for p in _named_parameters(modules) if p.value.requires_grad]
    parameters = [p for p in candidates if allowed is None or id(p.value) in allowed]
    if not parameters:
        raise ConfigError(
            f"{config.location}: nothing to train: {', '.join(modules) or 'no model'} has no trainable parameter that "
            "a term reaches."
        )
    groups = _parameter_groups(config, modules, parameters)
    params = _implementation_params(config, entry, parameters, capture)
    try:
        optimizer = entry.load()(groups, **params)
    except ValueError as error:  # torch checks ranges itself, such as `Invalid learning rate: -1`
        raise ConfigError(f"{config.location}: optimizer {config.type!r}: {error}") from None
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        if capture and (group.get("capturable") or group.get("fused")):
            group["lr"] = torch.tensor(group["initial_lr"], device=group["params"][0].device)
    return optimizer


def _parameter_groups(
    config: OptimizerConfig, modules: Mapping[str, nn.Module], parameters: Sequence[_NamedParameter]
) -> list[dict[str, Any]]:
    """Builds torch's parameter groups. A parameter is in the group of the first matching entry of `config.groups`.

    Raises:
        ConfigError: an entry other than `norm` and `bias` matches no parameter.
    """
    rules = [_GroupRule.parse(group, i, config, modules) for i, group in enumerate(config.groups)]
    members: list[list[Tensor]] = [[] for _ in rules]
    default_group: list[Tensor] = []
    for parameter in parameters:
        index = next((i for i, rule in enumerate(rules) if rule.matches(parameter)), None)
        (default_group if index is None else members[index]).append(parameter.value)
    for rule, matched in zip(rules, members, strict=True):
        if not matched and not rule.is_policy:
            matched_earlier = any(rule.matches(parameter) for parameter in parameters)
            reason = "an earlier group contains all of it" if matched_earlier else "none of it is trained in this stage"
            raise ConfigError(f"{rule.location}: {rule.label} matches no remaining parameter: {reason}.")
    groups: list[dict[str, Any]] = [{"params": default_group}] if default_group else []
    return groups + [{"params": tensors, **r.overrides} for r, tensors in zip(rules, members, strict=True) if tensors]


def _implementation_params(
    config: OptimizerConfig, entry: Entry, parameters: Sequence[_NamedParameter], capture: bool
) -> dict[str, Any]:
    """Returns the constructor arguments of the optimizer, with the choice of implementation (fused or `foreach`)."""
    params = {key: tuple(v) if isinstance(v, list) else v for key, v in config.params.items()}
    if not {"foreach", "fused", "differentiable"} & set(params):
        devices = {parameter.value.device.type for parameter in parameters}
        # torch's multi-tensor kernels reject lists of sharded and full tensors.
        sharded = any(is_sharded(parameter.value) for parameter in parameters)
        if devices == {"cuda"} and not sharded and config.type in FUSED:
            params["fused"] = True
        elif "foreach" in entry.parameters:
            params["foreach"] = devices <= {"cpu", "cuda"} and not sharded
    if capture and "capturable" in entry.parameters:
        params.setdefault("capturable", True)
    return params


def stays_on_device(optimizer: Optimizer) -> bool:
    """Returns whether a step of the optimizer reads nothing on the host, so that it can be part of a CUDA graph."""
    return all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


_IMPLEMENTATION_KEYS = ("lr", "foreach", "fused", "capturable")
"""Keys of a group that select an implementation, not a result: a checkpoint of one loads into another."""


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the optimizer's state dict, with learning rates as numbers instead of tensors.

    The state dict does not depend on the implementation (fused or `foreach`).
    """
    state = optimizer.state_dict()
    groups = [{**group, "lr": group["initial_lr"]} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a state dict that `optimizer_state` returned. The implementation (fused or `foreach`) stays as it is."""
    settings_of_groups = [
        {key: group[key] for key in _IMPLEMENTATION_KEYS if key in group} for group in optimizer.param_groups
    ]
    groups = [{**saved, **settings} for saved, settings in zip(state["param_groups"], settings_of_groups, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, settings in zip(optimizer.param_groups, settings_of_groups, strict=True):
        group["lr"] = settings["lr"]  # the same tensor object: loading copied it


def set_lr_factor(optimizer: Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `initial_lr * factor`."""
    for group in optimizer.param_groups:
        value = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # a recorded step reads the rate from the device
            group["lr"].fill_(value)
        else:
            group["lr"] = value


@dataclass(frozen=True)
class _NamedParameter:
    """A parameter with its full name and the modules that contain it.

    Attributes:
        name: name with the role, such as `student.layer1.0.conv1.weight`.
        parents: the modules that contain the parameter, outermost first.
    """

    name: str
    value: nn.Parameter
    parents: tuple[nn.Module, ...]


def _named_parameters(modules: Mapping[str, nn.Module]) -> Iterator[_NamedParameter]:
    """Yields every parameter of the modules once, even if several roles share it."""
    visited: set[int] = set()
    for role, model in modules.items():
        by_path = dict(model.named_modules(remove_duplicate=False))
        for path, parameter in model.named_parameters():
            if id(parameter) in visited:
                continue
            visited.add(id(parameter))
            parts = path.split(".")
            parents = tuple(by_path[".".join(parts[:i])] for i in range(len(parts)))
            yield _NamedParameter(f"{role}.{path}", parameter, parents)


@dataclass(frozen=True)
class _GroupRule:
    """One entry of an optimizer's `groups`, which matches parameters by path, by module type, or by a policy.

    The policies are `norm` (all normalisation layers) and `bias`.
    """

    location: Location
    label: str
    prefixes: tuple[str, ...] | None
    type: str | None
    overrides: Mapping[str, Any]

    @property
    def is_policy(self) -> bool:
        return self.prefixes is None and self.type in ("norm", "bias")

    def matches(self, parameter: _NamedParameter) -> bool:
        if self.prefixes is not None:
            inside = any(parameter.name == p or parameter.name.startswith(f"{p}.") for p in self.prefixes)
            if not inside:
                return False
        match self.type:
            case None:
                return True
            case "norm":
                return is_norm(parameter.parents[-1])
            case "bias":
                last = parameter.name.rsplit(".", 1)[-1]
                return last == "bias" or last.endswith("_bias")
        return any(type(module).__name__ == self.type for module in parameter.parents)

    @classmethod
    def parse(
        cls, group: Mapping[str, Any], index: int, config: OptimizerConfig, modules: Mapping[str, nn.Module]
    ) -> _GroupRule:
        location = replace(config.location, key=f"{config.location.key}.groups[{index}]".lstrip("."))
        path, kind = group.get("path"), group.get("type")
        if path is None and kind is None:
            raise ConfigError(f"{location}: a group needs `path` or `type`, which select its parameters.")
        overrides = {key: value for key, value in group.items() if key not in ("path", "type")}
        OPTIMIZERS.check(config.type, overrides, location)
        label = " and ".join(f"{key} {group[key]!r}" for key in ("path", "type") if key in group)
        prefixes = None if path is None else _prefixes(str(path), modules, location)
        if kind is not None and kind not in ("norm", "bias"):
            classes = {type(module).__name__ for model in modules.values() for module in model.modules()}
            if kind not in classes:
                raise ConfigError(f"{location}: no module of type {kind!r}.{suggest(kind, classes | {'norm', 'bias'})}")
        return cls(location, label, prefixes, kind, overrides)


def _prefixes(path: str, modules: Mapping[str, nn.Module], location: Location) -> tuple[str, ...]:
    """Returns the full names, with the role (`student.layer4`), of all modules and parameters that match `path`."""
    prefixes, names = [], list(modules)
    for role, model in modules.items():
        parameters = dict(model.named_parameters())
        names += [*parameters, *(name for name, _ in model.named_modules() if name)]
        if path == role:
            prefixes.append(role)
        for inner in {path, path.removeprefix(f"{role}.")}:
            if inner in parameters:
                prefixes.append(f"{role}.{inner}")
                continue
            try:
                prefixes.append(f"{role}.{find_module(model, inner)[0]}")
            except ConfigError:
                continue
    if not prefixes:
        raise ConfigError(f"{location}: no module or parameter {path!r} in {', '.join(modules)}.{suggest(path, names)}")
    return tuple(prefixes)


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a normalisation layer.

    These are torch's normalisation layers and all classes with a name like `RMSNorm` or `LayerNorm2d`.
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, norms) or re.search(r"Norm(\dd)?$", type(module).__name__) is not None
