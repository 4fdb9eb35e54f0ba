"""Class folders of one's own images, and ImageNet in the same layout."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kdbench.data.datasets.base import Dataset, PackedSplit
from kdbench.data.datasets.image_files import class_folder_names, decode_images, list_folder, resize_and_crop
from kdbench.data.loading.decode import READERS, ImageReader
from kdbench.data.loading.packed_cache import PackedCache
from kdbench.errors import ConfigError, DataError, suggest
from kdbench.registry import DATASETS

RESIDENT_LIMIT = 2 * 2**30
"""Bytes of decoded images up to which a folder is held in memory unless the recipe says otherwise."""


FOLDERS = {"train": ("train",), "test": ("test", "val"), "val": ("val",)}
"""Split -> the folders that may hold it, the first one that exists."""


IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


@DATASETS.register("image_folder", version=1, injected=("split", "data_root"), shape=(3, "size", "size"))
class ImageFolder(Dataset):
    """Images in class folders: ROOT/{train,test}/<class>/*.png (or jpg, ...); `val` serves where there is no `test`.

    The shorter side is resized to `size` (bilinear, antialiased) and the central square is cut out. The classes are the
    folders' names, sorted, and must be the same in all splits. Up to 2 GiB of decoded images are kept in memory and in
    a cache under `data_root`; more are read in every epoch.

    Args:
        root: the folder, absolute, or relative to `data_root` or to the folder where the command runs.
        size: height and width of the images.
        resident: true holds the images in memory, false reads them in every epoch, null decides by their size.
        mean: per channel, of images in [0, 1]; null takes ImageNet's, which torchvision's weights expect.
        std: likewise.
        normalize: false leaves the values in [0, 1].
        decode: null decodes, crops and resizes with PIL; `torchvision` decodes JPEGs with torchvision (on CUDA, with
            nvJPEG, on the GPU), then crops and resizes whole batches on the device, and implies `resident: false`.
    """

    splits = ("train", "val", "test")

    def __init__(
        self,
        root: str,
        size: int = 224,
        resident: bool | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        normalize: bool = True,
        decode: str | None = None,
        split: str = "train",
        data_root: str = "data",
    ) -> None:
        self.check_split(split)
        self.decode = _decode("image_folder", decode)
        if decode is not None and resident:
            raise ConfigError(
                "image_folder: decode says how files are read in every epoch; resident: true reads them once"
            )
        if size < 1:
            raise ConfigError(f"image_folder: size must be at least 1, got {size}")
        for name, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != 3:
                raise ConfigError(f"image_folder: {name} needs three numbers (red, green, blue), got {value}")
        if std is not None and min(std) <= 0:
            raise ConfigError(f"image_folder: std must be above 0, got {std}")
        self._open(_find(root, data_root), split, data_root)
        self.resize = self.size = size
        self.shape = (3, size, size)
        self.mean, self.std, self.normalize = tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD), normalize
        fits = len(self.listing) * 3 * size * size <= RESIDENT_LIMIT and decode is None
        self.resident = fits if resident is None else resident

    def _open(self, root: Path, split: str, data_root: str) -> None:
        self.root, self.split, self.data_root = root, split, Path(data_root)
        folder = split_folder(root, split)
        self.listing = list_folder(folder)
        self.classes = self.listing.classes
        for other in ("train", "test"):
            _same_classes(folder, self.classes, root, other)

    def __len__(self) -> int:
        return len(self.listing)

    def labels(self) -> Tensor:
        return torch.tensor(self.listing.labels)

    def reader(self) -> ImageReader:
        return READERS[self.decode](self.listing, self.resize, self.size)

    def checksum(self) -> str:
        """Returns the digest of the pixels, or, of images that are not held in memory, of names and file sizes."""
        if not self.resident:
            return self.listing.fingerprint(times=False)
        return self._cache().checksum() or self.load().checksum

    def load(self) -> PackedSplit:
        return self._cache().load(self._decode)

    def _cache(self) -> PackedCache:
        identity = [str(self.listing.folder.resolve()), self.size]
        name = f"{self.root.resolve().name}-{self.split}"
        return PackedCache(self.data_root / ".kdbench", name, identity, self.listing.fingerprint(), self.classes)

    def _decode(self) -> tuple[Tensor, Tensor]:
        def square(image: Image.Image, _: Path) -> Image.Image:
            return resize_and_crop(image, self.resize, self.size)

        return decode_images(self.listing, square, self.size), self.labels()


@DATASETS.register(
    "imagenet",
    version=1,
    injected=("split", "data_root"),
    shape=(3, "size", "size"),
    classes=1000,
    samples={"train": 1281167, "val": 50000, "test": 50000},
)
class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012) in torchvision's ImageFolder layout: imagenet/{train,val}/<wnid>/*.JPEG.

    Too large for memory: the images are decoded in every epoch by `workers` processes. The view `random_resized_crop`
    reads a random part; without it, and in evaluation, the shorter side is resized to `resize` and the centre cut out.
    Not downloaded: its licence has to be accepted at https://image-net.org.

    Args:
        root: the folder, absolute, or relative to `data_root` or to the folder where the command runs.
        size: height and width of the images.
        resize: of the shorter side, before the centre is cut out.
        normalize: false leaves the values in [0, 1].
        decode: as of `image_folder`.
    """

    resident = False

    def __init__(
        self,
        root: str = "imagenet",
        size: int = 224,
        resize: int = 256,
        normalize: bool = True,
        decode: str | None = None,
        split: str = "train",
        data_root: str = "data",
    ) -> None:
        self.check_split(split)
        self.decode = _decode("imagenet", decode)
        if not 1 <= size <= resize:
            raise ConfigError(f"imagenet: 1 <= size <= resize must hold, got size {size} and resize {resize}")
        self._open(_find(root, data_root), split, data_root)
        self.resize, self.size = resize, size
        self.shape = (3, size, size)
        self.mean, self.std, self.normalize = IMAGENET_MEAN, IMAGENET_STD, normalize


def _decode(dataset: str, decode: str | None) -> str:
    if decode is not None and decode not in READERS:
        raise ConfigError(
            f"{dataset}: decode must be null or a way to read files, got {decode!r}.{suggest(decode, READERS)}"
        )
    return decode or "pil"


def _find(root: str, data_root: str) -> Path:
    given = Path(root).expanduser()
    places = [given] if given.is_absolute() else [Path(data_root) / given, given]
    for place in places:
        if place.is_dir():
            return place
    tried = " or ".join(str(place.absolute()) for place in places)
    raise DataError(
        f"no folder {tried}. Class folders are expected in it: {root}/train/<class>/*.png and "
        f"{root}/test/<class>/*.png (or val)."
    )


def split_folder(root: Path, split: str) -> Path:
    """Returns the folder that holds the split.

    Raises:
        DataError: there is none; the message says what lies there instead.
    """
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    there = class_folder_names(root)
    found = f"there are {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}" if there else "there are no folders"
    raise DataError(f"{root} has no folder {' or '.join(FOLDERS[split])} for the split {split!r}; {found}.")


def _same_classes(folder: Path, classes: list[str], root: Path, split: str) -> None:
    other = next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)
    if other is None or other == folder:
        return
    there = set(class_folder_names(other))
    only_here, only_there = sorted(set(classes) - there), sorted(there - set(classes))
    if only_here or only_there:
        parts = [
            f"only in {place}: {', '.join(names[:5])}"
            for place, names in ((folder, only_here), (other, only_there))
            if names
        ]
        raise DataError(f"the splits have different classes; {'; '.join(parts)}. Labels would not mean the same.")
