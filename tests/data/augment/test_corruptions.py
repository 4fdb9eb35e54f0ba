"""Corruptions, quarter turns, colours and partial mixup: the pixels of the formula, from draws of the sample."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from kdbench.data.augment.color import Color
from kdbench.data.augment.corruptions import Blur, GaussianNoise, Half, LowResolution, Occlude, hashed_normals
from kdbench.data.augment.geometric import Rotate90
from kdbench.data.augment.mixing import Mixup
from kdbench.data.augment.view import View
from kdbench.errors import ConfigError


def uniform(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_images(rows, *shape, seed=0):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_standard_normal_and_independent():
    """Moments, tails, neighbouring pixels, the same pixel of neighbouring samples."""
    drawn = hashed_normals(uniform(400, 2), 3072).double()
    assert abs(drawn.mean()) < 0.004 and abs(drawn.std() - 1) < 0.004
    assert abs((drawn**3).mean()) < 0.02 and abs((drawn**4).mean() - 3) < 0.05
    for edge, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((drawn.abs() < edge).double().mean() - share) < 0.002
    assert drawn.abs().max() < 5.4
    for one, other in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1]), (drawn[:, 32:], drawn[:, :-32])):
        assert abs((one * other).mean()) < 0.004
    means = drawn.mean(1) * 3072**0.5  # of each sample: standard normal too, if its pixels are independent
    assert abs(means.mean()) < 0.2 and abs(means.std() - 1) < 0.15


def test_noise_differs_with_the_least_change_of_a_draw():
    close = torch.tensor([[0.5, 0.25], [0.5 + 2**-24, 0.25], [0.5, 0.25 + 2**-24], [0.25, 0.5]])
    drawn = hashed_normals(close, 3072)
    correlation = torch.corrcoef(drawn) - torch.eye(4)
    assert correlation.abs().max() < 0.08


def test_noise_is_scaled_and_added():
    image, draws = random_images(4, 3, 8, 8), uniform(4, 2)
    expected = image + 0.3 * hashed_normals(draws, 192).view(4, 3, 8, 8)
    assert_close(GaussianNoise(0.3).apply(image, draws), expected)
    assert GaussianNoise(0.3).apply(image.double(), draws).dtype == torch.float64
    assert torch.equal(GaussianNoise(0.0).apply(image, draws), image)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_torchvisions_in_the_interior(sigma):
    image, reach = random_images(5, 3, 24, 20), int(-(-3 * sigma // 1))
    got = Blur(sigma).apply(image, uniform(5, 1))
    expected = tv.gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])
    inside = (..., slice(reach, -reach), slice(reach, -reach))
    assert_close(got[inside], expected[inside], rtol=1e-4, atol=1e-5)
    assert_close(Blur(sigma).apply(torch.ones(1, 2, 4, 4), uniform(1, 1)), torch.ones(1, 2, 4, 4))


def test_blur_with_a_probability_blurs_whole_samples():
    image, draws = random_images(50, 1, 8, 8), uniform(50, 1)
    got = Blur(1.0, p=0.4).apply(image, draws)
    blurred = Blur(1.0).apply(image, draws)
    for k in range(50):
        assert torch.equal(got[k], blurred[k] if draws[k, 0] < 0.4 else image[k])


def test_low_resolution_repeats_the_mean_of_squares():
    image = random_images(2, 3, 8, 12)
    got = LowResolution(4).apply(image, uniform(2, 0))
    for i in range(8):
        for j in range(12):
            square = image[:, :, i // 4 * 4 : i // 4 * 4 + 4, j // 4 * 4 : j // 4 * 4 + 4]
            assert_close(got[:, :, i, j], square.mean((2, 3)))
    assert_close(LowResolution(4).apply(got, uniform(2, 0)), got)


@pytest.mark.parametrize(("share", "ratio"), [(0.25, 3.3), (0.1, 1.0), (0.5, 8.0), (1.0, 3.3)])
def test_occlusion_covers_one_whole_rectangle_of_the_share(share, ratio):
    got = Occlude(share, ratio).apply(torch.ones(300, 2, 32, 24), uniform(300, 3))
    covered = got[:, 0] == 0
    assert torch.equal(got[:, 0], got[:, 1])
    rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
    assert torch.equal(covered.sum((1, 2)), rows * columns)  # a rectangle
    area = covered.sum((1, 2)) / (32 * 24)
    assert (area - share).abs().max() < 0.06 and abs(area.mean() - share) < 0.02
    fits = (rows < 32) & (columns < 24) & (rows > 4) & (columns > 4)
    shape = (rows / columns)[fits]
    assert len(shape) == 0 or (shape.max() < ratio * 1.3 and shape.min() > 1 / ratio / 1.3)
    if share <= 0.25:
        seen = covered.any(0)  # every side and the middle are covered at some time
        assert seen[0].any() and seen[-1].any() and seen[:, 0].any() and seen[:, -1].any() and seen[8:-8, 8:-8].all()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turns_are_quarters_counterclockwise(turns):
    image = random_images(3, 2, 5, 5)
    expected = image
    for _ in range(turns):
        expected = expected.transpose(2, 3).flip(2)
    assert torch.equal(Rotate90(turns).apply(image, uniform(3, 0)), expected)
    draws = torch.full((3, 1), turns / 4 + 0.1)
    assert torch.equal(Rotate90().apply(image, draws), expected)
    assert Rotate90().extra_field_values(draws).tolist() == [turns] * 3


def test_colours_are_torchvisions():
    image = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    draws = uniform(40, 3)
    got = Color(0.4, 0.6, 0.8).apply(image, draws)
    for k in range(40):
        expected = tv.adjust_brightness(image[k], float(0.6 + 0.8 * draws[k, 0]))
        expected = tv.adjust_contrast(expected, float(0.4 + 1.2 * draws[k, 1]))
        expected = tv.adjust_saturation(expected, float(0.2 + 1.6 * draws[k, 2]))
        assert_close(got[k], expected, rtol=1e-4, atol=1e-4)
    same = Color(0, 0, 0).apply(image, draws)
    assert_close(same, image)
    grey = Color(0.4, 0.4, 0.4).apply(image[:, :1], draws)
    assert grey.shape == (40, 1, 6, 6) and (grey != image[:, :1]).any()


def test_partial_mixup_mixes_a_share_of_the_samples():
    whole, partial = Mixup(1.0).sample_params(20_000, 3), Mixup(1.0, fraction=0.3).sample_params(20_000, 3)
    mixed = partial[:, 0] < 1
    assert abs(mixed.double().mean() - 0.3) < 0.01
    assert torch.equal(partial[mixed], whole[mixed])
    assert abs(partial[mixed].double().mean() - 0.5) < 0.02  # what is mixed is mixed as ever: the draws are apart
    assert torch.equal(Mixup(1.0, fraction=1.0).sample_params(50, 3), Mixup(1.0).sample_params(50, 3))
    image = random_images(4, 1, 3, 3)
    draws = torch.tensor([[1.0], [0.5], [1.0], [0.2]])
    got, share = Mixup(1.0, fraction=0.5).mix(image, image.roll(1, 0), draws)
    assert torch.equal(got[[0, 2]], image[[0, 2]]) and torch.equal(share, draws[:, 0])


CORRUPTIONS = [
    ("noise", {"std": 0.3}),
    ("blur", {"sigma": 0.7, "p": 0.5}),
    ("low_resolution", {"factor": 2}),
    ("occlude", {"fraction": 0.3}),
    ("rotate90", {}),
    ("rotate90", {"turns": 1}),
    ("color", {}),
    ("mixup", {"fraction": 0.5}),
]


@pytest.mark.parametrize(("name", "params"), CORRUPTIONS)
def test_a_sample_looks_the_same_whatever_the_batch_and_the_ranks(source_of, make, part, name, params):
    options = {"views": {"image": (part("crop"), part(name, **params))}, "params": {"samples": 24, "shape": [3, 8, 8]}}
    whole = next(source_of(make(batch_size=24, **options)).batches(2))
    again = next(source_of(make(batch_size=24, **options)).batches(2))
    other = next(source_of(make(batch_size=24, **options)).batches(3))
    for key in whole:
        assert torch.equal(whole[key], again[key])
    assert not torch.equal(whole["image"][whole["index"].argsort()], other["image"][other["index"].argsort()])
    keys = [key for key in ("image", "turns", "mix") if key in whole]
    for rank in range(2):
        half = next(source_of(make(batch_size=12, **options), rank=rank, world_size=2).batches(2))
        for key in keys:
            assert_close(half[key], whole[key][rank::2], rtol=1e-6, atol=1e-6)
    if name != "mixup":
        by_index = {key: dict(zip(whole["index"].tolist(), whole[key], strict=True)) for key in keys}
        for batch in source_of(make(batch_size=5, **options)).batches(2):
            for key in keys:
                for index, value in zip(batch["index"].tolist(), batch[key], strict=True):
                    assert_close(value, by_index[key][index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(("name", "params"), [("noise", {"std": 0.3}), ("blur", {}), ("occlude", {})])
def test_evaluation_is_corrupted_only_where_that_is_asked_for(source_of, make, part, name, params, always):
    views = {"image": (part(name, always=always, **params),), "raw": ()}
    source = source_of(make(views=views, params={"samples": 40, "shape": [3, 8, 8]}))
    first = list(source.evaluation_batches(16))
    for batch, again in zip(first, source.evaluation_batches(16), strict=True):
        assert torch.equal(batch["image"], again["image"])  # the same every time
        assert torch.equal(batch["image"], batch["raw"]) == (not always)
    ranks = [
        source_of(make(views=views, params={"samples": 40, "shape": [3, 8, 8]}), rank=r, world_size=2).evaluation_batches(8)
        for r in range(2)
    ]
    whole = {i: image for batch in first for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)}
    for batch in (batch for rank in ranks for batch in rank):
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            assert_close(image, whole[index])


def test_what_a_view_is_holds_in_evaluation_too(source_of, make, part):
    views = {"image": (), "low": (part("low_resolution", factor=4),), "turned": (part("rotate90", turns=1),)}
    views["random"] = (part("rotate90"),)
    source = source_of(make(views=views, params={"samples": 16, "shape": [3, 8, 8]}))
    batch = next(source.evaluation_batches(16))
    assert torch.equal(batch["low"], LowResolution(4).apply(batch["image"], torch.empty(16, 0)))
    assert torch.equal(batch["turned"], torch.rot90(batch["image"], 1, (2, 3)))
    assert torch.equal(batch["random"], batch["image"])


def test_random_turns_are_told(source_of, make, part):
    views = {"image": (part("rotate90"),), "other": (part("rotate90"),), "raw": ()}
    source = source_of(make(views=views, params={"samples": 64, "shape": [1, 6, 6]}))
    batch = next(source.batches(0))
    for view, field in (("image", "turns"), ("other", "other_turns")):
        for k, turns in enumerate(batch[field].tolist()):
            assert torch.equal(batch[view][k], torch.rot90(batch["raw"][k], turns, (1, 2)))
        assert set(batch[field].tolist()) == {0, 1, 2, 3}
    assert not torch.equal(batch["turns"], batch["other_turns"])
    assert set(source.field_specs()) == set(batch)


def test_what_stands_after_the_mixing_comes_after_it(part):
    stored = torch.rand(6, 1, 8, 8)
    before = View("image", [part("cutout", size=4), part("mixup")], (1, 8, 8))
    after = View("image", [part("mixup"), part("cutout", size=4)], (1, 8, 8))
    for view in (before, after):
        draws = view.sample_params(6, 1, "train", 0)
        image = view.augment(stored, torch.arange(6), draws)
        mixed, _ = view.mix(image, image.roll(1, 0), draws)
        holes = (mixed == 0).sum((1, 2, 3))
        assert (holes > 0).all() == (view is after)
        assert torch.equal(image, stored) == (view is after)


@pytest.mark.parametrize(("name", "params"), CORRUPTIONS)
def test_no_corruption_reads_a_value(part, name, params):
    view = View("image", [part("crop"), part(name, **params)], (3, 8, 8), [0.5] * 3, [0.2] * 3, channels_last=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored, rows = torch.empty(20, 3, 8, 8, dtype=torch.uint8), torch.empty(8, dtype=torch.int64)
        draws = torch.empty(8, view.num_params)
        image = view.augment(stored, rows, draws)
        told = view.extra_fields(draws)
    assert image.shape == (8, 3, 8, 8)
    assert all(value.shape == (8,) for value in told.values())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("noise", {"std": -1.0}, "std must not be negative"),
        ("blur", {"sigma": 0.0}, "sigma must be above 0"),
        ("blur", {"p": 2.0}, r"p must be in \[0, 1\]"),
        ("low_resolution", {"factor": 3}, "factor 3 does not divide images of 8x10"),
        ("occlude", {"fraction": 0.0}, "fraction must be above 0"),
        ("occlude", {"ratio": 0.5}, "ratio must be at least 1"),
        ("rotate90", {}, "only square images .* these are 8x10"),
        ("rotate90", {"turns": 4}, "turns must be 0, 1, 2, 3 or null"),
        ("color", {"contrast": -0.1}, "contrast must not be negative"),
        ("mixup", {"fraction": 1.5}, r"fraction must be in \[0, 1\]"),
    ],
)
def test_mistakes_are_told_with_their_place(part, name, params, message):
    with pytest.raises(ConfigError, match=rf"recipe.yaml:7 augment.{name}: .*{message}"):
        View("image", [part(name, **params)], (3, 8, 10))


@pytest.mark.parametrize(("one", "other"), [("left", "right"), ("upper", "lower")])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_two_halves_are_the_image_and_share_no_pixel(one, other, size):
    image, draws = random_images(3, 2, *size), uniform(3, 0)
    first, second = Half(one).apply(image, draws), Half(other).apply(image, draws)
    assert torch.equal(first + second, image)
    assert not ((first != 0) & (second != 0)).any()
    kept = (first != 0)[0, 0].any(0 if one == "left" else 1)
    assert kept.tolist() == [True] * (len(kept) // 2) + [False] * (len(kept) - len(kept) // 2)
    assert Half.always, "a network for one half is measured on that half"
