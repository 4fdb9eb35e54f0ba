"""The datasets `image_folder` (images in class folders) and `imagenet` (the same layout)."""

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
"""Maximum size, in bytes of decoded images, of a folder that is held in memory by default."""


FOLDERS = {"train": ("train",), "test": ("test", "val"), "val": ("val",)}
"""Split -> possible names of its folder. The first folder that exists is used."""


IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


@DATASETS.register("image_folder", version=1, injected=("split", "data_root"), shape=(3, "size", "size"))
class ImageFolder(Dataset):
    """Images in class folders: ROOT/{train,test}/<class>/*.png (or jpg, ...). `val` is used if `test` is missing.

    The shorter side is resized to `size` (bilinear, antialiased), and the central square is cropped. The classes are
    the sorted names of the folders, which must be equal in all splits. If the decoded images have at most 2 GiB, they
    are held in memory and cached in a file under `data_root`. A larger dataset is decoded in every epoch.

    Args:
        root: path of the folder: absolute, or relative to `data_root` or to the working directory.
        size: height and width of the images.
        resident: true: images are held in memory. false: images are decoded in every epoch. null: images are held in
            memory up to 2 GiB.
        mean: mean per channel of images in [0, 1]; null: ImageNet's mean, which pretrained models of torchvision
            expect.
        std: standard deviation per channel; null: ImageNet's standard deviation.
        normalize: whether images are normalised; false: values stay in [0, 1].
        decode: null: images are decoded, cropped and resized with PIL. `torchvision`: JPEGs are decoded with
            torchvision (on the GPU with nvJPEG), batches are cropped and resized on the device, and images are
            decoded in every epoch.
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
        self.decode = _check_decoder("image_folder", decode)
        if decode is not None and resident:
            raise ConfigError(
                "image_folder: `decode` applies to files that are decoded in every epoch, but `resident: true` "
                "decodes them once; remove one of them"
            )
        if size < 1:
            raise ConfigError(f"image_folder: size must be at least 1, got {size}")
        for name, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != 3:
                raise ConfigError(f"image_folder: {name} needs three numbers (red, green, blue), got {value}")
        if std is not None and min(std) <= 0:
            raise ConfigError(f"image_folder: std must be above 0, got {std}")
        self._open(_find_root(root, data_root), split, data_root)
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
        for other_split in ("train", "test"):
            _check_same_classes(folder, self.classes, root, other_split)

    def __len__(self) -> int:
        return len(self.listing)

    def labels(self) -> Tensor:
        return torch.tensor(self.listing.labels)

    def reader(self) -> ImageReader:
        return READERS[self.decode](self.listing, self.resize, self.size)

    def checksum(self) -> str:
        """Returns a digest of the pixels if the dataset is held in memory, otherwise of file names and sizes."""
        if not self.resident:
            return self.listing.fingerprint(times=False)
        return self._cache().checksum() or self.load().checksum

    def load(self) -> PackedSplit:
        return self._cache().load(self._decode_images)

    def _cache(self) -> PackedCache:
        identity = [str(self.listing.folder.resolve()), self.size]
        name = f"{self.root.resolve().name}-{self.split}"
        return PackedCache(self.data_root / ".kdbench", name, identity, self.listing.fingerprint(), self.classes)

    def _decode_images(self) -> tuple[Tensor, Tensor]:
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

    The images are too large for memory, so `workers` processes decode them in every epoch. The augmentation
    `random_resized_crop` crops a random part. Without this augmentation, and in evaluation, the shorter side is
    resized to `resize` and the center is cropped. kdbench cannot download the images, because their licence has to be
    accepted at https://image-net.org.

    Args:
        root: path of the folder: absolute, or relative to `data_root` or to the working directory.
        size: height and width of the images.
        resize: length of the shorter side before the center is cropped.
        normalize: whether images are normalised; false: values stay in [0, 1].
        decode: null: images are decoded, cropped and resized with PIL. `torchvision`: JPEGs are decoded with
            torchvision (on the GPU with nvJPEG), and batches are cropped and resized on the device.
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
        self.decode = _check_decoder("imagenet", decode)
        if not 1 <= size <= resize:
            raise ConfigError(f"imagenet: 1 <= size <= resize must hold, got size {size} and resize {resize}")
        self._open(_find_root(root, data_root), split, data_root)
        self.resize, self.size = resize, size
        self.shape = (3, size, size)
        self.mean, self.std, self.normalize = IMAGENET_MEAN, IMAGENET_STD, normalize


def _check_decoder(dataset: str, decode: str | None) -> str:
    if decode is not None and decode not in READERS:
        raise ConfigError(f"{dataset}: decode must be null or a decoder, got {decode!r}.{suggest(decode, READERS)}")
    return decode or "pil"


def _find_root(root: str, data_root: str) -> Path:
    path = Path(root).expanduser()
    candidates = [path] if path.is_absolute() else [Path(data_root) / path, path]
    for folder in candidates:
        if folder.is_dir():
            return folder
    folders = " or ".join(str(folder.absolute()) for folder in candidates)
    raise DataError(
        f"there is no folder {folders}. It should have class folders: {root}/train/<class>/*.png and "
        f"{root}/test/<class>/*.png (or val)."
    )


def split_folder(root: Path, split: str) -> Path:
    """Returns the folder of a split, for example `ROOT/train`.

    Raises:
        DataError: the folder does not exist. The message lists the existing folders.
    """
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    names = class_folder_names(root)
    existing = f"there are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "it has no folders"
    raise DataError(f"{root} has no folder {' or '.join(FOLDERS[split])} for the split {split!r}; {existing}.")


def _check_same_classes(folder: Path, classes: list[str], root: Path, split: str) -> None:
    """Raises DataError if the class folders in `folder` differ from those of the split `split`."""
    other_folder = next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)
    if other_folder is None or other_folder == folder:
        return
    other_classes = set(class_folder_names(other_folder))
    extra, missing = sorted(set(classes) - other_classes), sorted(other_classes - set(classes))
    if extra or missing:
        differences = [
            f"only in {path}: {', '.join(names[:5])}"
            for path, names in ((folder, extra), (other_folder, missing))
            if names
        ]
        raise DataError(
            f"the splits have different classes ({'; '.join(differences)}), so their labels would not agree."
        )
