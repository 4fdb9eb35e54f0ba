"""Streaming sources: the same order, parameters and batches as resident sources."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from helpers.data_sources import (
    augmentation,
    equal_batches,
    equal_fields,
    evaluation_batches,
    open_source,
    source_config,
    training_batches,
    write_image_folders,
)
from kdbench.data.augment.geometric import RandomResizedCrop
from kdbench.data.describe import describe_source
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import derive

quiet_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12+


@pytest.fixture
def pets(tmp_path):
    """Class folders of images that are not square; returns what `write_image_folders` does."""
    splits = {"train": {"ant": 7, "bee": 6}, "val": {"ant": 2, "bee": 3}}
    return write_image_folders(tmp_path / "pets", splits, size=(14, 11))


def pets_config(resident, batch_size=4, **options):
    parts = tuple(augmentation(name) for name in ("crop", "flip", "mixup"))
    params = {"root": "pets", "size": 8, "resident": resident}
    views = {"image": parts, "raw": ()}
    return source_config(dataset="image_folder", batch_size=batch_size, params=params, views=views, **options)


@quiet_fork
@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_and_resident_sources_yield_the_same_batches(pets, workers):
    resident = open_source(pets_config(True, label_fraction=4))
    streaming = open_source(pets_config(False, label_fraction=4), workers=workers)
    assert type(streaming) is not type(resident)
    for epoch, start in ((0, 0), (1, 2), (0, 3)):
        assert equal_batches(training_batches(resident, epoch, start), training_batches(streaming, epoch, start))
    assert equal_batches(evaluation_batches(resident, 5), evaluation_batches(streaming, 5))
    streaming.close()


def test_ranks_together_give_the_global_batch(pets):
    global_batches = list(training_batches(open_source(pets_config(False, batch_size=6)), 2))
    ranks = [
        itertools.islice(training_batches(open_source(pets_config(False, 3), rank=rank, world_size=2), 2), 2)
        for rank in range(2)
    ]
    for global_batch, *shards in zip(global_batches[:2], *ranks, strict=True):
        for rank, shard in enumerate(shards):
            assert equal_fields(shard, {name: value[rank::2] for name, value in global_batch.items()})


@quiet_fork
def test_unfinished_pass_does_not_change_the_next_one(pets):
    source = open_source(pets_config(False), workers=1)
    expected = list(training_batches(source, 0))
    next(training_batches(source, 1))
    assert equal_batches(expected, training_batches(source, 0))
    iterator = training_batches(source, 0)
    first = next(iterator)
    list(evaluation_batches(source, 4))  # an evaluation in between
    assert equal_batches(expected, [first, *iterator])
    source.close()


def test_streaming_does_not_use_the_global_generator(pets):
    state = torch.get_rng_state()
    list(training_batches(open_source(pets_config(False)), 0))
    assert torch.equal(state, torch.get_rng_state())


def test_random_resized_crop_equals_torchvision_at_the_same_box(pets):
    views = {"image": (augmentation("random_resized_crop"),), "other": (augmentation("random_resized_crop"),)}
    params = {"root": "pets", "size": 8, "resident": False, "normalize": False}
    source = open_source(source_config(dataset="image_folder", batch_size=13, params=params, views=views), seed=3)
    batch = next(training_batches(source, 5))
    assert not torch.equal(batch["image"], batch["other"])
    for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
        key = [derive(3, "augment", "train", "image", 5, "reading"), index]
        x0, y0, x1, y1 = RandomResizedCrop().box(14, 11, np.random.Generator(np.random.Philox(key=key)))
        with Image.open(pets["train"][index][1]) as file:
            expected = tv.resized_crop(file.convert("RGB"), y0, x0, y1 - y0, x1 - x0, [8, 8])
        assert torch.equal(image, tv.to_tensor(expected))


@quiet_fork
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_reported_without_a_worker_traceback(pets, workers):
    pets["train"][3][1].write_text("hello")
    with pytest.raises(DataError, match=r"^\S*ant/003.png cannot be read as an image \(.*Replace it or remove it\.$"):
        list(training_batches(open_source(pets_config(False), workers=workers), 0))


def test_random_resized_crop_of_a_resident_dataset_is_rejected(pets):
    views = {"image": (augmentation("random_resized_crop"),)}
    config = source_config(dataset="image_folder", params={"root": "pets", "size": 8}, views=views, batch_size=4)
    message = r"augment.random_resized_crop: view 'image': random_resized_crop .* resident: false"
    with pytest.raises(ConfigError, match=message):
        open_source(config)


@pytest.mark.parametrize("dataset", ["cifar100", "synthetic"])
def test_random_resized_crop_is_rejected_before_the_files_exist(dataset):
    config = source_config(dataset=dataset, views={"image": (augmentation("random_resized_crop"),)})
    with pytest.raises(ConfigError, match=f"but {dataset} is held in memory"):
        describe_source(config, "nowhere")


def test_imagenet_reads_a_small_folder_like_torchvision(tmp_path):
    splits = {"train": {"n01": 5, "n02": 4}, "val": {"n01": 2, "n02": 1}}
    files = write_image_folders(tmp_path / "data" / "imagenet", splits, size=(40, 30), suffix="JPEG")
    views = {"image": (augmentation("random_resized_crop"), augmentation("flip"))}
    params = {"size": 16, "resize": 20, "normalize": False}
    train = open_source(source_config(dataset="imagenet", batch_size=4, params=params, views=views))
    batches = list(training_batches(train, 0))
    assert [batch["image"].shape for batch in batches] == [(4, 3, 16, 16)] * 2 + [(1, 3, 16, 16)]
    assert train.classes == ["n01", "n02"]
    for split in ("test", "val"):
        evaluation = open_source(source_config(name="eval", dataset="imagenet", split=split, params=params))
        (batch,) = evaluation_batches(evaluation, 64)
        assert batch["label"].tolist() == [0, 0, 1]
        for image, (_, path, _) in zip(batch["image"], files["val"], strict=True):
            with Image.open(path) as file:
                expected = tv.to_tensor(tv.center_crop(tv.resize(file.convert("RGB"), 20), [16, 16]))
            assert torch.equal(image, expected)
        assert train.checksum != evaluation.checksum
