"""Batches that overlap: half of each was the new half of the one before, under other augmentations."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdbench.config.load import load_recipe
from kdbench.errors import ConfigError


def views(part, *names):
    return {"image": tuple(part(name) for name in names)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def broken(batches: list[dict[str, torch.Tensor]], half: int) -> int:
    """How many batches do not begin with the new half of the batch before."""
    found = 0
    for before, batch in itertools.pairwise(batches):
        new = before["index"][-half:] if len(before["index"]) > half else before["index"]
        found += not torch.equal(batch["index"][:half], new)
    return found


def test_each_batch_begins_with_the_new_half_of_the_one_before(source_of, make):
    source = source_of(make(params={"samples": 50}, batch_size=16, overlap=True))
    batches = list(source.batches(0))
    assert [len(batch["index"]) for batch in batches] == [8, 16, 16, 16, 16, 16, 10]
    assert len(batches) == source.steps_per_epoch == 7
    assert broken(batches, 8) == 0
    new = [batch["index"] if number == 0 else batch["index"][8:] for number, batch in enumerate(batches)]
    assert sorted(torch.cat(new).tolist()) == list(range(50)), "every sample is new once in an epoch"
    plain = list(source_of(make(params={"samples": 50}, batch_size=8)).batches(0))
    assert torch.equal(torch.cat(new), torch.cat([batch["index"] for batch in plain])), "in the order of any epoch"


def test_without_the_option_batches_share_nothing(source_of, make):
    """Negative control."""
    batches = list(source_of(make(params={"samples": 50}, batch_size=16)).batches(0))
    assert broken(batches, 8) == len(batches) - 1


def test_the_second_visit_is_augmented_anew_and_the_first_as_without_overlap(source_of, part, make):
    augments = views(part, "crop", "flip")
    params = {"samples": 64, "shape": [3, 16, 16]}
    batches = list(source_of(make(params=params, batch_size=16, views=augments, overlap=True)).batches(2))
    plain = list(source_of(make(params=params, batch_size=8, views=augments)).batches(2))
    differs = 0
    for number, (before, batch, alone) in enumerate(zip(batches, batches[1:], plain[1:], strict=False)):
        assert torch.equal(batch["image"][8:], alone["image"]), number
        new = before["image"][-8:]
        assert torch.equal(batch["label"][:8], before["label"][-8:])
        differs += sum(not torch.equal(a, b) for a, b in zip(new, batch["image"][:8], strict=True))
    assert differs > 0.9 * 8 * (len(batches) - 1)


def test_a_start_in_the_middle_gives_the_same_batches(source_of, part, make):
    source = source_of(make(views=views(part, "crop", "cutmix"), params={"samples": 60}, overlap=True))
    whole, rest = list(source.batches(4)), list(source.batches(4, start=3))
    assert len(rest) == len(whole) - 3
    assert all(itertools.starmap(same, zip(whole[3:], rest, strict=True)))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_give_the_global_batch(source_of, part, make, world):
    augments = views(part, "crop", "flip", "mixup")
    params = {"samples": 4 * world * 3 + 1}
    alone = source_of(make(batch_size=4 * world, params=params, views=augments, overlap=True))
    ranks = [
        source_of(make(batch_size=4, params=params, views=augments, overlap=True), rank=rank, world_size=world)
        for rank in range(world)
    ]
    for whole, *shards in zip(alone.batches(1), *(rank.batches(1) for rank in ranks), strict=True):
        rows = len(whole["index"])
        for key in whole:
            together = torch.stack([shard[key] for shard in shards], 1).flatten(0, 1)
            assert torch.equal(together[:rows], whole[key]), key
        assert all("valid" in shard for shard in shards) == bool(rows % world)


def test_images_that_are_decoded_in_every_epoch_are_read_anew_too(source_of, part, make, tmp_path, write_folders):
    write_folders(tmp_path / "pets", {"train": {"cat": 5, "dog": 4}, "test": {"cat": 1, "dog": 1}})
    config = {"root": str(tmp_path / "pets"), "size": 8, "resident": False}
    crop = {"image": (part("random_resized_crop", scale=[0.2, 0.5]),)}
    folder = dict(dataset="image_folder", params=config, views=crop)
    batches = list(source_of(make(**folder, batch_size=4, overlap=True)).batches(0))
    assert broken(batches, 2) == 0 and len(batches) == 5
    before, batch = batches[0], batches[1]
    assert not torch.equal(before["image"][-2:], batch["image"][:2])
    plain = list(source_of(make(**folder, batch_size=2)).batches(0))
    assert torch.equal(batch["image"][2:], plain[1]["image"])


def test_mistakes_are_told(source_of, make, tmp_path):
    with pytest.raises(ConfigError, match="noise is drawn anew"):
        source_of(make(dataset="gaussian", params={"shape": [4]}, overlap=True))
    text = "dataset: digits\nstudent: digits_mlp\nterms: {ce: cross_entropy}\noptimizer: SGD\nepochs: 1\n"
    for rest, said in (
        ("batch_size: 7\ndata: {train: {overlap: true}}", "must be even, not 7"),
        ("data: {eval: {overlap: true}}", "belongs to a source that is trained on"),
    ):
        (tmp_path / "own.yaml").write_text(text + rest, encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            load_recipe(str(tmp_path / "own.yaml"), [])
