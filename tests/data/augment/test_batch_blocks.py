"""Blocks: batches that are augmented together equal batches that are augmented one by one, with fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.data_sources import augmentation, open_source, source_config, training_batches

AUGMENTATIONS = {
    "crop, flip": [("crop", {"padding": 2}), ("flip", {})],
    "mixup": [("crop", {"padding": 2}), ("mixup", {})],
    "cutmix": [("flip", {}), ("cutmix", {})],
    "rotation": [("rotate90", {}), ("color", {})],
}


class OperationCounter(TorchDispatchMode):
    """Counts operations that write a tensor, which are the kernels on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def block_source(names: str, block_size: int, **options):
    """Opens a source of 103 samples whose batches of 8 are augmented in blocks."""
    views = {"image": tuple(augmentation(name, **params) for name, params in AUGMENTATIONS[names])}
    config = source_config(params={"samples": 103}, batch_size=8, views=views, label_fraction=0.5)
    source = open_source(config, **options)
    source.block_size = block_size
    return source


def equal_layouts(first, second) -> bool:
    """Returns whether two batches have bitwise equal fields with equal strides."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].stride() == second[name].stride() for name in first
    )


@pytest.mark.parametrize("names", AUGMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 3}, {"channels_last": True}], ids=str)
def test_blocks_equal_single_batches(names, options):
    """Includes block sizes that do not divide the epoch, and one above the epoch's length."""
    single = list(training_batches(block_source(names, 1, **options), 2))
    for block_size in (3, 5, 99):
        blocks = list(training_batches(block_source(names, block_size, **options), 2))
        assert len(blocks) == len(single)
        assert all(equal_layouts(a, b) for a, b in zip(single, blocks, strict=True)), block_size


def test_each_batch_mixes_its_own_rows():
    """Rolled over the block, the first row of a batch would be mixed with the last row of another batch."""
    for batch in training_batches(block_source("mixup", 4), 0):
        labels = {int(index): int(label) for index, label in zip(batch["index"], batch["label"], strict=True)}
        assert batch["label_other"].tolist() == [labels[int(index)] for index in batch["index"].roll(1)]


@pytest.mark.parametrize("start", [1, 4, 7, 11, 12])
def test_start_within_a_block_augments_the_complete_block(start):
    """So every operation has the same shape as in a run without interruption."""
    source = block_source("crop, flip", 4)
    block_rows: list[int] = []
    augment = source.augment

    def record_rows(shard, *args, **kwargs):
        block_rows.append(len(shard.index))
        return augment(shard, *args, **kwargs)

    source.augment = record_rows
    rest = list(training_batches(source, 1, start=start))
    assert block_rows == [32, 32, 32, 7][min(start // 4, 3) :]
    assert all(equal_layouts(a, b) for a, b in zip(list(training_batches(source, 1))[start:], rest, strict=True))


def test_block_needs_the_operations_of_one_batch():
    """12 full batches in blocks of 8. The parameters of the epoch, which are drawn once, are not counted."""
    counts = {}
    for block_size in (1, 8):
        source = block_source("crop, flip", block_size)
        params = {name: source.epoch_params(name, 0) for name in source.views}
        source.epoch_params = lambda name, epoch, params=params: params[name]
        with OperationCounter() as counter:
            assert len(list(training_batches(source, 0))) == 13
        counts[block_size] = counter.count
    assert counts[8] < counts[1] / 4, counts
