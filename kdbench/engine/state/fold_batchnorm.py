"""Folding of BatchNorm into the preceding convolution, for networks that stay in eval mode.

In eval mode, BatchNorm computes y = gamma * (x - mean) / sqrt(var + eps) + beta with constants per channel. A
convolution with weights W gamma / sqrt(var + eps) and a shifted bias gives the same y, and saves one pass over the
feature map (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2).
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
    """Copies a model in eval mode, and folds each BatchNorm of the copy into the convolution before the BatchNorm.

    The function runs the model once to find pairs of a convolution and a BatchNorm, so it works for any architecture.
    A pair is folded only if each of its modules is called once, and if only the BatchNorm reads the output of the
    convolution. A folded BatchNorm is replaced by an `nn.Identity`, so module paths do not change. The original model
    and its state dict are unchanged.

    Args:
        model: model in eval mode. The copy must stay in eval mode. Hooks are copied too, so this function must be
            called before hooks are registered.
        example: input of the right shape, with arbitrary values, on the model's device.
        keep_features: features (outputs of submodules) that must keep their values. A convolution whose output is one
            of these features is not folded.

    Returns:
        A tuple of the folded copy and the number of folded BatchNorms. If nothing can be folded, the first entry is
        `model` itself.
    """
    pairs = _find_foldable_pairs(model, example, tuple(keep_features))
    if not pairs:
        return model, 0
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for convolution_path, norm_path in pairs:
            _fold_pair(folded.get_submodule(convolution_path), folded.get_submodule(norm_path))
            parent, _, name = norm_path.rpartition(".")
            folded.get_submodule(parent).register_module(name, nn.Identity())
    return folded, len(pairs)


def _fold_pair(convolution: nn.Module, norm: nn.Module) -> None:
    assert isinstance(convolution, FOLDABLE_CONVOLUTIONS) and isinstance(norm, FOLDABLE_NORMS)
    weight, bias = convolution.weight, convolution.bias
    # In float64, so that only the final cast rounds.
    mean, variance, gamma, beta, wide_bias = (
        None if value is None else value.detach().to("cpu", torch.float64)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias, bias)
    )
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if gamma is None else scale * gamma
    shift = (0.0 if wide_bias is None else wide_bias) - mean
    shift = shift * scale if beta is None else shift * scale + beta
    wide_weight = weight.detach().to("cpu", torch.float64) * scale.reshape(-1, *([1] * (weight.dim() - 1)))
    convolution.weight = nn.Parameter(wide_weight.to(weight), requires_grad=weight.requires_grad)
    convolution.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)


def _find_foldable_pairs(
    model: nn.Module, example: Tensor, keep_features: tuple[Feature, ...]
) -> list[tuple[str, str]]:
    """Runs the model once, and returns (path of the convolution, path of the BatchNorm) for each foldable pair."""
    paths = {module: path for path, module in model.named_modules()}
    uses = _ConvolutionUses()
    handles = []
    for module in model.modules():
        if type(module) in FOLDABLE_CONVOLUTIONS and not module._forward_hooks and not module._forward_pre_hooks:
            handles.append(module.register_forward_hook(lambda m, _, output: uses.record_output(m, output)))
        elif _is_constant_norm(module):
            handles.append(module.register_forward_pre_hook(lambda m, args: uses.enter_norm(m, args)))
            handles.append(module.register_forward_hook(lambda *_: uses.leave_norm()))
    extractor = FeatureExtractor(model, keep_features)
    try:
        with torch.no_grad(), uses:
            extractor.active = True
            output = model(example)
    finally:
        extractor.remove()
        for handle in handles:
            handle.remove()
    visible_ids = {id(leaf) for leaf in (*tree_leaves(output), *extractor.values.values()) if isinstance(leaf, Tensor)}

    convolutions = {id(outputs[0]): module for module, outputs in uses.outputs.items() if len(outputs) == 1}
    pairs = []
    for norm, inputs in uses.norm_inputs.items():
        convolution = convolutions.get(id(inputs[0])) if len(inputs) == 1 else None
        if convolution is None or id(inputs[0]) in visible_ids or id(inputs[0]) in uses.other_use_ids:
            continue
        pairs.append((paths[convolution], paths[norm]))
    return pairs


def _is_constant_norm(module: nn.Module) -> bool:
    return type(module) in FOLDABLE_NORMS and not module.training and getattr(module, "running_mean", None) is not None


class _ConvolutionUses(TorchDispatchMode):
    """Recorder of convolution outputs, BatchNorm inputs, and convolution outputs that layers except BatchNorm read."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[nn.Module, list[Tensor]] = {}  # one per call; references keep the ids unique
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
