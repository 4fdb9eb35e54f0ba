"""Crops, flips, cutout, mixup and cutmix: the same pixels as the references, from draws that belong to the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from kdbench.data.augment.geometric import Crop, Flip, RandomResizedCrop, uniform_integers
from kdbench.data.augment.mixing import Cutmix, Cutout, Mixup
from kdbench.data.augment.view import View, gather_pixels
from kdbench.errors import ConfigError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def images(count=20, shape=(3, 32, 32), seed=0):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def offsets(draws, places):
    return (draws.double() * places).floor().long().clamp(max=places - 1).tolist()


@pytest.mark.parametrize(("padding", "size"), [(4, None), (0, 24), (2, 28), (3, 36)])
def test_crop_and_flip_equal_torchvision_at_the_same_offsets(part, padding, size):
    view = View("image", [part("crop", padding=padding, size=size), part("flip")], (3, 32, 32), MEAN, STD)
    stored, rows = images(), torch.tensor([3, 3, 0, 19, 7])
    draws = view.sample_params(20, seed=5, source="train", epoch=2)[rows]
    got = view.augment(stored, rows, draws)
    side = size or 32
    tops, lefts = (offsets(draws[:, k], 32 + 2 * padding - side + 1) for k in (0, 1))
    for k, row in enumerate(rows.tolist()):
        image = tv.crop(tv.pad(stored[row], [padding] * 4), tops[k], lefts[k], side, side)
        if draws[k, 2] < 0.5:
            image = tv.horizontal_flip(image)
        expected = tv.normalize(tv.to_dtype(image, torch.float32, scale=True), MEAN, STD)
        assert_close(got[k], expected, rtol=0, atol=1e-6)
    assert {bool(flip) for flip in draws[:, 2] < 0.5} == {True, False}


def test_crop_and_flip_equal_the_pil_pipeline_exactly(part):
    view = View("image", [part("crop"), part("flip", p=1.0)], (3, 32, 32))
    stored = images()
    draws = view.sample_params(20, 1, "train", 0)
    got = (view.augment(stored, torch.arange(20), draws) * 255).round().to(torch.uint8)
    for k, (top, left) in enumerate(zip(offsets(draws[:, 0], 9), offsets(draws[:, 1], 9), strict=True)):
        canvas = Image.new("RGB", (40, 40))
        canvas.paste(Image.fromarray(stored[k].permute(1, 2, 0).numpy()), (4, 4))
        image = canvas.crop((left, top, left + 32, top + 32)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(got[k].permute(1, 2, 0).numpy(), np.asarray(image))


def test_moves_are_composed_in_the_order_of_the_recipe(part):
    stored, rows = images(1, (1, 6, 9)), torch.tensor([0])
    draws = torch.tensor([[0.99, 0.0]])
    last_rows = Crop(padding=0, size=4)
    ys, xs = torch.arange(6)[None], torch.arange(9)[None]
    flipped_first = last_rows.map_coordinates(*Flip(1.0).map_coordinates(ys, xs, draws), draws)
    flipped_last = Flip(1.0).map_coordinates(*last_rows.map_coordinates(ys, xs, draws), draws)
    assert_close(gather_pixels(stored, rows, *flipped_first), stored.flip(3)[:, :, 2:6, 0:4])
    assert_close(gather_pixels(stored, rows, *flipped_last), stored[:, :, 2:6, 0:4].flip(3))


def test_crop_offsets_and_flips_are_uniform(part):
    view = View("image", [part("crop"), part("flip", p=0.3)], (3, 32, 32))
    draws = view.sample_params(81_000, 3, "train", 0)
    both = uniform_integers(draws[:, 0], 9) * 9 + uniform_integers(draws[:, 1], 9)
    counts = torch.bincount(both, minlength=81).double()
    chi_square = ((counts - 1000) ** 2 / 1000).sum()  # 80 degrees of freedom: 99.99 % lie below 136
    assert 40 < chi_square < 136
    assert abs((draws[:, 2] < 0.3).double().mean() - 0.3) < 0.008


def test_padding_is_black_before_normalisation(part):
    view = View("image", [part("crop", padding=8)], (3, 8, 8), MEAN, STD)
    outside = torch.zeros(1, 2)  # the corner of the padding
    got = view.augment(images(1, (3, 8, 8)), torch.tensor([0]), outside)
    expected = -torch.tensor(MEAN) / torch.tensor(STD)
    assert_close(got, expected.view(1, 3, 1, 1).expand_as(got))


def test_draws_depend_on_seed_source_view_epoch_and_sample_only(part):
    def table(view="image", samples=50, seed=1, source="train", epoch=0, augments=("crop", "flip")):
        return View(view, [part(name) for name in augments], (3, 32, 32)).sample_params(samples, seed, source, epoch)

    same = table()
    assert torch.equal(same, table())
    for other in (table(view="image_strong"), table(seed=2), table(source="other"), table(epoch=1)):
        assert not torch.isclose(same, other).all(0).any()


def test_another_augmentation_leaves_the_draws_of_the_others(part):
    crops = View("image", [part("crop"), part("flip")], (3, 32, 32)).sample_params(9, 1, "train", 0)
    more = View("image", [part("cutout", size=8), part("crop"), part("flip")], (3, 32, 32)).sample_params(9, 1, "train", 0)
    assert torch.equal(crops, more[:, 2:])


def test_two_crops_in_one_view_draw_apart(part):
    twice = View("image", [part("crop"), part("crop")], (3, 32, 32)).sample_params(9, 1, "train", 0)
    assert not torch.isclose(twice[:, :2], twice[:, 2:]).any()


def test_cutout_zeroes_the_square_of_the_paper_after_normalisation():
    image = torch.randn(200, 3, 16, 12, generator=torch.Generator().manual_seed(0)) + 5
    draws = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    got = Cutout(size=6).apply(image, draws)
    for k in range(200):
        y, x = int(draws[k, 0].double() * 16), int(draws[k, 1].double() * 12)
        expected = image[k].clone()
        expected[:, max(0, y - 3) : min(16, y + 3), max(0, x - 3) : min(12, x + 3)] = 0
        assert torch.equal(got[k], expected)


def test_mixup_is_the_convex_blend_of_rows_and_partners():
    image = torch.randn(6, 3, 4, 4)
    draws = torch.rand(6, 1)
    mixed, share = Mixup(0.4).mix(image, image.roll(1, 0), draws)
    for k in range(6):
        assert_close(mixed[k], draws[k] * image[k] + (1 - draws[k]) * image[k - 1])
    assert torch.equal(share, draws[:, 0])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixing_draws_follow_the_beta_distribution(alpha):
    for augment in (Mixup(alpha), Cutmix(alpha)):
        drawn = augment.sample_params(40_000, 7)[:, 0].double()
        assert abs(drawn.mean() - 0.5) < 0.01
        assert abs(drawn.var() - 1 / (4 * (2 * alpha + 1))) < 0.005  # of Beta(a, a)


def test_cutmix_pastes_the_box_of_the_paper_and_counts_its_pixels():
    image, partner = torch.zeros(300, 1, 12, 20), torch.ones(300, 1, 12, 20)
    draws = Cutmix(1.0).sample_params(300, 3)
    mixed, share = Cutmix(1.0).mix(image, partner, draws)
    assert_close(share, 1 - mixed.mean((1, 2, 3)))
    for k in range(300):
        ratio = np.sqrt(1 - np.float32(draws[k, 0]))
        half_h, half_w = int(12 * ratio) // 2, int(20 * ratio) // 2
        y, x = int(draws[k, 1].double() * 12), int(draws[k, 2].double() * 20)
        expected = torch.zeros(12, 20)
        expected[max(0, y - half_h) : min(12, y + half_h), max(0, x - half_w) : min(20, x + half_w)] = 1
        assert torch.equal(mixed[k, 0], expected)


def test_evaluation_takes_the_centre_and_draws_nothing(part):
    view = View("image", [part("crop", padding=2, size=6), part("flip", p=1.0)], (3, 9, 10))
    stored = images(4, (3, 9, 10))
    assert_close(view.evaluation_images(stored, torch.arange(4)), tv.center_crop(stored, [6, 6]).float() / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_layout_are_those_asked_for(part, dtype):
    view = View("image", [part("crop"), part("mixup")], (3, 32, 32), MEAN, STD, dtype=dtype, channels_last=True)
    draws = view.sample_params(20, 1, "train", 0)
    image = view.augment(images(), torch.arange(20), draws)
    mixed, share = view.mix(image, image.roll(1, 0), draws)
    assert image.dtype == mixed.dtype == share.dtype == dtype
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_no_augmentation_reads_a_value(part, mixing):
    """Under FakeTensorMode every host read raises: nothing waits for a GPU, and shapes are static."""
    augments = [part("crop", size=28), part("flip"), part("cutout", size=8), part(mixing)]
    view = View("image", augments, (3, 32, 32), MEAN, STD, channels_last=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored = torch.empty(20, 3, 32, 32, dtype=torch.uint8)
        rows = torch.empty(8, dtype=torch.int64)
        draws = torch.empty(8, view.num_params)
        image = view.augment(stored, rows, draws)
        mixed, share = view.mix(image, image.roll(1, 0), draws)
        plain = view.evaluation_images(stored, rows)
    assert mixed.shape == plain.shape == (8, 3, 28, 28)
    assert share.shape == (8,)


def test_random_resized_crop_stays_inside_and_covers_the_asked_area():
    crop = RandomResizedCrop(scale=(0.2, 0.6))
    for k in range(300):
        left, top, right, bottom = crop.box(90, 60, np.random.default_rng(k))
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        assert 0.18 < (right - left) * (bottom - top) / 5400 < 0.63
        assert 0.7 < (right - left) / (bottom - top) < 1.42
    wide = crop.box(1000, 10, np.random.default_rng(0))  # no try fits: the centre, at the widest ratio
    assert wide == (493, 0, 506, 10)


def test_faults_are_told_with_their_place(part):
    with pytest.raises(
        ConfigError, match=r"recipe.yaml:7 augment.crop: crop: size 50 is more than the padded image has \(40\)"
    ):
        View("image", [part("crop", size=50)], (3, 32, 32))
    with pytest.raises(ConfigError, match=r"recipe.yaml:7 .*Did you mean 'crop'"):
        View("image", [part("corp")], (3, 32, 32))
    with pytest.raises(ConfigError, match="one of mixup and cutmix is enough"):
        View("image", [part("mixup"), part("cutmix")], (3, 32, 32))
    with pytest.raises(ConfigError, match=r"flip needs images of shape \[channels, height, width\].*\[16\]"):
        View("image", [part("flip")], (16,))
    for name, params in (
        ("flip", {"p": 2.0}),
        ("cutout", {"size": 0}),
        ("mixup", {"alpha": 0.0}),
        ("crop", {"padding": -1}),
    ):
        with pytest.raises(ConfigError, match=rf"recipe.yaml:7 .*{name}"):
            View("image", [part(name, **params)], (3, 32, 32))
