"""Weight transforms: each computes a layer's effective (quantised or pruned) weight from its stored weight.

A weight transform registers a parametrization of torch.nn.utils.parametrize on the weights of the layers. The
optimizer updates the stored weight, which has full precision. Transforms that are piecewise constant use the
straight-through gradient. `bake` replaces the stored weights by the effective weights and removes the
parametrizations, so that the state dict has the names of the original network again. A weight can have several
transforms. They are applied in the order of registration and are baked together.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdbench.errors import ConfigError, suggest

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight can be transformed. Output channels are dimension 0 (not so in transposed convolutions)."""


class WeightTransform:
    """Base class of weight transforms (quantisation, pruning), which change the weights that the layers use.

        @WEIGHT_TRANSFORMS.register("quantize", version=1)

    A transform registers a parametrization on the weights of the selected layers. The transform must be applied after
    the initial weights are loaded, because some transforms compute levels or masks from the initial weights.

    Args:
        modules: paths of layers, or of modules that contain layers. None: every linear layer and convolution, except
            transposed convolutions.
        skip_first: whether the first layer of the network, in the order of `named_modules`, stays unchanged.
        skip_last: whether the last layer stays unchanged.
    """

    def __init__(self, modules: list[str] | None = None, skip_first: bool = False, skip_last: bool = False) -> None:
        self.modules = modules
        self.skip_first = skip_first
        self.skip_last = skip_last

    def target_layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields the path and the module of each layer whose weight is transformed.

        Raises:
            ConfigError: a path in `modules` contains no linear layer or convolution, or no layer is selected.
        """
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
        skipped = {
            path for path, _ in (layers[:1] if self.skip_first else []) + (layers[-1:] if self.skip_last else [])
        }
        for ancestor in self.modules or ():
            if not any(_is_within(path, ancestor) for path, _ in layers):
                paths = [path for path, _ in model.named_modules() if path]
                raise ConfigError(
                    f"modules: {ancestor!r} contains no linear or convolution layer.{suggest(ancestor, paths)}"
                )
        targets = [
            (path, module)
            for path, module in layers
            if path not in skipped
            and (not self.modules or any(_is_within(path, ancestor) for ancestor in self.modules))
        ]
        if not targets:
            raise ConfigError(
                f"no layer remains to transform: skip_first, skip_last and modules exclude all {len(layers)} linear "
                "layers and convolutions of the network"
            )
        yield from targets

    def parametrization(self, weight: Tensor) -> nn.Module:
        """Builds the module whose forward computes the effective weight of a layer from the stored weight.

        Args:
            weight: weight of the layer before the transform.
        """
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Registers the parametrization on the weight of each selected layer of a model, in place."""
        for _, layer in self.target_layers(model):
            # `unsafe` skips torch's consistency check, which would compute the function of every weight once more.
            parametrize.register_parametrization(
                layer, "weight", self.parametrization(effective_weight(layer)), unsafe=True
            )

    def bake(self, model: nn.Module) -> None:
        """Replaces the stored weights by the effective weights and removes all weight transforms, in place."""
        for _, module in list(model.named_modules()):
            if not parametrize.is_parametrized(module):
                continue
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name, functions in list(module.parametrizations.items()):
                if any(isinstance(function, WeightParametrization) for function in functions.children()):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def effective_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict that the model would have after `WeightTransform.bake`, without changing the model.

    The function does not bake a deep copy of the model: a deep copy has the same parametrized class in torch, and
    removing a parametrization from the copy would delete the class property that the original model needs.
    """
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, functions in module.parametrizations.items():
            if any(isinstance(function, WeightParametrization) for function in functions.children()):
                prefix = f"{path}.parametrizations.{name}.".lstrip(".")
                state = {key: value for key, value in state.items() if not key.startswith(prefix)}
                state[f"{path}.{name}".lstrip(".")] = getattr(module, name).detach().clone()
    return state


class WeightParametrization(nn.Module):
    """Base class of the parametrizations of weight transforms, by which `WeightTransform.bake` recognises them."""


def effective_weight(layer: nn.Module) -> Tensor:
    """Returns the weight that the forward of a layer uses (after weight transforms), detached."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def straight_through(effective: Tensor, stored: Tensor) -> Tensor:
    """Returns the values of `effective` with the gradient of `stored` (straight-through estimator)."""
    return effective.detach() + (stored - stored.detach())


def _is_within(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")
