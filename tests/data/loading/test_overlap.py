"""Overlapping batches: the first half of a batch is the new half of the previous one, augmented differently."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.data_sources import (
    augmentation,
    equal_batches,
    open_source,
    source_config,
    training_batches,
    views,
    write_image_folders,
)
from kdbench.config.load import load_recipe
from kdbench.errors import ConfigError


def count_breaks(batches: list[dict[str, torch.Tensor]], half: int) -> int:
    """Counts the batches that do not begin with the new half of the previous batch."""
    breaks = 0
    for previous, batch in itertools.pairwise(batches):
        new = previous["index"][-half:] if len(previous["index"]) > half else previous["index"]
        breaks += not torch.equal(batch["index"][:half], new)
    return breaks


def test_each_batch_begins_with_the_new_half_of_the_previous_one():
    source = open_source(source_config(params={"samples": 50}, batch_size=16, overlap=True))
    batches = list(training_batches(source, 0))
    assert [len(batch["index"]) for batch in batches] == [8, 16, 16, 16, 16, 16, 10]
    assert len(batches) == source.steps_per_epoch == 7
    assert count_breaks(batches, 8) == 0
    new = [batch["index"] if number == 0 else batch["index"][8:] for number, batch in enumerate(batches)]
    assert sorted(torch.cat(new).tolist()) == list(range(50)), "every sample is new once in an epoch"
    plain = list(training_batches(open_source(source_config(params={"samples": 50}, batch_size=8)), 0))
    assert torch.equal(torch.cat(new), torch.cat([batch["index"] for batch in plain])), "same order as without overlap"


def test_batches_without_overlap_are_disjoint():
    """Negative control."""
    batches = list(training_batches(open_source(source_config(params={"samples": 50}, batch_size=16)), 0))
    assert count_breaks(batches, 8) == len(batches) - 1


def test_second_visit_is_augmented_differently_and_first_visit_as_without_overlap():
    image_views = views("crop", "flip")
    params = {"samples": 64, "shape": [3, 16, 16]}
    overlapping = source_config(params=params, batch_size=16, views=image_views, overlap=True)
    batches = list(training_batches(open_source(overlapping), 2))
    plain = list(training_batches(open_source(source_config(params=params, batch_size=8, views=image_views)), 2))
    num_different = 0
    for number, (previous, batch, expected) in enumerate(zip(batches, batches[1:], plain[1:], strict=False)):
        assert torch.equal(batch["image"][8:], expected["image"]), number
        assert torch.equal(batch["label"][:8], previous["label"][-8:])
        pairs = zip(previous["image"][-8:], batch["image"][:8], strict=True)
        num_different += sum(not torch.equal(first_visit, second_visit) for first_visit, second_visit in pairs)
    assert num_different > 0.9 * 8 * (len(batches) - 1)


def test_start_in_the_middle_gives_the_same_batches():
    source = open_source(source_config(views=views("crop", "cutmix"), params={"samples": 60}, overlap=True))
    epoch, rest = list(training_batches(source, 4)), list(training_batches(source, 4, start=3))
    assert len(rest) == len(epoch) - 3
    assert equal_batches(epoch[3:], rest)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_the_global_batch(world_size):
    options = {"params": {"samples": 4 * world_size * 3 + 1}, "views": views("crop", "flip", "mixup"), "overlap": True}
    single = open_source(source_config(batch_size=4 * world_size, **options))
    ranks = [
        training_batches(open_source(source_config(batch_size=4, **options), rank=rank, world_size=world_size), 1)
        for rank in range(world_size)
    ]
    for global_batch, *shards in zip(training_batches(single, 1), *ranks, strict=True):
        num_rows = len(global_batch["index"])
        for field in global_batch:
            rows = torch.stack([shard[field] for shard in shards], 1).flatten(0, 1)
            assert torch.equal(rows[:num_rows], global_batch[field]), field
        assert all("valid" in shard for shard in shards) == bool(num_rows % world_size)


def test_second_visit_of_a_streamed_image_is_decoded_with_another_crop(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"cat": 5, "dog": 4}, "test": {"cat": 1, "dog": 1}})
    options = {
        "dataset": "image_folder",
        "params": {"root": str(tmp_path / "pets"), "size": 8, "resident": False},
        "views": {"image": (augmentation("random_resized_crop", scale=[0.2, 0.5]),)},
    }
    batches = list(training_batches(open_source(source_config(**options, batch_size=4, overlap=True)), 0))
    assert count_breaks(batches, 2) == 0 and len(batches) == 5
    previous, batch = batches[0], batches[1]
    assert not torch.equal(previous["image"][-2:], batch["image"][:2])
    plain = list(training_batches(open_source(source_config(**options, batch_size=2)), 0))
    assert torch.equal(batch["image"][2:], plain[1]["image"])


def test_overlap_of_unsuitable_sources_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="generated data is new in every batch"):
        open_source(source_config(dataset="gaussian", params={"shape": [4]}, overlap=True))
    text = "dataset: digits\nstudent: digits_mlp\nterms: {ce: cross_entropy}\noptimizer: SGD\nepochs: 1\n"
    for ending, message in (
        ("batch_size: 7\ndata: {train: {overlap: true}}", "must be even, not 7"),
        ("data: {eval: {overlap: true}}", "is not allowed in a source for evaluation"),
    ):
        (tmp_path / "recipe.yaml").write_text(text + ending, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_recipe(str(tmp_path / "recipe.yaml"), [])
