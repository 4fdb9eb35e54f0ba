"""Which images a view can show of a sample: as many as it says, and the code tells which one it is."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdbench.data.augment.geometric import Crop
from kdbench.data.augment.view import View
from kdbench.data.describe import describe_source
from kdbench.registry import AUGMENTATIONS

SHAPE = (3, 8, 8)
PARAMETERS = {"cutout": {"size": 3}, "same": {"view": "image"}}
COUNTED = {"crop": 81, "flip": 2, "cutout": 64, "rotate90": 4, "half": 1, "low_resolution": 1}


def images(count: int = 1) -> torch.Tensor:
    """No two pixels of an image are alike, so that two variants are alike in no pixel by chance."""
    drawn = [torch.randperm(192, generator=torch.Generator().manual_seed(n)).view(SHAPE) + 1 for n in range(count)]
    return torch.stack(drawn).to(torch.uint8)


def shown(view: View, draws: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Many draws of one sample: the images, and their codes."""
    table = view.sample_params(draws, seed, "train", 0)
    return view.augment(images(), torch.zeros(draws, dtype=torch.int64), table), view.variant_ids(table)


def keys(image: torch.Tensor) -> list[bytes]:
    return [one.contiguous().numpy().tobytes() for one in image]


@pytest.mark.parametrize(
    ("augments", "count"),
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
def test_two_draws_show_the_same_image_exactly_when_their_codes_are_equal(part, augments, count):
    view = View("image", [part(name, **params) for name, params in augments], SHAPE)
    image, codes = shown(view, 60 * count)
    assert view.variant_count.count == count
    assert set(codes.tolist()) == set(range(count)), "every variant is drawn, and no other code"
    pairs = set(zip(keys(image), codes.tolist(), strict=True))
    assert len({code for _, code in pairs}) == len(pairs), "one code, one image"
    if count != 162:  # a crop after a crop shows some images along two ways
        assert len({key for key, _ in pairs}) == len(pairs), "one image, one code"


def test_a_code_that_forgets_the_column_is_noticed(part, monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(Crop, "variant_id", lambda self, draws, shape: (draws[:, 0] * 5).long())
    image, codes = shown(View("image", [part("crop", padding=2)], SHAPE), 1000)
    pairs = set(zip(keys(image), codes.tolist(), strict=True))
    assert len({code for _, code in pairs}) < len(pairs)


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS.entries) - {"same"}))
def test_the_image_is_a_function_of_the_code_wherever_variants_are_counted(part, name):
    """Every registered augmentation: a counted one has codes that tell its images apart, the others say why not."""
    view = View("image", [part(name, **PARAMETERS.get(name, {}))], SHAPE)
    assert view.variant_count.count == COUNTED.get(name)
    if view.variant_count.count is None:
        assert name in view.variant_count.reason
        return
    image, codes = shown(view, 2000)
    first: dict[int, bytes] = {}
    for key, code in zip(keys(image), codes.tolist(), strict=True):
        assert 0 <= code < view.variant_count.count
        assert first.setdefault(code, key) == key


def test_variants_are_multiplied_and_one_without_end_spoils_them_all(part):
    crop, flip = part("crop"), part("flip")
    assert View("image", [crop, flip], (3, 32, 32)).variant_count.count == 162
    for spoiler, words in (("mixup", "blends"), ("color", "not counted"), ("noise", "not counted")):
        found = View("image", [crop, part(spoiler), flip], SHAPE).variant_count
        assert found.count is None and spoiler in found.reason and words in found.reason


def test_a_source_says_how_many_variants_its_views_have(make, part):
    views = {"image": (part("crop", padding=1), part("flip")), "strong": (part("color"),)}
    counted = describe_source(make(params={"shape": [3, 8, 8]}, views=views), "data").variants
    assert {name: variants.count for name, variants in counted.items()} == {"image": 18, "strong": None}
    overlapping = describe_source(make(params={"shape": [3, 8, 8]}, views=views, overlap=True), "data").variants
    assert all(variants.count is None and "overlap" in variants.reason for variants in overlapping.values())


def test_what_is_read_from_files_is_not_counted(make, tmp_path, write_folders):
    write_folders(tmp_path / "pets", {"train": {"ant": 3, "bee": 3}}, size=(14, 11))
    for resident, count in ((True, 1), (False, None)):
        params = {"root": "pets", "size": 8, "resident": resident}
        found = describe_source(make(dataset="image_folder", params=params), "data").variants["image"]
        assert found.count == count and ("read from files" in found.reason) is (not resident)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_rank_sees_in_an_epoch_is_what_its_batches_hold(make, source_of, world, overlap):
    params = {"shape": [1, 8, 8], "samples": 23, "classes": 3}
    for rank, epoch in itertools.product(range(world), range(2)):
        source = source_of(make(params=params, batch_size=4, overlap=overlap), rank=rank, world_size=world)
        held = torch.cat([batch["index"] for batch in source.batches(epoch)]).unique()
        assert torch.equal(source.epoch_positions(epoch), held)
