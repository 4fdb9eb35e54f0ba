"""Arithmetic that terms share: precision, finite gradients, and rows that a mask leaves out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Casts bfloat16 and float16 to float32; other types stay. A softmax in bfloat16 loses its tail."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def autocast_disabled(values: Tensor) -> AbstractContextManager[object]:
    """Disables autocast on the device of `values`: autocast casts even float32 operands of a product to bfloat16."""
    device_type = values.device.type
    # torch.autocast rejects the meta device, where nothing is computed that could lose precision.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divides with finite value and gradient: where the denominator is 0 it returns the numerator.

    For quotients whose numerator is 0 wherever the denominator is, so that 0 / 0 = 0.
    """
    return numerator / torch.where(denominator == 0, 1, denominator)


def safe_sqrt(values: Tensor) -> Tensor:
    """Computes the square root of values >= 0; the gradient at 0 is 0, not infinite."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1).sqrt(), 0)


def safe_normalize(vectors: Tensor) -> Tensor:
    """Scales the vectors of the last dimension to Euclidean length 1; zero vectors stay zero."""
    return safe_divide(vectors, safe_sqrt(vectors.square().sum(-1, keepdim=True)))


def flatten_and_mask(features: Tensor, mask: Tensor | None) -> Tensor:
    """Flattens each row to (batch, elements), at least float32, with zeros in the rows that the mask leaves out.

    Zeros keep the content of padded rows, even NaN, out of value and gradient.
    """
    rows = at_least_float32(features).flatten(1)
    return rows if mask is None else torch.where(mask.unsqueeze(1), rows, 0)


def row_weights(rows: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Computes the weight of each row in a loss that couples rows: (batch,).

    Without `weight`: 1 for a valid row, 0 for a masked one. With `weight` (>= 0): its values, scaled to mean 1 over the
    valid rows of positive weight. Equal weights therefore change nothing, and a row of weight 0 is the same as a masked
    one.
    """
    weights = rows.new_ones(rows.shape[0]) if weight is None else weight.to(rows.dtype)
    weights = weights if mask is None else torch.where(mask, weights, 0)
    return weights if weight is None else safe_divide(weights * (weights > 0).sum(), weights.sum())


def mean_over_pairs(values: Tensor, weights: Tensor) -> Tensor:
    """Computes the weighted mean of (batch, batch) values over all pairs (i, j), including i = j.

    A pair has the weight w_i * w_j.
    """
    pair_weights = weights.unsqueeze(0) * weights.unsqueeze(1)
    return safe_divide((pair_weights * values).sum(), pair_weights.sum())
