"""Which samples a rank sees in a step: a function of (seed, source, epoch, position) and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.randomness import generator


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Sends a tensor of the host to the device without waiting for it: from pinned memory, where that is CUDA."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True)
class Shard:
    """One rank's part of a global batch.

    index: int64 (rows,), positions in the split.
    partner: int64 (rows,), the row before each one in the global batch, with which mixup and cutmix mix it.
    valid: bool (rows,), False where a row was repeated to make the ranks equal; None where none was.
    again: bool (rows,), True where the sample was in the global batch before, and has other draws now; None where the
        batches do not overlap. partner_again: the same of the partners.
    """

    index: Tensor
    partner: Tensor
    valid: Tensor | None = None
    again: Tensor | None = None
    partner_again: Tensor | None = None

    def to(self, device: torch.device) -> Shard:
        parts = (self.valid, self.again, self.partner_again)
        moved = (None if part is None else sent(part, device) for part in parts)
        return Shard(sent(self.index, device), sent(self.partner, device), *moved)

    def drawn(self, population: int) -> Tensor:
        """Which row of an epoch's draws each row has: those of second visits stand behind those of the first."""
        return self.index if self.again is None else self.index + population * self.again

    def partner_drawn(self, population: int) -> Tensor:
        """The same of the partners."""
        return self.partner if self.partner_again is None else self.partner + population * self.partner_again


def epoch_order(positions: Tensor, seed: int, source: str, epoch: int) -> Tensor:
    """Returns `positions` (samples,) shuffled for one epoch."""
    return positions[torch.randperm(len(positions), generator=generator(seed, "order", source, epoch))]


def fresh(batch_size: int, overlap: bool) -> int:
    """Returns how many samples of a batch are new: all, or where the batches overlap half of them."""
    return batch_size // 2 if overlap else batch_size


def steps(samples: int, batch_size: int, world: int, *, overlap: bool = False) -> int:
    """Returns the number of global batches in an epoch; the last one may be smaller."""
    return -(-samples // (fresh(batch_size, overlap) * world))


def shards(order: Tensor, step: int, count: int, batch_size: int, rank: int = 0, world: int = 1) -> Shard:
    """Returns the rows of a rank in `count` global batches from `step` on, one batch after the other.

    All of them must be whole, and none may overlap; `shard` gives any single one.
    """
    together = batch_size * world
    rows = order[step * together : (step + count) * together].view(count, together)
    partners = rows.roll(1, 1)
    return Shard(rows[:, rank::world].reshape(-1), partners[:, rank::world].reshape(-1))


def shard(order: Tensor, step: int, batch_size: int, rank: int = 0, world: int = 1, *, overlap: bool = False) -> Shard:
    """Returns rows `rank::world` of global batch `step`, that is of `order[step*B*world : (step+1)*B*world]`.

    With `overlap` half of a batch is new, `order[step*H : (step+1)*H]` with H = B*world/2, and before it stand the new
    rows of the batch before. The first batch of an epoch has none before it and is the new half alone.

    Every rank gets equally many rows: where the last global batch does not divide, its first row is repeated and marked
    as not valid.
    """
    new = fresh(batch_size, overlap) * world
    start = step * new
    before = min(start, new) if overlap else 0
    rows = order[start - before : start + new]
    again = torch.arange(len(rows), device=rows.device) < before if overlap else None
    partners, partners_again = rows.roll(1), None if again is None else again.roll(1)
    missing = -len(rows) % world
    valid = None
    if missing:
        valid = torch.arange(len(rows) + missing, device=rows.device) < len(rows)
        rows, partners = _padded(rows, missing), _padded(partners, missing)
        again = None if again is None else _padded(again, missing)
        partners_again = None if partners_again is None else _padded(partners_again, missing)
        valid = valid[rank::world]
    return Shard(
        rows[rank::world],
        partners[rank::world],
        valid,
        None if again is None else again[rank::world],
        None if partners_again is None else partners_again[rank::world],
    )


def _padded(rows: Tensor, missing: int) -> Tensor:
    return torch.cat([rows, rows[:1].expand(missing)])
