"""The order of samples: computes the rows of each rank in each step from seed, source, epoch and step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.randomness import generator


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device. On CUDA, the copy is asynchronous, from pinned memory."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True)
class RankShard:
    """One rank's rows of a global batch (a batch over all ranks), as indices of samples.

    If batches overlap, a sample is in two successive batches of an epoch. Its second visit has different augmentation
    parameters.

    Attributes:
        index: int64 (rows,), index of each row's sample in the split.
        partner: int64 (rows,), index of the sample with which mixup or cutmix mixes each row. The partner of a row is
            the preceding row of the global batch.
        valid: bool (rows,), False for a repeated row that gives all ranks equally many rows; None: no row is
            repeated.
        second_visit: bool (rows,), True if the previous global batch already contained the sample; None: batches do
            not overlap.
        partner_second_visit: `second_visit` for the samples in `partner`.
    """

    index: Tensor
    partner: Tensor
    valid: Tensor | None = None
    second_visit: Tensor | None = None
    partner_second_visit: Tensor | None = None

    def to(self, device: torch.device) -> RankShard:
        """Returns a copy of the shard on a device."""
        optional = (self.valid, self.second_visit, self.partner_second_visit)
        copies = (None if value is None else to_device(value, device) for value in optional)
        return RankShard(to_device(self.index, device), to_device(self.partner, device), *copies)

    def param_rows(self, population: int) -> Tensor:
        """Returns the row of each sample in the epoch's table of augmentation parameters, int64 (rows,).

        The table has `population` rows for first visits of the samples. If batches overlap, `population` rows for
        second visits follow.
        """
        return self.index if self.second_visit is None else self.index + population * self.second_visit

    def partner_param_rows(self, population: int) -> Tensor:
        """Like `param_rows`, for the samples with which mixup or cutmix mixes the rows. Returns int64 (rows,)."""
        if self.partner_second_visit is None:
            return self.partner
        return self.partner + population * self.partner_second_visit


def epoch_order(indices: Tensor, seed: int, source: str, epoch: int) -> Tensor:
    """Returns the samples' `indices`, int64 (samples,), shuffled for one epoch."""
    return indices[torch.randperm(len(indices), generator=generator(seed, "order", source, epoch))]


def new_samples_per_batch(batch_size: int, overlap: bool) -> int:
    """Returns the number of samples in a batch that were not in the previous batch: half of them with `overlap`."""
    return batch_size // 2 if overlap else batch_size


def num_steps(samples: int, batch_size: int, world_size: int, *, overlap: bool = False) -> int:
    """Returns the number of global batches in an epoch. A smaller last batch is counted.

    Args:
        samples: number of samples in an epoch.
        batch_size: batch size of one rank.
        overlap: whether each batch repeats half of the previous batch.
    """
    return -(-samples // (new_samples_per_batch(batch_size, overlap) * world_size))


def rank_shard_of_block(
    order: Tensor, step: int, count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> RankShard:
    """Returns one rank's rows of `count` consecutive global batches, beginning with the batch of step `step`.

    The batches must be full and must not overlap. For a single batch without these conditions use `rank_shard`.

    Args:
        order: indices of the samples in the order of the epoch.
    """
    global_size = batch_size * world_size
    rows = order[step * global_size : (step + count) * global_size].view(count, global_size)
    partners = rows.roll(1, 1)
    return RankShard(rows[:, rank::world_size].reshape(-1), partners[:, rank::world_size].reshape(-1))


def rank_shard(
    order: Tensor, step: int, batch_size: int, rank: int = 0, world_size: int = 1, *, overlap: bool = False
) -> RankShard:
    """Returns one rank's rows of the global batch of step `step`.

    With world size W and batch size B of one rank, the global batch is `order[step * B * W : (step + 1) * B * W]`,
    and a rank has the rows `rank::W` of it.

    With `overlap`, each global batch has H = B * W / 2 new samples, `order[step * H : (step + 1) * H]`, which follow
    the new samples of the previous batch. The first batch of an epoch has only its new samples.

    Every rank gets equally many rows. If the last global batch cannot be divided evenly, its first row is repeated,
    and `valid` is False for the repetitions.

    Args:
        order: indices of the samples in the order of the epoch.
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
