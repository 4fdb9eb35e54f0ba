"""Decoding with torchvision and resizing on the device: equal to PIL within a tolerance, for all kinds of files."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from helpers.data_sources import (
    augmentation,
    equal_batches,
    evaluation_batches,
    open_source,
    source_config,
    training_batches,
)
from helpers.recipes import recipe_from_text
from kdbench.config.identity import identity
from kdbench.data.augment.geometric import RandomResizedCrop
from kdbench.data.loading.resample import CropRegion, _padding_groups, filter_weights, resample_crops
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import derive

quiet_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12+

LEVELS = 2
"""Largest difference of a pixel to PIL's, of 255 (see docs/recipe.md): the filter weights are rounded differently."""


def smooth_image(width: int, height: int, seed: int) -> Image.Image:
    """Draws waves with some noise. A flat image would hide errors of resizing, and pure noise those of JPEG."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9)) for _ in range(3)]
    noisy = 127 + 100 * np.stack(waves, 2) + rng.normal(0, 9, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


FILES = {
    "a_plain.jpg": ((53, 37), "RGB", {}),
    "b_upright.jpg": ((31, 67), "RGB", {"quality": 60}),
    "c_square.jpg": ((40, 40), "RGB", {"progressive": True}),
    "d_gray.jpg": ((45, 33), "L", {}),
    "e_ink.jpg": ((38, 52), "CMYK", {}),
    "f_other.png": ((29, 30), "RGB", {}),
    "g_tiny.jpg": ((7, 9), "RGB", {}),
    "h_resized.jpg": ((20, 33), "RGB", {}),
}


@pytest.fixture
def paths(tmp_path):
    """Writes files of several sizes and kinds; returns those of the training split in the order of `index`."""
    for split in ("train", "val"):
        for class_name in ("ant", "bee"):
            folder = tmp_path / "mixed" / split / class_name
            folder.mkdir(parents=True)
            for number, (name, (size, mode, options)) in enumerate(FILES.items()):
                smooth_image(*size, seed=number).convert(mode).save(folder / name, **options)
    return sorted((tmp_path / "mixed" / "train").rglob("*.*"))


def mixed_config(decode, augmentations=("random_resized_crop",), name="train", batch_size=5, **options):
    parts = tuple(augmentation(part) for part in augmentations)
    views = {"image": parts, "raw": ()} if name == "train" else {"image": ()}
    params = {"root": "mixed", "size": 20, "normalize": False, "resident": False, "decode": decode}
    split = "train" if name == "train" else "test"
    return source_config(
        name, dataset="image_folder", split=split, batch_size=batch_size, params=params, views=views, **options
    )


def expected_crop(path, index, *, epoch, seed) -> torch.Tensor:
    """Applies torchvision's resized_crop to the PIL image, with the box of the sample."""
    key = [derive(seed, "augment", "train", "image", epoch, "reading"), index]
    with Image.open(path) as file:
        image = file.convert("RGB")
    x0, y0, x1, y1 = RandomResizedCrop().box(*image.size, np.random.Generator(np.random.Philox(key=key)))
    return tv.pil_to_tensor(tv.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [20, 20]))


def max_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the largest difference of two pixels."""
    return float((first.float() - second.float()).abs().max())


@pytest.mark.parametrize(("decode", "levels"), [(None, 0), ("pil", 0), ("torchvision", LEVELS)])
def test_random_crop_equals_torchvision_with_the_same_box(paths, decode, levels):
    for batch in training_batches(open_source(mixed_config(decode), seed=3, notice=lambda text: None), 5):
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            expected = expected_crop(paths[index], index, epoch=5, seed=3)
            assert max_difference(image * 255, expected) <= levels + 1e-3, paths[index]


@pytest.mark.parametrize(("decode", "levels"), [(None, 0), ("torchvision", LEVELS)])
def test_evaluation_equals_torchvisions_resize_and_center_crop(paths, decode, levels):
    source = open_source(mixed_config(decode, name="eval"), notice=lambda text: None)
    (batch,) = evaluation_batches(source, 64)
    for path, image in zip(paths, batch["image"], strict=True):
        with Image.open(str(path).replace("/train/", "/val/")) as file:
            expected = tv.pil_to_tensor(tv.center_crop(tv.resize(file.convert("RGB"), 20), [20, 20]))
        assert max_difference(image * 255, expected) <= levels + 1e-3, path


def test_tolerance_detects_a_box_that_is_one_pixel_off():
    """Negative control: the tolerance distinguishes neighbouring boxes, and antialiased from plain resizing."""
    image = smooth_image(53, 37, 0)
    pixels = tv.pil_to_tensor(image)
    expected = tv.pil_to_tensor(tv.resized_crop(image, 3, 5, 30, 41, [20, 20]))
    right, shifted = CropRegion(3, 5, 30, 41, 20, 20), CropRegion(3, 6, 30, 41, 20, 20)
    assert max_difference(resample_crops([pixels], [right], 20)[0], expected) <= LEVELS
    assert max_difference(resample_crops([pixels], [shifted], 20)[0], expected) > 10 * LEVELS
    aliased = tv.resize(pixels[:, 3:33, 5:46], [20, 20], antialias=False)
    assert max_difference(aliased, expected) > 5 * LEVELS


@pytest.mark.parametrize("size", [(20, 20), (61, 20), (20, 44), (9, 7), (300, 200), (3, 250)])
def test_resampling_equals_pil_for_shrinking_and_growing(size):
    image = smooth_image(*size, seed=4)
    width, height = size
    expected = tv.pil_to_tensor(image.resize((20, 20), Image.Resampling.BILINEAR))
    resized = resample_crops([tv.pil_to_tensor(image)], [CropRegion(0, 0, height, width, 20, 20)], 20)
    assert max_difference(resized[0], expected) <= 1


def test_image_of_the_target_size_is_cropped_exactly():
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = resample_crops([pixels], [CropRegion(0, 0, 20, 30, 20, 30, 0, 5)], 20)
    assert torch.equal(crops[0], pixels[:, :, 5:25])


def test_filter_weights_sum_to_one_and_exclude_padding():
    weights = filter_weights(torch.tensor([5, 9]), torch.tensor([4, 4]), torch.tensor([0, 1]), 3, 12)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3))
    assert not weights[0, :, 5:].any() and not weights[1, :, 9:].any()


def test_very_large_image_does_not_pad_the_others(monkeypatch):
    sizes = [(10, 12), (4000, 3000), (11, 9), (12, 12)]
    regions = [CropRegion(0, 0, height, width, 8, 8) for height, width in sizes]
    monkeypatch.setattr("kdbench.data.loading.resample.GROUP_ELEMENTS", 3 * 3 * 12 * 12)
    assert sorted(map(sorted, _padding_groups(regions))) == [[0, 2, 3], [1]]
    sizes = [(10, 12), (90, 80), (11, 9), (12, 12)]
    images = [tv.pil_to_tensor(smooth_image(width, height, 1)) for height, width in sizes]
    regions = [CropRegion(0, 0, *image.shape[1:], 8, 8) for image in images]
    assert len(_padding_groups(regions)) > 1
    grouped = resample_crops(images, regions, 8)
    single = [resample_crops([image], [region], 8)[0] for image, region in zip(images, regions, strict=True)]
    assert max_difference(grouped, torch.stack(single)) <= 1  # a longer sum may round differently


def test_one_notice_names_a_file_that_torchvision_does_not_decode(paths):
    notices: list[str] = []
    source = open_source(mixed_config("torchvision"), notice=notices.append)
    for epoch in range(2):
        list(training_batches(source, epoch))
    (notice,) = notices
    assert "PIL decodes this file" in notice and ("not a JPEG but PNG" in notice or "a JPEG in CMYK" in notice)
    notices.clear()
    list(training_batches(open_source(mixed_config(None), notice=notices.append), 0))
    assert notices == []


@quiet_fork
@pytest.mark.parametrize("decode", [None, "torchvision"])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_the_first_step(paths, decode, workers):
    config = mixed_config(decode, augmentations=("random_resized_crop", "flip", "mixup"))
    options = {"notice": lambda text: None}
    expected = [list(training_batches(open_source(config, **options), epoch)) for epoch in range(2)]
    source = open_source(config, workers=workers, **options)
    for epoch, start in ((1, 0), (0, 2), (1, 3), (0, 0)):
        assert equal_batches(expected[epoch][start:], training_batches(source, epoch, start))
    source.close()


@pytest.mark.parametrize("decode", [None, "torchvision"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_give_the_global_batch(paths, decode, world_size):
    def batches(batch_size, **options):
        config = mixed_config(decode, ("random_resized_crop", "flip", "cutmix"), batch_size=batch_size)
        return training_batches(open_source(config, notice=lambda text: None, **options), 1)

    ranks = [batches(8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for global_batch, *shards in zip(batches(8), *ranks, strict=True):
        for rank, shard in enumerate(shards):
            for field, value in global_batch.items():
                tolerance = 1 if field in ("image", "raw") else 0  # a longer sum may round differently
                assert max_difference(shard[field] * 255, value[rank::world_size] * 255) <= tolerance, field


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
@pytest.mark.parametrize("decode", [None, "torchvision"])
def test_damaged_jpeg_is_reported_with_its_path(paths, decode, damage):
    content = paths[1].read_bytes()
    paths[1].write_bytes({"text": b"hello", "cut": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(DataError, match=r"b_upright.jpg cannot be read as an image \(.*Replace it or remove it\.$"):
        list(training_batches(open_source(mixed_config(decode), notice=lambda text: None), 0))


@quiet_fork
@pytest.mark.parametrize("decode", [None, "torchvision"])
def test_training_workers_persist_over_epochs_and_close_ends_all(paths, decode):
    before = set(multiprocessing.active_children())
    source = open_source(mixed_config(decode), workers=2, notice=lambda text: None)

    def worker_pids():
        return {child.pid for child in set(multiprocessing.active_children()) - before}

    list(training_batches(source, 0))
    first_epoch = worker_pids()
    training = training_batches(source, 1)
    next(training)
    assert len(first_epoch) == 2 and worker_pids() == first_epoch
    evaluation = evaluation_batches(source, 3)
    next(evaluation)
    assert len(worker_pids()) == 4
    source.close()  # while both passes are unfinished
    assert worker_pids() == set()


def test_killed_worker_is_reported(paths, monkeypatch):
    """Simulates the kill: the loader's signal handler would raise anywhere in the interpreter, also in pytest."""

    def killed_loader(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        yield

    source = open_source(mixed_config(None))
    monkeypatch.setattr(source, "_loader", killed_loader)
    with pytest.raises(DataError, match=r"source 'train' ended \(DataLoader worker .*fewer `workers` \(now 0\)"):
        list(training_batches(source, 0))


def test_unsuitable_values_of_decode_are_rejected(paths):
    with pytest.raises(ConfigError, match=r"decode must be null or a decoder, got 'torchvison'.*torchvision"):
        open_source(mixed_config("torchvison"))
    params = {"root": "mixed", "size": 20, "resident": True, "decode": "torchvision"}
    with pytest.raises(ConfigError, match="`resident: true` decodes them once"):
        open_source(source_config(dataset="image_folder", params=params))


def test_decode_is_part_of_the_run_identity(paths):
    text = "student: {model: resnet20}\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
    data = "dataset: {type: image_folder, root: mixed, size: 20, resident: false}\n"
    default = identity(recipe_from_text(text, data=data))
    assert identity(recipe_from_text(text, data=data.replace("false}", "false, decode: torchvision}"))) != default


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with nvJPEG")
def test_gpu_decodes_within_the_tolerance(paths):
    """nvJPEG's transform and colours are rounded differently from libjpeg's: at most 8 levels, below 1 on average."""
    source = open_source(mixed_config("torchvision"), device="cuda", seed=3, notice=lambda text: None)
    for batch in training_batches(source, 5):
        for index, image in zip(batch["index"].tolist(), batch["image"].cpu(), strict=True):
            expected = expected_crop(paths[index], index, epoch=5, seed=3)
            assert max_difference(image * 255, expected) <= 8, paths[index]
            assert (image * 255 - expected).abs().mean() < 1, paths[index]
