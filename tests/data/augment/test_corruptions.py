"""Corruptions, quarter turns, colours and partial mixup: the pixels of the formulas, from the sample's parameters."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from helpers.data_sources import (
    augmentation,
    equal_fields,
    evaluation_batches,
    open_source,
    source_config,
    training_batches,
)
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
    """Checks moments, tails, and the correlation of neighbouring pixels and of one pixel in neighbouring samples."""
    normals = hashed_normals(uniform(400, 2), 3072).double()
    assert abs(normals.mean()) < 0.004 and abs(normals.std() - 1) < 0.004
    assert abs((normals**3).mean()) < 0.02 and abs((normals**4).mean() - 3) < 0.05
    for edge, probability in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((normals.abs() < edge).double().mean() - probability) < 0.002
    assert normals.abs().max() < 5.4
    for first, second in (
        (normals[:, 1:], normals[:, :-1]),
        (normals[1:], normals[:-1]),
        (normals[:, 32:], normals[:, :-32]),
    ):
        assert abs((first * second).mean()) < 0.004
    means = normals.mean(1) * 3072**0.5  # standard normal too, if the pixels of a sample are independent
    assert abs(means.mean()) < 0.2 and abs(means.std() - 1) < 0.15


def test_smallest_change_of_a_parameter_changes_the_noise():
    params = torch.tensor([[0.5, 0.25], [0.5 + 2**-24, 0.25], [0.5, 0.25 + 2**-24], [0.25, 0.5]])
    normals = hashed_normals(params, 3072)
    correlation = torch.corrcoef(normals) - torch.eye(4)
    assert correlation.abs().max() < 0.08


def test_noise_is_scaled_and_added():
    image, params = random_images(4, 3, 8, 8), uniform(4, 2)
    expected = image + 0.3 * hashed_normals(params, 192).view(4, 3, 8, 8)
    assert_close(GaussianNoise(0.3).apply(image, params), expected)
    assert GaussianNoise(0.3).apply(image.double(), params).dtype == torch.float64
    assert torch.equal(GaussianNoise(0.0).apply(image, params), image)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_equals_torchvision_in_the_interior(sigma):
    image, reach = random_images(5, 3, 24, 20), int(-(-3 * sigma // 1))
    result = Blur(sigma).apply(image, uniform(5, 1))
    expected = tv.gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])
    interior = (..., slice(reach, -reach), slice(reach, -reach))
    assert_close(result[interior], expected[interior], rtol=1e-4, atol=1e-5)
    assert_close(Blur(sigma).apply(torch.ones(1, 2, 4, 4), uniform(1, 1)), torch.ones(1, 2, 4, 4))


def test_blur_probability_applies_to_samples():
    image, params = random_images(50, 1, 8, 8), uniform(50, 1)
    result = Blur(1.0, p=0.4).apply(image, params)
    blurred = Blur(1.0).apply(image, params)
    for k in range(50):
        assert torch.equal(result[k], blurred[k] if params[k, 0] < 0.4 else image[k])


def test_low_resolution_repeats_the_mean_of_squares():
    image = random_images(2, 3, 8, 12)
    result = LowResolution(4).apply(image, uniform(2, 0))
    for i in range(8):
        for j in range(12):
            square = image[:, :, i // 4 * 4 : i // 4 * 4 + 4, j // 4 * 4 : j // 4 * 4 + 4]
            assert_close(result[:, :, i, j], square.mean((2, 3)))
    assert_close(LowResolution(4).apply(result, uniform(2, 0)), result)


@pytest.mark.parametrize(("fraction", "ratio"), [(0.25, 3.3), (0.1, 1.0), (0.5, 8.0), (1.0, 3.3)])
def test_occlude_covers_one_rectangle_of_the_configured_area(fraction, ratio):
    result = Occlude(fraction, ratio).apply(torch.ones(300, 2, 32, 24), uniform(300, 3))
    covered = result[:, 0] == 0
    assert torch.equal(result[:, 0], result[:, 1])
    rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
    assert torch.equal(covered.sum((1, 2)), rows * columns)  # a rectangle
    area = covered.sum((1, 2)) / (32 * 24)
    assert (area - fraction).abs().max() < 0.06 and abs(area.mean() - fraction) < 0.02
    unbounded = (rows < 32) & (columns < 24) & (rows > 4) & (columns > 4)
    ratios = (rows / columns)[unbounded]
    assert len(ratios) == 0 or (ratios.max() < ratio * 1.3 and ratios.min() > 1 / ratio / 1.3)
    if fraction <= 0.25:
        union = covered.any(0)  # some rectangle reaches each border, and the middle is covered completely
        assert union[0].any() and union[-1].any() and union[:, 0].any() and union[:, -1].any()
        assert union[8:-8, 8:-8].all()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotate90_turns_counterclockwise_by_quarters(turns):
    image = random_images(3, 2, 5, 5)
    expected = image
    for _ in range(turns):
        expected = expected.transpose(2, 3).flip(2)
    assert torch.equal(Rotate90(turns).apply(image, uniform(3, 0)), expected)
    params = torch.full((3, 1), turns / 4 + 0.1)
    assert torch.equal(Rotate90().apply(image, params), expected)
    assert Rotate90().extra_field_values(params).tolist() == [turns] * 3


def test_color_equals_torchvision():
    image = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    params = uniform(40, 3)
    result = Color(0.4, 0.6, 0.8).apply(image, params)
    for k in range(40):
        expected = tv.adjust_brightness(image[k], float(0.6 + 0.8 * params[k, 0]))
        expected = tv.adjust_contrast(expected, float(0.4 + 1.2 * params[k, 1]))
        expected = tv.adjust_saturation(expected, float(0.2 + 1.6 * params[k, 2]))
        assert_close(result[k], expected, rtol=1e-4, atol=1e-4)
    assert_close(Color(0, 0, 0).apply(image, params), image)
    grey = Color(0.4, 0.4, 0.4).apply(image[:, :1], params)
    assert grey.shape == (40, 1, 6, 6) and (grey != image[:, :1]).any()


def test_partial_mixup_mixes_a_fraction_of_the_samples():
    full, partial = Mixup(1.0).sample_params(20_000, 3), Mixup(1.0, fraction=0.3).sample_params(20_000, 3)
    mixed = partial[:, 0] < 1
    assert abs(mixed.double().mean() - 0.3) < 0.01
    assert torch.equal(partial[mixed], full[mixed])
    assert abs(partial[mixed].double().mean() - 0.5) < 0.02  # the weight is independent of whether a sample is mixed
    assert torch.equal(Mixup(1.0, fraction=1.0).sample_params(50, 3), Mixup(1.0).sample_params(50, 3))
    image = random_images(4, 1, 3, 3)
    params = torch.tensor([[1.0], [0.5], [1.0], [0.2]])
    result, label_weight = Mixup(1.0, fraction=0.5).mix(image, image.roll(1, 0), params)
    assert torch.equal(result[[0, 2]], image[[0, 2]]) and torch.equal(label_weight, params[:, 0])


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
def test_augmented_sample_does_not_depend_on_batch_and_ranks(name, params):
    options = {
        "views": {"image": (augmentation("crop"), augmentation(name, **params))},
        "params": {"samples": 24, "shape": [3, 8, 8]},
    }
    full_batch = source_config(batch_size=24, **options)
    expected = next(training_batches(open_source(full_batch), 2))
    repeated = next(training_batches(open_source(full_batch), 2))
    next_epoch = next(training_batches(open_source(full_batch), 3))
    assert equal_fields(expected, repeated)
    sorted_images = [batch["image"][batch["index"].argsort()] for batch in (expected, next_epoch)]
    assert not torch.equal(*sorted_images)
    fields = [field for field in ("image", "turns", "mix") if field in expected]
    for rank in range(2):
        shard_config = source_config(batch_size=12, **options)
        shard = next(training_batches(open_source(shard_config, rank=rank, world_size=2), 2))
        for field in fields:
            assert_close(shard[field], expected[field][rank::2], rtol=1e-6, atol=1e-6)
    if name != "mixup":  # mixup depends on the partner, and so on the batch
        values = {field: dict(zip(expected["index"].tolist(), expected[field], strict=True)) for field in fields}
        for batch in training_batches(open_source(source_config(batch_size=5, **options)), 2):
            for field in fields:
                for index, value in zip(batch["index"].tolist(), batch[field], strict=True):
                    assert_close(value, values[field][index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(("name", "params"), [("noise", {"std": 0.3}), ("blur", {}), ("occlude", {})])
def test_evaluation_is_corrupted_only_with_always(name, params, always):
    options = {
        "views": {"image": (augmentation(name, always=always, **params),), "raw": ()},
        "params": {"samples": 40, "shape": [3, 8, 8]},
    }
    source = open_source(source_config(**options))
    batches = list(evaluation_batches(source, 16))
    for batch, repeated in zip(batches, evaluation_batches(source, 16), strict=True):
        assert torch.equal(batch["image"], repeated["image"])  # the same in every evaluation
        assert torch.equal(batch["image"], batch["raw"]) == (not always)
    images = {i: image for batch in batches for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)}
    for rank in range(2):
        for batch in evaluation_batches(open_source(source_config(**options), rank=rank, world_size=2), 8):
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                assert_close(image, images[index])


def test_low_resolution_and_fixed_turns_apply_in_evaluation():
    views = {
        "image": (),
        "low": (augmentation("low_resolution", factor=4),),
        "turned": (augmentation("rotate90", turns=1),),
        "random": (augmentation("rotate90"),),
    }
    source = open_source(source_config(views=views, params={"samples": 16, "shape": [3, 8, 8]}))
    batch = next(evaluation_batches(source, 16))
    assert torch.equal(batch["low"], LowResolution(4).apply(batch["image"], torch.empty(16, 0)))
    assert torch.equal(batch["turned"], torch.rot90(batch["image"], 1, (2, 3)))
    assert torch.equal(batch["random"], batch["image"])


def test_random_turns_are_a_field_of_the_batch():
    views = {"image": (augmentation("rotate90"),), "other": (augmentation("rotate90"),), "raw": ()}
    source = open_source(source_config(views=views, params={"samples": 64, "shape": [1, 6, 6]}))
    batch = next(training_batches(source, 0))
    for view, field in (("image", "turns"), ("other", "other_turns")):
        for k, turns in enumerate(batch[field].tolist()):
            assert torch.equal(batch[view][k], torch.rot90(batch["raw"][k], turns, (1, 2)))
        assert set(batch[field].tolist()) == {0, 1, 2, 3}
    assert not torch.equal(batch["turns"], batch["other_turns"])
    assert set(source.field_specs()) == set(batch)


def test_augmentation_after_the_mixing_in_the_recipe_is_applied_after_it():
    stored = torch.rand(6, 1, 8, 8)
    before = View("image", [augmentation("cutout", size=4), augmentation("mixup")], (1, 8, 8))
    after = View("image", [augmentation("mixup"), augmentation("cutout", size=4)], (1, 8, 8))
    for view in (before, after):
        params = view.sample_params(6, 1, "train", 0)
        image = view.augment(stored, torch.arange(6), params)
        mixed, _ = view.mix(image, image.roll(1, 0), params)
        holes = (mixed == 0).sum((1, 2, 3))
        assert (holes > 0).all() == (view is after)
        assert torch.equal(image, stored) == (view is after)


@pytest.mark.parametrize(("name", "params"), CORRUPTIONS)
def test_corruptions_read_no_value_on_the_host(name, params):
    view = View(
        "image",
        [augmentation("crop"), augmentation(name, **params)],
        (3, 8, 8),
        [0.5] * 3,
        [0.2] * 3,
        channels_last=True,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored, rows = torch.empty(20, 3, 8, 8, dtype=torch.uint8), torch.empty(8, dtype=torch.int64)
        params = torch.empty(8, view.num_params)
        image = view.augment(stored, rows, params)
        extra_fields = view.extra_fields(params)
    assert image.shape == (8, 3, 8, 8)
    assert all(value.shape == (8,) for value in extra_fields.values())


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
def test_configuration_errors_name_the_location(name, params, message):
    with pytest.raises(ConfigError, match=rf"recipe.yaml:7 augment.{name}: .*{message}"):
        View("image", [augmentation(name, **params)], (3, 8, 10))


@pytest.mark.parametrize(("first_side", "second_side"), [("left", "right"), ("upper", "lower")])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_two_halves_are_disjoint_and_together_the_image(first_side, second_side, size):
    image, params = random_images(3, 2, *size), uniform(3, 0)
    first, second = Half(first_side).apply(image, params), Half(second_side).apply(image, params)
    assert torch.equal(first + second, image)
    assert not ((first != 0) & (second != 0)).any()
    visible = (first != 0)[0, 0].any(0 if first_side == "left" else 1)
    half, size_along = len(visible) // 2, len(visible)
    assert visible.tolist() == [True] * half + [False] * (size_along - half)
    assert Half.always, "a network for one half is evaluated on that half"
