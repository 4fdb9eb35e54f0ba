"""Sources: order, shards, resume, hidden labels, validation splits."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.data_sources import (
    augmentation,
    concatenate,
    equal_batches,
    evaluation_batches,
    open_source,
    source_config,
    training_batches,
    views,
)
from kdbench.data.loading.build import build_sources
from kdbench.data.sampling.order import RankShard, epoch_order, num_steps, rank_shard
from kdbench.errors import ConfigError, DataError


def test_epoch_contains_every_sample_once_and_its_last_batch_is_smaller():
    source = open_source(source_config(params={"samples": 50}, batch_size=16))
    batches = list(training_batches(source, 0))
    assert [len(batch["index"]) for batch in batches] == [16, 16, 16, 2]
    assert source.steps_per_epoch == 4
    assert sorted(concatenate(batches)["index"].tolist()) == list(range(50))


def test_order_depends_on_epoch_seed_and_source():
    order = concatenate(training_batches(open_source(), 0))["index"]
    assert torch.equal(order, concatenate(training_batches(open_source(), 0))["index"])
    for source, epoch in ((open_source(), 1), (open_source(seed=2), 0), (open_source(source_config(name="other")), 0)):
        assert not torch.equal(order, concatenate(training_batches(source, epoch))["index"])


def test_batches_do_not_depend_on_previous_passes():
    source = open_source(source_config(views=views("crop", "mixup")))
    expected = list(training_batches(source, 3))
    torch.rand(7)
    list(training_batches(source, 5))
    assert equal_batches(expected, training_batches(source, 3))


def test_sources_do_not_use_the_global_generator():
    state = torch.get_rng_state()
    config = source_config(views=views("crop", "cutmix"), label_fraction=0.5)
    list(training_batches(open_source(config, validation=0.2), 0))
    assert torch.equal(state, torch.get_rng_state())


def test_start_in_the_middle_gives_the_same_batches():
    config = source_config(views=views("crop", "flip", "cutmix"), label_fraction=0.5, params={"samples": 100})
    source = open_source(config)
    epoch, rest = list(training_batches(source, 4)), list(training_batches(source, 4, start=3))
    assert len(rest) == len(epoch) - 3
    assert equal_batches(epoch[3:], rest)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_the_global_batch(world_size, mixing):
    """Includes images, labels and mixing partners: no value of a sample depends on the number of ranks."""
    parts = (augmentation("crop"), augmentation("flip"), augmentation("cutout", size=6), augmentation(mixing))
    options = {"params": {"samples": 4 * world_size * 3}, "views": {"image": parts}}
    single = open_source(source_config(batch_size=4 * world_size, **options))
    ranks = [
        training_batches(open_source(source_config(batch_size=4, **options), rank=rank, world_size=world_size), 1)
        for rank in range(world_size)
    ]
    for global_batch, *shards in zip(training_batches(single, 1), *ranks, strict=True):
        for rank, shard in enumerate(shards):
            assert "valid" not in shard
            for field in global_batch:
                assert torch.equal(shard[field], global_batch[field][rank::world_size]), field


def test_padded_rows_are_marked_and_every_sample_is_valid_once():
    config = source_config(batch_size=4, params={"samples": 25})
    ranks = [training_batches(open_source(config, rank=rank, world_size=3), 0) for rank in range(3)]
    valid_indices = []
    for shards in zip(*ranks, strict=True):
        assert len({len(shard["index"]) for shard in shards}) == 1
        assert len({"valid" in shard for shard in shards}) == 1
        for shard in shards:
            valid = shard.get("valid", torch.ones(len(shard["index"]), dtype=torch.bool))
            assert valid.dtype == torch.bool
            valid_indices += shard["index"][valid].tolist()
    assert sorted(valid_indices) == list(range(25))


def test_last_batch_smaller_than_the_world_gives_every_rank_a_row():
    order = torch.arange(9)
    shards = [rank_shard(order, 1, 2, rank, 4) for rank in range(4)]
    assert [shard.index.tolist() for shard in shards] == [[8], [8], [8], [8]]
    assert [shard.valid.tolist() for shard in shards if shard.valid is not None] == [[True], [False], [False], [False]]


def test_epoch_order_is_a_permutation_of_the_indices():
    indices = torch.tensor([2, 5, 11, 12])
    assert sorted(epoch_order(indices, 1, "train", 0).tolist()) == indices.tolist()
    assert num_steps(10, 4, 1) == 3
    assert num_steps(10, 2, 2) == 3


@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 1), (64, 1), (3, 2), (5, 3)])
def test_augmented_sample_does_not_depend_on_the_batch(batch_size, world_size):
    options = {"params": {"samples": 40, "shape": [1, 8, 8]}, "views": views("crop", "flip")}
    expected = concatenate(training_batches(open_source(source_config(batch_size=40, **options)), 2))
    images_by_index = dict(zip(expected["index"].tolist(), expected["image"], strict=True))
    config = source_config(batch_size=min(batch_size, 40 // world_size), **options)
    for rank in range(world_size):
        for batch in training_batches(open_source(config, rank=rank, world_size=world_size), 2):
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                assert torch.equal(image, images_by_index[index])


def test_views_of_a_sample_have_independent_parameters():
    strong = (augmentation("crop"), augmentation("cutout", size=8))
    source = open_source(source_config(views={"image": (augmentation("crop"),), "image_strong": strong, "raw": ()}))
    batch = next(training_batches(source, 0))
    assert not torch.equal(batch["image"], batch["image_strong"])
    evaluation = concatenate(evaluation_batches(source, 512))
    assert torch.equal(batch["raw"], evaluation["raw"][batch["index"]])
    assert torch.equal(evaluation["image"], evaluation["raw"])  # evaluation does not augment
    assert torch.equal(evaluation["image_strong"], evaluation["raw"])


def test_mixup_blends_with_the_partner_by_the_field_mix():
    source = open_source(source_config(views={"image": (augmentation("mixup"),), "raw": ()}))
    batch = next(training_batches(source, 0))
    weight = batch["mix"].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch["image"], weight * batch["raw"] + (1 - weight) * batch["raw"].roll(1, 0))
    assert torch.equal(batch["label_other"], batch["label"].roll(1))


def test_evaluation_yields_every_sample_once_in_order():
    config = source_config(params={"samples": 45}, batch_size=8)
    assert concatenate(evaluation_batches(open_source(config), 8))["index"].tolist() == list(range(45))
    ranks = [list(evaluation_batches(open_source(config, rank=rank, world_size=4), 8)) for rank in range(4)]
    assert [[len(batch["index"]) for batch in rank] for rank in ranks] == [[8, 4]] * 4  # 45 = 4 * 11 + 1
    indices = [
        batch["index"][batch["valid"]] if "valid" in batch else batch["index"] for rank in ranks for batch in rank
    ]
    assert sorted(torch.cat(indices).tolist()) == list(range(45))


def test_hidden_labels_are_in_no_field():
    options = {"params": {"samples": 100}}
    source = open_source(source_config(label_fraction=20, views=views("crop", "mixup"), **options))
    true_labels = next(evaluation_batches(open_source(source_config(**options)), 100))["label"]
    for batch in (concatenate(training_batches(source, 0)), concatenate(evaluation_batches(source, 30))):
        assert torch.equal(batch["labelled"], batch["label"] != -100)
        assert torch.equal(batch["label"][batch["labelled"]], true_labels[batch["index"]][batch["labelled"]])
        assert torch.bincount(batch["label"][batch["labelled"]]).tolist() == [2] * 10
    batch = next(training_batches(source, 0))
    assert torch.equal(batch["label_other"], batch["label"].roll(1))


def test_labelled_samples_depend_on_the_seed_alone():
    def labelled(**options):
        source = open_source(source_config(label_fraction=0.2, batch_size=8), **options)
        batch = concatenate(evaluation_batches(source, 64))
        return batch["index"][batch["labelled"]].tolist()

    assert labelled() == labelled(dtype=torch.float64)
    assert labelled() != labelled(seed=2)


def test_subset_is_balanced_and_keeps_the_indices_of_the_split():
    source = open_source(source_config(subset=30, params={"samples": 200}))
    batch = concatenate(evaluation_batches(source, 64))
    assert source.num_samples == 30
    assert source.population == 200
    assert torch.bincount(batch["label"]).tolist() == [3] * 10
    assert batch["index"].max() >= 30
    full_split = next(evaluation_batches(open_source(source_config(params={"samples": 200})), 200))
    assert torch.equal(batch["image"], full_split["image"][batch["index"]])


def test_validation_is_held_out_of_every_source_of_the_same_split():
    options = {"params": {"samples": 100}}
    data = {
        "train": source_config(label_fraction=20, views=views("crop"), **options),
        "unlabelled": source_config(name="unlabelled", **options),
        "eval": source_config(name="eval", split="test", **options),
    }
    sources = build_sources(data, validation=0.2, seed=1, device="cpu", data_root="data")
    validation = concatenate(evaluation_batches(sources["validation"], 64))
    assert torch.bincount(validation["label"]).tolist() == [2] * 10
    assert "labelled" not in validation
    for name in ("train", "unlabelled"):
        indices = concatenate(training_batches(sources[name], 0))["index"].tolist()
        assert sorted(indices + validation["index"].tolist()) == list(range(100))
    assert sources["eval"].num_samples == 100
    assert sources["train"].images is sources["unlabelled"].images  # type: ignore[attr-defined]  # loaded once
    full_split = next(evaluation_batches(open_source(source_config(**options)), 100))
    assert torch.equal(validation["image"], full_split["image"][validation["index"]])


def test_validation_has_the_views_of_evaluation():
    """A network that is evaluated on half of an image needs that half of the validation samples too."""
    evaluation_views = {"image": (), "half": (augmentation("half", side="left"),)}
    options = {"params": {"samples": 40}}
    data = {
        "train": source_config(views={**evaluation_views, "image": (augmentation("flip"),)}, **options),
        "eval": source_config(name="eval", split="test", views=evaluation_views, **options),
    }
    sources = build_sources(data, validation=20, seed=1, device="cpu", data_root="data")
    validation = concatenate(evaluation_batches(sources["validation"], 64))
    middle = validation["image"].shape[3] // 2
    assert torch.equal(validation["half"][..., :middle], validation["image"][..., :middle])
    assert not validation["half"][..., middle:].any() and validation["image"][..., middle:].any()


def test_label_fraction_draws_from_the_samples_that_are_not_held_out():
    data = {"train": source_config(label_fraction=20, params={"samples": 40})}
    source = build_sources(data, validation=20, seed=1, device="cpu", data_root="data")["train"]
    assert concatenate(evaluation_batches(source, 64))["labelled"].tolist() == [True] * 20


def test_generated_batches_are_full_and_a_function_of_the_step():
    options = {"name": "noise", "dataset": "gaussian", "params": {"shape": [5], "samples": 20}}
    source = open_source(source_config(batch_size=6, **options))
    batches = list(training_batches(source, 2))
    assert [batch["z"].shape for batch in batches] == [(6, 5)] * source.steps_per_epoch
    assert equal_batches(batches[2:], training_batches(source, 2, start=2))
    assert not torch.equal(batches[0]["z"], next(training_batches(source, 3))["z"])
    config = source_config(batch_size=3, **options)
    ranks = [training_batches(open_source(config, rank=rank, world_size=2), 2) for rank in range(2)]
    for global_batch, *shards in zip(batches, *ranks, strict=True):
        for rank, shard in enumerate(shards):
            assert torch.equal(shard["z"], global_batch["z"][rank::2])
            assert torch.equal(shard["index"], global_batch["index"][rank::2])


def test_gaussian_is_standard_normal():
    source = open_source(source_config(dataset="gaussian", name="n", batch_size=1000))
    values = concatenate(training_batches(source, 0))["z"]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_field_specs_are_those_of_the_batches():
    configs = [
        source_config(
            label_fraction=0.5,
            views={"image": (augmentation("crop", size=24), augmentation("mixup")), "other": ()},
        ),
        source_config(name="noise", dataset="gaussian"),
        source_config(dataset="digits", split="test"),
    ]
    for config in configs:
        for dtype in (torch.float32, torch.float64):
            source = open_source(config, dtype=dtype)
            batch = next(training_batches(source, 0))
            specs = {name: (tuple(value.shape[1:]), str(value.dtype)[6:]) for name, value in batch.items()}
            assert specs == source.field_specs()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"batch_size": 600}, {}, r"recipe.yaml:3 data.train: batch_size: 600 is more than the 512 samples"),
        ({"batch_size": 300}, {"world_size": 2}, r"300 on each of 2 processes is more than the 512"),
        ({"label_fraction": 5}, {}, r"data.train: label_fraction: 5 leaves 'class5', .* without any label"),
        ({"label_fraction": 0.001}, {}, r"label_fraction: 0.001 leaves .* without any label"),
        ({"label_fraction": 9999}, {}, r"data.train: label_fraction: 9999 samples were asked for, .* only 512"),
        (
            {"label_fraction": 1.5},
            {},
            r"label_fraction must be a fraction in \(0, 1\] or a whole number of at least 2, got 1.5",
        ),
        ({"subset": -1}, {}, r"subset must be a fraction"),
        (
            {},
            {"validation": 5},
            r"recipe.yaml:3 data.train: validation: with 5, the validation split has no sample of 'class5'",
        ),
        ({}, {"validation": 512}, r"with 512, the training split has no sample of 'class0'"),
        ({}, {"validation": 1.0}, r"the training split has no sample"),
        ({"split": "trian"}, {}, r"data.train: dataset 'synthetic' has no split 'trian'. Did you mean 'train'"),
        ({"dataset": "cifar"}, {}, r"data.train: no dataset 'cifar'. Did you mean 'cifar10'"),
        ({"params": {"sample": 3}}, {}, r"no parameter 'sample'. Did you mean 'samples'"),
        ({"params": {"samples": 3}}, {}, r"data.train: synthetic: needs at least one sample per class"),
    ],
)
def test_configuration_errors_name_the_location(changes, options, message):
    with pytest.raises(ConfigError, match=message):
        open_source(source_config(**changes), **options)


def test_validation_without_a_labelled_train_source_is_rejected():
    for data in ({"eval": source_config(name="eval")}, {"train": source_config(dataset="gaussian")}):
        with pytest.raises(ConfigError, match="needs a source `train` with labels"):
            build_sources(data, validation=0.1, seed=1, device="cpu", data_root="data")


def test_two_mixing_views_are_rejected():
    with pytest.raises(ConfigError, match="views image and other both mix"):
        open_source(source_config(views={"image": (augmentation("mixup"),), "other": (augmentation("cutmix"),)}))


def test_evaluation_source_may_be_smaller_than_its_batch():
    source = open_source(source_config(name="eval", batch_size=64, params={"samples": 20}))
    assert source.num_samples == 20


def test_empty_split_is_rejected(monkeypatch):
    monkeypatch.setattr("kdbench.data.datasets.synthetic.Synthetic.__len__", lambda self: 0)
    with pytest.raises(DataError, match=r"data.train: synthetic: the split 'train' is empty"):
        open_source()


def test_augment_reads_no_value_on_the_host():
    """FakeTensorMode raises at every host read."""
    parts = (augmentation("crop"), augmentation("flip"), augmentation("cutmix"))
    source = open_source(source_config(label_fraction=0.5, views={"image": parts, "raw": ()}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        index = torch.empty(8, dtype=torch.int64)
        images = {name: (torch.empty(512, 3, 32, 32, dtype=torch.uint8), index) for name in source.views}
        params = {name: torch.empty(512, view.num_params) for name, view in source.views.items()}
        batch = source.augment(RankShard(index, index), images, None, params)
    assert batch["image"].shape == (8, 3, 32, 32)
    assert {"label", "label_other", "mix", "labelled", "index", "raw"} < batch.keys()
