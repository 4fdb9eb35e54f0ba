"""What every loss here needs of arithmetic: enough precision, gradients that stay finite, rows that do not count."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Returns bfloat16 and float16 as float32, the rest as it is: a softmax in bf16 loses its tail."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def autocast_disabled(values: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on the device of `values`: it would take even float32 operands of a matmul to bf16."""
    kind = values.device.type
    # `meta` knows no autocast, and computes nothing that could lose precision.
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and numerator itself where the denominator is 0: value and gradient stay finite.

    Meant for quotients whose numerator vanishes together with the denominator, so that 0/0 counts as 0.
    """
    return numerator / torch.where(denominator == 0, 1, denominator)


def safe_sqrt(values: Tensor) -> Tensor:
    """Square root of values >= 0, with gradient 0 instead of infinity at 0."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1).sqrt(), 0)


def flatten_and_mask(features: Tensor, mask: Tensor | None) -> Tensor:
    """Flattens per sample to (batch, elements), at least float32, with zeros in rows that the mask leaves out.

    Zeros, because whatever stands in a padded row (even NaN) must reach neither the value nor the gradient.
    """
    rows = at_least_float32(features).flatten(1)
    return rows if mask is None else torch.where(mask.unsqueeze(1), rows, 0)


def row_weights(rows: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Returns (batch,): how much each row counts. 1 for a valid row, 0 for one that the mask leaves out.

    Row weights (>= 0) are relative: they are scaled to a mean of 1 over the valid rows of positive weight, so that
    equal weights change nothing and a row of weight 0 is one left out.
    """
    counts = rows.new_ones(rows.shape[0]) if weight is None else weight.to(rows.dtype)
    counts = counts if mask is None else torch.where(mask, counts, 0)
    return counts if weight is None else safe_divide(counts * (counts > 0).sum(), counts.sum())


def mean_over_pairs(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of (batch, batch) values over all pairs (i, j), also i = j; a pair counts c_i * c_j times."""
    pairs = weights.unsqueeze(0) * weights.unsqueeze(1)
    return safe_divide((pairs * values).sum(), pairs.sum())
