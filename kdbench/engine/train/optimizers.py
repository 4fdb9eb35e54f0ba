"""From the recipe's `optimizer` to an optimiser of torch.optim with its parameter groups."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdbench.config.schema import OptimizerConfig
from kdbench.engine.distributed.dtensor import is_sharded
from kdbench.engine.network.features import find_module
from kdbench.errors import ConfigError, Location, suggest
from kdbench.registry import OPTIMIZERS

UNFIT = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it takes sparse gradients only",
}
"""Optimisers of torch.optim that the training step cannot drive, and why."""


FUSED = ("SGD", "Adam", "AdamW")
"""Those that have one kernel for the whole update on CUDA; it also takes the loss scale of fp16 without a host read."""


def build_optimizer(
    config: OptimizerConfig,
    modules: Mapping[str, nn.Module],
    only: Collection[nn.Parameter] | None = None,
    *,
    capture: bool = False,
) -> Optimizer:
    """Builds the optimiser of one update.

    The first parameter group holds what no entry of `config.groups` matches; then follow the entries' groups in the
    order of the recipe (empty ones are left out). Within a group, parameters stand in the order of `modules` and of
    their `named_parameters`, so that the same recipe always gives the same optimiser state. Each group has the key
    `initial_lr` for `set_lr_factor`. On CUDA the fused implementation is used where there is one, else, as on the CPU,
    the multi-tensor one (`foreach`), unless the recipe chooses `foreach` or `fused` itself.

    An entry's `path` names a module or a parameter, with the role (`student.layer4`) or without (`layer4`, in every
    role that has one); negative indices count from the end. Its `type` is the class of a module (everything inside it
    matches), `norm` (all normalisation layers) or `bias`. With both, both must hold. `norm` and `bias` may match
    nothing, because they state a policy; a path or a class that matches nothing is a mistake.

    Args:
        config: type, parameters and groups.
        modules: role or term name -> module whose parameters may train.
        only: the parameters that a term of this update reaches; None: all. Those without gradient are always left out.
        capture: keep learning rate and step count on the device, where the optimiser can (`stays_on_device`).

    Raises:
        ConfigError: unknown optimiser or parameter, a value that the optimiser refuses, an entry of `groups` that
            matches nothing, or nothing to train.
    """
    entry = OPTIMIZERS.check(config.type, config.params, config.location)
    if config.type in UNFIT:
        raise ConfigError(f"{config.location}: optimizer {config.type!r} cannot be used here: {UNFIT[config.type]}.")
    allowed = None if only is None else {id(parameter) for parameter in only}
    owned = [o for o in _owned(modules) if o.value.requires_grad and (allowed is None or id(o.value) in allowed)]
    if not owned:
        raise ConfigError(
            f"{config.location}: nothing to train: {', '.join(modules) or 'no model'} has no parameter that is trainable "
            "and that a term reaches."
        )

    entries = [_Group.read(group, i, config, modules) for i, group in enumerate(config.groups)]
    members: list[list[Tensor]] = [[] for _ in entries]
    rest: list[Tensor] = []
    for parameter in owned:
        chosen = next((i for i, group in enumerate(entries) if group.matches(parameter)), None)
        (rest if chosen is None else members[chosen]).append(parameter.value)
    for group, found in zip(entries, members, strict=True):
        if not found and not group.is_policy:
            taken = any(group.matches(parameter) for parameter in owned)
            reason = "an earlier group has all of it" if taken else "none of it is trained in this stage"
            raise ConfigError(f"{group.place}: {group.label} matches no parameter that is left: {reason}.")

    groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
    groups += [{"params": found, **g.overrides} for g, found in zip(entries, members, strict=True) if found]
    params = {key: tuple(v) if isinstance(v, list) else v for key, v in config.params.items()}
    if not {"foreach", "fused", "differentiable"} & set(params):
        kinds = {parameter.value.device.type for parameter in owned}
        parts = any(is_sharded(parameter.value) for parameter in owned)  # torch takes no list of whole and parted tensors
        if kinds == {"cuda"} and not parts and config.type in FUSED:
            params["fused"] = True
        elif "foreach" in entry.parameters:
            params["foreach"] = kinds <= {"cpu", "cuda"} and not parts
    if capture and "capturable" in entry.parameters:
        params.setdefault("capturable", True)
    try:
        optimizer = entry.load()(groups, **params)
    except ValueError as error:  # torch checks ranges itself, such as `Invalid learning rate: -1`
        raise ConfigError(f"{config.location}: optimizer {config.type!r}: {error}") from None
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        if capture and (group.get("capturable") or group.get("fused")):
            group["lr"] = torch.tensor(group["initial_lr"], device=group["params"][0].device)
    return optimizer


def stays_on_device(optimizer: Optimizer) -> bool:
    """Whether a step of the optimiser reads nothing on the host, so that a CUDA graph of it may be replayed."""
    return all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


_WAYS = ("lr", "foreach", "fused", "capturable")
"""How an optimiser computes, not what: a checkpoint made in one way is read in another."""


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's state with its learning rates as numbers, as they are in every way of computing."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": group["initial_lr"]} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Reads what `optimizer_state` gave, and goes on computing in this optimiser's own way."""
    own = [{key: group[key] for key in _WAYS if key in group} for group in optimizer.param_groups]
    groups = [{**saved, **ways} for saved, ways in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, ways in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = ways["lr"]  # the tensor itself: loading makes a copy


def set_lr_factor(optimizer: Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `initial_lr * factor`; never multiplies in place, so errors cannot add up."""
    for group in optimizer.param_groups:
        value = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # a captured step reads the rate from the device
            group["lr"].fill_(value)
        else:
            group["lr"] = value


@dataclass(frozen=True)
class _Owned:
    """A parameter with its full name (`student.layer1.0.conv1.weight`) and the modules around it, outermost first."""

    name: str
    value: nn.Parameter
    around: tuple[nn.Module, ...]


def _owned(modules: Mapping[str, nn.Module]) -> Iterator[_Owned]:
    seen: set[int] = set()
    for role, model in modules.items():
        by_path = dict(model.named_modules(remove_duplicate=False))
        for path, parameter in model.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            parts = path.split(".")
            around = tuple(by_path[".".join(parts[:i])] for i in range(len(parts)))
            yield _Owned(f"{role}.{path}", parameter, around)


@dataclass(frozen=True)
class _Group:
    """One entry of `groups`, ready to match."""

    place: Location
    label: str
    prefixes: tuple[str, ...] | None
    type: str | None
    overrides: Mapping[str, Any]

    @property
    def is_policy(self) -> bool:
        return self.prefixes is None and self.type in ("norm", "bias")

    def matches(self, parameter: _Owned) -> bool:
        if self.prefixes is not None:
            inside = any(parameter.name == p or parameter.name.startswith(f"{p}.") for p in self.prefixes)
            if not inside:
                return False
        match self.type:
            case None:
                return True
            case "norm":
                return is_norm(parameter.around[-1])
            case "bias":
                last = parameter.name.rsplit(".", 1)[-1]
                return last == "bias" or last.endswith("_bias")
        return any(type(module).__name__ == self.type for module in parameter.around)

    @classmethod
    def read(
        cls, group: Mapping[str, Any], index: int, config: OptimizerConfig, modules: Mapping[str, nn.Module]
    ) -> _Group:
        place = replace(config.location, key=f"{config.location.key}.groups[{index}]".lstrip("."))
        path, kind = group.get("path"), group.get("type")
        if path is None and kind is None:
            raise ConfigError(f"{place}: a group needs `path` or `type`, to say which parameters it holds.")
        overrides = {key: value for key, value in group.items() if key not in ("path", "type")}
        OPTIMIZERS.check(config.type, overrides, place)
        label = " and ".join(f"{key} {group[key]!r}" for key in ("path", "type") if key in group)
        prefixes = None if path is None else _prefixes(str(path), modules, place)
        if kind is not None and kind not in ("norm", "bias"):
            classes = {type(module).__name__ for model in modules.values() for module in model.modules()}
            if kind not in classes:
                raise ConfigError(f"{place}: no module of type {kind!r}.{suggest(kind, classes | {'norm', 'bias'})}")
        return cls(place, label, prefixes, kind, overrides)


def _prefixes(path: str, modules: Mapping[str, nn.Module], place: Location) -> tuple[str, ...]:
    """The full names, with role, of all modules and parameters that `path` means."""
    found, known = [], list(modules)
    for role, model in modules.items():
        own = dict(model.named_parameters())
        known += [*own, *(name for name, _ in model.named_modules() if name)]
        if path == role:
            found.append(role)
        for inner in {path, path.removeprefix(f"{role}.")}:
            if inner in own:
                found.append(f"{role}.{inner}")
                continue
            try:
                found.append(f"{role}.{find_module(model, inner)[0]}")
            except ConfigError:
                continue
    if not found:
        raise ConfigError(f"{place}: no module or parameter {path!r} in {', '.join(modules)}.{suggest(path, known)}")
    return tuple(found)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: a layer of torch, or one that is called so (`RMSNorm`, `LayerNorm2d`)."""
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, known) or re.search(r"Norm(\dd)?$", type(module).__name__) is not None
