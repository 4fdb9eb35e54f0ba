"""Decoding with torchvision and resizing on the device: PIL's pixels up to a stated tolerance, whatever the file."""

from __future__ import annotations

import itertools
import multiprocessing

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from kdbench.data.augment.geometric import RandomResizedCrop
from kdbench.data.loading.resample import CropRegion, _padding_groups, filter_weights, resample_crops
from kdbench.errors import ConfigError, DataError
from kdbench.randomness import derive

quiet_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12+

LEVELS = 2
"""Of 255: how far a pixel may be from PIL's (as docs/recipe.md says). The decoders agree; the weights round apart."""


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """Waves with some noise: neither flat, where any resizing is right, nor pure noise, where JPEG leaves nothing."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9)) for _ in range(3)]
    noisy = 127 + 100 * np.stack(waves, 2) + rng.normal(0, 9, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


FILES = {
    "a_plain.jpg": ((53, 37), {}),
    "b_upright.jpg": ((31, 67), {"quality": 60}),
    "c_square.jpg": ((40, 40), {"progressive": True}),
    "d_gray.jpg": ((45, 33), {"mode": "L"}),
    "e_ink.jpg": ((38, 52), {"mode": "CMYK"}),
    "f_other.png": ((29, 30), {}),
    "g_tiny.jpg": ((7, 9), {}),
    "h_resized.jpg": ((20, 33), {}),
}


@pytest.fixture
def odd(tmp_path):
    """Files of odd sizes and kinds; returns the paths of the training split in the order of `index`."""
    for split in ("train", "val"):
        for kind in ("ant", "bee"):
            folder = tmp_path / "odd" / split / kind
            folder.mkdir(parents=True)
            for number, (name, (size, how)) in enumerate(FILES.items()):
                how = dict(how)
                image = smooth(*size, seed=number).convert(how.pop("mode", "RGB"))
                image.save(folder / name, **how)
    return sorted((tmp_path / "odd" / "train").rglob("*.*"))


@pytest.fixture
def folder(make, part):
    def build(decode, augments=("random_resized_crop",), name="train", **rest):
        views = {"image": tuple(part(one) for one in augments), "raw": ()} if name == "train" else {"image": ()}
        params = {"root": "odd", "size": 20, "normalize": False, "resident": False, "decode": decode}
        split = "train" if name == "train" else "test"
        size = rest.pop("batch_size", 5)
        return make(name=name, dataset="image_folder", split=split, batch_size=size, params=params, views=views, **rest)

    return build


@pytest.fixture
def said():
    return []


def opened(source_of, config, said, **options):
    source = source_of(config, **options)
    source.notice = said.append
    return source


def reference(path, index, *, epoch, seed) -> torch.Tensor:
    """torchvision's resized_crop of the PIL image at the box that the sample drew."""
    key = [derive(seed, "augment", "train", "image", epoch, "reading"), index]
    with Image.open(path) as file:
        whole = file.convert("RGB")
    left, top, right, bottom = RandomResizedCrop().box(*whole.size, np.random.Generator(np.random.Philox(key=key)))
    return tv.pil_to_tensor(tv.resized_crop(whole, top, left, bottom - top, right - left, [20, 20]))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in levels."""
    return float((one.float() - other.float()).abs().max())


@pytest.mark.parametrize(("decode", "levels"), [(None, 0), ("pil", 0), ("torchvision", LEVELS)])
def test_a_random_part_is_torchvisions_of_the_same_box(odd, folder, source_of, said, decode, levels):
    for batch in opened(source_of, folder(decode), said, seed=3).batches(5):
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            expected = reference(odd[index], index, epoch=5, seed=3)
            assert distance(image * 255, expected) <= levels + 1e-3, odd[index]


@pytest.mark.parametrize(("decode", "levels"), [(None, 0), ("torchvision", LEVELS)])
def test_evaluation_is_torchvisions_resize_and_center_crop(odd, folder, source_of, said, decode, levels):
    (batch,) = opened(source_of, folder(decode, name="eval"), said).evaluation_batches(64)
    for path, image in zip(odd, batch["image"], strict=True):
        with Image.open(str(path).replace("/train/", "/val/")) as file:
            expected = tv.pil_to_tensor(tv.center_crop(tv.resize(file.convert("RGB"), 20), [20, 20]))
        assert distance(image * 255, expected) <= levels + 1e-3, path


def test_a_box_one_pixel_away_is_farther_than_the_tolerance():
    """The negative control: the tolerance tells the right box from its neighbour, and bilinear from antialiased."""
    image = smooth(53, 37, 0)
    pixels = tv.pil_to_tensor(image)
    expected = tv.pil_to_tensor(tv.resized_crop(image, 3, 5, 30, 41, [20, 20]))
    right, wrong = CropRegion(3, 5, 30, 41, 20, 20), CropRegion(3, 6, 30, 41, 20, 20)
    assert distance(resample_crops([pixels], [right], 20)[0], expected) <= LEVELS
    assert distance(resample_crops([pixels], [wrong], 20)[0], expected) > 10 * LEVELS
    blunt = tv.resize(pixels[:, 3:33, 5:46], [20, 20], antialias=False)
    assert distance(blunt, expected) > 5 * LEVELS


@pytest.mark.parametrize("size", [(20, 20), (61, 20), (20, 44), (9, 7), (300, 200), (3, 250)])
def test_resampling_is_pils_for_shrinking_and_growing(size):
    image = smooth(*size, seed=4)
    width, height = size
    expected = tv.pil_to_tensor(image.resize((20, 20), Image.Resampling.BILINEAR))
    read = resample_crops([tv.pil_to_tensor(image)], [CropRegion(0, 0, height, width, 20, 20)], 20)
    assert distance(read[0], expected) <= 1


def test_an_image_that_has_the_size_is_read_as_it_is():
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    read = resample_crops([pixels], [CropRegion(0, 0, 20, 30, 20, 30, 0, 5)], 20)
    assert torch.equal(read[0], pixels[:, :, 5:25])


def test_weights_sum_to_one_and_leave_the_padding_out():
    found = filter_weights(torch.tensor([5, 9]), torch.tensor([4, 4]), torch.tensor([0, 1]), 3, 12)
    torch.testing.assert_close(found.sum(2), torch.ones(2, 3))
    assert not found[0, :, 5:].any() and not found[1, :, 9:].any()


def test_a_very_large_image_does_not_pad_the_others(monkeypatch):
    sizes = [(10, 12), (4000, 3000), (11, 9), (12, 12)]
    regions = [CropRegion(0, 0, height, width, 8, 8) for height, width in sizes]
    monkeypatch.setattr("kdbench.data.loading.resample.GROUP_ELEMENTS", 3 * 3 * 12 * 12)
    assert sorted(map(sorted, _padding_groups(regions))) == [[0, 2, 3], [1]]
    images = [tv.pil_to_tensor(smooth(width, height, 1)) for height, width in ((10, 12), (90, 80), (11, 9), (12, 12))]
    regions = [CropRegion(0, 0, *image.shape[1:], 8, 8) for image in images]
    together = resample_crops(images, regions, 8)
    alone = [resample_crops([image], [region], 8)[0] for image, region in zip(images, regions, strict=True)]
    assert distance(together, torch.stack(alone)) <= 1  # a longer sum rounds otherwise; mostly 0
    assert len(_padding_groups(regions)) > 1


def test_what_torchvision_does_not_decode_is_told_once(odd, folder, source_of, said):
    source = opened(source_of, folder("torchvision"), said)
    for epoch in range(2):
        list(source.batches(epoch))
    (text,) = said
    assert "PIL decodes it" in text and ("no JPEG but PNG" in text or "a JPEG in CMYK" in text)
    told = []
    list(opened(source_of, folder(None), told).batches(0))
    assert told == []


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@quiet_fork
@pytest.mark.parametrize("decode", [None, "torchvision"])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_on_where_one_starts(odd, folder, source_of, said, decode, workers):
    config = folder(decode, augments=("random_resized_crop", "flip", "mixup"))
    expected = [list(opened(source_of, config, said).batches(epoch)) for epoch in range(2)]
    source = opened(source_of, config, said, workers=workers)
    for epoch, start in ((1, 0), (0, 2), (1, 3), (0, 0)):
        assert all(itertools.starmap(same, zip(expected[epoch][start:], source.batches(epoch, start), strict=True)))
    source.close()


@pytest.mark.parametrize("decode", [None, "torchvision"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_the_global_batch(odd, folder, source_of, said, decode, world):
    augments = ("random_resized_crop", "flip", "cutmix")
    whole = list(opened(source_of, folder(decode, augments, batch_size=8), said).batches(1))
    ranks = [
        opened(source_of, folder(decode, augments, batch_size=8 // world), said, rank=rank, world_size=world).batches(1)
        for rank in range(world)
    ]
    for batch, *shards in zip(whole, *ranks, strict=True):
        for rank, one in enumerate(shards):
            for key, value in batch.items():
                near = 1 if key in ("image", "raw") else 0  # a longer sum may round otherwise
                assert distance(one[key] * 255, value[rank::world] * 255) <= near, key


@pytest.mark.parametrize("how", ["text", "cut", "empty"])
@pytest.mark.parametrize("decode", [None, "torchvision"])
def test_a_damaged_jpeg_is_told_with_its_path(odd, folder, source_of, said, decode, how):
    path = odd[1]
    content = path.read_bytes()
    path.write_bytes({"text": b"hello", "cut": content[: len(content) // 2], "empty": b""}[how])
    with pytest.raises(DataError, match=r"b_upright.jpg cannot be read as an image \(.*Replace it or remove it\.$"):
        list(opened(source_of, folder(decode), said).batches(0))


@quiet_fork
@pytest.mark.parametrize("decode", [None, "torchvision"])
def test_workers_last_from_epoch_to_epoch_and_none_is_left(odd, folder, source_of, said, decode):
    before = set(multiprocessing.active_children())
    source = opened(source_of, folder(decode), said, workers=2)

    def working():
        return {child.pid for child in set(multiprocessing.active_children()) - before}

    list(source.batches(0))
    first = working()
    left = source.batches(1)
    next(left)
    assert len(first) == 2 and working() == first
    evaluation = source.evaluation_batches(3)
    next(evaluation)
    assert len(working()) == 4
    source.close()  # while `left` and `evaluation` still stand in the middle
    assert working() == set()


def test_a_worker_that_was_killed_is_told_in_words(odd, folder, source_of, said, monkeypatch):
    """Not really killed: the loader's signal handler would raise wherever the interpreter just is, in pytest too."""

    def killed(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        yield

    source = opened(source_of, folder(None), said)
    monkeypatch.setattr(source, "_loader", killed)
    with pytest.raises(DataError, match=r"source 'train' ended \(DataLoader worker .*fewer `workers` \(now 0\)"):
        list(source.batches(0))


def test_bad_values_of_decode_are_refused(odd, folder, source_of, make, said):
    with pytest.raises(ConfigError, match=r"decode must be null or a way to read files, got 'torchvison'.*torchvision"):
        source_of(folder("torchvison"))
    params = {"root": "odd", "size": 20, "resident": True, "decode": "torchvision"}
    with pytest.raises(ConfigError, match="resident: true reads them once"):
        source_of(make(dataset="image_folder", params=params))


def test_decoding_is_part_of_a_runs_identity(odd):
    from helpers.recipes import recipe_from_text
    from kdbench.config.identity import identity

    text = "student: {model: resnet20}\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
    data = "dataset: {type: image_folder, root: odd, size: 20, resident: false}\n"
    plain = identity(recipe_from_text(text, data=data))
    assert identity(recipe_from_text(text, data=data.replace("false}", "false, decode: torchvision}"))) != plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with nvJPEG")
def test_the_gpu_decodes_within_the_tolerance(odd, folder, source_of, said):
    """nvJPEG's own transform and colours round otherwise than libjpeg's: within 8 levels, on the average below 1."""
    here = opened(source_of, folder("torchvision"), said, device="cuda", seed=3)
    for batch in here.batches(5):
        for index, image in zip(batch["index"].tolist(), batch["image"].cpu(), strict=True):
            expected = reference(odd[index], index, epoch=5, seed=3)
            assert distance(image * 255, expected) <= 8, odd[index]
            assert (image * 255 - expected).abs().mean() < 1, odd[index]
