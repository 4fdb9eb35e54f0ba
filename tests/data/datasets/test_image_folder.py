"""One's own class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.image_files import resize_and_crop
from kdbench.data.datasets.image_folder import ImageFolder, ImageNet
from kdbench.data.describe import describe_source
from kdbench.errors import ConfigError, DataError


def test_pixels_are_those_of_torchvisions_resize_and_centre_crop():
    rng = np.random.default_rng(0)
    for width, height in ((50, 33), (33, 50), (40, 40), (16, 16), (17, 90), (100, 23)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for resize, size in ((16, 16), (32, 28), (40, 40)):
            expected = transforms.CenterCrop(size)(transforms.Resize(resize)(image))
            assert np.array_equal(np.asarray(resize_and_crop(image, resize, size)), np.asarray(expected))


def test_reads_classes_and_labels_like_torchvisions_image_folder(tmp_path, write_folders):
    import torchvision

    write_folders(tmp_path / "pets", {"train": {"dog": 3, "Cat": 2, "ant": 1}, "val": {"dog": 1, "Cat": 1, "ant": 1}})
    ours = ImageFolder(root="pets", size=8, data_root=str(tmp_path))
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "pets" / "train"))
    assert ours.classes == theirs.classes
    packed = ours.load()
    assert packed.labels.tolist() == theirs.targets
    resize = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.PILToTensor()])
    for image, (other, _) in zip(packed.images, theirs, strict=True):
        assert torch.equal(image, resize(other))


def test_val_serves_as_test_and_roots_may_be_absolute_or_here(tmp_path, write_folders):
    write_folders(tmp_path / "pets", {"train": {"a": 2}, "val": {"a": 1}})
    for root in (str(tmp_path / "pets"), "pets"):  # the test runs in tmp_path
        assert len(ImageFolder(root=root, size=8, split="test", data_root="elsewhere")) == 1


def test_nested_folders_and_other_files(tmp_path, write_folders):
    write_folders(tmp_path / "pets" / "train", {"a": {"deep": 2}, "b": {"deep": 1}})
    (tmp_path / "pets" / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / "a" / ".hidden.png").write_text("not an image")
    assert len(ImageFolder(root="pets", size=8)) == 3


def test_grey_and_transparent_images_become_rgb(tmp_path):
    folder = tmp_path / "pets" / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (9, 9), 7).save(folder / "0.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(folder / "1.png")
    Image.new("P", (9, 9)).save(folder / "2.png")
    images = ImageFolder(root="pets", size=8).load().images
    assert images.shape == (3, 3, 8, 8)
    assert images[0].unique().tolist() == [7]


def test_own_statistics_and_raw_values(tmp_path, write_folders, source_of, make):
    write_folders(tmp_path / "pets", {"train": {"a": 2, "b": 2}})
    raw, own = (
        next(
            source_of(make(dataset="image_folder", batch_size=4, params={"root": "pets", "size": 8} | extra)).evaluation_batches(
                4
            )
        )
        for extra in ({"normalize": False}, {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]})
    )
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert 0 <= raw["image"].min() < raw["image"].max() <= 1
    torch.testing.assert_close(own["image"], (raw["image"] - mean) / std)


def test_a_changed_folder_is_noticed(tmp_path, write_folders):
    write_folders(tmp_path / "pets", {"train": {"a": 2, "b": 1}})
    before = ImageFolder(root="pets", size=8).load()
    Image.new("RGB", (9, 9)).save(tmp_path / "pets" / "train" / "b" / "new.png")
    after = ImageFolder(root="pets", size=8).load()
    assert (len(before.labels), len(after.labels)) == (3, 4)
    assert before.checksum != after.checksum


def test_small_folders_are_resident_and_large_ones_stream(tmp_path, write_folders, monkeypatch):
    write_folders(tmp_path / "pets", {"train": {"a": 2}})
    assert ImageFolder(root="pets", size=8).resident
    assert not ImageFolder(root="pets", size=8, resident=False).resident
    monkeypatch.setattr("kdbench.data.datasets.image_folder.RESIDENT_LIMIT", 2 * 3 * 8 * 8 - 1)
    assert not ImageFolder(root="pets", size=8).resident
    assert ImageFolder(root="pets", size=8, resident=True).resident


def test_is_described_as_far_as_the_files_allow(tmp_path, write_folders):
    config = SourceConfig(name="train", dataset=PartConfig(type="image_folder", params={"root": "pets", "size": 8}))
    missing = describe_source(config, "data")
    assert missing.fields["image"] == ((3, 8, 8), "float32")
    assert (missing.classes, missing.samples) == (None, None)
    assert f"no folder {Path('data/pets').absolute()} or {Path('pets').absolute()}" in str(missing.problem)
    write_folders(tmp_path / "pets", {"train": {"a": 2, "b": 3}})
    found = describe_source(config, "data")
    assert (found.classes, found.samples, found.problem) == (2, 5, None)
    imagenet = describe_source(SourceConfig(name="train", dataset=PartConfig(type="imagenet")), "data")
    assert imagenet.fields["image"] == ((3, 224, 224), "float32")
    assert (imagenet.classes, imagenet.samples) == (1000, 1281167)
    assert "imagenet/train/<class>" in str(imagenet.problem)


def test_missing_folders_say_what_is_there(tmp_path, write_folders):
    with pytest.raises(DataError, match=r"no folder /.*/data/pets or /.*/pets. Class folders are expected"):
        ImageFolder(root="pets")
    write_folders(tmp_path / "pets", {"training": {"a": 1}})
    with pytest.raises(DataError, match=r"pets has no folder train for the split 'train'; there are training"):
        ImageFolder(root="pets")
    with pytest.raises(DataError, match=r"has no folder test or val for the split 'test'"):
        ImageFolder(root="pets", split="test")


def test_unsuitable_folders_are_refused(tmp_path, write_folders):
    write_folders(tmp_path / "pets", {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "hog": 1}})
    with pytest.raises(DataError, match=r"different classes; only in .*train: dog; only in .*test: hog"):
        ImageFolder(root="pets")
    with pytest.raises(DataError, match=r"only in .*test: hog; only in .*train: dog"):
        ImageFolder(root="pets", split="test")
    write_folders(tmp_path / "empty", {"train": {"cat": 1, "dog": 0}})
    with pytest.raises(DataError, match=r"no images in class dog"):
        ImageFolder(root="empty")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"flat/train has no class folders"):
        ImageFolder(root="flat")


def test_an_unreadable_image_is_named(tmp_path, write_folders):
    write_folders(tmp_path / "pets", {"train": {"cat": 2}})
    (tmp_path / "pets" / "train" / "cat" / "001.png").write_text("hello")
    with pytest.raises(DataError, match=r"cat/001.png cannot be read as an image .* Replace it or remove it"):
        ImageFolder(root="pets", size=8).load()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"mean": [0.5]}, "mean needs three"),
        ({"std": [1.0, 0.0, 1.0]}, "std must"),
    ],
)
def test_wrong_parameters_are_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        ImageFolder(root="pets", **params)
    with pytest.raises(ConfigError, match="size <= resize"):
        ImageNet(size=300)
