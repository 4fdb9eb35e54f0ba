"""Variants: a view shows as many different images of a sample as it declares, and `variant_ids` identifies them."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.data_sources import augmentation, open_source, source_config, training_batches, write_image_folders
from kdbench.data.augment.geometric import Crop
from kdbench.data.augment.view import View
from kdbench.data.describe import describe_source
from kdbench.registry import AUGMENTATIONS

SHAPE = (3, 8, 8)
PARAMETERS = {"cutout": {"size": 3}, "same": {"view": "image"}}
VARIANT_COUNTS = {"crop": 81, "flip": 2, "cutout": 64, "rotate90": 4, "half": 1, "low_resolution": 1}


def distinct_pixels() -> torch.Tensor:
    """Returns one image without two equal pixels, so that variants differ wherever they use other pixels."""
    return (torch.randperm(192, generator=torch.Generator().manual_seed(0)).view(1, *SHAPE) + 1).to(torch.uint8)


def draw_variants(view: View, count: int, seed: int = 1) -> list[tuple[bytes, int]]:
    """Draws `count` times from one sample; returns each image, as bytes, with its variant id."""
    params = view.sample_params(count, seed, "train", 0)
    images = view.augment(distinct_pixels(), torch.zeros(count, dtype=torch.int64), params)
    keys = [image.contiguous().numpy().tobytes() for image in images]
    return list(zip(keys, view.variant_ids(params).tolist(), strict=True))


@pytest.mark.parametrize(
    ("augmentations", "count"),
    [
        ([], 1),
        ([("crop", {"padding": 2})], 25),
        ([("flip", {})], 2),
        ([("crop", {"padding": 1}), ("flip", {})], 18),
        ([("flip", {}), ("crop", {"padding": 0, "size": 6}), ("crop", {"padding": 1})], 2 * 9 * 9),
        ([("rotate90", {}), ("flip", {})], 8),
        ([("rotate90", {"turns": 1}), ("half", {})], 1),
    ],
)
def test_images_are_equal_exactly_when_their_ids_are(augmentations, count):
    view = View("image", [augmentation(name, **params) for name, params in augmentations], SHAPE)
    pairs = set(draw_variants(view, 60 * count))
    ids = {variant_id for _, variant_id in pairs}
    assert view.variant_count.count == count
    assert ids == set(range(count)), "every variant occurs, and no other id"
    assert len(ids) == len(pairs), "one id, one image"
    if count != 162:  # two crops in a row can reach the same image in several ways
        assert len({image for image, _ in pairs}) == len(pairs), "one image, one id"


def test_id_without_the_column_is_detected(monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(Crop, "variant_id", lambda self, params, shape: (params[:, 0] * 5).long())
    pairs = set(draw_variants(View("image", [augmentation("crop", padding=2)], SHAPE), 1000))
    assert len({variant_id for _, variant_id in pairs}) < len(pairs)


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS.entries) - {"same"}))
def test_every_augmentation_has_valid_ids_or_gives_a_reason(name):
    view = View("image", [augmentation(name, **PARAMETERS.get(name, {}))], SHAPE)
    assert view.variant_count.count == VARIANT_COUNTS.get(name)
    if view.variant_count.count is None:
        assert name in view.variant_count.reason
        return
    images_by_id: dict[int, bytes] = {}
    for image, variant_id in draw_variants(view, 2000):
        assert 0 <= variant_id < view.variant_count.count
        assert images_by_id.setdefault(variant_id, image) == image


def test_variant_counts_are_multiplied_unless_one_is_infinite():
    crop, flip = augmentation("crop"), augmentation("flip")
    assert View("image", [crop, flip], (3, 32, 32)).variant_count.count == 162
    for name, reason in (("mixup", "blends"), ("color", "no finite list"), ("noise", "no finite list")):
        variants = View("image", [crop, augmentation(name), flip], SHAPE).variant_count
        assert variants.count is None and name in variants.reason and reason in variants.reason


def test_source_spec_has_the_variant_counts_of_its_views():
    views = {"image": (augmentation("crop", padding=1), augmentation("flip")), "strong": (augmentation("color"),)}
    options = {"params": {"shape": [3, 8, 8]}, "views": views}
    variants = describe_source(source_config(**options), "data").variants
    assert {name: view_variants.count for name, view_variants in variants.items()} == {"image": 18, "strong": None}
    overlapping = describe_source(source_config(**options, overlap=True), "data").variants
    assert all(variants.count is None and "overlap" in variants.reason for variants in overlapping.values())


def test_streamed_images_have_no_variant_count(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"ant": 3, "bee": 3}}, size=(14, 11))
    for resident, count in ((True, 1), (False, None)):
        params = {"root": "pets", "size": 8, "resident": resident}
        variants = describe_source(source_config(dataset="image_folder", params=params), "data").variants["image"]
        assert variants.count == count and ("read from files" in variants.reason) is (not resident)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_epoch_indices_are_those_of_the_batches(world_size, overlap):
    config = source_config(params={"shape": [1, 8, 8], "samples": 23, "classes": 3}, batch_size=4, overlap=overlap)
    for rank, epoch in itertools.product(range(world_size), range(2)):
        source = open_source(config, rank=rank, world_size=world_size)
        indices = torch.cat([batch["index"] for batch in training_batches(source, epoch)]).unique()
        assert torch.equal(source.epoch_indices(epoch), indices)
