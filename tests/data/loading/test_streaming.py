"""Images that are decoded in every epoch: the same order, draws and batches as those held in memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv

from kdbench.data.augment.geometric import RandomResizedCrop
from kdbench.data.describe import describe_source
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import derive

quiet_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12+


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def pets(tmp_path, write_folders):
    return write_folders(tmp_path / "pets", {"train": {"ant": 7, "bee": 6}, "val": {"ant": 2, "bee": 3}}, size=(14, 11))


@pytest.fixture
def folder(make, part):
    def build(resident, augments=("crop", "flip", "mixup"), **rest):
        views = {"image": tuple(part(name) for name in augments), "raw": ()}
        params = {"root": "pets", "size": 8, "resident": resident}
        return make(dataset="image_folder", batch_size=rest.pop("batch_size", 4), params=params, views=views, **rest)

    return build


@quiet_fork
@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_and_resident_give_the_same_batches(pets, folder, source_of, workers):
    resident = source_of(folder(True, label_fraction=4))
    streaming = source_of(folder(False, label_fraction=4), workers=workers)
    assert type(streaming) is not type(resident)
    for epoch, start in ((0, 0), (1, 2), (0, 3)):
        pairs = zip(resident.batches(epoch, start), streaming.batches(epoch, start), strict=True)
        assert all(itertools.starmap(same, pairs))
    assert all(itertools.starmap(same, zip(resident.evaluation_batches(5), streaming.evaluation_batches(5), strict=True)))
    streaming.close()


def test_ranks_together_give_the_global_batch(pets, folder, source_of):
    whole = list(source_of(folder(False, batch_size=6)).batches(2))
    ranks = [source_of(folder(False, batch_size=3), rank=rank, world_size=2) for rank in range(2)]
    for batch, *shards in zip(whole[:2], *(itertools.islice(rank.batches(2), 2) for rank in ranks), strict=True):
        for rank, one in enumerate(shards):
            assert same(one, {key: value[rank::2] for key, value in batch.items()})


@quiet_fork
def test_an_iteration_that_was_left_does_not_disturb_the_next(pets, folder, source_of):
    source = source_of(folder(False), workers=1)
    expected = list(source.batches(0))
    next(source.batches(1))
    assert all(itertools.starmap(same, zip(expected, source.batches(0), strict=True)))
    iterator = source.batches(0)
    first = next(iterator)
    list(source.evaluation_batches(4))  # an evaluation in between
    assert all(itertools.starmap(same, zip(expected, [first, *iterator], strict=True)))
    source.close()


def test_reading_leaves_the_global_generator_alone(pets, folder, source_of):
    state = torch.get_rng_state()
    list(source_of(folder(False)).batches(0))
    assert torch.equal(state, torch.get_rng_state())


def test_random_resized_crop_is_torchvisions_at_the_drawn_box(pets, make, part, source_of):
    from PIL import Image

    views = {"image": (part("random_resized_crop"),), "other": (part("random_resized_crop"),)}
    params = {"root": "pets", "size": 8, "resident": False, "normalize": False}
    source = source_of(make(dataset="image_folder", batch_size=13, params=params, views=views), seed=3)
    batch = next(source.batches(5))
    assert not torch.equal(batch["image"], batch["other"])
    for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
        key = [derive(3, "augment", "train", "image", 5, "reading"), index]
        with Image.open(pets["train"][index][1]) as whole:
            left, top, right, bottom = RandomResizedCrop().box(14, 11, np.random.Generator(np.random.Philox(key=key)))
            expected = tv.resized_crop(whole.convert("RGB"), top, left, bottom - top, right - left, [8, 8])
        assert torch.equal(image, tv.to_tensor(expected))


@quiet_fork
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_without_a_worker_traceback(pets, folder, source_of, workers):
    pets["train"][3][1].write_text("hello")
    with pytest.raises(DataError, match=r"^\S*ant/003.png cannot be read as an image \(.*Replace it or remove it\.$"):
        list(source_of(folder(False), workers=workers).batches(0))


def test_random_resized_crop_on_images_in_memory_is_refused(pets, make, part, source_of):
    views = {"image": (part("random_resized_crop"),)}
    params = {"root": "pets", "size": 8}
    with pytest.raises(
        ConfigError, match=r"augment.random_resized_crop: view 'image': random_resized_crop .* resident: false"
    ):
        source_of(make(dataset="image_folder", params=params, views=views, batch_size=4))


@pytest.mark.parametrize("dataset", ["cifar100", "synthetic"])
def test_random_resized_crop_on_images_in_memory_is_refused_before_they_are_there(make, part, dataset):
    source = make(dataset=dataset, views={"image": (part("random_resized_crop"),)})
    with pytest.raises(ConfigError, match=f"but {dataset} is held in memory"):
        describe_source(source, "nowhere")


def test_imagenet_on_a_small_folder(tmp_path, write_folders, make, part, source_of):
    splits = {"train": {"n01": 5, "n02": 4}, "val": {"n01": 2, "n02": 1}}
    written = write_folders(tmp_path / "data" / "imagenet", splits, size=(40, 30), suffix="JPEG")
    views = {"image": (part("random_resized_crop"), part("flip"))}
    params = {"size": 16, "resize": 20, "normalize": False}
    train = source_of(make(dataset="imagenet", batch_size=4, params=params, views=views))
    batches = list(train.batches(0))
    assert [batch["image"].shape for batch in batches] == [(4, 3, 16, 16)] * 2 + [(1, 3, 16, 16)]
    assert train.classes == ["n01", "n02"]
    for name in ("test", "val"):
        evaluation = source_of(make(name="eval", dataset="imagenet", split=name, params=params))
        (batch,) = evaluation.evaluation_batches(64)
        assert batch["label"].tolist() == [0, 0, 1]
        from PIL import Image

        for image, (_, path, _) in zip(batch["image"], written["val"], strict=True):
            with Image.open(path) as whole:
                expected = tv.to_tensor(tv.center_crop(tv.resize(whole.convert("RGB"), 20), [16, 16]))
            assert torch.equal(image, expected)
    assert train.checksum != evaluation.checksum
