"""Reads the data of a stage: `dataset:` with its options, the sources of `data:`, their views, subsets and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.config.parse.keys import AT_LEAST_ONE, FRACTION_OR_COUNT, KeyReader, ParseContext
from kdbench.config.parse.parts import read_part
from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.errors import suggest
from kdbench.registry import AUGMENTATIONS, DATASETS, RELABELS, SUBSETS, type_mismatch

DATASET_INJECTED = ("split", "data_root", "file")


_EVALUATION = ("eval", "validation", "test")


_OWN = (
    "dataset",
    "split",
    "batch_size",
    "augment",
    "label_fraction",
    "subset",
    "relabel",
    "artifact",
    "initial",
    "overlap",
)


def read_sources(
    context: ParseContext, top: KeyReader, eval_batch_size: int, made: Mapping[str, str] | None = None
) -> dict[str, SourceConfig]:
    """Reads every source. `dataset: NAME` alone makes `train` (split train) and `eval` (split test).

    Args:
        made: what earlier stages make, as this stage may write it (`query.picked`) -> `STAGE.NAME` in full, such as
            `query@2.picked`.
    """
    shared = _Shared(
        dataset=top.get_raw("dataset"),
        dataset_key=top.subkey("dataset"),
        augment=top.get_raw("augment"),
        augment_key=top.subkey("augment"),
        batch_size=top.read("batch_size", "int", 64, AT_LEAST_ONE),
        evaluation=eval_batch_size,
        labels=top.get_raw("label_fraction"),
        labels_key=top.subkey("label_fraction"),
        relabel=top.get_raw("relabel"),
        relabel_key=top.subkey("relabel"),
        made=made or {},
    )
    dataset = shared.dataset
    entries: dict[str, Any] = {}
    if dataset is not None:
        entries = {"train": {}, "eval": {}}
    written = top.get_raw("data", {})
    if not isinstance(written, Mapping):
        top.error("data", f"must be a mapping of source names to datasets, got {written!r}.")
        written = {}
    for name, value in written.items():
        if value is None:
            entries.pop(name, None)
        else:
            entries[name] = value
    if not entries:
        context.error("", "the recipe names no data; write `dataset: NAME`, one of `kdbench list datasets`.")
    sources = {}
    for name, value in entries.items():
        key = top.subkey(f"data.{name}") if name in written else top.subkey("dataset")
        source = _source(context, name, key, value, shared, name in written)
        if source is not None:
            sources[name] = source
    if entries and "eval" not in entries:
        context.error(
            "data", "there is no source `eval` to evaluate on; write `eval: {dataset: NAME, split: test}` in `data:`."
        )
    return sources


@dataclass(frozen=True)
class _Shared:
    """What the top level says for sources that do not say it themselves, with the keys where it says so."""

    dataset: Any
    dataset_key: str
    augment: Any
    augment_key: str
    batch_size: int
    evaluation: int
    labels: Any
    labels_key: str
    relabel: Any
    relabel_key: str
    made: Mapping[str, str]


def is_evaluation(name: str) -> bool:
    """Whether a source of this name is only evaluated: `eval`, and `eval_old` and the like."""
    return name in _EVALUATION or name.startswith("eval_")


def _source(context: ParseContext, name: str, key: str, value: Any, shared: _Shared, written: bool) -> SourceConfig | None:
    if isinstance(value, str):
        value = {"dataset": value}
    fields = KeyReader(context, value, key, f"source {name!r}")
    fields.known += ["type", "artifact", "initial"]
    made: str | None = None
    if fields.has("artifact"):
        made = read_artifact_reference(
            context, fields.get_raw("artifact"), fields.subkey("artifact"), shared.made, "initial" in fields.data
        )
        first = fields.get_raw("initial")
        if made is None and first is not None:
            return _source(context, name, key, _with_first(fields, first), shared, written)
    own = {option: fields.get_raw(option) for option in ("dataset", "augment")}
    split = fields.read("split", "str", "test" if is_evaluation(name) else "train")
    default = shared.evaluation if is_evaluation(name) else shared.batch_size
    batch_size = fields.read("batch_size", "int", default, AT_LEAST_ONE)
    overlap = fields.read("overlap", "bool", False)
    if overlap and is_evaluation(name):
        fields.error("overlap", "belongs to a source that is trained on.")
    elif overlap and batch_size % 2:
        fields.error(
            "overlap", f"half of each batch was in the one before, so batch_size must be even, not {batch_size}."
        )
    train = name == "train"
    labels_raw = fields.get_raw("label_fraction", shared.labels if train else None)
    labels_key = fields.subkey("label_fraction") if fields.has("label_fraction") else shared.labels_key
    labels = read_labels(context, labels_raw, labels_key, shared.made)
    subset = read_subset(context, fields.get_raw("subset"), fields.subkey("subset"), shared.made)
    relabel_raw = fields.get_raw("relabel", shared.relabel if train else None)
    relabel_key = fields.subkey("relabel") if fields.has("relabel") else shared.relabel_key
    relabel = None if relabel_raw is None else read_part(context, RELABELS, relabel_raw, relabel_key)
    if made is not None or fields.data.get("artifact") is not None:
        dataset = PartConfig(type="artifact", location=fields.location("artifact"))
        for other in ("dataset", "type", "split"):
            if fields.data.get(other) is not None:
                said = "a source has one of `artifact:` and `dataset:`"
                said = "what a stage made has no splits" if other == "split" else said
                fields.error(other, f"{said}; remove this, or write `{other}: null` where it comes from a layer below.")
        fields.finish()
    elif fields.has("type"):
        if own["dataset"] is not None:
            fields.error("dataset", "a source has `dataset:`, or `type:` with parameters beside it, not both.")
        dataset = read_part(context, DATASETS, fields.data, key, DATASET_INJECTED, reserved=_OWN)
    else:
        chosen = own["dataset"] if own["dataset"] is not None else shared.dataset
        chosen_key = fields.subkey("dataset") if own["dataset"] is not None else shared.dataset_key
        if chosen is None:
            fields.error("", f"source {name!r} needs a `dataset`, one of `kdbench list datasets`.")
            dataset = None
        else:
            dataset = read_part(context, DATASETS, chosen, chosen_key, DATASET_INJECTED)
        fields.finish()
    if dataset is not None and dataset.type == "artifact" and not fields.has("artifact"):
        fields.error(
            "", f"source {name!r}: what a stage made is written `{{artifact: STAGE.NAME}}`, without a dataset."
        )
    if own["augment"] is not None:
        views = read_views(context, own["augment"], fields.subkey("augment"))
    elif train and shared.augment is not None:
        views = read_views(context, shared.augment, shared.augment_key)
    else:
        views = {"image": ()}
    if dataset is None:
        return None
    place = context.location(key if written else shared.dataset_key)
    places = {}
    for option, field in (("batch_size", "batch_size"), ("label_fraction", "labels"), ("subset", "subset")):
        if fields.has(option) or option in context.locations:
            places[field] = fields.location(option) if fields.has(option) else context.location(option)
    if relabel is not None:
        places["relabel"] = context.location(relabel_key)
    if train and "validation" in context.locations:
        places["validation"] = context.location("validation")
    return SourceConfig(
        name=name,
        dataset=dataset,
        split=split,
        batch_size=batch_size,
        views=views,
        label_fraction=labels,
        subset=subset,
        relabel=relabel,
        artifact=made,
        overlap=overlap,
        location=place,
        locations=places,
    )


def _with_first(fields: KeyReader, first: Any) -> dict[str, Any]:
    """The source as it is where no earlier stage has made it: `initial` laid over the other keys."""
    rest = {name: value for name, value in fields.data.items() if name not in ("artifact", "initial")}
    if isinstance(first, str):
        first = {"dataset": first}
    if not isinstance(first, Mapping):
        fields.error("initial", f"must be a dataset, or a mapping with the keys of a source, got {first!r}.")
        first = {}
    return {**rest, **first}


def read_views(context: ParseContext, value: Any, key: str) -> dict[str, tuple[PartConfig, ...]]:
    """Reads `augment`: a list for the view `image`, or a mapping of views to lists.

    `{from: VIEW, then: [...]}` becomes a list that begins with `{type: same, view: VIEW}`.
    """
    if isinstance(value, list):
        views = {"image": _augmentations(context, value, key)}
    elif isinstance(value, Mapping):
        views: dict[str, tuple[PartConfig, ...]] = {"image": ()}
        for view, items in value.items():
            views[view] = () if items is None else _view(context, items, f"{key}.{view}")
    else:
        context.error(key, f"must be a list of augmentations, or a mapping of views to lists, got {value!r}.")
        return {"image": ()}
    for view, items in views.items():
        _check_same(context, view, items, views)
    return views


def _view(context: ParseContext, value: Any, key: str) -> tuple[PartConfig, ...]:
    if isinstance(value, list):
        return _augmentations(context, value, key)
    if not isinstance(value, Mapping):
        context.error(key, f"must be a list of augmentations, or {{from: VIEW, then: [...]}}, got {value!r}.")
        return ()
    fields = KeyReader(context, value, key, "a view that continues another")
    start = fields.read("from", "str")
    then = fields.read("then", "list", [])
    fields.finish()
    if start is None:
        fields.error("", "needs `from`: the view that it continues.")
        return ()
    same = PartConfig(type="same", params={"view": start}, location=fields.location("from"))
    return (same, *_augmentations(context, then, fields.subkey("then")))


def _augmentations(context: ParseContext, items: list[Any], key: str) -> tuple[PartConfig, ...]:
    found = [read_part(context, AUGMENTATIONS, item, f"{key}.{i}") for i, item in enumerate(items)]
    return tuple(item for item in found if item is not None)


def _check_same(
    context: ParseContext, view: str, items: tuple[PartConfig, ...], views: Mapping[str, tuple[PartConfig, ...]]
) -> None:
    """Finds fault with a view that continues one which does not exist, or itself."""
    for position, item in enumerate(items):
        if item.type != "same":
            continue
        if position:
            said = "`reuse` comes first in a view; what follows it is done to what it gives."
            context.errors.add(item.location, said)
            return
        path = [view]
        while (other := _continued(views[path[-1]])) is not None:
            if other not in views:
                if len(path) == 1:
                    context.errors.add(item.location, f"no view {other!r}.{suggest(other, views)}")
                return
            path.append(other)
            if other in path[:-1]:
                context.errors.add(item.location, f"views continue each other in a circle: {' -> '.join(path)}.")
                return


def _continued(items: tuple[PartConfig, ...]) -> str | None:
    first = items[0] if items else None
    return str(first.params.get("view")) if first is not None and first.type == "same" else None


SubsetStep = float | int | str | PartConfig


def read_subset(context: ParseContext, value: Any, key: str, made: Mapping[str, str]) -> SubsetStep | tuple[SubsetStep, ...] | None:
    """Reads `subset`: a number, `{type: NAME, ...}`, `{artifact: STAGE.NAME, initial: ...}`, or a list of these.

    Args:
        made: what earlier stages make, as written -> `STAGE.NAME` in full.
    """
    if not isinstance(value, list):
        return _subset(context, value, key, made)
    if not value:
        context.error(key, "must not be an empty list; leave it out to keep every sample.")
    steps: list[SubsetStep] = []
    for number, item in enumerate(value):
        step = _subset(context, item, f"{key}.{number}", made)
        steps += step if isinstance(step, tuple) else () if step is None else (step,)
    return tuple(steps) if steps else None


def _subset(context: ParseContext, value: Any, key: str, made: Mapping[str, str]) -> SubsetStep | tuple[SubsetStep, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "artifact" in value:
        found, first = _chosen(context, value, key, made)
        return found if found is not None else read_subset(context, first, f"{key}.first", made)
    if isinstance(value, Mapping | str):
        return read_part(context, SUBSETS, value, key)
    return _amount(context, value, key, "a number, {type: SUBSET, ...}, {artifact: STAGE.NAME}, or a list of these")


def read_labels(context: ParseContext, value: Any, key: str, made: Mapping[str, str]) -> float | int | str | None:
    """Reads `label_fraction`: a number, or `{artifact: STAGE.NAME, initial: ...}`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        if "artifact" not in value:
            context.error(key, f"must be a number or {{artifact: STAGE.NAME, initial: NUMBER}}, got {value!r}.")
            return None
        found, first = _chosen(context, value, key, made)
        return found if found is not None else read_labels(context, first, f"{key}.first", made)
    return _amount(context, value, key, "a number or {artifact: STAGE.NAME, initial: NUMBER}")


def read_artifact_reference(context: ParseContext, value: Any, key: str, made: Mapping[str, str], has_first: bool) -> str | None:
    """Reads a reference to what an earlier stage makes; returns `STAGE.NAME` in full, or None where none makes it."""
    if not isinstance(value, str) or "." not in value:
        context.error(key, f"must be STAGE.NAME, what an earlier stage makes, got {value!r}.")
        return None
    if value in made:
        return made[value]
    if not has_first:
        known = suggest(value, made) if made else " No earlier stage makes anything."
        context.error(
            key, f"no earlier stage makes {value!r}; write `initial:` beside it for where none has yet.{known}"
        )
    return None


def _chosen(context: ParseContext, value: Mapping[str, Any], key: str, made: Mapping[str, str]) -> tuple[str | None, Any]:
    """Returns the choice in full, or None and what stands in its place."""
    fields = KeyReader(context, value, key, "a made choice")
    first = fields.get_raw("initial")
    found = read_artifact_reference(context, fields.get_raw("artifact"), fields.subkey("artifact"), made, first is not None)
    fields.finish()
    return found, first


def _amount(context: ParseContext, value: Any, key: str, words: str) -> float | int | None:
    if type_mismatch("float", value):
        context.error(key, f"must be {words}, got {value!r}.")
        return None
    if not FRACTION_OR_COUNT[0](value):
        context.error(key, f"must be {FRACTION_OR_COUNT[1]}, got {value!r}.")
        return None
    return value
