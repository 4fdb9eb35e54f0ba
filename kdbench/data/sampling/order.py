"""Rows of each rank in each step: functions of (seed, source, epoch, step)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.randomness import generator


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device; on CUDA from pinned memory, without waiting for the copy."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True)
class RankShard:
    """One rank's rows of a global batch.

    index: int64 (rows,), indices of the split.
    partner: int64 (rows,), index of the preceding row of the global batch, which mixup and cutmix mix in.
    valid: bool (rows,), False where a row was repeated to give all ranks equally many; None if none was.
    second_visit: bool (rows,), True where the previous global batch already contained the sample; its augmentation
        parameters differ this time. None where batches do not overlap.
    partner_second_visit: the same for the partners.
    """

    index: Tensor
    partner: Tensor
    valid: Tensor | None = None
    second_visit: Tensor | None = None
    partner_second_visit: Tensor | None = None

    def to(self, device: torch.device) -> RankShard:
        """Copies the shard to a device."""
        optional = (self.valid, self.second_visit, self.partner_second_visit)
        copies = (None if value is None else to_device(value, device) for value in optional)
        return RankShard(to_device(self.index, device), to_device(self.partner, device), *copies)

    def param_rows(self, population: int) -> Tensor:
        """Returns each row's row in the epoch's augmentation parameters; second visits follow all first visits."""
        return self.index if self.second_visit is None else self.index + population * self.second_visit

    def partner_param_rows(self, population: int) -> Tensor:
        """Returns each partner's row in the epoch's augmentation parameters."""
        if self.partner_second_visit is None:
            return self.partner
        return self.partner + population * self.partner_second_visit


def epoch_order(indices: Tensor, seed: int, source: str, epoch: int) -> Tensor:
    """Returns `indices` (samples,) shuffled for one epoch."""
    return indices[torch.randperm(len(indices), generator=generator(seed, "order", source, epoch))]


def new_samples_per_batch(batch_size: int, overlap: bool) -> int:
    """Returns the number of samples of a batch that the previous batch did not contain: half of them with `overlap`."""
    return batch_size // 2 if overlap else batch_size


def num_steps(samples: int, batch_size: int, world_size: int, *, overlap: bool = False) -> int:
    """Returns the number of global batches in an epoch; the last one may be smaller."""
    return -(-samples // (new_samples_per_batch(batch_size, overlap) * world_size))


def rank_shard_of_block(
    order: Tensor, step: int, count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> RankShard:
    """Returns a rank's rows of the `count` global batches from `step` on, one batch after the other.

    All of these batches must be full and none may overlap; `rank_shard` handles any single batch.
    """
    global_size = batch_size * world_size
    rows = order[step * global_size : (step + count) * global_size].view(count, global_size)
    partners = rows.roll(1, 1)
    return RankShard(rows[:, rank::world_size].reshape(-1), partners[:, rank::world_size].reshape(-1))


def rank_shard(
    order: Tensor, step: int, batch_size: int, rank: int = 0, world_size: int = 1, *, overlap: bool = False
) -> RankShard:
    """Returns rows `rank::world_size` of a global batch, `order[step * B * world_size : (step + 1) * B * world_size]`.

    With `overlap` the new half of a batch is `order[step * H : (step + 1) * H]`, H = B * world_size / 2. The new half
    of the previous batch precedes it; the first batch of an epoch has the new half only.

    Every rank gets equally many rows. Where the last global batch does not divide, its first row is repeated and is not
    `valid`.
    """
    new = new_samples_per_batch(batch_size, overlap) * world_size
    start = step * new
    repeated = min(start, new) if overlap else 0
    rows = order[start - repeated : start + new]
    second_visits = torch.arange(len(rows), device=rows.device) < repeated if overlap else None
    # Partners are rows of the global batch, so that mixing does not depend on the number of ranks.
    partners = rows.roll(1)
    partner_second_visits = None if second_visits is None else second_visits.roll(1)
    padding = -len(rows) % world_size
    valid = None
    if padding:
        valid = torch.arange(len(rows) + padding, device=rows.device) < len(rows)
        rows, partners = _pad(rows, padding), _pad(partners, padding)
        second_visits = None if second_visits is None else _pad(second_visits, padding)
        partner_second_visits = None if partner_second_visits is None else _pad(partner_second_visits, padding)
        valid = valid[rank::world_size]
    return RankShard(
        rows[rank::world_size],
        partners[rank::world_size],
        valid,
        None if second_visits is None else second_visits[rank::world_size],
        None if partner_second_visits is None else partner_second_visits[rank::world_size],
    )


def _pad(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows[:1].expand(count)])
