"""CIFAR from torchvision's layout and from class folders: the same bits; errors that name the file."""

from __future__ import annotations

import hashlib
import io
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.data_sources import write_image_folders
from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.cifar import Cifar10, Cifar100
from kdbench.data.describe import describe_source
from kdbench.errors import DataError


def write_archive(root, monkeypatch, dataset, samples, *, split="train", parts=1, order=None):
    """Writes torchvision's layout, and makes kdbench expect the MD5s of its files.

    Args:
        samples: (class, path, pixels) each.
        parts: number of files.
        order: of the samples in the files; None as they are.
    """
    folder = root / dataset.archive_folder
    folder.mkdir(parents=True, exist_ok=True)
    names = dataset.names.split()
    order = list(range(len(samples))) if order is None else order
    checksums = []
    for number, rows in enumerate(np.array_split(order, parts)):
        pixels = np.stack([samples[k][2].transpose(2, 0, 1).reshape(-1) for k in rows])
        labels = [names.index(samples[k][0]) for k in rows]
        raw = pickle.dumps({"data": pixels, dataset.label_key: labels, "batch_label": "x"}, protocol=2)
        (folder / f"{split}{number}").write_bytes(raw)
        checksums.append((f"{split}{number}", hashlib.md5(raw).hexdigest()))
    monkeypatch.setattr(dataset, "files", dict(dataset.files) | {split: tuple(checksums)})
    return folder


def write_class_folders(root, dataset, each=2, split="train"):
    """Writes images of every class; returns (class, path, pixels) of each."""
    classes = dict.fromkeys(dataset.names.split(), each)
    return write_image_folders(root / dataset.name, {split: classes}, size=(32, 32))[split]


@pytest.mark.parametrize(("dataset", "parts"), [(Cifar10, 3), (Cifar100, 1)])
def test_both_layouts_give_the_same_bits(tmp_path, monkeypatch, dataset, parts):
    samples = write_class_folders(tmp_path / "folders", dataset)
    shuffled = np.random.default_rng(1).permutation(len(samples))
    write_archive(tmp_path / "archive", monkeypatch, dataset, samples, parts=parts, order=shuffled)
    first = dataset(data_root=str(tmp_path / "folders")).load()
    second = dataset(data_root=str(tmp_path / "archive")).load()
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.checksum == second.checksum
    names = dataset.names.split()
    pixels = {pixels.transpose(2, 0, 1).tobytes(): name for name, _, pixels in samples}
    assert all(
        pixels[image.tobytes()] == names[label]
        for image, label in zip(first.images.numpy(), first.labels.tolist(), strict=True)
    )


def test_archive_is_read_as_by_torchvision(tmp_path, monkeypatch):
    import torchvision

    samples = write_class_folders(tmp_path, Cifar100)
    folder = write_archive(tmp_path, monkeypatch, Cifar100, samples)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": Cifar100.names.split()}))

    class Tiny(torchvision.datasets.CIFAR100):
        train_list = [list(Cifar100.files["train"][0])]  # noqa: RUF012
        meta = torchvision.datasets.CIFAR100.meta | {"md5": None}

        def _check_integrity(self):
            return True

    reference = Tiny(tmp_path)
    assert reference.classes == Cifar100.names.split()
    expected = sorted(
        (label, image.transpose(2, 0, 1).tobytes())
        for image, label in zip(reference.data, reference.targets, strict=True)
    )
    split = Cifar100(data_root=str(tmp_path)).load()
    pairs = zip(split.images.numpy(), split.labels.tolist(), strict=True)
    assert [(label, image.tobytes()) for image, label in pairs] == expected


def test_file_names_and_checksums_are_those_of_torchvision():
    import torchvision

    for dataset, reference in ((Cifar10, torchvision.datasets.CIFAR10), (Cifar100, torchvision.datasets.CIFAR100)):
        assert [list(pair) for pair in dataset.files["train"]] == reference.train_list
        assert [list(pair) for pair in dataset.files["test"]] == reference.test_list
        assert dataset.archive_folder == reference.base_folder
        names = dataset.names.split()
        assert names == sorted(names)


def test_spec_is_known_without_files(tmp_path):
    config = SourceConfig(name="train", dataset=PartConfig(type="cifar100"))
    spec = describe_source(config, str(tmp_path / "data"))
    assert spec.fields["image"] == ((3, 32, 32), "float32")
    assert (spec.classes, spec.samples) == (100, 50000)
    assert spec.problem == f"cifar100 is not under {tmp_path / 'data'}/; it will be downloaded"
    assert not (tmp_path / "data").exists()


def test_downloaded_archive_is_read(tmp_path, monkeypatch):
    samples = write_class_folders(tmp_path / "elsewhere", Cifar10)
    requests = []

    def download(url, root, filename, md5):
        requests.append((url, filename, md5))
        write_archive(tmp_path / "data", monkeypatch, Cifar10, samples)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    split = Cifar10(data_root=str(tmp_path / "data")).load()
    assert len(split.images) == 20
    assert requests[0][1:] == ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")


def test_error_without_network_names_both_layouts(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", offline)
    with pytest.raises(
        DataError, match=r"(?s)cannot be downloaded .*no route.*cifar-100-python/.*cifar100/\{train,test\}"
    ):
        Cifar100(data_root=str(tmp_path)).load()


def test_damaged_or_missing_archive_file_is_reported(tmp_path, monkeypatch):
    samples = write_class_folders(tmp_path / "x", Cifar10)
    folder = write_archive(tmp_path, monkeypatch, Cifar10, samples, parts=2)
    raw = bytearray((folder / "train1").read_bytes())
    raw[500] ^= 1
    (folder / "train1").write_bytes(raw)
    with pytest.raises(DataError, match=r"train1 is damaged: its MD5 is .* Remove the folder"):
        Cifar10(data_root=str(tmp_path)).load()
    (folder / "train1").unlink()
    with pytest.raises(DataError, match=r"train1 is missing"):
        Cifar10(data_root=str(tmp_path)).load()


def test_pickle_of_another_structure_is_rejected(tmp_path, monkeypatch):
    folder = tmp_path / Cifar10.archive_folder
    folder.mkdir()
    for content in (
        {"data": np.zeros((2, 3072), np.uint8)},
        [1],
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
    ):
        raw = pickle.dumps(content, protocol=2)
        (folder / "test0").write_bytes(raw)
        monkeypatch.setattr(Cifar10, "files", {"test": (("test0", hashlib.md5(raw).hexdigest()),)})
        with pytest.raises(DataError, match="test0 does not contain the images of cifar10"):
            Cifar10(split="test", data_root=str(tmp_path)).load()


def test_incomplete_class_folders_are_rejected(tmp_path):
    write_image_folders(tmp_path / "cifar10", {"train": {"airplane": 1, "dragon": 1}}, size=(32, 32))
    with pytest.raises(DataError, match=r"10 classes of cifar10 \(missing: automobile, .*; unknown: dragon\)"):
        Cifar10(data_root=str(tmp_path))


def test_images_of_another_size_are_rejected(tmp_path):
    samples = write_class_folders(tmp_path, Cifar10)
    Image.new("RGB", (30, 32)).save(samples[3][1])
    with pytest.raises(DataError, match=r"automobile/001.png is 30x32 pixels; images of cifar10 are 32x32"):
        Cifar10(data_root=str(tmp_path)).load()


def test_truncated_image_is_reported_with_its_path(tmp_path):
    samples = write_class_folders(tmp_path, Cifar10)
    raw = samples[0][1].read_bytes()
    samples[0][1].write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"airplane/000.png cannot be read as an image"):
        Cifar10(data_root=str(tmp_path)).load()


def test_changed_image_changes_the_checksum(tmp_path):
    samples = write_class_folders(tmp_path, Cifar10)
    before = Cifar10(data_root=str(tmp_path)).load()
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(buffer, "PNG")
    samples[0][1].write_bytes(buffer.getvalue())
    assert Cifar10(data_root=str(tmp_path)).load().checksum != before.checksum
