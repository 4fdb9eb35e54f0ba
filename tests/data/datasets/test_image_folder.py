"""Class folders of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image

from helpers.data_sources import evaluation_batches, open_source, source_config, write_image_folders
from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.image_files import resize_and_crop
from kdbench.data.datasets.image_folder import ImageFolder, ImageNet
from kdbench.data.describe import describe_source
from kdbench.errors import ConfigError, DataError


def test_pixels_equal_torchvisions_resize_and_center_crop():
    rng = np.random.default_rng(0)
    for width, height in ((50, 33), (33, 50), (40, 40), (16, 16), (17, 90), (100, 23)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for resize, size in ((16, 16), (32, 28), (40, 40)):
            expected = transforms.CenterCrop(size)(transforms.Resize(resize)(image))
            assert np.array_equal(np.asarray(resize_and_crop(image, resize, size)), np.asarray(expected))


def test_classes_labels_and_pixels_equal_torchvisions_image_folder(tmp_path):
    import torchvision

    write_image_folders(
        tmp_path / "pets", {"train": {"dog": 3, "Cat": 2, "ant": 1}, "val": {"dog": 1, "Cat": 1, "ant": 1}}
    )
    dataset = ImageFolder(root="pets", size=8, data_root=str(tmp_path))
    reference = torchvision.datasets.ImageFolder(str(tmp_path / "pets" / "train"))
    assert dataset.classes == reference.classes
    split = dataset.load()
    assert split.labels.tolist() == reference.targets
    resize = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.PILToTensor()])
    for image, (expected, _) in zip(split.images, reference, strict=True):
        assert torch.equal(image, resize(expected))


def test_val_replaces_test_and_root_may_be_absolute_or_relative(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"a": 2}, "val": {"a": 1}})
    for root in (str(tmp_path / "pets"), "pets"):  # the test runs in tmp_path
        assert len(ImageFolder(root=root, size=8, split="test", data_root="elsewhere")) == 1


def test_nested_folders_are_read_and_other_files_ignored(tmp_path):
    write_image_folders(tmp_path / "pets" / "train", {"a": {"deep": 2}, "b": {"deep": 1}})
    (tmp_path / "pets" / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / "a" / ".hidden.png").write_text("not an image")
    assert len(ImageFolder(root="pets", size=8)) == 3


def test_grey_transparent_and_palette_images_become_rgb(tmp_path):
    folder = tmp_path / "pets" / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (9, 9), 7).save(folder / "0.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(folder / "1.png")
    Image.new("P", (9, 9)).save(folder / "2.png")
    images = ImageFolder(root="pets", size=8).load().images
    assert images.shape == (3, 3, 8, 8)
    assert images[0].unique().tolist() == [7]


def test_mean_std_and_normalize_are_applied(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"a": 2, "b": 2}})
    raw, normalised = (
        next(
            evaluation_batches(
                open_source(
                    source_config(dataset="image_folder", batch_size=4, params={"root": "pets", "size": 8} | extra)
                ),
                4,
            )
        )
        for extra in ({"normalize": False}, {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]})
    )
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert 0 <= raw["image"].min() < raw["image"].max() <= 1
    torch.testing.assert_close(normalised["image"], (raw["image"] - mean) / std)


def test_added_image_changes_the_split(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"a": 2, "b": 1}})
    before = ImageFolder(root="pets", size=8).load()
    Image.new("RGB", (9, 9)).save(tmp_path / "pets" / "train" / "b" / "new.png")
    after = ImageFolder(root="pets", size=8).load()
    assert (len(before.labels), len(after.labels)) == (3, 4)
    assert before.checksum != after.checksum


def test_small_folders_are_resident_and_large_ones_are_streamed(tmp_path, monkeypatch):
    write_image_folders(tmp_path / "pets", {"train": {"a": 2}})
    assert ImageFolder(root="pets", size=8).resident
    assert not ImageFolder(root="pets", size=8, resident=False).resident
    monkeypatch.setattr("kdbench.data.datasets.image_folder.RESIDENT_LIMIT", 2 * 3 * 8 * 8 - 1)
    assert not ImageFolder(root="pets", size=8).resident
    assert ImageFolder(root="pets", size=8, resident=True).resident


def test_spec_is_as_complete_as_the_files_allow(tmp_path):
    config = SourceConfig(name="train", dataset=PartConfig(type="image_folder", params={"root": "pets", "size": 8}))
    missing = describe_source(config, "data")
    assert missing.fields["image"] == ((3, 8, 8), "float32")
    assert (missing.classes, missing.samples) == (None, None)
    assert f"no folder {Path('data/pets').absolute()} or {Path('pets').absolute()}" in str(missing.problem)
    write_image_folders(tmp_path / "pets", {"train": {"a": 2, "b": 3}})
    spec = describe_source(config, "data")
    assert (spec.classes, spec.samples, spec.problem) == (2, 5, None)
    imagenet = describe_source(SourceConfig(name="train", dataset=PartConfig(type="imagenet")), "data")
    assert imagenet.fields["image"] == ((3, 224, 224), "float32")
    assert (imagenet.classes, imagenet.samples) == (1000, 1281167)
    assert "imagenet/train/<class>" in str(imagenet.problem)


def test_missing_folder_is_reported_with_the_existing_ones(tmp_path):
    with pytest.raises(DataError, match=r"no folder /.*/data/pets or /.*/pets. It should have class folders"):
        ImageFolder(root="pets")
    write_image_folders(tmp_path / "pets", {"training": {"a": 1}})
    with pytest.raises(DataError, match=r"pets has no folder train for the split 'train'; there are training"):
        ImageFolder(root="pets")
    with pytest.raises(DataError, match=r"has no folder test or val for the split 'test'"):
        ImageFolder(root="pets", split="test")


def test_folders_with_other_classes_or_without_images_are_rejected(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "hog": 1}})
    with pytest.raises(DataError, match=r"different classes \(only in .*train: dog; only in .*test: hog\)"):
        ImageFolder(root="pets")
    with pytest.raises(DataError, match=r"only in .*test: hog; only in .*train: dog"):
        ImageFolder(root="pets", split="test")
    write_image_folders(tmp_path / "empty", {"train": {"cat": 1, "dog": 0}})
    with pytest.raises(DataError, match=r"no images in class dog"):
        ImageFolder(root="empty")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"flat/train has no class folders"):
        ImageFolder(root="flat")


def test_unreadable_image_is_reported_with_its_path(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"cat": 2}})
    (tmp_path / "pets" / "train" / "cat" / "001.png").write_text("hello")
    with pytest.raises(DataError, match=r"cat/001.png cannot be read as an image .* Replace it or remove it"):
        ImageFolder(root="pets", size=8).load()


def test_links_without_target_are_reported(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"cat": 2}})
    link = tmp_path / "pets" / "train" / "cat" / "z.png"
    link.symlink_to("nothing.png")
    with pytest.raises(DataError, match=r"cat/z.png is a link without a target; replace it or remove it"):
        ImageFolder(root="pets", size=8)
    link.unlink()
    link.symlink_to("z.png")  # a link to itself
    with pytest.raises(DataError, match=r"cat/z.png is a link without a target"):
        ImageFolder(root="pets", size=8)


def test_named_pipe_is_reported_and_not_opened(tmp_path):
    write_image_folders(tmp_path / "pets", {"train": {"cat": 2}})
    os.mkfifo(tmp_path / "pets" / "train" / "cat" / "f.png")
    with pytest.raises(DataError, match=r"cat/f.png is not a regular file; replace it or remove it"):
        ImageFolder(root="pets", size=8)


@pytest.mark.parametrize("target", ["..", ".", "../../train"])
def test_link_loop_is_reported(tmp_path, target):
    write_image_folders(tmp_path / "pets", {"train": {"cat": 2, "dog": 1}})
    (tmp_path / "pets" / "train" / "cat" / "loop").symlink_to(target)
    with pytest.raises(DataError, match=r"cat/loop is a link to a folder that contains it; remove the link"):
        ImageFolder(root="pets", size=8)


def test_links_to_images_and_other_folders_are_followed(tmp_path):
    """Negative control of the tests of broken links."""
    write_image_folders(tmp_path / "pets", {"train": {"cat": 2}})
    write_image_folders(tmp_path / "store", {"more": {"cat": 3}})
    folder = tmp_path / "pets" / "train" / "cat"
    (folder / "linked").symlink_to(tmp_path / "store" / "more" / "cat")
    (folder / "z.png").symlink_to("000.png")
    assert len(ImageFolder(root="pets", size=8)) == 2 + 3 + 1


def test_class_folder_with_an_invalid_name_is_reported(tmp_path):
    """Such a name can be written neither to the results nor to figures, so it must not reach training."""
    write_image_folders(tmp_path / "pets", {"train": {"cat": 2}})
    (tmp_path / "pets" / "train" / "cat").rename(os.fsdecode(os.fsencode(tmp_path / "pets" / "train") + b"/caf\xe9"))
    with pytest.raises(DataError, match=r"the name of the folder caf\\udce9 is not valid UTF-8; rename it"):
        ImageFolder(root="pets", size=8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"mean": [0.5]}, "mean needs three"),
        ({"std": [1.0, 0.0, 1.0]}, "std must"),
    ],
)
def test_unsuitable_parameters_are_rejected(params, message):
    with pytest.raises(ConfigError, match=message):
        ImageFolder(root="pets", **params)
    with pytest.raises(ConfigError, match="size <= resize"):
        ImageNet(size=300)
