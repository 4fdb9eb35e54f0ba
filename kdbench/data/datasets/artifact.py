"""Datasets and subsets that an earlier stage built (artifacts)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdbench.data.datasets.base import Dataset, PackedSplit, content_checksum
from kdbench.data.source_spec import FieldSpec, SourceSpec
from kdbench.errors import DataError
from kdbench.registry import ARTIFACTS, DATASETS

ArtifactFiles: TypeAlias = Mapping[str, Path]
"""`STAGE.NAME` -> file of the artifact NAME that the stage STAGE built."""


RESERVED_FIELDS = ("image", "label", "index", "valid", "label_true", "label_other", "mix")
"""Batch fields that a source computes. An artifact cannot store fields of these names."""


_MISSING = "the artifact does not exist yet"


@DATASETS.register("artifact", version=1, injected=("split", "data_root", "file"))
class ArtifactDataset(Dataset):
    """Dataset that an earlier stage built as an artifact. A recipe names it as `{artifact: STAGE.NAME}`.

    Images are used as they were stored. (FKD and FerKD therefore store cropped images with their soft labels.) A file
    without mean and standard deviation contains normalised images. Other stored values of each sample (`soft`,
    `weight`, ...) become fields of the batch. The label of a sample is hidden if its stored value `labelled` is
    false.
    """

    splits = ("train", "val", "test")

    def __init__(self, split: str = "train", data_root: str = "data", file: str | None = None) -> None:
        self.split = split
        self.file = file
        self._content: Mapping[str, Any] | None = None
        if file is None:
            self.problem = _MISSING
            return
        content = self._content = _read_dataset(file)
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
            raise DataError(_MISSING)
        # The tensors are cloned because they are memory-mapped, and a later round may replace the file.
        images, labels = self._content["images"].clone(), self._content["labels"].clone()
        fields = {name: value.clone() for name, value in self.extra.items()}
        return PackedSplit(images, labels, self._digest(images, labels, fields), fields)

    def checksum(self) -> str:
        """Returns a digest of the artifact's content, or an empty string if the artifact does not exist yet."""
        return "" if self._content is None else self.load().checksum

    def _digest(self, images: Tensor, labels: Tensor, fields: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(content_checksum(self.classes, images, labels).encode())
        for name in sorted(fields):
            digest.update(f"{name} {list(fields[name].shape)} {fields[name].dtype}".encode())
            digest.update(fields[name].contiguous().numpy().data)
        return digest.hexdigest()


def read_subset(file: Path | str, population: int) -> Tensor:
    """Reads a subset that an earlier stage built. Returns the indices of its samples, int64, sorted.

    Args:
        file: file of the artifact.
        population: number of samples in the split from which the subset selects.

    Raises:
        DataError: the file does not contain a subset, or an index is outside the split.
    """
    content = _read(file)
    index = content.get("index")
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        raise DataError(f"{file} contains {_kind(content)}, expected a subset")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= population):
        raise DataError(
            f"{file} selects samples with an index of at least {population}, the size of this split. Was it built from "
            "another dataset?"
        )
    return index.unique()


def expected_spec(artifact_type: str, source: SourceSpec | None, evaluation: SourceSpec) -> SourceSpec:
    """Returns the expected fields and classes of a dataset that a stage will build as an artifact.

    Args:
        artifact_type: name of the artifact builder. Its registration lists in `fields` the values that it stores for
            each sample in addition to image and label. The list contains names of scalars (`soft` has shape
            (classes,)), or maps names to shapes.
        source: description of the source from which the artifact is built.
        evaluation: description of the evaluation source. Its images are assumed if `source` has no images.
    """
    image_spec = source if source is not None and "image" in source.fields else evaluation
    classes = image_spec.classes if image_spec.classes is not None else evaluation.classes
    declared = ARTIFACTS.entry(artifact_type).facts.get("fields", ())
    shapes = dict(declared) if isinstance(declared, Mapping) else {name: None for name in declared}
    fields: dict[str, FieldSpec] = {"image": image_spec.fields["image"]} if "image" in image_spec.fields else {}
    for name, shape in shapes.items():
        default = (classes or 1,) if name == "soft" else ()
        fields[name] = (default if shape is None else tuple(shape), "bool" if name == "labelled" else "float32")
    return SourceSpec(fields, classes)


def _read_dataset(file: str) -> Mapping[str, Any]:
    """Reads the file of a dataset that an earlier stage built, and checks its content."""
    content = _read(file)
    images, labels = content.get("images"), content.get("labels")
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DataError(f"{file} contains {_kind(content)}, expected a dataset")
    if not isinstance(content.get("classes"), list | tuple):
        raise DataError(f"{file} is damaged: a dataset needs an entry 'classes' of type list")
    fields: Mapping[str, Tensor] = content.get("fields", {})
    mismatched = [name for name, value in {"labels": labels, **fields}.items() if len(value) != len(images)]
    if mismatched:
        raise DataError(f"{file} has {len(images)} images but a different number of values in {', '.join(mismatched)}")
    reserved = [name for name in fields if name in RESERVED_FIELDS]
    if reserved:
        raise DataError(f"{file} stores the field {', '.join(reserved)}, which the source computes itself; rename it")
    return content


def _read(file: Path | str) -> Mapping[str, Any]:
    """Reads an artifact file and returns its content as a mapping. The tensors are memory-mapped."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; start the run again with fresh=true") from None
    except Exception as error:  # a damaged archive raises any type
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{file} contains an object of type {type(content).__name__}, expected an artifact")
    return content


def _kind(content: Mapping[str, Any]) -> str:
    """Returns the kind of an artifact, such as "a subset", which it derives from the keys of the content."""
    kinds = {"images": "a dataset", "index": "a subset", "value": "a tensor", "params": "a model"}
    return next((kind for key, kind in kinds.items() if key in content), "an unknown kind of artifact")
