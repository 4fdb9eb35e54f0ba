"""Batches that are augmented together are the batches that are augmented alone, by fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

LISTS = {
    "crop, flip": [("crop", {"padding": 2}), ("flip", {})],
    "mixup": [("crop", {"padding": 2}), ("mixup", {})],
    "cutmix": [("flip", {}), ("cutmix", {})],
    "rotation": [("rotate90", {}), ("color", {})],
}


class Operations(TorchDispatchMode):
    """Counts operations that write something, which on a GPU are the kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def source(source_of, make, part, names: str, block: int, **options):
    views = {"image": tuple(part(name, **params) for name, params in LISTS[names])}
    found = source_of(make(params={"samples": 103}, batch_size=8, views=views, label_fraction=0.5), **options)
    found.block_size = block
    return found


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].stride() == other[name].stride() for name in one
    )


@pytest.mark.parametrize("names", LISTS)
@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 3}, {"channels_last": True}], ids=str)
def test_blocks_give_the_batches_of_single_steps(source_of, make, part, names, options):
    """Whatever their size: one that divides nothing, and one larger than the epoch."""
    single = list(source(source_of, make, part, names, 1, **options).batches(2))
    for block in (3, 5, 99):
        together = list(source(source_of, make, part, names, block, **options).batches(2))
        assert len(together) == len(single)
        assert all(equal(one, other) for one, other in zip(single, together, strict=True)), block


def test_each_batch_mixes_its_own_rows(source_of, make, part):
    """Rolled over the whole block, the first row of a batch would be mixed with another batch's last."""
    for batch in source(source_of, make, part, "mixup", 4).batches(0):
        partners = batch["index"].roll(1)
        labels = {int(i): int(label) for i, label in zip(batch["index"], batch["label"], strict=True)}
        assert batch["label_other"].tolist() == [labels[int(i)] for i in partners]


@pytest.mark.parametrize("start", [1, 4, 7, 11, 12])
def test_a_start_within_a_block_makes_the_whole_block(source_of, make, part, start):
    """So that every operation has the shape that it has in a run that was not interrupted."""
    whole = source(source_of, make, part, "crop, flip", 4)
    made: list[int] = []
    augmented = whole.augmented
    whole.augmented = lambda part, *rest, **named: made.append(len(part.index)) or augmented(part, *rest, **named)
    rest = list(whole.batches(1, start=start))
    assert made == [32, 32, 32, 7][min(start // 4, 3) :]
    assert all(equal(one, other) for one, other in zip(list(whole.batches(1))[start:], rest, strict=True))


def test_a_block_takes_the_operations_of_one_batch(source_of, make, part):
    """24 batches in blocks of 8; the draws of the epoch, which are made once, are left out."""
    counts = {}
    for block in (1, 8):
        own = source(source_of, make, part, "crop, flip", block)
        tables = {name: own.epoch_params(name, 0) for name in own.views}
        own.draws = lambda name, epoch, tables=tables: tables[name]
        with Operations() as operations:
            assert len(list(own.batches(0))) == 13
        counts[block] = operations.count
    assert counts[8] < counts[1] / 4, counts
