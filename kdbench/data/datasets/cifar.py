"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read from torchvision's layout or from class folders."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.data.datasets.base import Dataset, PackedSplit
from kdbench.data.datasets.image_files import ImageListing, decode_images, list_folder
from kdbench.data.datasets.unpickle import load_pickle
from kdbench.data.loading.packed_cache import PackedCache
from kdbench.errors import DataError
from kdbench.files import file_lock
from kdbench.registry import DATASETS

NOTICES = logging.getLogger("kdbench.data")


class _Cifar(Dataset):
    """Base class of CIFAR-10 and CIFAR-100.

    Attributes:
        name: name of the dataset and of the folder with class folders.
        archive_folder: name of the folder with the pickle files, as in torchvision.
        label_key: key of the labels in the pickle files.
        names: names of the classes, separated by spaces, in the order of the labels.
        files: split -> pairs of a pickle file's name and its MD5, as in torchvision.
        num_samples: split -> number of samples.
    """

    shape = (3, 32, 32)
    name: ClassVar[str]
    archive_folder: ClassVar[str]
    label_key: ClassVar[str]
    names: ClassVar[str]
    files: ClassVar[dict[str, tuple[tuple[str, str], ...]]]
    num_samples: ClassVar[dict[str, int]] = {"train": 50000, "test": 10000}

    def __init__(self, normalize: bool = True, split: str = "train", data_root: str = "data") -> None:
        self.check_split(split)
        self.normalize = normalize
        self.split = split
        self.data_root = Path(data_root)
        self.classes = self.names.split()
        self.listing: ImageListing | None = None
        self.archive = self.data_root / self.archive_folder
        folder = self.data_root / self.name / split
        if not self.archive.is_dir():
            if folder.is_dir():
                self.listing = self._class_folders(folder)
            else:
                self.problem = f"{self.name} is not under {self.data_root}/; it will be downloaded"

    def __len__(self) -> int:
        return self.num_samples[self.split] if self.listing is None else len(self.listing)

    def checksum(self) -> str:
        return self._cache().checksum() or self.load().checksum

    def load(self) -> PackedSplit:
        return self._cache().load(self._decode_archive if self.listing is None else self._decode_folders)

    def _cache(self) -> PackedCache:
        if self.listing is not None:
            layout, fingerprint = "folders", self.listing.fingerprint()
        else:
            if not self.archive.is_dir():
                self._download()
            layout, fingerprint = "archive", self._archive_fingerprint()
        return PackedCache(self.data_root / ".kdbench", f"{self.name}-{self.split}", layout, fingerprint, self.classes)

    def _class_folders(self, folder: Path) -> ImageListing:
        listing = list_folder(folder)
        if listing.classes != self.classes:
            missing = sorted(set(self.classes) - set(listing.classes))
            foreign = sorted(set(listing.classes) - set(self.classes))
            parts = [f"missing: {', '.join(missing[:8])}" if missing else "", f"unknown: {', '.join(foreign[:8])}"]
            difference = "; ".join(part for part in parts[: 2 if foreign else 1] if part)
            raise DataError(
                f"{folder} does not have the {len(self.classes)} classes of {self.name} ({difference}). Complete it, "
                "or use the dataset image_folder for other classes."
            )
        if len(listing) != self.num_samples[self.split]:
            NOTICES.warning("%s has %d images instead of %d.", folder, len(listing), self.num_samples[self.split])
        return listing

    def _archive_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file, _ in self.files[self.split]:
            path = self.archive / file
            try:
                status = path.stat()
            except FileNotFoundError:
                raise DataError(
                    f"{path} is missing. Remove the folder {self.archive} to have {self.name} downloaded again, or "
                    "put back the file from the original archive."
                ) from None
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _decode_archive(self) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for file, expected_md5 in self.files[self.split]:
            path = self.archive / file
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if md5 != expected_md5:
                raise DataError(
                    f"{path} is damaged: its MD5 is {md5}, expected {expected_md5}. Remove the folder {self.archive} "
                    f"to download {self.name} again."
                )
            try:
                entry = load_pickle(path)
                images.append(np.asarray(entry["data"], np.uint8).reshape(-1, *self.shape))
                labels.append(np.asarray(entry[self.label_key], np.int64).reshape(-1))
                if len(images[-1]) != len(labels[-1]):
                    raise ValueError(f"{len(images[-1])} images but {len(labels[-1])} labels")
            except (pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} does not contain the images of {self.name}: {error}") from None
        return _sort_samples(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))

    def _decode_folders(self) -> tuple[Tensor, Tensor]:
        listing = self.listing
        assert listing is not None

        def check_size(image: Image.Image, path: Path) -> Image.Image:
            if image.size != (32, 32):
                raise DataError(f"{path} is {image.width}x{image.height} pixels; images of {self.name} are 32x32")
            return image

        return _sort_samples(decode_images(listing, check_size, 32), torch.tensor(listing.labels))

    def _download(self) -> None:
        """Downloads and unpacks the archive with torchvision, which shows a progress bar and verifies the checksum."""
        import torchvision.datasets
        from torchvision.datasets.utils import download_and_extract_archive

        official = getattr(torchvision.datasets, self.name.upper())
        with file_lock(self.data_root / ".kdbench" / f"{self.name}-download.lock", optional=True):
            if self.archive.is_dir():  # another process downloaded it while this one waited
                return
            try:
                download_and_extract_archive(
                    official.url, str(self.data_root), filename=official.filename, md5=official.tgz_md5
                )
            except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
                raise DataError(
                    f"{self.name} is not under {self.data_root}/ and cannot be downloaded from {official.url} "
                    f"({error}). Copy torchvision's folder {self.archive_folder}/ (the unpacked archive) or class "
                    f"folders {self.name}/{{train,test}}/<class>/*.png there, or set data_root=DIR."
                ) from None


def _sort_samples(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts samples by class, then by pixels, so that their order is the same for all file layouts."""
    pixels = [image.tobytes() for image in images.numpy()]
    classes = labels.tolist()
    order = torch.tensor(sorted(range(len(pixels)), key=lambda n: (classes[n], pixels[n])))
    return images[order].contiguous(), labels[order].contiguous()


@DATASETS.register(
    "cifar10",
    version=1,
    injected=("split", "data_root"),
    shape=(3, 32, 32),
    classes=10,
    samples={"train": 50000, "test": 10000},
)
class Cifar10(_Cifar):
    """CIFAR-10: 50000 training and 10000 test images, 3x32x32, in 10 classes (Krizhevsky 2009).

    The images are read from torchvision's folder `cifar-10-batches-py/` under `data_root`, or from class folders
    `cifar10/{train,test}/<class>/*.png`. If both are missing, they are downloaded. They are decoded once and cached
    in one file. The samples are sorted by class and pixels, so that their indices are the same for both layouts.

    Args:
        normalize: whether images are normalised; false: values stay in [0, 1].
    """

    name = "cifar10"
    archive_folder = "cifar-10-batches-py"
    label_key = "labels"
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    files: ClassVar = {
        "train": (
            ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        "test": (("test_batch", "40351d587109b95175f43aff81a1287e"),),
    }


@DATASETS.register(
    "cifar100",
    version=1,
    injected=("split", "data_root"),
    shape=(3, 32, 32),
    classes=100,
    samples={"train": 50000, "test": 10000},
)
class Cifar100(_Cifar):
    """CIFAR-100: 50000 training and 10000 test images, 3x32x32, in 100 classes (Krizhevsky 2009).

    The images are read from torchvision's folder `cifar-100-python/` under `data_root`, or from class folders
    `cifar100/{train,test}/<class>/*.png`. If both are missing, they are downloaded. They are decoded once and cached
    in one file. The samples are sorted by class and pixels, so that their indices are the same for both layouts.

    Args:
        normalize: whether images are normalised; false: values stay in [0, 1].
    """

    name = "cifar100"
    archive_folder = "cifar-100-python"
    label_key = "fine_labels"
    names = (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    )
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
    files: ClassVar = {
        "train": (("train", "16019d7e3df5f24257cddd939b257f8d"),),
        "test": (("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
    }
