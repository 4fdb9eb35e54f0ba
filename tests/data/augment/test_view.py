"""Crops, flips, cutout, mixup and cutmix: the same pixels as torchvision, PIL and the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from helpers.data_sources import augmentation
from kdbench.data.augment.geometric import Crop, Flip, RandomResizedCrop, uniform_integers
from kdbench.data.augment.mixing import Cutmix, Cutout, Mixup
from kdbench.data.augment.view import View, gather_pixels
from kdbench.errors import ConfigError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def random_images(count=20, shape=(3, 32, 32), seed=0):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def offsets(uniform, count):
    """Converts uniform numbers to offsets below `count`, independently of `uniform_integers`."""
    return (uniform.double() * count).floor().long().clamp(max=count - 1).tolist()


@pytest.mark.parametrize(("padding", "size"), [(4, None), (0, 24), (2, 28), (3, 36)])
def test_crop_and_flip_equal_torchvision_at_the_same_offsets(padding, size):
    view = View(
        "image", [augmentation("crop", padding=padding, size=size), augmentation("flip")], (3, 32, 32), MEAN, STD
    )
    stored, rows = random_images(), torch.tensor([3, 3, 0, 19, 7])
    params = view.sample_params(20, seed=5, source="train", epoch=2)[rows]
    result = view.augment(stored, rows, params)
    side = size or 32
    ys, xs = (offsets(params[:, k], 32 + 2 * padding - side + 1) for k in (0, 1))
    for k, row in enumerate(rows.tolist()):
        image = tv.crop(tv.pad(stored[row], [padding] * 4), ys[k], xs[k], side, side)
        if params[k, 2] < 0.5:
            image = tv.horizontal_flip(image)
        expected = tv.normalize(tv.to_dtype(image, torch.float32, scale=True), MEAN, STD)
        assert_close(result[k], expected, rtol=0, atol=1e-6)
    assert {bool(flip) for flip in params[:, 2] < 0.5} == {True, False}


def test_crop_and_flip_equal_the_pil_pipeline_exactly():
    view = View("image", [augmentation("crop"), augmentation("flip", p=1.0)], (3, 32, 32))
    stored = random_images()
    params = view.sample_params(20, 1, "train", 0)
    result = (view.augment(stored, torch.arange(20), params) * 255).round().to(torch.uint8)
    for k, (y, x) in enumerate(zip(offsets(params[:, 0], 9), offsets(params[:, 1], 9), strict=True)):
        canvas = Image.new("RGB", (40, 40))
        canvas.paste(Image.fromarray(stored[k].permute(1, 2, 0).numpy()), (4, 4))
        image = canvas.crop((x, y, x + 32, y + 32)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(result[k].permute(1, 2, 0).numpy(), np.asarray(image))


def test_moves_are_composed_in_the_order_of_the_recipe():
    stored, rows = random_images(1, (1, 6, 9)), torch.tensor([0])
    params = torch.tensor([[0.99, 0.0]])
    crop, flip = Crop(padding=0, size=4), Flip(1.0)
    ys, xs = torch.arange(6)[None], torch.arange(9)[None]
    flipped_first = crop.map_coordinates(*flip.map_coordinates(ys, xs, params), params)
    flipped_last = flip.map_coordinates(*crop.map_coordinates(ys, xs, params), params)
    assert_close(gather_pixels(stored, rows, *flipped_first), stored.flip(3)[:, :, 2:6, 0:4])
    assert_close(gather_pixels(stored, rows, *flipped_last), stored[:, :, 2:6, 0:4].flip(3))


def test_crop_offsets_and_flips_are_uniform():
    view = View("image", [augmentation("crop"), augmentation("flip", p=0.3)], (3, 32, 32))
    params = view.sample_params(81_000, 3, "train", 0)
    cells = uniform_integers(params[:, 0], 9) * 9 + uniform_integers(params[:, 1], 9)
    counts = torch.bincount(cells, minlength=81).double()
    chi_square = ((counts - 1000) ** 2 / 1000).sum()  # 80 degrees of freedom: below 136 with probability 0.9999
    assert 40 < chi_square < 136
    assert abs((params[:, 2] < 0.3).double().mean() - 0.3) < 0.008


def test_padding_is_black_before_normalisation():
    view = View("image", [augmentation("crop", padding=8)], (3, 8, 8), MEAN, STD)
    corner = torch.zeros(1, 2)  # the crop is inside the padding
    result = view.augment(random_images(1, (3, 8, 8)), torch.tensor([0]), corner)
    expected = -torch.tensor(MEAN) / torch.tensor(STD)
    assert_close(result, expected.view(1, 3, 1, 1).expand_as(result))


def test_params_depend_on_view_seed_source_and_epoch():
    def sample_params(view="image", samples=50, seed=1, source="train", epoch=0, names=("crop", "flip")):
        return View(view, [augmentation(name) for name in names], (3, 32, 32)).sample_params(
            samples, seed, source, epoch
        )

    params = sample_params()
    assert torch.equal(params, sample_params())
    for change in ({"view": "image_strong"}, {"seed": 2}, {"source": "other"}, {"epoch": 1}):
        assert not torch.isclose(params, sample_params(**change)).all(0).any()


def test_further_augmentation_does_not_change_the_params_of_the_others():
    crops = View("image", [augmentation("crop"), augmentation("flip")], (3, 32, 32)).sample_params(9, 1, "train", 0)
    more = View(
        "image", [augmentation("cutout", size=8), augmentation("crop"), augmentation("flip")], (3, 32, 32)
    ).sample_params(9, 1, "train", 0)
    assert torch.equal(crops, more[:, 2:])


def test_two_crops_of_one_view_have_independent_params():
    twice = View("image", [augmentation("crop"), augmentation("crop")], (3, 32, 32)).sample_params(9, 1, "train", 0)
    assert not torch.isclose(twice[:, :2], twice[:, 2:]).any()


def test_cutout_zeroes_the_square_of_the_paper():
    image = torch.randn(200, 3, 16, 12, generator=torch.Generator().manual_seed(0)) + 5
    params = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    result = Cutout(size=6).apply(image, params)
    for k in range(200):
        y, x = int(params[k, 0].double() * 16), int(params[k, 1].double() * 12)
        expected = image[k].clone()
        expected[:, max(0, y - 3) : min(16, y + 3), max(0, x - 3) : min(12, x + 3)] = 0
        assert torch.equal(result[k], expected)


def test_mixup_is_the_convex_combination_of_row_and_partner():
    image = torch.randn(6, 3, 4, 4)
    params = torch.rand(6, 1)
    mixed, label_weight = Mixup(0.4).mix(image, image.roll(1, 0), params)
    for k in range(6):
        assert_close(mixed[k], params[k] * image[k] + (1 - params[k]) * image[k - 1])
    assert torch.equal(label_weight, params[:, 0])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixing_weights_follow_the_beta_distribution(alpha):
    for mixing in (Mixup(alpha), Cutmix(alpha)):
        weights = mixing.sample_params(40_000, 7)[:, 0].double()
        assert abs(weights.mean() - 0.5) < 0.01
        assert abs(weights.var() - 1 / (4 * (2 * alpha + 1))) < 0.005  # of Beta(a, a)


def test_cutmix_pastes_the_box_of_the_paper_and_counts_its_pixels():
    image, partner = torch.zeros(300, 1, 12, 20), torch.ones(300, 1, 12, 20)
    params = Cutmix(1.0).sample_params(300, 3)
    mixed, label_weight = Cutmix(1.0).mix(image, partner, params)
    assert_close(label_weight, 1 - mixed.mean((1, 2, 3)))
    for k in range(300):
        ratio = np.sqrt(1 - np.float32(params[k, 0]))
        half_h, half_w = int(12 * ratio) // 2, int(20 * ratio) // 2
        y, x = int(params[k, 1].double() * 12), int(params[k, 2].double() * 20)
        expected = torch.zeros(12, 20)
        expected[max(0, y - half_h) : min(12, y + half_h), max(0, x - half_w) : min(20, x + half_w)] = 1
        assert torch.equal(mixed[k, 0], expected)


def test_evaluation_crops_the_center_without_params():
    view = View("image", [augmentation("crop", padding=2, size=6), augmentation("flip", p=1.0)], (3, 9, 10))
    stored = random_images(4, (3, 9, 10))
    assert_close(view.evaluation_images(stored, torch.arange(4)), tv.center_crop(stored, [6, 6]).float() / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_memory_format_are_the_configured_ones(dtype):
    view = View(
        "image", [augmentation("crop"), augmentation("mixup")], (3, 32, 32), MEAN, STD, dtype=dtype, channels_last=True
    )
    params = view.sample_params(20, 1, "train", 0)
    image = view.augment(random_images(), torch.arange(20), params)
    mixed, label_weight = view.mix(image, image.roll(1, 0), params)
    assert image.dtype == mixed.dtype == label_weight.dtype == dtype
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_augmentations_read_no_value_on_the_host(mixing):
    """FakeTensorMode raises at every host read: nothing waits for a GPU, and shapes are static."""
    parts = [
        augmentation("crop", size=28),
        augmentation("flip"),
        augmentation("cutout", size=8),
        augmentation(mixing),
    ]
    view = View("image", parts, (3, 32, 32), MEAN, STD, channels_last=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored = torch.empty(20, 3, 32, 32, dtype=torch.uint8)
        rows = torch.empty(8, dtype=torch.int64)
        params = torch.empty(8, view.num_params)
        image = view.augment(stored, rows, params)
        mixed, label_weight = view.mix(image, image.roll(1, 0), params)
        evaluation = view.evaluation_images(stored, rows)
    assert mixed.shape == evaluation.shape == (8, 3, 28, 28)
    assert label_weight.shape == (8,)


def test_random_resized_crop_is_inside_and_covers_the_configured_area():
    crop = RandomResizedCrop(scale=(0.2, 0.6))
    for k in range(300):
        x0, y0, x1, y1 = crop.box(90, 60, np.random.default_rng(k))
        assert 0 <= x0 < x1 <= 90
        assert 0 <= y0 < y1 <= 60
        assert 0.18 < (x1 - x0) * (y1 - y0) / 5400 < 0.63
        assert 0.7 < (x1 - x0) / (y1 - y0) < 1.42
    wide = crop.box(1000, 10, np.random.default_rng(0))  # no box fits: the center, at the largest ratio
    assert wide == (493, 0, 506, 10)


def test_configuration_errors_name_the_location():
    with pytest.raises(
        ConfigError, match=r"recipe.yaml:7 augment.crop: crop: size 50 is larger than the padded image \(40\)"
    ):
        View("image", [augmentation("crop", size=50)], (3, 32, 32))
    with pytest.raises(ConfigError, match=r"recipe.yaml:7 .*Did you mean 'crop'"):
        View("image", [augmentation("corp")], (3, 32, 32))
    with pytest.raises(ConfigError, match="use either mixup or cutmix"):
        View("image", [augmentation("mixup"), augmentation("cutmix")], (3, 32, 32))
    with pytest.raises(ConfigError, match=r"flip needs images of shape \[channels, height, width\].*\[16\]"):
        View("image", [augmentation("flip")], (16,))
    for name, params in (
        ("flip", {"p": 2.0}),
        ("cutout", {"size": 0}),
        ("mixup", {"alpha": 0.0}),
        ("crop", {"padding": -1}),
    ):
        with pytest.raises(ConfigError, match=rf"recipe.yaml:7 .*{name}"):
            View("image", [augmentation(name, **params)], (3, 32, 32))
