"""What is done to a network's weights in every forward: fewer bits, three values, fewer channels.

A transform stands between a weight that is stored and the weight that the layer uses (a parametrisation of torch.nn).
The stored one trains in full precision; where the function between them is flat, its gradient goes straight through.
`bake` makes the used weights the stored ones and takes the transform away: the names of the state dict are again those
of the plain network. Several transforms work on one weight in the order in which they were applied; baking bakes all.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdbench.errors import ConfigError, suggest

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What has its weight changed. Output channels come first in all of them (in transposed convolutions they do not)."""


class WeightTransform:
    """Base of all transforms: chooses the layers, puts the parametrisation on their weights, bakes it in.

        @TRANSFORMS.register("quantize", version=1)

    Apply it to a network that has the weights to start from: some transforms choose their levels or masks by them.

    Args:
        modules: paths of layers, or of modules whose layers are all meant; None: every linear layer and convolution
            (transposed ones excepted).
        skip_first, skip_last: leave out the first, the last of all the network's layers, in the order of their paths.
    """

    def __init__(self, modules: list[str] | None = None, skip_first: bool = False, skip_last: bool = False) -> None:
        self.modules = modules
        self.skip_first = skip_first
        self.skip_last = skip_last

    def target_layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields path and module of each layer whose weight the transform changes.

        Raises:
            ConfigError: a path that names no layer, or nothing left to change.
        """
        every = [(path, module) for path, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
        left_out = {path for path, _ in (every[:1] if self.skip_first else []) + (every[-1:] if self.skip_last else [])}
        for wanted in self.modules or ():
            if not any(_is_within(path, wanted) for path, _ in every):
                paths = [path for path, _ in model.named_modules() if path]
                raise ConfigError(f"modules: {wanted!r} names no layer with weights.{suggest(wanted, paths)}")
        chosen = [
            (path, module)
            for path, module in every
            if path not in left_out and (not self.modules or any(_is_within(path, wanted) for wanted in self.modules))
        ]
        if not chosen:
            raise ConfigError(f"no layer is left to change: the network has {len(every)}, all of them left out")
        yield from chosen

    def parametrization(self, weight: Tensor) -> nn.Module:
        """Makes the module from the stored to the used weight, for a layer with this stored weight."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Puts the transform on the chosen layers of `model`, in place."""
        for _, layer in self.target_layers(model):
            # `unsafe` leaves out torch's own trial of the function, which would cost a pass over every weight.
            parametrize.register_parametrization(layer, "weight", self.parametrization(effective_weight(layer)), unsafe=True)

    def bake(self, model: nn.Module) -> None:
        """Stores the weights that the forward used, and takes this and every other transform off `model`, in place."""
        for _, module in list(model.named_modules()):
            if not parametrize.is_parametrized(module):
                continue
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name, functions in list(module.parametrizations.items()):
                if any(isinstance(function, WeightParametrization) for function in functions.children()):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def effective_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `bake` would leave; the model stays as it is.

    A copy cannot be baked in its place: torch gives both the same class, and takes the weight off that class.
    """
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, functions in module.parametrizations.items():
            if any(isinstance(function, WeightParametrization) for function in functions.children()):
                before = f"{path}.parametrizations.{name}.".lstrip(".")
                state = {key: value for key, value in state.items() if not key.startswith(before)}
                state[f"{path}.{name}".lstrip(".")] = getattr(module, name).detach().clone()
    return state


class WeightParametrization(nn.Module):
    """From a stored weight to the used one. The base marks what a transform put there: a model may have others."""


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer uses, as it is now."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def straight_through(effective: Tensor, stored: Tensor) -> Tensor:
    """`used`, to the bit, with the gradient of `stored`."""
    return effective.detach() + (stored - stored.detach())


def _is_within(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")
