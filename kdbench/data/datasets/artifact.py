"""What an earlier stage made: a dataset like any other, or a choice among the samples of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.data.datasets.base import Dataset, PackedSplit, content_checksum
from kdbench.data.source_spec import SourceSpec
from kdbench.errors import DataError
from kdbench.registry import ARTIFACTS, DATASETS

RESERVED_FIELDS = ("image", "label", "index", "valid", "label_true", "label_other", "mix")
"""Fields of a batch that the source itself gives; a made dataset cannot bring its own."""


@DATASETS.register("artifact", version=1, injected=("split", "data_root", "file"))
class ArtifactDataset(Dataset):
    """The dataset that an earlier stage made; a recipe writes it as `{artifact: STAGE.NAME}`.

    Its images are as the maker stored them: normalised already where the file has no mean and deviation. So a method
    that stores crops with their soft labels (FKD, FerKD) stores the cropped images, and no crop is replayed. Whatever
    else the maker stored for each sample (`soft`, `weight`, ...) becomes a field of the batch; where `labelled` is
    false the label is hidden.
    """

    splits = ("train", "val", "test")

    def __init__(self, split: str = "train", data_root: str = "data", file: str | None = None) -> None:
        self.split = split
        self.file = file
        self._content: Mapping[str, Any] | None = None
        if file is None:
            self.problem = "it has not been made yet"
            return
        content = self._content = _dataset(file)
        images = content["images"]
        self.classes = list(content["classes"])
        self.shape = tuple(images.shape[1:])
        self.normalize = content.get("mean") is not None
        if self.normalize:
            self.mean = tuple(float(value) for value in content["mean"])
            self.std = tuple(float(value) for value in content["std"])
        self.extra: Mapping[str, Tensor] = content.get("fields", {})

    def __len__(self) -> int:
        return 0 if self._content is None else len(self._content["images"])

    def load(self) -> PackedSplit:
        if self._content is None:
            raise DataError("it has not been made yet")
        # A copy of each: they were mapped into memory, and the file may be replaced by a later round.
        images, labels = self._content["images"].clone(), self._content["labels"].clone()
        fields = {name: value.clone() for name, value in self.extra.items()}
        return PackedSplit(images, labels, self._digest(images, labels, fields), fields)

    def checksum(self) -> str:
        """Empty before it is made: what it holds follows from the recipe and the other datasets."""
        return "" if self._content is None else self.load().checksum

    def _digest(self, images: Tensor, labels: Tensor, fields: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(content_checksum(self.classes, images, labels).encode())
        for name in sorted(fields):
            digest.update(f"{name} {list(fields[name].shape)} {fields[name].dtype}".encode())
            digest.update(fields[name].contiguous().numpy().data)
        return digest.hexdigest()


def read_subset(file: Path | str, population: int) -> Tensor:
    """Returns the positions that an earlier stage chose, int64, sorted.

    Args:
        population: samples of the split that the choice is to be among.

    Raises:
        DataError: the file holds something else, or positions beyond the split.
    """
    content = _read(file)
    index = content.get("index")
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        raise DataError(f"{file} holds {_kind(content)}, not a choice of samples")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= population):
        raise DataError(f"{file} chooses among more than the {population} samples of this split: of another dataset?")
    return index.unique()


def expected_spec(artifact_type: str, source: SourceSpec | None, images: SourceSpec) -> SourceSpec:
    """Returns what a dataset will give that has not been made yet.

    Args:
        maker: of MAKERS; its fact `fields` names what it stores for each sample besides image and label. `soft` has the
            shape (classes,), all others (); a mapping of names to shapes says otherwise.
        source: what the maker runs over.
        images: stands in where that has no images: the evaluation source.
    """
    like = source if source is not None and "image" in source.fields else images
    classes = like.classes if like.classes is not None else images.classes
    declared = ARTIFACTS.entry(artifact_type).facts.get("fields", ())
    shapes = dict(declared) if isinstance(declared, Mapping) else {name: None for name in declared}
    fields = {"image": like.fields["image"]} if "image" in like.fields else {}
    for name, shape in shapes.items():
        default = (classes or 1,) if name == "soft" else ()
        fields[name] = (default if shape is None else tuple(shape), "bool" if name == "labelled" else "float32")
    return SourceSpec(fields, classes)


def _dataset(file: str) -> Mapping[str, Any]:
    content = _read(file)
    images, labels = content.get("images"), content.get("labels")
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DataError(f"{file} holds {_kind(content)}, not a dataset")
    fields: Mapping[str, Tensor] = content.get("fields", {})
    wrong = [name for name, value in {"labels": labels, **fields}.items() if len(value) != len(images)]
    if wrong:
        raise DataError(f"{file} has {len(images)} images but another number of {', '.join(wrong)}")
    taken = [name for name in fields if name in RESERVED_FIELDS]
    if taken:
        raise DataError(f"{file}: {', '.join(taken)} cannot be stored for each sample; the source gives it itself")
    return content


def _read(file: Path | str) -> Mapping[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise DataError(f"{file} is gone; begin the run anew with fresh=true") from None
    except Exception as error:  # a damaged archive fails in any way
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{file} holds {type(content).__name__}, not what a stage makes")
    return content


def _kind(content: Mapping[str, Any]) -> str:
    kinds = {"images": "a dataset", "index": "a choice of samples", "value": "a tensor", "params": "a model"}
    return next((words for key, words in kinds.items() if key in content), "something else")
