"""Several views of one sample: independent, or one that continues another with the same parameters."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from helpers.data_sources import (
    augmentation,
    evaluation_batches,
    open_source,
    source_config,
    training_batches,
    write_image_folders,
)
from kdbench.data.augment.corruptions import hashed_normals
from kdbench.errors import ConfigError

PARAMS = {"samples": 40, "shape": [3, 8, 8]}


def same(view="image"):
    """Configures the augmentation that continues another view."""
    return augmentation("same", view=view)


def test_continued_view_differs_only_by_its_further_augmentations():
    views = {
        "image": (augmentation("crop"), augmentation("flip")),
        "equal": (same(),),
        "noisy": (same(), augmentation("noise", std=0.3)),
        "independent": (augmentation("crop"), augmentation("flip")),
    }
    source = open_source(source_config(views=views, params=PARAMS))
    for batch in training_batches(source, 1):
        assert torch.equal(batch["image"], batch["equal"])
        assert not torch.equal(batch["image"], batch["independent"])  # negative control
        noise = (batch["noisy"] - batch["image"]) / 0.3
        params = source.views["noisy"].sample_params(40, 1, "train", 1)[batch["index"]]
        assert_close(noise.flatten(1), hashed_normals(params[:, -2:], 192), rtol=1e-3, atol=1e-4)
        assert batch["index"].shape == batch["label"].shape == (len(noise),)


def test_every_view_shows_the_sample_of_the_row():
    views = {
        "image": (augmentation("flip"),),
        "other": (augmentation("flip"),),
        "more": (same("other"),),
        "raw": (),
    }
    source = open_source(source_config(views=views, params=PARAMS))
    stored = next(evaluation_batches(source, 40))["image"]
    for batch in training_batches(source, 0):
        assert torch.equal(batch["raw"], stored[batch["index"]])
        for name in ("image", "other", "more"):
            unflipped, flipped = (batch[name] == batch["raw"]), (batch[name] == batch["raw"].flip(3))
            assert (unflipped.flatten(1).all(1) | flipped.flatten(1).all(1)).all()
        assert torch.equal(batch["other"], batch["more"])


def test_views_may_continue_continued_views_in_any_order():
    views = {
        "third": (same("second"), augmentation("rotate90", turns=1)),
        "second": (same(), augmentation("cutout", size=3)),
        "image": (augmentation("crop"),),
    }
    batch = next(training_batches(open_source(source_config(views=views, params=PARAMS)), 0))
    assert torch.equal(batch["third"], torch.rot90(batch["second"], 1, (2, 3)))
    cut_out = batch["second"] == 0
    assert torch.equal(batch["second"][~cut_out], batch["image"][~cut_out]) and cut_out.any()


def test_further_augmentations_of_a_continued_view_have_their_own_parameters():
    views = {
        "image": (augmentation("crop"),),
        "second": (same(), augmentation("crop")),
        "third": (same(), augmentation("crop")),
    }
    batch = next(training_batches(open_source(source_config(views=views, params=PARAMS)), 0))
    pairs = itertools.combinations((batch["image"], batch["second"], batch["third"]), 2)
    assert not any(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_mixed_views_use_the_same_partner_and_weight(world_size):
    options = {
        "views": {
            "image": (augmentation("crop"), augmentation("mixup", fraction=0.7)),
            "noisy": (same(), augmentation("noise", std=0.1)),
            "equal": (same(),),
        },
        "params": PARAMS,
    }
    single = open_source(source_config(batch_size=20, **options))
    for rank in range(world_size):
        config = source_config(batch_size=20 // world_size, **options)
        source = open_source(config, rank=rank, world_size=world_size)
        for batch, global_batch in zip(training_batches(source, 0), training_batches(single, 0), strict=True):
            assert torch.equal(batch["image"], batch["equal"])
            noise = (batch["noisy"] - batch["image"]) / 0.1
            # Noise is added after the mixing: averaged noise would have a smaller deviation.
            assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1
            for field in global_batch:
                assert_close(batch[field], global_batch[field][rank::world_size], rtol=1e-6, atol=1e-6)


def test_streamed_views_use_the_same_decoded_crop(tmp_path):
    splits = {"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}
    write_image_folders(tmp_path / "pets", splits, size=(40, 30))
    params = {"root": str(tmp_path / "pets"), "size": 16, "resident": False}
    views = {
        "image": (augmentation("random_resized_crop"), augmentation("flip")),
        "equal": (same(),),
        "independent": (augmentation("random_resized_crop"), augmentation("flip")),
    }
    for workers in (0, 1):
        config = source_config(dataset="image_folder", params=params, views=views, batch_size=4)
        source = open_source(config, workers=workers)
        for batch in training_batches(source, 0):
            assert torch.equal(batch["image"], batch["equal"])
            assert not torch.equal(batch["image"], batch["independent"])
        source.close()


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"image": (), "b": (augmentation("flip"), same())}, "`same` must be the first augmentation of view 'b'"),
        ({"image": (), "b": (same("imge"),)}, "no view 'imge'. Did you mean 'image'"),
        ({"image": (same("b"),), "b": (same(),)}, "in a cycle: image -> b -> image"),
        ({"image": (augmentation("mixup"),), "b": (augmentation("cutmix"),)}, "Mix in one view only"),
    ],
)
def test_unsuitable_views_are_rejected(views, message):
    with pytest.raises(ConfigError, match=message):
        open_source(source_config(views=views, params=PARAMS))
