"""Which samples a rank sees in a step: a function of (seed, source, epoch, position) and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.randomness import generator


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Sends a tensor of the host to the device without waiting for it: from pinned memory, where that is CUDA."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True)
class RankShard:
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
    second_visit: Tensor | None = None
    partner_second_visit: Tensor | None = None

    def to(self, device: torch.device) -> RankShard:
        parts = (self.valid, self.second_visit, self.partner_second_visit)
        moved = (None if part is None else to_device(part, device) for part in parts)
        return RankShard(to_device(self.index, device), to_device(self.partner, device), *moved)

    def param_rows(self, population: int) -> Tensor:
        """Which row of an epoch's draws each row has: those of second visits stand behind those of the first."""
        return self.index if self.second_visit is None else self.index + population * self.second_visit

    def partner_param_rows(self, population: int) -> Tensor:
        """The same of the partners."""
        return self.partner if self.partner_second_visit is None else self.partner + population * self.partner_second_visit


def epoch_order(positions: Tensor, seed: int, source: str, epoch: int) -> Tensor:
    """Returns `positions` (samples,) shuffled for one epoch."""
    return positions[torch.randperm(len(positions), generator=generator(seed, "order", source, epoch))]


def new_samples_per_batch(batch_size: int, overlap: bool) -> int:
    """Returns how many samples of a batch are new: all, or where the batches overlap half of them."""
    return batch_size // 2 if overlap else batch_size


def num_steps(samples: int, batch_size: int, world_size: int, *, overlap: bool = False) -> int:
    """Returns the number of global batches in an epoch; the last one may be smaller."""
    return -(-samples // (new_samples_per_batch(batch_size, overlap) * world_size))


def rank_shard_of_block(order: Tensor, step: int, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> RankShard:
    """Returns the rows of a rank in `count` global batches from `step` on, one batch after the other.

    All of them must be whole, and none may overlap; `shard` gives any single one.
    """
    together = batch_size * world_size
    rows = order[step * together : (step + count) * together].view(count, together)
    partners = rows.roll(1, 1)
    return RankShard(rows[:, rank::world_size].reshape(-1), partners[:, rank::world_size].reshape(-1))


def rank_shard(order: Tensor, step: int, batch_size: int, rank: int = 0, world_size: int = 1, *, overlap: bool = False) -> RankShard:
    """Returns rows `rank::world` of global batch `step`, that is of `order[step*B*world : (step+1)*B*world]`.

    With `overlap` half of a batch is new, `order[step*H : (step+1)*H]` with H = B*world/2, and before it stand the new
    rows of the batch before. The first batch of an epoch has none before it and is the new half alone.

    Every rank gets equally many rows: where the last global batch does not divide, its first row is repeated and marked
    as not valid.
    """
    new = new_samples_per_batch(batch_size, overlap) * world_size
    start = step * new
    before = min(start, new) if overlap else 0
    rows = order[start - before : start + new]
    again = torch.arange(len(rows), device=rows.device) < before if overlap else None
    partners, partners_again = rows.roll(1), None if again is None else again.roll(1)
    missing = -len(rows) % world_size
    valid = None
    if missing:
        valid = torch.arange(len(rows) + missing, device=rows.device) < len(rows)
        rows, partners = _padded(rows, missing), _padded(partners, missing)
        again = None if again is None else _padded(again, missing)
        partners_again = None if partners_again is None else _padded(partners_again, missing)
        valid = valid[rank::world_size]
    return RankShard(
        rows[rank::world_size],
        partners[rank::world_size],
        valid,
        None if again is None else again[rank::world_size],
        None if partners_again is None else partners_again[rank::world_size],
    )


def _padded(rows: Tensor, missing: int) -> Tensor:
    return torch.cat([rows, rows[:1].expand(missing)])
