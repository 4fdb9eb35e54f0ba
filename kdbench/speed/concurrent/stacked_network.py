"""Several networks of one architecture as one network, with their channels side by side.

A convolution becomes a grouped convolution, in which each network has its own groups. BatchNorm and GroupNorm get
more channels. A linear layer multiplies the channels of each network by the matrix of this network. Layers that treat
every value or channel separately do not change. Each network computes the same values as alone, and one kernel does
the work of n kernels for n networks.
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
"""Layers that treat every channel separately and equally. A stacked network contains them unchanged."""


class StackedLinear(nn.Module):
    """Linear layers of several networks in one module: (batch, networks * inputs) -> (batch, networks * outputs).

    Args:
        networks: number of networks.
        weight: (networks * outputs, inputs).
        bias: (networks * outputs,).
    """

    def __init__(self, networks: int, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.networks = networks
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a linear layer on an input with {x.dim()} dimensions cannot be stacked; expected 2")
        weight = self.weight.unflatten(0, (self.networks, -1))
        bias = None if self.bias is None else self.bias.unflatten(0, (self.networks, -1))
        parts = x.unflatten(1, (self.networks, -1))
        if x.device.type == "cpu":  # a batched product may round differently from a single one
            biases = [None] * self.networks if bias is None else bias.unbind()
            layers = zip(parts.unbind(1), weight.unbind(), biases, strict=True)
            return torch.cat([F.linear(part.contiguous(), w, b) for part, w, b in layers], 1)
        parts, matrices = parts.transpose(0, 1), weight.transpose(1, 2)
        product = torch.bmm(parts, matrices) if bias is None else torch.baddbmm(bias.unsqueeze(1), parts, matrices)
        return product.transpose(0, 1).flatten(1)


class StackedNetwork:
    """Several networks of one architecture that run as one network.

    Args:
        models: the networks, in the same mode (train or eval) and with the same frozen modules.
        features: features (outputs of submodules) to extract from each network.
        overwritten: features that a later operation overwrites in place.

    Raises:
        ValueError: a layer of the networks cannot be stacked.
    """

    def __init__(
        self, models: Sequence[nn.Module], features: Iterable[Feature], overwritten: frozenset[Feature] = frozenset()
    ) -> None:
        obstacle = unstackable_layer(models[0])
        if obstacle:
            raise ValueError(obstacle)
        self.models = list(models)
        self.network = remove_hooks(copy.deepcopy(models[0]))
        for path, module in list(self.network.named_modules()):
            _stack_layer(self.network, path, module, [model.get_submodule(path) for model in models])
        self.extractor = FeatureExtractor(self.network, features, overwritten=overwritten, stop=True)

    def __call__(self, inputs: Sequence[Tensor]) -> list[dict[Feature, Tensor]]:
        """Runs all networks, and returns feature -> value for each network.

        Args:
            inputs: one input for each network. All inputs have the same shape (batch, channels, ...).
        """
        features: list[dict[Feature, Tensor]] = [{} for _ in self.models]
        for feature, value in self.extractor(torch.cat(list(inputs), 1)).items():
            channels_last = value.dim() == 4 and not value.is_contiguous()
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            for of_model, part in zip(features, value.chunk(len(self.models), 1), strict=True):
                of_model[feature] = part.contiguous(memory_format=memory_format)
        return features

    def alias_parameters(self) -> None:
        """Turns the parameters and buffers of each network into views of the stacked network's tensors.

        The tensor objects stay the same, so optimizers, checkpoints and evaluations can continue to use them.
        """
        for tensor, stacked, index in self._pairs():
            tensor.data = stacked.detach()[index]

    def distribute_gradients(self) -> None:
        """Sets the gradients of each single network to slices of the gradients of the stacked network."""
        for tensor, stacked, index in self._pairs():
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None if stacked.grad is None else stacked.grad[index]

    def stacked_parameters(self, parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the stacked tensors that contain any of `parameters`, and the parameters in no stacked tensor.

        A stacked tensor contains the same parameter of several networks. No stacked tensor is returned twice.
        """
        stacked_by_id = {id(tensor): stacked for tensor, stacked, _ in self._pairs()}
        parameters = list(parameters)
        stacked = {id(stacked_by_id[id(p)]): stacked_by_id[id(p)] for p in parameters if id(p) in stacked_by_id}
        return list(stacked.values()), [p for p in parameters if id(p) not in stacked_by_id]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor, slice | int]]:
        """Yields (tensor of a single network, stacked tensor that contains the tensor, index in the stacked tensor)."""
        for path, module in self.network.named_modules():
            for number, model in enumerate(self.models):
                original = model.get_submodule(path)
                for name, stacked in (*module._parameters.items(), *module._buffers.items()):
                    if stacked is None:
                        continue
                    tensors = original._parameters if name in original._parameters else original._buffers
                    tensor = tensors[name]
                    assert tensor is not None
                    rows = tensor.shape[0] if tensor.dim() else 0
                    yield tensor, stacked, slice(number * rows, (number + 1) * rows) if tensor.dim() else number


def unstackable_layer(model: nn.Module) -> str:
    """Returns the reason why a layer prevents the stacking of a network, or an empty string.

    Stacked networks are several networks of one architecture that are computed as one network.
    """
    for path, module in model.named_modules():
        kind, where = type(module), f" ({path})" if path else ""
        has_children = any(True for _ in module.children())
        if (kind in (*CONVOLUTIONS, nn.Linear, nn.GroupNorm) and path) or kind in UNTOUCHED:
            continue
        if isinstance(module, NORMS) and kind in NORMS:
            if module.momentum is None:
                return f"{kind.__name__}{where} averages over all previous batches (momentum=None)"
            continue
        if not has_children or module._parameters or module._buffers:
            return f"{kind.__name__}{where} is not known to treat channels separately"
    return ""


def remove_hooks(model: nn.Module) -> nn.Module:
    """Removes all forward hooks of a copied model, such as hooks that extract features, and returns the model."""
    for module in model.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            for name in (hooks, f"{hooks}_with_kwargs", f"{hooks}_always_called"):
                getattr(module, name, {}).clear()
    return model


def _stack_layer(network: nn.Module, path: str, module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Replaces one layer's weights in the stacked network by the concatenated weights of this layer in all networks.

    Args:
        network: the stacked network.
        path: path of the layer in each network.
        module: the layer of the stacked network.
        layers: the layer of each network.
    """
    count = len(layers)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            joined = torch.cat([layer._parameters[name].detach() for layer in layers])  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(joined, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            buffers = [layer._buffers[name] for layer in layers]
            module._buffers[name] = torch.cat(buffers) if buffer.dim() else torch.stack(buffers)  # type: ignore[arg-type]
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
        network.get_submodule(parent).register_module(name, StackedLinear(count, weight, bias))


def stacking_difference(
    models: Sequence[nn.Module],
    features: Iterable[Feature],
    overwritten: frozenset[Feature],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    autocast: contextlib.AbstractContextManager[object] | None = None,
) -> float:
    """Compares stacked networks with each network alone: features, gradients and buffers.

    The function modifies copies of the networks only, and draws no random number.

    Args:
        models: the networks.
        features: features (outputs of submodules) to compare.
        overwritten: features that a later operation overwrites in place.
        inputs: one input for each network.
        dtype: dtype of the copies. In float64, a real difference is far larger than rounding.
        autocast: context manager in which the forwards run.

    Returns:
        The largest difference in any tensor, relative to the largest value of this tensor; 0 for equal bits.
    """
    features = tuple(features)
    single = [remove_hooks(copy.deepcopy(model)).to(dtype) for model in models]
    stacked = StackedNetwork([copy.deepcopy(model) for model in single], features, overwritten)
    inputs = [value.detach().to(dtype) for value in inputs]
    with autocast or contextlib.nullcontext():
        stacked_features = stacked(inputs)
        single_features = [
            FeatureExtractor(model, features, overwritten=overwritten)(value)
            for model, value in zip(single, inputs, strict=True)
        ]
    # One backward for the stack, one for each single network: gradients are compared, too.
    torch.autograd.backward([_probe_loss(values, number) for number, values in enumerate(stacked_features)])
    for number, values in enumerate(single_features):
        _probe_loss(values, number).backward()
    stacked.alias_parameters()
    stacked.distribute_gradients()
    pairs = [
        (stacked_values[feature], single_values[feature])
        for stacked_values, single_values in zip(stacked_features, single_features, strict=True)
        for feature in features
    ]
    gradients = []
    for first, second in zip(stacked.models, single, strict=True):
        pairs += zip(first.buffers(), second.buffers(), strict=True)
        for parameter, reference in zip(first.parameters(), second.parameters(), strict=True):
            if (parameter.grad is None) != (reference.grad is None):
                return math.inf
            if parameter.grad is not None and reference.grad is not None:
                gradients.append((parameter.grad, reference.grad))
    largest = max((float(reference.abs().max()) for _, reference in gradients), default=0.0)
    return max(
        *(_relative_difference(value, reference) for value, reference in pairs),
        # Some gradients consist of rounding alone, so differences far below the largest gradient do not count.
        *(_relative_difference(value, reference, 1e-6 * largest) for value, reference in gradients),
        0.0,
    )


def _probe_loss(features: dict[Feature, Tensor], number: int) -> Tensor:
    """Returns a weighted sum of all feature values, as a loss for the comparison of gradients.

    Args:
        features: features of one network.
        number: number of the network. The weights of the sum depend on it.
    """
    total = None
    for value in features.values():
        ramp = torch.arange(value.numel(), device=value.device, dtype=torch.float64)
        weights = torch.sin(ramp + number).to(value.dtype).view(value.shape)
        part = (value * weights).sum() / value.shape[0]
        total = part if total is None else total + part
    assert total is not None
    return total


def _relative_difference(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    if value.shape != reference.shape:
        return math.inf
    if torch.equal(value, reference):
        return 0.0
    value, reference = value.detach().double(), reference.detach().double()
    difference = float((value - reference).abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / max(float(reference.abs().max()), floor, 1e-300)
