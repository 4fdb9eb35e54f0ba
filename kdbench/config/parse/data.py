"""Reads the sources of a stage: `dataset` with its options, and the entries of `data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.parts import read_part
from kdbench.config.parse.subsets import read_artifact_reference, read_label_fraction, read_subset
from kdbench.config.parse.views import read_views
from kdbench.config.schema import PartConfig, SourceConfig, declared_keys
from kdbench.errors import Location
from kdbench.registry import DATASETS, RELABELS

DATASET_INJECTED = ("split", "data_root", "file")


_EVALUATION_SOURCES = ("eval", "validation", "test")


_TRAIN_OPTIONS = ("augment", "label_fraction", "relabel")
"""Keys of the top level that apply to the source `train`. `dataset` and `batch_size` apply to every source."""


_LOCATED_OPTIONS = ("batch_size", "label_fraction", "subset", "relabel")
"""Keys whose locations a source keeps, for messages of the data package."""


def is_evaluation(name: str) -> bool:
    """Returns whether a source is only evaluated: `eval`, or `eval_old` and the like."""
    return name in _EVALUATION_SOURCES or name.startswith("eval_")


def read_sources(
    context: ParseContext, top: KeyReader, eval_batch_size: int, artifact_names: Mapping[str, str] | None = None
) -> dict[str, SourceConfig]:
    """Reads every source. `dataset: NAME` alone defines `train` (split train) and `eval` (split test).

    Args:
        top: reader of the stage's keys.
        eval_batch_size: batch size of evaluation sources.
        artifact_names: `STAGE.NAME` as this stage may write it (`query.labels`) -> in full (`query@2.labels`).
    """
    data = top.read_mapping("data", "extra: {dataset: NAME}")
    entries: dict[str, Any] = {"train": {}, "eval": {}} if top.has("dataset") else {}
    for name, value in data.items():
        if value is None:
            entries.pop(name, None)
        else:
            entries[name] = value
    if not entries:
        context.error("", "the recipe has no data; write `dataset: NAME`, one of `kdbench list datasets`.")
    sources = {}
    for name, value in entries.items():
        key = top.subkey(f"data.{name}") if name in data else top.subkey("dataset")
        reader = _SourceReader(context, name, key, top, eval_batch_size, artifact_names or {}, name in data)
        source = reader.read(value)
        if source is not None:
            sources[name] = source
    if entries and "eval" not in entries:
        example = "`eval: {dataset: NAME, split: test}`"
        context.error("data", f"there is no source `eval` for the evaluation; write {example} in `data:`.")
    return sources


@dataclass(frozen=True)
class _SourceReader:
    """Reads one source.

    Attributes:
        key: the location of the source: its entry of `data`, or `dataset`.
        top: reader of the stage's keys, whose options apply where the source has none.
        is_written: whether `data` has an entry for the source.
    """

    context: ParseContext
    name: str
    key: str
    top: KeyReader
    eval_batch_size: int
    artifact_names: Mapping[str, str]
    is_written: bool

    def read(self, value: Any) -> SourceConfig | None:
        """Reads the entry of `data`; returns None after an error in the dataset."""
        if isinstance(value, str):
            value = {"dataset": value}
        # `type: NAME` in place of `dataset: NAME` has the dataset's parameters as keys beside it.
        has_type = isinstance(value, Mapping) and value.get("type") is not None
        keys = declared_keys(SourceConfig)
        reader = KeyReader(self.context, value, self.key, f"source {self.name!r}", keys, parameters=has_type)
        artifact: str | None = None
        if reader.has("artifact"):
            artifact = read_artifact_reference(reader, self.artifact_names)
            initial = reader.get_raw("initial")
            if artifact is None and initial is not None:
                return self.read(_with_initial(reader, initial))
        dataset = self._read_dataset(reader)
        is_eval = is_evaluation(self.name)
        default_batch_size = self.eval_batch_size if is_eval else self.top.read("batch_size")
        batch_size = reader.read("batch_size", default_batch_size)
        fields = {
            "name": self.name,
            "split": reader.read("split", "test" if is_eval else "train"),
            "batch_size": batch_size,
            "artifact": artifact,
            "overlap": self._read_overlap(reader, batch_size),
            "subset": read_subset(reader, self.artifact_names),
            **self._read_train_options(reader),
            "location": self.context.location(self.key if self.is_written else self.top.subkey("dataset")),
            "locations": self._option_locations(reader),
        }
        return None if dataset is None else SourceConfig(dataset=dataset, **fields)

    def _read_train_options(self, reader: KeyReader) -> dict[str, Any]:
        """Reads the options that `train` takes from the top level if the source itself does not have them."""
        fields: dict[str, Any] = {}
        for name in _TRAIN_OPTIONS:
            holder = self.top if self.name == "train" and not reader.has(name) else reader
            if not holder.has(name):
                continue
            if name == "augment":
                fields["views"] = read_views(holder)
            elif name == "label_fraction":
                fields[name] = read_label_fraction(holder, self.artifact_names)
            else:
                fields[name] = read_part(self.context, RELABELS, holder.get_raw(name), holder.subkey(name))
        return fields

    def _read_dataset(self, reader: KeyReader) -> PartConfig | None:
        if reader.has("artifact"):
            for name in ("dataset", "type", "split"):
                if reader.has(name):
                    reason = (
                        "an artifact has no splits"
                        if name == "split"
                        else "`artifact:` and `dataset:` exclude each other"
                    )
                    reader.error(name, f"{reason}; remove it, or write `{name}: null` if a layer below sets it.")
            return PartConfig(type="artifact", location=reader.location("artifact"))
        if reader.has("type"):
            if reader.has("dataset"):
                reader.error("dataset", "write `dataset:`, or `type:` with parameters beside it, not both.")
            reserved = tuple(name for name in reader.keys if name != "type")
            dataset = read_part(self.context, DATASETS, reader.data, self.key, DATASET_INJECTED, reserved)
        elif reader.has("dataset") or self.top.has("dataset"):
            holder = reader if reader.has("dataset") else self.top
            value, key = holder.get_raw("dataset"), holder.subkey("dataset")
            dataset = read_part(self.context, DATASETS, value, key, DATASET_INJECTED)
        else:
            reader.error("", f"source {self.name!r} needs a `dataset`, one of `kdbench list datasets`.")
            return None
        if dataset is not None and dataset.type == "artifact":
            message = "an artifact is written `{artifact: STAGE.NAME}`, without a dataset."
            reader.error("", f"source {self.name!r}: {message}")
        return dataset

    def _read_overlap(self, reader: KeyReader, batch_size: int) -> bool:
        overlap = reader.read("overlap")
        if overlap and is_evaluation(self.name):
            reader.error("overlap", "belongs to a source for training.")
        elif overlap and batch_size % 2:
            reason = "half of each batch is repeated from the previous one"
            reader.error("overlap", f"{reason}, so batch_size must be even, not {batch_size}.")
        return overlap

    def _option_locations(self, reader: KeyReader) -> dict[str, Location]:
        locations = {}
        for name in _LOCATED_OPTIONS:
            if reader.has(name):
                locations[name] = reader.location(name)
            elif name in self.context.locations:
                locations[name] = self.context.location(name)
        if self.name == "train" and "validation" in self.context.locations:
            locations["validation"] = self.context.location("validation")
        return locations


def _with_initial(reader: KeyReader, initial: Any) -> dict[str, Any]:
    """Returns the source while no stage has produced its artifact: `initial` merged over the other keys."""
    data = {name: value for name, value in reader.data.items() if name not in ("artifact", "initial")}
    if isinstance(initial, str):
        initial = {"dataset": initial}
    if not isinstance(initial, Mapping):
        reader.error("initial", f"must be a dataset, or a mapping with the keys of a source, got {initial!r}.")
        initial = {}
    return {**data, **initial}
