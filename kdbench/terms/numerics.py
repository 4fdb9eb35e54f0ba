"""Arithmetic that several terms use: casts to float32, operations with finite gradients, masks and row weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Casts bfloat16 and float16 tensors to float32, and returns tensors of other types unchanged.

    In bfloat16, the small probabilities of a softmax would be rounded to 0.
    """
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def autocast_disabled(values: Tensor) -> AbstractContextManager[object]:
    """Returns a context manager that disables autocast on the device of `values`.

    Autocast casts even float32 operands of a matrix product to bfloat16.
    """
    device_type = values.device.type
    # torch.autocast rejects the meta device, where nothing is computed that could lose precision.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divides element by element; where the denominator is 0, the result is the numerator.

    Value and gradient are finite. If the numerator is 0 wherever the denominator is 0, then 0 / 0 = 0.
    """
    return numerator / torch.where(denominator == 0, 1, denominator)


def safe_sqrt(values: Tensor) -> Tensor:
    """Computes the square root of values >= 0. The gradient at 0 is 0 instead of infinite."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1).sqrt(), 0)


def safe_normalize(vectors: Tensor) -> Tensor:
    """Scales the vectors along the last dimension to Euclidean length 1. Zero vectors stay zero."""
    return safe_divide(vectors, safe_sqrt(vectors.square().sum(-1, keepdim=True)))


def flatten_and_mask(features: Tensor, mask: Tensor | None) -> Tensor:
    """Flattens `features` to (batch, elements), casts them to at least float32, and sets masked rows to 0.

    The zeros keep the content of padded rows, which may be NaN, out of the loss and its gradient.

    Args:
        features: (batch, ...).
        mask: bool (batch,), False for padded rows. None: all rows are valid.
    """
    rows = at_least_float32(features).flatten(1)
    return rows if mask is None else torch.where(mask.unsqueeze(1), rows, 0)


def row_weights(rows: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Computes the weight of each row in a loss that couples rows.

    Args:
        rows: (batch, ...). Only the batch size, type and device are read.
        mask: bool (batch,), False for padded rows. None: all rows are valid.
        weight: (batch,), >= 0. None: all rows have equal weight.

    Returns:
        (batch,). Masked rows have weight 0. Without `weight`, valid rows have weight 1. With `weight`, its values are
        scaled to mean 1 over the valid rows of positive weight: only ratios of weights matter, and a row of weight 0
        has the same effect as a masked row.
    """
    weights = rows.new_ones(rows.shape[0]) if weight is None else weight.to(rows.dtype)
    weights = weights if mask is None else torch.where(mask, weights, 0)
    return weights if weight is None else safe_divide(weights * (weights > 0).sum(), weights.sum())


def mean_over_pairs(values: Tensor, weights: Tensor) -> Tensor:
    """Computes the weighted mean of `values` over all pairs of rows (i, j), including i = j.

    Args:
        values: (batch, batch), one value per pair.
        weights: weight w_i of each row, (batch,). The pair (i, j) has the weight w_i * w_j.
    """
    pair_weights = weights.unsqueeze(0) * weights.unsqueeze(1)
    return safe_divide((pair_weights * values).sum(), pair_weights.sum())
