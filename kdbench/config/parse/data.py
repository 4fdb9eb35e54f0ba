"""Parses the sources of a stage: `dataset` with its options, and the entries of `data` with views and subsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.operands import artifact_hint
from kdbench.config.parse.parts import read_part
from kdbench.config.schema import PartConfig, SourceConfig, declared_keys
from kdbench.config.schema.data import ARTIFACT_REFERENCE_KEYS, VIEW_KEYS
from kdbench.config.schema.keys import FRACTION_OR_COUNT
from kdbench.errors import Location, suggest
from kdbench.registry import AUGMENTATIONS, DATASETS, RELABELS, SUBSETS, type_mismatch

Augmentations = tuple[PartConfig, ...]
SubsetStep = float | int | str | PartConfig

DATASET_INJECTED = ("split", "data_root", "file")


_EVALUATION_SOURCES = ("eval", "validation", "test")


_TRAIN_OPTIONS = ("augment", "label_fraction", "relabel")
"""Keys of the top level that are defaults of the source `train` only."""


_LOCATED_OPTIONS = ("batch_size", "label_fraction", "subset", "relabel")
"""Keys whose locations in the file are stored in the source, for later error messages."""


def is_evaluation(name: str) -> bool:
    """Returns whether a source is for evaluation only. Its name decides: `eval`, `eval_*`, `validation`, `test`."""
    return name in _EVALUATION_SOURCES or name.startswith("eval_")


def read_sources(
    context: ParseContext, top: KeyReader, eval_batch_size: int, artifact_names: Mapping[str, str] | None = None
) -> dict[str, SourceConfig]:
    """Parses all sources. `dataset: NAME` defines the sources `train` (split train) and `eval` (split test).

    Args:
        top: reader of the stage's keys.
        eval_batch_size: batch size of evaluation sources.
        artifact_names: name of an artifact in the recipe, such as `query.labels` -> full name with the round of
            the loop, such as `query@2.labels`.
    """
    data = top.read_mapping("data", "extra: {dataset: NAME}")
    entries: dict[str, Any] = {"train": {}, "eval": {}} if top.has("dataset") else {}
    for name, value in data.items():
        if value is None:
            entries.pop(name, None)
        else:
            entries[name] = value
    if not entries:
        context.error("", "the recipe has no dataset; write `dataset: NAME` with a name of `kdbench list datasets`.")
    sources = {}
    for name, value in entries.items():
        key = top.subkey(f"data.{name}") if name in data else top.subkey("dataset")
        reader = _SourceReader(context, name, key, top, eval_batch_size, artifact_names or {}, name in data)
        source = reader.read(value)
        if source is not None:
            sources[name] = source
        else:
            context.invalid.add(f"source {name}")
    if entries and "eval" not in entries:
        example = "`eval: {dataset: NAME, split: test}`"
        context.error("data", f"the source `eval` for the evaluation is missing; write {example} in `data:`.")
    return sources


@dataclass(frozen=True)
class _SourceReader:
    """Parses one source.

    Attributes:
        key: dotted key of the source: its entry of `data`, or `dataset`.
        top: reader of the stage's keys. `batch_size` and, for `train`, `augment`, `label_fraction` and `relabel` are
            defaults of the source.
        is_written: whether the key `data` has an entry for the source.
    """

    context: ParseContext
    name: str
    key: str
    top: KeyReader
    eval_batch_size: int
    artifact_names: Mapping[str, str]
    is_written: bool

    def read(self, value: Any) -> SourceConfig | None:
        """Returns the parsed source, or None if its dataset has a mistake."""
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
        """Parses `augment`, `label_fraction` and `relabel`. For `train`, the stage's value is the default."""
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
                        else f"`artifact` and `{name}` exclude each other"
                    )
                    fix = f"remove `{name}`, or write `{name}: null` if a group file or the top level sets it"
                    reader.error(name, f"{reason}; {fix}.")
            return PartConfig(type="artifact", location=reader.location("artifact"))
        if reader.has("type"):
            if reader.has("dataset"):
                reader.error("dataset", "`dataset` and `type` exclude each other; keep one of them.")
            reserved = tuple(name for name in reader.keys if name != "type")
            dataset = read_part(self.context, DATASETS, reader.data, self.key, DATASET_INJECTED, reserved)
        elif reader.has("dataset") or self.top.has("dataset"):
            holder = reader if reader.has("dataset") else self.top
            value, key = holder.get_raw("dataset"), holder.subkey("dataset")
            dataset = read_part(self.context, DATASETS, value, key, DATASET_INJECTED)
        else:
            reader.error("", f"source {self.name!r} needs the key `dataset`, a name of `kdbench list datasets`.")
            return None
        if dataset is not None and dataset.type == "artifact":
            message = "write `artifact: STAGE.NAME` in place of the dataset `artifact`."
            reader.error("", f"source {self.name!r}: {message}")
        return dataset

    def _read_overlap(self, reader: KeyReader, batch_size: int) -> bool:
        overlap = reader.read("overlap")
        if overlap and is_evaluation(self.name):
            reader.error("overlap", "`overlap` is not allowed in a source for evaluation.")
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
    """Returns the keys of a source whose artifact does not exist yet: `initial` merged over the other keys."""
    data = {name: value for name, value in reader.data.items() if name not in ("artifact", "initial")}
    if isinstance(initial, str):
        initial = {"dataset": initial}
    if not isinstance(initial, Mapping):
        reader.error("initial", f"must be a dataset, or a mapping with the keys of a source, got {initial!r}.")
        initial = {}
    return {**data, **initial}


def read_views(reader: KeyReader) -> dict[str, Augmentations]:
    """Parses the views of a source and returns view -> augmentations.

    `{from: VIEW, then: [...]}` is converted to a list that begins with `{type: same, view: VIEW}`.
    """
    context, value, key = reader.context, reader.get_raw("augment"), reader.subkey("augment")
    views: dict[str, Augmentations] = {"image": ()}
    if isinstance(value, list):
        views["image"] = _read_augmentations(context, value, key)
    elif isinstance(value, Mapping):
        for view, items in value.items():
            views[view] = () if items is None else _read_view(context, items, f"{key}.{view}")
    else:
        context.error(key, f"must be a list of augmentations, or a mapping of views to lists, got {value!r}.")
    for view in views:
        _check_continuation(context, view, views)
    return views


def _read_view(context: ParseContext, value: Any, key: str) -> Augmentations:
    if isinstance(value, list):
        return _read_augmentations(context, value, key)
    if not isinstance(value, Mapping):
        context.error(key, f"must be a list of augmentations, or {{from: VIEW, then: [...]}}, got {value!r}.")
        return ()
    reader = KeyReader(context, value, key, "a view that continues another view", VIEW_KEYS)
    start = reader.read("from")
    if start is None:
        reader.error("", "the key `from` is missing; write `from: VIEW`, the view that this view continues.")
        return ()
    items = reader.get_raw("then") or []
    if not isinstance(items, list):
        reader.error("then", f"must be a list of augmentations, got {items!r}.")
        items = []
    continuation = PartConfig(type="same", params={"view": start}, location=reader.location("from"))
    return (continuation, *_read_augmentations(context, items, reader.subkey("then")))


def _read_augmentations(context: ParseContext, items: list[Any], key: str) -> Augmentations:
    parts = [read_part(context, AUGMENTATIONS, item, f"{key}.{index}") for index, item in enumerate(items)]
    return tuple(part for part in parts if part is not None)


def _check_continuation(context: ParseContext, view: str, views: Mapping[str, Augmentations]) -> None:
    """Reports a view whose `from` names a missing view or leads back to the view itself."""
    for index, part in enumerate(views[view]):
        if part.type != "same":
            continue
        if index:
            message = "`same` must be the first augmentation of a view; the others are applied to its result."
            context.errors.add(part.location, message)
            return
        chain = [view]
        while (continued := _continued_view(views[chain[-1]])) is not None:
            if continued not in views:
                # A missing view further along the chain is reported for the view that names it.
                if len(chain) == 1:
                    context.errors.add(part.location, f"no view {continued!r}.{suggest(continued, views)}")
                return
            chain.append(continued)
            if continued in chain[:-1]:
                context.errors.add(part.location, f"views continue each other in a cycle: {' -> '.join(chain)}.")
                return


def _continued_view(parts: Augmentations) -> str | None:
    first = parts[0] if parts else None
    return str(first.params.get("view")) if first is not None and first.type == "same" else None


def read_subset(reader: KeyReader, artifact_names: Mapping[str, str]) -> SubsetStep | tuple[SubsetStep, ...] | None:
    """Parses `subset`: a number, `{type: NAME, ...}`, `{artifact: STAGE.NAME, initial: ...}`, or a list of these.

    Args:
        artifact_names: name of an artifact in the recipe, such as `query.labels` -> full name with the round of
            the loop, such as `query@2.labels`.
    """
    return _read_steps(reader.context, reader.get_raw("subset"), reader.subkey("subset"), artifact_names)


def _read_steps(
    context: ParseContext, value: Any, key: str, artifact_names: Mapping[str, str]
) -> SubsetStep | tuple[SubsetStep, ...] | None:
    if not isinstance(value, list):
        return _read_step(context, value, key, artifact_names)
    if not value:
        context.error(key, "the list is empty; remove `subset` to keep all samples.")
    steps: list[SubsetStep] = []
    for index, item in enumerate(value):
        step = _read_step(context, item, f"{key}.{index}", artifact_names)
        steps += step if isinstance(step, tuple) else () if step is None else (step,)
    return tuple(steps) if steps else None


def _read_step(
    context: ParseContext, value: Any, key: str, artifact_names: Mapping[str, str]
) -> SubsetStep | tuple[SubsetStep, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "artifact" in value:
        artifact, initial = _read_artifact_subset(context, value, key, artifact_names)
        return artifact if artifact is not None else _read_steps(context, initial, f"{key}.initial", artifact_names)
    if isinstance(value, Mapping | str):
        return read_part(context, SUBSETS, value, key)
    return _read_amount(
        context, value, key, "a number, {type: SUBSET, ...}, {artifact: STAGE.NAME}, or a list of these"
    )


def read_label_fraction(reader: KeyReader, artifact_names: Mapping[str, str]) -> float | int | str | None:
    """Parses `label_fraction`: a number, or `{artifact: STAGE.NAME, initial: ...}`."""
    key = reader.subkey("label_fraction")
    return _read_label_fraction(reader.context, reader.get_raw("label_fraction"), key, artifact_names)


def _read_label_fraction(
    context: ParseContext, value: Any, key: str, artifact_names: Mapping[str, str]
) -> float | int | str | None:
    forms = "a number or {artifact: STAGE.NAME, initial: NUMBER}"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _read_amount(context, value, key, forms)
    if "artifact" not in value:
        context.error(key, f"must be {forms}, got {value!r}.")
        return None
    artifact, initial = _read_artifact_subset(context, value, key, artifact_names)
    return (
        artifact if artifact is not None else _read_label_fraction(context, initial, f"{key}.initial", artifact_names)
    )


def _read_artifact_subset(
    context: ParseContext, value: Mapping[str, Any], key: str, artifact_names: Mapping[str, str]
) -> tuple[str | None, Any]:
    """Parses `{artifact: STAGE.NAME, initial: ...}`. Returns the artifact's full name and the value of `initial`.

    The full name is None if no earlier stage produces the artifact.
    """
    reader = KeyReader(context, value, key, "an artifact reference", ARTIFACT_REFERENCE_KEYS)
    return read_artifact_reference(reader, artifact_names), reader.get_raw("initial")


def read_artifact_reference(reader: KeyReader, artifact_names: Mapping[str, str]) -> str | None:
    """Parses `artifact: STAGE.NAME` and returns the full name, or None if no earlier stage produces the artifact."""
    name = reader.get_raw("artifact")
    if not isinstance(name, str) or "." not in name:
        reader.error("artifact", f"must be STAGE.NAME, the name of an earlier stage's artifact, got {name!r}.")
        return None
    if name in artifact_names:
        return artifact_names[name]
    if not reader.has("initial"):
        hint = artifact_hint(name, artifact_names)
        message = (
            f"no earlier stage produces the artifact {name!r}; if a later stage of a loop does, add `initial:`.{hint}"
        )
        reader.error("artifact", message)
    return None


def _read_amount(context: ParseContext, value: Any, key: str, forms: str) -> float | int | None:
    if type_mismatch("float", value):
        context.error(key, f"must be {forms}, got {value!r}.")
        return None
    if not FRACTION_OR_COUNT.holds(value):
        context.error(key, f"must be {FRACTION_OR_COUNT.text}, got {value!r}.")
        return None
    return value
