"""Sources: order, shards, resume, hidden labels, held-out parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdbench.data.loading.build import build_sources
from kdbench.data.sampling.order import RankShard, epoch_order, num_steps, rank_shard
from kdbench.errors import ConfigError, DataError


def views(part, *names):
    return {"image": tuple(part(name) for name in names)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def collect(batches):
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_every_sample_comes_once_per_epoch_and_the_last_batch_is_smaller(source_of, make):
    source = source_of(make(params={"samples": 50}, batch_size=16))
    batches = list(source.batches(0))
    assert [len(batch["index"]) for batch in batches] == [16, 16, 16, 2]
    assert source.steps_per_epoch == 4
    assert sorted(collect(batches)["index"].tolist()) == list(range(50))


def test_epochs_and_seeds_and_sources_have_their_own_order(source_of, make):
    first = collect(source_of().batches(0))["index"]
    assert torch.equal(first, collect(source_of().batches(0))["index"])
    for other in (source_of().batches(1), source_of(seed=2).batches(0), source_of(make(name="other")).batches(0)):
        assert not torch.equal(first, collect(other)["index"])


def test_order_does_not_depend_on_what_ran_before(source_of, part, make):
    source = source_of(make(views=views(part, "crop", "mixup")))
    expected = list(source.batches(3))
    torch.rand(7)
    list(source.batches(5))
    assert all(itertools.starmap(same, zip(expected, source.batches(3), strict=True)))


def test_building_and_reading_leave_the_global_generator_alone(source_of, part, make):
    state = torch.get_rng_state()
    list(source_of(make(views=views(part, "crop", "cutmix"), label_fraction=0.5), validation=0.2).batches(0))
    assert torch.equal(state, torch.get_rng_state())


def test_starting_in_the_middle_gives_the_same_batches(source_of, part, make):
    source = source_of(make(views=views(part, "crop", "flip", "cutmix"), label_fraction=0.5, params={"samples": 100}))
    whole, rest = list(source.batches(4)), list(source.batches(4, start=3))
    assert len(rest) == len(whole) - 3
    assert all(itertools.starmap(same, zip(whole[3:], rest, strict=True)))


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_give_the_global_batch(source_of, part, make, world, mixing):
    """Images, labels and mixing partners too: what a sample looks like does not depend on the ranks."""
    augments = {"image": (part("crop"), part("flip"), part("cutout", size=6), part(mixing))}
    alone = source_of(make(batch_size=4 * world, params={"samples": 4 * world * 3}, views=augments))
    ranks = [
        source_of(make(batch_size=4, params={"samples": 4 * world * 3}, views=augments), rank=rank, world_size=world)
        for rank in range(world)
    ]
    for whole, *shards in zip(alone.batches(1), *(rank.batches(1) for rank in ranks), strict=True):
        for rank, one in enumerate(shards):
            assert "valid" not in one
            for key in whole:
                assert torch.equal(one[key], whole[key][rank::world]), key


def test_padded_rows_are_marked_and_every_sample_is_valid_once(source_of, make):
    ranks = [source_of(make(batch_size=4, params={"samples": 25}), rank=r, world_size=3) for r in range(3)]
    seen = []
    for shards in zip(*(rank.batches(0) for rank in ranks), strict=True):
        assert len({len(one["index"]) for one in shards}) == 1
        assert len({"valid" in one for one in shards}) == 1
        for one in shards:
            valid = one.get("valid", torch.ones(len(one["index"]), dtype=torch.bool))
            assert valid.dtype == torch.bool
            seen += one["index"][valid].tolist()
    assert sorted(seen) == list(range(25))


def test_a_last_batch_smaller_than_the_world_gives_every_rank_a_row():
    order = torch.arange(9)
    parts = [rank_shard(order, 1, 2, rank, 4) for rank in range(4)]
    assert [part.index.tolist() for part in parts] == [[8], [8], [8], [8]]
    assert [part.valid.tolist() for part in parts if part.valid is not None] == [[True], [False], [False], [False]]


def test_order_keeps_to_the_positions_it_was_given():
    positions = torch.tensor([2, 5, 11, 12])
    assert sorted(epoch_order(positions, 1, "train", 0).tolist()) == positions.tolist()
    assert num_steps(10, 4, 1) == 3
    assert num_steps(10, 2, 2) == 3


@pytest.mark.parametrize(("batch_size", "world"), [(7, 1), (64, 1), (3, 2), (5, 3)])
def test_a_sample_looks_the_same_whatever_the_batch(source_of, part, make, batch_size, world):
    augments = views(part, "crop", "flip")
    params = {"samples": 40, "shape": [1, 8, 8]}
    expected = collect(source_of(make(batch_size=40, params=params, views=augments)).batches(2))
    by_index = dict(zip(expected["index"].tolist(), expected["image"], strict=True))
    for rank in range(world):
        name = "train"
        source = source_of(
            make(name=name, batch_size=min(batch_size, 40 // world), params=params, views=augments),
            rank=rank,
            world_size=world,
        )
        for batch in source.batches(2):
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                assert torch.equal(image, by_index[index])


def test_views_of_a_sample_have_their_own_draws(source_of, part, make):
    source = source_of(
        make(views={"image": (part("crop"),), "image_strong": (part("crop"), part("cutout", size=8)), "raw": ()})
    )
    batch = next(source.batches(0))
    assert not torch.equal(batch["image"], batch["image_strong"])
    plain = collect(source.evaluation_batches(512))
    assert torch.equal(batch["raw"], plain["raw"][batch["index"]])
    assert torch.equal(plain["image"], plain["raw"])  # evaluation augments nothing
    assert torch.equal(plain["image_strong"], plain["raw"])


def test_mixing_gives_the_partner_and_the_share(source_of, part, make):
    source = source_of(make(views={"image": (part("mixup"),), "raw": ()}))
    batch = next(source.batches(0))
    share = batch["mix"].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch["image"], share * batch["raw"] + (1 - share) * batch["raw"].roll(1, 0))
    assert torch.equal(batch["label_other"], batch["label"].roll(1))


def test_evaluation_gives_every_sample_once_in_order(source_of, make):
    whole = collect(source_of(make(params={"samples": 45})).evaluation_batches(8))
    assert whole["index"].tolist() == list(range(45))
    ranks = [list(source_of(make(params={"samples": 45}, batch_size=8), rank=r, world_size=4).evaluation_batches(8)) for r in range(4)]
    assert [[len(batch["index"]) for batch in rank] for rank in ranks] == [[8, 4]] * 4  # 45 = 4 * 11 + 1
    told = [batch["index"][batch["valid"]] if "valid" in batch else batch["index"] for rank in ranks for batch in rank]
    assert sorted(torch.cat(told).tolist()) == list(range(45))


def test_hidden_labels_never_leak(source_of, part, make):
    source = source_of(make(label_fraction=20, params={"samples": 100}, views=views(part, "crop", "mixup")))
    shown = source_of(make(params={"samples": 100})).evaluation_batches(100)
    truth = next(shown)["label"]
    for batch in (collect(source.batches(0)), collect(source.evaluation_batches(30))):
        assert torch.equal(batch["labelled"], batch["label"] != -100)
        assert torch.equal(batch["label"][batch["labelled"]], truth[batch["index"]][batch["labelled"]])
        assert torch.bincount(batch["label"][batch["labelled"]]).tolist() == [2] * 10
    batch = next(source.batches(0))
    assert torch.equal(batch["label_other"], batch["label"].roll(1))


def test_kept_labels_depend_on_the_seed_alone(source_of, make):
    def kept(**options):
        batch = collect(source_of(make(label_fraction=0.2, batch_size=8), **options).evaluation_batches(64))
        return batch["index"][batch["labelled"]].tolist()

    assert kept() == kept(dtype=torch.float64)
    assert kept() != kept(seed=2)


def test_subset_is_balanced_and_keeps_the_positions_of_the_split(source_of, make):
    source = source_of(make(subset=30, params={"samples": 200}))
    batch = collect(source.evaluation_batches(64))
    assert source.num_samples == 30
    assert source.population == 200
    assert torch.bincount(batch["label"]).tolist() == [3] * 10
    assert batch["index"].max() >= 30
    everything = next(source_of(make(params={"samples": 200})).evaluation_batches(200))
    assert torch.equal(batch["image"], everything["image"][batch["index"]])


def test_validation_is_held_out_of_every_source_of_the_same_split(make, part):
    data = {
        "train": make(label_fraction=20, params={"samples": 100}, views=views(part, "crop")),
        "unlabelled": make(name="unlabelled", params={"samples": 100}),
        "eval": make(name="eval", split="test", params={"samples": 100}),
    }
    sources = build_sources(data, validation=0.2, seed=1, device="cpu", data_root="data")
    held_out = collect(sources["validation"].evaluation_batches(64))
    assert torch.bincount(held_out["label"]).tolist() == [2] * 10
    assert "labelled" not in held_out
    for name in ("train", "unlabelled"):
        rest = collect(sources[name].batches(0))["index"].tolist()
        assert sorted(rest + held_out["index"].tolist()) == list(range(100))
    assert sources["eval"].num_samples == 100
    assert sources["train"].images is sources["unlabelled"].images  # type: ignore[attr-defined]  # loaded once
    plain = build_sources(
        {"train": make(params={"samples": 100})}, validation=None, seed=1, device="cpu", data_root="d"
    )
    images = next(plain["train"].evaluation_batches(100))["image"]
    assert torch.equal(held_out["image"], images[held_out["index"]])


def test_validation_shows_the_views_of_evaluation(make, part):
    """A network that is measured on half of an image is measured so on held-out samples too."""
    halves = {"image": (), "left": (part("half", side="left"),)}
    data = {
        "train": make(params={"samples": 40}, views={**halves, "image": (part("flip"),)}),
        "eval": make(name="eval", split="test", params={"samples": 40}, views=halves),
    }
    sources = build_sources(data, validation=20, seed=1, device="cpu", data_root="data")
    held_out = collect(sources["validation"].evaluation_batches(64))
    half = held_out["image"].shape[3] // 2
    assert torch.equal(held_out["left"][..., :half], held_out["image"][..., :half])
    assert not held_out["left"][..., half:].any() and held_out["image"][..., half:].any()


def test_labels_are_drawn_from_what_validation_leaves(make):
    data = {"train": make(label_fraction=20, params={"samples": 40})}
    source = build_sources(data, validation=20, seed=1, device="cpu", data_root="data")["train"]
    assert collect(source.evaluation_batches(64))["labelled"].tolist() == [True] * 20


def test_noise_is_whole_and_a_function_of_the_step(source_of, make):
    config = make(name="noise", dataset="gaussian", batch_size=6, params={"shape": [5], "samples": 20})
    source = source_of(config)
    batches = list(source.batches(2))
    assert [batch["z"].shape for batch in batches] == [(6, 5)] * source.steps_per_epoch
    assert all(itertools.starmap(same, zip(batches[2:], source.batches(2, start=2), strict=True)))
    assert not torch.equal(batches[0]["z"], next(source.batches(3))["z"])
    ranks = [
        source_of(
            make(name="noise", dataset="gaussian", batch_size=3, params={"shape": [5], "samples": 20}), rank=r, world_size=2
        )
        for r in range(2)
    ]
    for whole, *shards in zip(batches, *(rank.batches(2) for rank in ranks), strict=True):
        for rank, one in enumerate(shards):
            assert torch.equal(one["z"], whole["z"][rank::2])
            assert torch.equal(one["index"], whole["index"][rank::2])
    values = collect(source_of(make(dataset="gaussian", name="n", batch_size=1000)).batches(0))["z"]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_the_spec_is_what_the_batches_are(source_of, part, make):
    configs = [
        make(label_fraction=0.5, views={"image": (part("crop", size=24), part("mixup")), "other": ()}),
        make(name="noise", dataset="gaussian"),
        make(dataset="digits", split="test"),
    ]
    for one in configs:
        for dtype in (torch.float32, torch.float64):
            source = source_of(one, dtype=dtype)
            batch = next(source.batches(0))
            found = {name: (tuple(value.shape[1:]), str(value.dtype)[6:]) for name, value in batch.items()}
            assert found == source.field_specs()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"batch_size": 600}, {}, r"recipe.yaml:3 data.train: batch_size: 600 is more than the 512 samples"),
        ({"batch_size": 300}, {"world_size": 2}, r"300 on each of 2 processes is more than the 512"),
        ({"label_fraction": 5}, {}, r"data.train: labels: 5 leaves 'class5', .* without any label"),
        ({"label_fraction": 0.001}, {}, r"labels: 0.001 leaves .* without any label"),
        ({"label_fraction": 9999}, {}, r"data.train: labels: 9999 samples were asked for, but there are only 512"),
        ({"label_fraction": 1.5}, {}, r"labels must be a share in \(0, 1\] or a whole number of at least 2, got 1.5"),
        ({"subset": -1}, {}, r"subset must be a share"),
        ({}, {"validation": 5}, r"recipe.yaml:3 data.train: validation: 5 has no sample of 'class5'"),
        ({}, {"validation": 512}, r"512 leaves train no sample of 'class0'"),
        ({}, {"validation": 1.0}, r"leaves train no sample"),
        ({"split": "trian"}, {}, r"data.train: dataset 'synthetic' has no split 'trian'. Did you mean 'train'"),
        ({"dataset": "cifar"}, {}, r"data.train: no dataset 'cifar'. Did you mean 'cifar10'"),
        ({"params": {"sample": 3}}, {}, r"no parameter 'sample'. Did you mean 'samples'"),
        ({"params": {"samples": 3}}, {}, r"data.train: synthetic: needs at least one sample per class"),
    ],
)
def test_mistakes_are_told_with_their_place(make, changes, options, message):
    with pytest.raises(ConfigError, match=message):
        build_sources(
            {"train": make(**changes)},
            **({"validation": None, "seed": 1, "device": "cpu", "data_root": "data"} | options),
        )


def test_validation_needs_a_train_source(make):
    for data in ({"eval": make(name="eval")}, {"train": make(dataset="gaussian")}):
        with pytest.raises(ConfigError, match="held out from the source `train`"):
            build_sources(data, validation=0.1, seed=1, device="cpu", data_root="data")


def test_two_views_may_not_both_mix(source_of, part, make):
    with pytest.raises(ConfigError, match="views image and other both mix"):
        source_of(make(views={"image": (part("mixup"),), "other": (part("cutmix"),)}))


def test_an_evaluation_source_may_be_smaller_than_its_batch(source_of, make):
    source = source_of(make(name="eval", batch_size=64, params={"samples": 20}))
    assert source.num_samples == 20


def test_an_empty_split_is_refused(source_of, make, monkeypatch):
    monkeypatch.setattr("kdbench.data.datasets.synthetic.Synthetic.__len__", lambda self: 0)
    with pytest.raises(DataError, match=r"data.train: synthetic: the split 'train' is empty"):
        source_of()


def test_making_a_batch_reads_no_value(source_of, part, make):
    """Under FakeTensorMode every host read raises."""
    source = source_of(make(label_fraction=0.5, views={"image": (part("crop"), part("flip"), part("cutmix")), "raw": ()}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        index = torch.empty(8, dtype=torch.int64)
        stored = {name: (torch.empty(512, 3, 32, 32, dtype=torch.uint8), index) for name in source.views}
        tables = {name: torch.empty(512, view.num_params) for name, view in source.views.items()}
        batch = source.augment(RankShard(index, index), stored, None, tables)
    assert batch["image"].shape == (8, 3, 32, 32)
    assert {"label", "label_other", "mix", "labelled", "index", "raw"} < batch.keys()
