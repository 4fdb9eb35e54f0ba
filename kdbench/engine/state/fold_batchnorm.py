"""Folds BatchNorm into the convolution before it, for networks that stay in eval mode.

In eval mode BatchNorm is y = gamma * (x - mean) / sqrt(var + eps) + beta with constants per channel, so a convolution
with weights W gamma / sqrt(var + eps) and a shifted bias gives the same y and saves one pass over the feature map
(Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbench.engine.network.features import Feature, FeatureExtractor

FOLDABLE_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


FOLDABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(model: nn.Module, example: Tensor, keep_features: Iterable[Feature] = ()) -> tuple[nn.Module, int]:
    """Returns a copy of a model in eval mode in which BatchNorms are folded away, and how many there were.

    A pair is found by running the model once, so that any model will do: the output of a convolution that is called
    once goes into a BatchNorm that is called once, and nowhere else. All module paths stay (a folded BatchNorm becomes
    an `nn.Identity`), so that features keep their addresses and, but for rounding, their values. The original stays as
    it is, its state dict with it.

    Args:
        model: in eval mode; it must not go back to train mode. Hooks are copied with it: fold first, then capture.
        example: an input of the right shape, on the model's device; its values do not matter.
        keep: features that will be captured. Where one holds the value between a convolution and its BatchNorm, the
            two stay apart.
    """
    pairs = _find_foldable_pairs(model, example, tuple(keep_features))
    if not pairs:
        return model, 0
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for convolution_path, norm_path in pairs:
            _fold(folded.get_submodule(convolution_path), folded.get_submodule(norm_path))
            parent, _, name = norm_path.rpartition(".")
            setattr(folded.get_submodule(parent), name, nn.Identity())
    return folded, len(pairs)


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    assert isinstance(convolution, FOLDABLE_CONVOLUTIONS) and isinstance(norm, FOLDABLE_NORMS)
    weight, bias = convolution.weight, convolution.bias
    # In float64: the rounding of the product is then the only one.
    mean, variance, gamma, beta, own_bias = (
        None if value is None else value.detach().to("cpu", torch.float64)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias, bias)
    )
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if gamma is None else scale * gamma
    shift = (0.0 if own_bias is None else own_bias) - mean
    shift = shift * scale if beta is None else shift * scale + beta
    wide = weight.detach().to("cpu", torch.float64) * scale.reshape(-1, *([1] * (weight.dim() - 1)))
    convolution.weight = nn.Parameter(wide.to(weight), requires_grad=weight.requires_grad)
    convolution.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)


def _find_foldable_pairs(model: nn.Module, example: Tensor, keep: tuple[Feature, ...]) -> list[tuple[str, str]]:
    """Runs the model once and lists (path of the convolution, path of its BatchNorm)."""
    paths = {module: path for path, module in model.named_modules()}
    watch = _ConvolutionUses()
    handles = []
    for module in model.modules():
        if type(module) in FOLDABLE_CONVOLUTIONS and not module._forward_hooks and not module._forward_pre_hooks:
            handles.append(module.register_forward_hook(lambda m, _, output: watch.record_output(m, output)))
        elif _is_constant_norm(module):
            handles.append(module.register_forward_pre_hook(lambda m, args: watch.enter_norm(m, args)))
            handles.append(module.register_forward_hook(lambda *_: watch.leave_norm()))
    capture = FeatureExtractor(model, keep)
    try:
        with torch.no_grad(), watch:
            capture.active = True
            output = model(example)
    finally:
        capture.remove()
        for handle in handles:
            handle.remove()
    seen = {id(leaf) for leaf in (*tree_leaves(output), *capture.kept.values()) if isinstance(leaf, Tensor)}

    source = {id(values[0]): module for module, values in watch.outputs.items() if len(values) == 1}
    pairs = []
    for norm, taken in watch.norm_inputs.items():
        convolution = source.get(id(taken[0])) if len(taken) == 1 else None
        if convolution is None or id(taken[0]) in seen or id(taken[0]) in watch.other_use_ids:
            continue
        pairs.append((paths[convolution], paths[norm]))
    return pairs


def _is_constant_norm(module: nn.Module) -> bool:
    return type(module) in FOLDABLE_NORMS and not module.training and getattr(module, "running_mean", None) is not None


class _ConvolutionUses(TorchDispatchMode):
    """Notes what convolutions give, what BatchNorms take, and which convolutions' outputs anything else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[nn.Module, list[Tensor]] = {}  # per call; kept alive, so that an id means one tensor
        self.norm_inputs: dict[nn.Module, list[Any]] = {}
        self.convolution_output_ids: set[int] = set()
        self.other_use_ids: set[int] = set()
        self.in_norm = False

    def record_output(self, module: nn.Module, output: Any) -> None:
        self.outputs.setdefault(module, []).append(output)
        self.convolution_output_ids.add(id(output))

    def enter_norm(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.norm_inputs.setdefault(module, []).append(args[0] if args else None)
        self.in_norm = True

    def leave_norm(self) -> None:
        self.in_norm = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.in_norm:
            self.other_use_ids.update({id(leaf) for leaf in tree_leaves((args, kwargs))} & self.convolution_output_ids)
        return func(*args, **(kwargs or {}))
