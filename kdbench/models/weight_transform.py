"""Weight transforms: the effective weight of a layer is a function of its stored weight (quantised, ternary, pruned).

A transform registers a parametrization of torch.nn.utils.parametrize on the weights of the layers. The stored weight is
trained in full precision; where the function is piecewise constant, its gradient is the straight-through estimate.
`bake` replaces the stored weights by the effective ones and removes the parametrization, so that the state dict has the
names of the plain network again. Several transforms of one weight are applied in the order of registration and are
baked together.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdbench.errors import ConfigError, suggest

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight can be transformed. Output channels are dimension 0 (not so in transposed convolutions)."""


class WeightTransform:
    """Base class of weight transforms: selects layers, registers a parametrization on their weights, bakes it.

        @WEIGHT_TRANSFORMS.register("quantize", version=1)

    Apply a transform after the initial weights are loaded: some transforms derive levels or masks from them.

    Args:
        modules: paths of layers, or of modules that contain the layers; None selects every linear layer and convolution
            (not transposed ones).
        skip_first: leave out the first layer of the network, in the order of `named_modules`.
        skip_last: leave out the last layer.
    """

    def __init__(self, modules: list[str] | None = None, skip_first: bool = False, skip_last: bool = False) -> None:
        self.modules = modules
        self.skip_first = skip_first
        self.skip_last = skip_last

    def target_layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields path and module of each layer whose weight is transformed.

        Raises:
            ConfigError: a path contains no layer, or no layer remains.
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
                f"no layer remains to transform: the network has {len(layers)}, and skip_first, skip_last or modules "
                "exclude all of them"
            )
        yield from targets

    def parametrization(self, weight: Tensor) -> nn.Module:
        """Builds the module that maps a stored weight to the effective weight.

        Args:
            weight: the layer's current weight.
        """
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Registers the parametrization on the target layers, in place."""
        for _, layer in self.target_layers(model):
            # `unsafe` skips torch's consistency check, which would compute the function of every weight once more.
            parametrize.register_parametrization(
                layer, "weight", self.parametrization(effective_weight(layer)), unsafe=True
            )

    def bake(self, model: nn.Module) -> None:
        """Stores the effective weights and removes all weight transforms of the model, in place."""
        for _, module in list(model.named_modules()):
            if not parametrize.is_parametrized(module):
                continue
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name, functions in list(module.parametrizations.items()):
                if any(isinstance(function, WeightParametrization) for function in functions.children()):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def effective_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict that the model would have after `bake`; the model is unchanged.

    Baking a deep copy is not possible: torch gives both models the same parametrized class, and removing the
    parametrization deletes the property of that class.
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
    """Base class of the parametrizations of weight transforms; distinguishes them from a model's other ones."""


def effective_weight(layer: nn.Module) -> Tensor:
    """Returns the weight that the layer's forward uses now, detached."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def straight_through(effective: Tensor, stored: Tensor) -> Tensor:
    """Returns exactly `effective` in the forward, with the gradient of `stored` (straight-through estimator)."""
    return effective.detach() + (stored - stored.detach())


def _is_within(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")
