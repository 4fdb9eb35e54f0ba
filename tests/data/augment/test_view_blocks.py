"""Views of one sample: drawn apart, or one continuing the other with its draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from kdbench.data.augment.corruptions import hashed_normals
from kdbench.errors import ConfigError

PARAMS = {"samples": 40, "shape": [3, 8, 8]}


@pytest.fixture
def same(part):
    return lambda view="image": part("same", view=view)


def test_a_view_that_continues_another_differs_only_by_what_follows(source_of, make, part, same):
    views = {
        "image": (part("crop"), part("flip")),
        "equal": (same(),),
        "noisy": (same(), part("noise", std=0.3)),
        "apart": (part("crop"), part("flip")),
    }
    source = source_of(make(views=views, params=PARAMS))
    for batch in source.batches(1):
        assert torch.equal(batch["image"], batch["equal"])
        assert not torch.equal(batch["image"], batch["apart"])  # the negative control: views that draw apart
        noise = (batch["noisy"] - batch["image"]) / 0.3
        table = source.views["noisy"].sample_params(40, 1, "train", 1)[batch["index"]]
        assert_close(noise.flatten(1), hashed_normals(table[:, -2:], 192), rtol=1e-3, atol=1e-4)
        assert batch["index"].shape == batch["label"].shape == (len(noise),)


def test_every_view_is_of_the_same_sample(source_of, make, part, same):
    """Without augmentation all views are the image of `index`; with it each is a move of that image's pixels."""
    views = {"image": (part("flip"),), "other": (part("flip"),), "more": (same("other"),), "raw": ()}
    source = source_of(make(views=views, params=PARAMS))
    plain = next(source.evaluation_batches(40))["image"]
    for batch in source.batches(0):
        assert torch.equal(batch["raw"], plain[batch["index"]])
        for name in ("image", "other", "more"):
            kept, turned = (batch[name] == batch["raw"]), (batch[name] == batch["raw"].flip(3))
            assert (kept.flatten(1).all(1) | turned.flatten(1).all(1)).all()
        assert torch.equal(batch["other"], batch["more"])


def test_views_continue_views_that_continue_views_in_any_order(source_of, make, part, same):
    views = {
        "third": (same("second"), part("rotate90", turns=1)),
        "second": (same(), part("cutout", size=3)),
        "image": (part("crop"),),
    }
    batch = next(source_of(make(views=views, params=PARAMS)).batches(0))
    assert torch.equal(batch["third"], torch.rot90(batch["second"], 1, (2, 3)))
    covered = batch["second"] == 0
    assert torch.equal(batch["second"][~covered], batch["image"][~covered]) and covered.any()


def test_further_draws_of_the_same_kind_are_the_views_own(source_of, make, part, same):
    views = {"image": (part("crop"),), "twice": (same(), part("crop")), "again": (same(), part("crop"))}
    batch = next(source_of(make(views=views, params=PARAMS)).batches(0))
    pairs = itertools.combinations((batch["image"], batch["twice"], batch["again"]), 2)
    assert not any(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("world", [1, 2])
def test_mixed_views_share_partner_and_share(source_of, make, part, same, world):
    views = {
        "image": (part("crop"), part("mixup", fraction=0.7)),
        "noisy": (same(), part("noise", std=0.1)),
        "equal": (same(),),
    }
    alone = source_of(make(batch_size=20, views=views, params=PARAMS))
    for rank in range(world):
        source = source_of(make(batch_size=20 // world, views=views, params=PARAMS), rank=rank, world_size=world)
        for batch, whole in zip(source.batches(0), alone.batches(0), strict=True):
            assert torch.equal(batch["image"], batch["equal"])
            noise = (batch["noisy"] - batch["image"]) / 0.1
            assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1  # added after the mixing: not averaged away
            for key in whole:
                assert_close(batch[key], whole[key][rank::world], rtol=1e-6, atol=1e-6)


def test_streamed_views_share_what_is_read(source_of, make, part, same, write_folders, tmp_path):
    write_folders(tmp_path / "own", {"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}, size=(40, 30))
    params = {"root": str(tmp_path / "own"), "size": 16, "resident": False}
    views = {
        "image": (part("random_resized_crop"), part("flip")),
        "equal": (same(),),
        "apart": (part("random_resized_crop"), part("flip")),
    }
    for workers in (0, 1):
        source = source_of(make(dataset="image_folder", params=params, views=views, batch_size=4), workers=workers)
        for batch in source.batches(0):
            assert torch.equal(batch["image"], batch["equal"])
            assert not torch.equal(batch["image"], batch["apart"])
        source.close()


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"image": (), "b": ("flip", "same:image")}, "`same` comes first"),
        ({"image": (), "b": ("same:imge",)}, "no view 'imge'. Did you mean 'image'"),
        ({"image": ("same:b",), "b": ("same:image",)}, "in a circle: image -> b -> image"),
        ({"image": ("mixup",), "b": ("cutmix",)}, "let the other continue it"),
    ],
)
def test_mistakes_are_told(source_of, make, part, same, views, message):
    spelled = {
        name: tuple(same(item[5:]) if item.startswith("same:") else part(item) for item in items)
        for name, items in views.items()
    }
    with pytest.raises(ConfigError, match=message):
        source_of(make(views=spelled, params=PARAMS))
