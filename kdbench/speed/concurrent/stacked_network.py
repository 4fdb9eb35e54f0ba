"""Several networks of one architecture as one: their channels stand side by side.

A convolution becomes a grouped one (each network's channels are groups of their own), BatchNorm and GroupNorm know no
difference, a linear layer multiplies each network's part by its own matrix, and what works on each value or each
channel alone stays as it is. Every network's values are then those that it gives by itself, and one kernel does what
took as many as there are networks.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.engine.network.features import Feature, FeatureExtractor
from kdbench.models.layers import GlobalAveragePool

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


UNTOUCHED = (
    *(nn.Identity, nn.Flatten, GlobalAveragePool),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
"""Layers that treat every channel alone and alike."""


class StackedLinear(nn.Module):
    """One linear layer for each network: (batch, networks * inputs) -> (batch, networks * outputs).

    Args:
        weight: (networks * outputs, inputs).
        bias: (networks * outputs,).
    """

    def __init__(self, networks: int, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.networks = networks
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a linear layer over {x.dim()} dimensions cannot be stacked")
        weight = self.weight.unflatten(0, (self.networks, -1))
        bias = None if self.bias is None else self.bias.unflatten(0, (self.networks, -1))
        parts = x.unflatten(1, (self.networks, -1))
        if x.device.type == "cpu":  # a batched product may round otherwise than a single one
            biases = [None] * self.networks if bias is None else bias.unbind()
            own = zip(parts.unbind(1), weight.unbind(), biases, strict=True)
            return torch.cat([F.linear(part.contiguous(), w, b) for part, w, b in own], 1)
        parts, across = parts.transpose(0, 1), weight.transpose(1, 2)
        product = torch.bmm(parts, across) if bias is None else torch.baddbmm(bias.unsqueeze(1), parts, across)
        return product.transpose(0, 1).flatten(1)


class StackedNetwork:
    """Networks of one architecture, run as one.

    Args:
        models: in the same mode, with the same parts frozen.
        features: what is wanted of each.
        overwritten: those of them that a later operation overwrites in place.

    Raises:
        ValueError: one of their layers cannot be stacked.
    """

    def __init__(
        self, models: Sequence[nn.Module], features: Iterable[Feature], overwritten: frozenset[Feature] = frozenset()
    ) -> None:
        refused = unstackable_layer(models[0])
        if refused:
            raise ValueError(refused)
        self.models = list(models)
        self.net = without_hooks(copy.deepcopy(models[0]))
        for path, module in list(self.net.named_modules()):
            _widen(self.net, path, module, [model.get_submodule(path) for model in models])
        self.capture = FeatureExtractor(self.net, features, overwritten=overwritten, stop=True)

    def __call__(self, inputs: Sequence[Tensor]) -> list[dict[Feature, Tensor]]:
        """Returns the features of each network; the inputs are as many, of one shape, with the channels second."""
        found: list[dict[Feature, Tensor]] = [{} for _ in self.models]
        for feature, value in self.capture(torch.cat(list(inputs), 1)).items():
            wide = value.dim() == 4 and not value.is_contiguous()
            kept = torch.channels_last if wide else torch.contiguous_format
            for own, part in zip(found, value.chunk(len(self.models), 1), strict=True):
                own[feature] = part.contiguous(memory_format=kept)
        return found

    def share(self) -> None:
        """Makes the networks' own parameters and buffers views of the stacked ones, from now on.

        Whatever holds them (an optimiser, a checkpoint, an evaluation) goes on as before.
        """
        for own, stacked, place in self._pairs():
            own.data = stacked.detach()[place]

    def hand_out(self) -> None:
        """Gives each network's parameters their part of the gradient."""
        for own, stacked, place in self._pairs():
            if isinstance(own, nn.Parameter):
                own.grad = None if stacked.grad is None else stacked.grad[place]

    def stacked_of(self, parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Splits parameters into those that are stacked (then the stacked ones, once each), and the others."""
        known = {id(own): stacked for own, stacked, _ in self._pairs()}
        given = list(parameters)
        stacked = {id(known[id(p)]): known[id(p)] for p in given if id(p) in known}
        return list(stacked.values()), [p for p in given if id(p) not in known]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor, slice | int]]:
        """Each network's tensor, the stacked one, and where in it the first lies."""
        for path, module in self.net.named_modules():
            for number, model in enumerate(self.models):
                own = model.get_submodule(path)
                for name, stacked in (*module._parameters.items(), *module._buffers.items()):
                    if stacked is None:
                        continue
                    value = own._parameters[name] if name in own._parameters else own._buffers[name]
                    assert value is not None
                    rows = value.shape[0] if value.dim() else 0
                    yield value, stacked, slice(number * rows, (number + 1) * rows) if value.dim() else number


def unstackable_layer(model: nn.Module) -> str:
    """Which layer of a network cannot be stacked, in words; empty where all can."""
    for path, module in model.named_modules():
        kind, where = type(module), f" ({path})" if path else ""
        inner = any(True for _ in module.children())
        if (kind in (*CONVOLUTIONS, nn.Linear, nn.GroupNorm) and path) or kind in UNTOUCHED:
            continue
        if isinstance(module, NORMS) and kind in NORMS:
            if module.momentum is None:
                return f"{kind.__name__}{where} averages over all batches so far"
            continue
        if not inner or module._parameters or module._buffers:
            return f"{kind.__name__}{where} is not known to treat channels apart"
    return ""


def without_hooks(model: nn.Module) -> nn.Module:
    """Takes away the hooks that a copy of a model brought along; what they did would be found by `difference`."""
    for module in model.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            for name in (hooks, f"{hooks}_with_kwargs", f"{hooks}_always_called"):
                getattr(module, name, {}).clear()
    return model


def _widen(net: nn.Module, path: str, module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Gives a layer of the stacked network the tensors of all, and the numbers that go with them."""
    count = len(parts)
    for name, value in module._parameters.items():
        if value is not None:
            joined = torch.cat([part._parameters[name].detach() for part in parts])  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(joined, requires_grad=value.requires_grad)
    for name, value in module._buffers.items():
        if value is not None:
            own = [part._buffers[name] for part in parts]
            module._buffers[name] = torch.cat(own) if value.dim() else torch.stack(own)  # type: ignore[arg-type]
    if isinstance(module, CONVOLUTIONS):
        module.in_channels, module.out_channels = module.in_channels * count, module.out_channels * count
        module.groups *= count
    elif isinstance(module, NORMS):
        module.num_features *= count
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = module.num_groups * count, module.num_channels * count
    elif isinstance(module, nn.Linear):
        parent, _, name = path.rpartition(".")
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        assert weight is not None
        setattr(net.get_submodule(parent), name, StackedLinear(count, weight, bias))


def difference(
    models: Sequence[nn.Module],
    features: Iterable[Feature],
    overwritten: frozenset[Feature],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    autocast: contextlib.AbstractContextManager[object] | None = None,
) -> float:
    """How far the stacked networks are from each alone on these inputs: features, gradients and buffers.

    The largest difference of a tensor relative to its largest value; 0 means the same bits. Nothing but copies of the
    networks is touched, and nothing is drawn.

    Args:
        dtype: what the copies compute in. In float64 a true difference stands far above rounding.
    """
    features = tuple(features)
    alone = [without_hooks(copy.deepcopy(model)).to(dtype) for model in models]
    stacked = StackedNetwork([copy.deepcopy(model) for model in alone], features, overwritten)
    shown = [value.detach().to(dtype) for value in inputs]
    with autocast or contextlib.nullcontext():
        together = stacked(shown)
        apart = [
            FeatureExtractor(model, features, overwritten=overwritten)(value) for model, value in zip(alone, shown, strict=True)
        ]
    torch.autograd.backward([_probe(own, number) for number, own in enumerate(together)])
    for number, own in enumerate(apart):
        _probe(own, number).backward()
    stacked.share()
    stacked.hand_out()
    pairs = [(one[f], other[f]) for one, other in zip(together, apart, strict=True) for f in features]
    gradients = []
    for one, other in zip(stacked.models, alone, strict=True):
        pairs += zip(one.buffers(), other.buffers(), strict=True)
        for first, second in zip(one.parameters(), other.parameters(), strict=True):
            if (first.grad is None) != (second.grad is None):
                return math.inf
            if first.grad is not None and second.grad is not None:
                gradients.append((first.grad, second.grad))
    largest = max((float(second.abs().max()) for _, second in gradients), default=0.0)
    return max(
        *(_relative(one, other) for one, other in pairs),
        *(_relative(one, other, 1e-6 * largest) for one, other in gradients),  # some are nothing but rounding
        0.0,
    )


def _probe(found: dict[Feature, Tensor], number: int) -> Tensor:
    """A scalar that weighs every value of every feature, for each network otherwise."""
    total = None
    for value in found.values():
        ramp = torch.arange(value.numel(), device=value.device, dtype=torch.float64)
        weights = torch.sin(ramp + number).to(value.dtype).view(value.shape)
        part = (value * weights).sum() / value.shape[0]
        total = part if total is None else total + part
    assert total is not None
    return total


def _relative(one: Tensor, other: Tensor, floor: float = 0.0) -> float:
    if one.shape != other.shape:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    gap = float((one - other).abs().max())
    return gap / max(float(other.abs().max()), floor, 1e-300) if math.isfinite(gap) else math.inf
