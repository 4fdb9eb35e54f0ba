"""Which samples a rank sees in a step: a function of (seed, source, epoch, position) and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.randomness import generator


@dataclass(frozen=True)
class Shard:
    """One rank's part of a global batch.

    index: int64 (rows,), positions in the split.
    partner: int64 (rows,), the row before each one in the global batch, with which mixup and cutmix mix it.
    valid: bool (rows,), False where a row was repeated to make the ranks equal; None where none was.
    """

    index: Tensor
    partner: Tensor
    valid: Tensor | None = None


def epoch_order(positions: Tensor, seed: int, source: str, epoch: int) -> Tensor:
    """Returns `positions` (samples,) shuffled for one epoch."""
    return positions[torch.randperm(len(positions), generator=generator(seed, "order", source, epoch))]


def steps(samples: int, batch_size: int, world: int) -> int:
    """Returns the number of global batches in an epoch; the last one may be smaller."""
    return -(-samples // (batch_size * world))


def shard(order: Tensor, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Shard:
    """Returns rows `rank::world` of global batch `step`, that is of `order[step*B*world : (step+1)*B*world]`.

    Every rank gets equally many rows: where the last global batch does not divide, its first row is repeated and marked
    as not valid.
    """
    start = step * batch_size * world
    rows = order[start : start + batch_size * world]
    partners = rows.roll(1)
    missing = -len(rows) % world
    valid = None
    if missing:
        valid = torch.arange(len(rows) + missing, device=rows.device) < len(rows)
        rows = torch.cat([rows, rows[:1].expand(missing)])
        partners = torch.cat([partners, partners[:1].expand(missing)])
        valid = valid[rank::world]
    return Shard(rows[rank::world], partners[rank::world], valid)
