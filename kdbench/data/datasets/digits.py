"""The handwritten digits of scikit-learn: real data without a download."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from kdbench.data.datasets.base import Dataset, PackedSplit, pack
from kdbench.errors import DataError
from kdbench.registry import DATASETS


@DATASETS.register(
    "digits",
    version=1,
    injected=("split", "data_root"),
    shape=(1, 8, 8),
    classes=10,
    samples={"train": 901, "test": 896},
)
class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits, 1x8x8, ten classes (the test set of UCI's optical digits, ID 80).

    The values 0 to 16 are divided by 16 (float32). Half of the images of every class are the split `test` (896
    images). The other images are the split `train` (901). The division does not depend on a seed: the images of a
    class are sorted by a hash of their number, and the first half is `test`.

    Args:
        normalize: whether images are normalised; false: values stay in [0, 1].
    """

    def __init__(self, normalize: bool = True, split: str = "train", data_root: str = "data") -> None:
        self.check_split(split)
        self.split = split
        self.normalize = normalize
        self.classes = [str(digit) for digit in range(10)]
        self.shape = (1, 8, 8)
        self.mean = (0.3053,)  # of the 1797 images
        self.std = (0.3760,)

    def __len__(self) -> int:
        return {"train": 901, "test": 896}[self.split]

    def load(self) -> PackedSplit:
        values, labels = _read_arrays()
        rows = np.array(sorted(row for group in _class_halves(labels, self.split) for row in group))
        images = torch.from_numpy(values[rows].astype(np.float32) / 16).view(-1, *self.shape)
        return pack(self.classes, images, torch.from_numpy(labels[rows].astype(np.int64)))


@cache
def _read_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Reads all images, int64 (1797, 64), and all labels, int64 (1797,). The result is cached in memory.

    The CSV file (64 pixels and the label in each line) is read from scikit-learn's folder. scikit-learn is not
    imported, because its import takes longer than the training of a small student.
    """
    file = _csv_file()
    try:
        text = gzip.decompress(file.read_bytes()).decode()
        table = np.array([line.split(",") for line in text.split()], dtype=np.int64)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"digits: {file} cannot be read ({error}); reinstall scikit-learn.") from None
    if table.shape != (1797, 65):
        raise DataError(f"digits: {file} has a table of shape {table.shape}, expected (1797, 65).")
    return table[:, :-1], table[:, -1]


def _csv_file() -> Path:
    """Returns the path of the CSV file of the digits in scikit-learn's folder."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("digits: they are part of scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _class_halves(labels: np.ndarray, split: str) -> list[list[int]]:
    """Returns one list per class: the row numbers of the class's images in the split, "train" or "test"."""
    groups = []
    for digit in range(10):
        members = np.flatnonzero(labels == digit).tolist()
        members.sort(key=lambda number: hashlib.sha256(f"kdbench digits {number}".encode()).digest())
        half = len(members) // 2
        groups.append(members[:half] if split == "test" else members[half:])
    return groups
