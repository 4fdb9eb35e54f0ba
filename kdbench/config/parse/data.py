"""Reads the data of a stage: `dataset:` with its options, the sources of `data:`, their views, subsets and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.config.parse.keys import AT_LEAST_ONE, SHARE_OR_COUNT, Context, Fields
from kdbench.config.parse.parts import named
from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.errors import nearest
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
    context: Context, top: Fields, eval_batch_size: int, made: Mapping[str, str] | None = None
) -> dict[str, SourceConfig]:
    """Reads every source. `dataset: NAME` alone makes `train` (split train) and `eval` (split test).

    Args:
        made: what earlier stages make, as this stage may write it (`query.picked`) -> `STAGE.NAME` in full, such as
            `query@2.picked`.
    """
    shared = _Shared(
        dataset=top.raw("dataset"),
        dataset_key=top.path("dataset"),
        augment=top.raw("augment"),
        augment_key=top.path("augment"),
        batch_size=top.take("batch_size", "int", 64, AT_LEAST_ONE),
        evaluation=eval_batch_size,
        labels=top.raw("label_fraction"),
        labels_key=top.path("label_fraction"),
        relabel=top.raw("relabel"),
        relabel_key=top.path("relabel"),
        made=made or {},
    )
    dataset = shared.dataset
    entries: dict[str, Any] = {}
    if dataset is not None:
        entries = {"train": {}, "eval": {}}
    written = top.raw("data", {})
    if not isinstance(written, Mapping):
        top.fault("data", f"must be a mapping of source names to datasets, got {written!r}.")
        written = {}
    for name, value in written.items():
        if value is None:
            entries.pop(name, None)
        else:
            entries[name] = value
    if not entries:
        context.fault("", "the recipe names no data; write `dataset: NAME`, one of `kdbench list datasets`.")
    sources = {}
    for name, value in entries.items():
        key = top.path(f"data.{name}") if name in written else top.path("dataset")
        source = _source(context, name, key, value, shared, name in written)
        if source is not None:
            sources[name] = source
    if entries and "eval" not in entries:
        context.fault(
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


def _source(context: Context, name: str, key: str, value: Any, shared: _Shared, written: bool) -> SourceConfig | None:
    if isinstance(value, str):
        value = {"dataset": value}
    fields = Fields(context, value, key, f"source {name!r}")
    fields.known += ["type", "artifact", "initial"]
    made: str | None = None
    if fields.has("artifact"):
        made = made_name(
            context, fields.raw("artifact"), fields.path("artifact"), shared.made, "initial" in fields.data
        )
        first = fields.raw("initial")
        if made is None and first is not None:
            return _source(context, name, key, _with_first(fields, first), shared, written)
    own = {option: fields.raw(option) for option in ("dataset", "augment")}
    split = fields.take("split", "str", "test" if is_evaluation(name) else "train")
    default = shared.evaluation if is_evaluation(name) else shared.batch_size
    batch_size = fields.take("batch_size", "int", default, AT_LEAST_ONE)
    overlap = fields.take("overlap", "bool", False)
    if overlap and is_evaluation(name):
        fields.fault("overlap", "belongs to a source that is trained on.")
    elif overlap and batch_size % 2:
        fields.fault(
            "overlap", f"half of each batch was in the one before, so batch_size must be even, not {batch_size}."
        )
    train = name == "train"
    labels_raw = fields.raw("label_fraction", shared.labels if train else None)
    labels_key = fields.path("label_fraction") if fields.has("label_fraction") else shared.labels_key
    labels = read_labels(context, labels_raw, labels_key, shared.made)
    subset = read_subset(context, fields.raw("subset"), fields.path("subset"), shared.made)
    relabel_raw = fields.raw("relabel", shared.relabel if train else None)
    relabel_key = fields.path("relabel") if fields.has("relabel") else shared.relabel_key
    relabel = None if relabel_raw is None else named(context, RELABELS, relabel_raw, relabel_key)
    if made is not None or fields.data.get("artifact") is not None:
        dataset = PartConfig(type="artifact", location=fields.place("artifact"))
        for other in ("dataset", "type", "split"):
            if fields.data.get(other) is not None:
                said = "a source has one of `artifact:` and `dataset:`"
                said = "what a stage made has no splits" if other == "split" else said
                fields.fault(other, f"{said}; remove this, or write `{other}: null` where it comes from a layer below.")
        fields.done()
    elif fields.has("type"):
        if own["dataset"] is not None:
            fields.fault("dataset", "a source has `dataset:`, or `type:` with parameters beside it, not both.")
        dataset = named(context, DATASETS, fields.data, key, DATASET_INJECTED, reserved=_OWN)
    else:
        chosen = own["dataset"] if own["dataset"] is not None else shared.dataset
        chosen_key = fields.path("dataset") if own["dataset"] is not None else shared.dataset_key
        if chosen is None:
            fields.fault("", f"source {name!r} needs a `dataset`, one of `kdbench list datasets`.")
            dataset = None
        else:
            dataset = named(context, DATASETS, chosen, chosen_key, DATASET_INJECTED)
        fields.done()
    if dataset is not None and dataset.type == "artifact" and not fields.has("artifact"):
        fields.fault(
            "", f"source {name!r}: what a stage made is written `{{artifact: STAGE.NAME}}`, without a dataset."
        )
    if own["augment"] is not None:
        views = read_views(context, own["augment"], fields.path("augment"))
    elif train and shared.augment is not None:
        views = read_views(context, shared.augment, shared.augment_key)
    else:
        views = {"image": ()}
    if dataset is None:
        return None
    place = context.place(key if written else shared.dataset_key)
    places = {}
    for option, field in (("batch_size", "batch_size"), ("label_fraction", "labels"), ("subset", "subset")):
        if fields.has(option) or option in context.places:
            places[field] = fields.place(option) if fields.has(option) else context.place(option)
    if relabel is not None:
        places["relabel"] = context.place(relabel_key)
    if train and "validation" in context.places:
        places["validation"] = context.place("validation")
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


def _with_first(fields: Fields, first: Any) -> dict[str, Any]:
    """The source as it is where no earlier stage has made it: `initial` laid over the other keys."""
    rest = {name: value for name, value in fields.data.items() if name not in ("artifact", "initial")}
    if isinstance(first, str):
        first = {"dataset": first}
    if not isinstance(first, Mapping):
        fields.fault("initial", f"must be a dataset, or a mapping with the keys of a source, got {first!r}.")
        first = {}
    return {**rest, **first}


def read_views(context: Context, value: Any, key: str) -> dict[str, tuple[PartConfig, ...]]:
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
        context.fault(key, f"must be a list of augmentations, or a mapping of views to lists, got {value!r}.")
        return {"image": ()}
    for view, items in views.items():
        _check_same(context, view, items, views)
    return views


def _view(context: Context, value: Any, key: str) -> tuple[PartConfig, ...]:
    if isinstance(value, list):
        return _augmentations(context, value, key)
    if not isinstance(value, Mapping):
        context.fault(key, f"must be a list of augmentations, or {{from: VIEW, then: [...]}}, got {value!r}.")
        return ()
    fields = Fields(context, value, key, "a view that continues another")
    start = fields.take("from", "str")
    then = fields.take("then", "list", [])
    fields.done()
    if start is None:
        fields.fault("", "needs `from`: the view that it continues.")
        return ()
    same = PartConfig(type="same", params={"view": start}, location=fields.place("from"))
    return (same, *_augmentations(context, then, fields.path("then")))


def _augmentations(context: Context, items: list[Any], key: str) -> tuple[PartConfig, ...]:
    found = [named(context, AUGMENTATIONS, item, f"{key}.{i}") for i, item in enumerate(items)]
    return tuple(item for item in found if item is not None)


def _check_same(
    context: Context, view: str, items: tuple[PartConfig, ...], views: Mapping[str, tuple[PartConfig, ...]]
) -> None:
    """Finds fault with a view that continues one which does not exist, or itself."""
    for position, item in enumerate(items):
        if item.type != "same":
            continue
        if position:
            said = "`reuse` comes first in a view; what follows it is done to what it gives."
            context.faults.add(item.location, said)
            return
        path = [view]
        while (other := _continued(views[path[-1]])) is not None:
            if other not in views:
                if len(path) == 1:
                    context.faults.add(item.location, f"no view {other!r}.{nearest(other, views)}")
                return
            path.append(other)
            if other in path[:-1]:
                context.faults.add(item.location, f"views continue each other in a circle: {' -> '.join(path)}.")
                return


def _continued(items: tuple[PartConfig, ...]) -> str | None:
    first = items[0] if items else None
    return str(first.params.get("view")) if first is not None and first.type == "same" else None


Step = float | int | str | PartConfig


def read_subset(context: Context, value: Any, key: str, made: Mapping[str, str]) -> Step | tuple[Step, ...] | None:
    """Reads `subset`: a number, `{type: NAME, ...}`, `{artifact: STAGE.NAME, initial: ...}`, or a list of these.

    Args:
        made: what earlier stages make, as written -> `STAGE.NAME` in full.
    """
    if not isinstance(value, list):
        return _subset(context, value, key, made)
    if not value:
        context.fault(key, "must not be an empty list; leave it out to keep every sample.")
    steps: list[Step] = []
    for number, item in enumerate(value):
        step = _subset(context, item, f"{key}.{number}", made)
        steps += step if isinstance(step, tuple) else () if step is None else (step,)
    return tuple(steps) if steps else None


def _subset(context: Context, value: Any, key: str, made: Mapping[str, str]) -> Step | tuple[Step, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "artifact" in value:
        found, first = _chosen(context, value, key, made)
        return found if found is not None else read_subset(context, first, f"{key}.first", made)
    if isinstance(value, Mapping | str):
        return named(context, SUBSETS, value, key)
    return _amount(context, value, key, "a number, {type: SUBSET, ...}, {artifact: STAGE.NAME}, or a list of these")


def read_labels(context: Context, value: Any, key: str, made: Mapping[str, str]) -> float | int | str | None:
    """Reads `label_fraction`: a number, or `{artifact: STAGE.NAME, initial: ...}`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        if "artifact" not in value:
            context.fault(key, f"must be a number or {{artifact: STAGE.NAME, initial: NUMBER}}, got {value!r}.")
            return None
        found, first = _chosen(context, value, key, made)
        return found if found is not None else read_labels(context, first, f"{key}.first", made)
    return _amount(context, value, key, "a number or {artifact: STAGE.NAME, initial: NUMBER}")


def made_name(context: Context, value: Any, key: str, made: Mapping[str, str], has_first: bool) -> str | None:
    """Reads a reference to what an earlier stage makes; returns `STAGE.NAME` in full, or None where none makes it."""
    if not isinstance(value, str) or "." not in value:
        context.fault(key, f"must be STAGE.NAME, what an earlier stage makes, got {value!r}.")
        return None
    if value in made:
        return made[value]
    if not has_first:
        known = nearest(value, made) if made else " No earlier stage makes anything."
        context.fault(
            key, f"no earlier stage makes {value!r}; write `initial:` beside it for where none has yet.{known}"
        )
    return None


def _chosen(context: Context, value: Mapping[str, Any], key: str, made: Mapping[str, str]) -> tuple[str | None, Any]:
    """Returns the choice in full, or None and what stands in its place."""
    fields = Fields(context, value, key, "a made choice")
    first = fields.raw("initial")
    found = made_name(context, fields.raw("artifact"), fields.path("artifact"), made, first is not None)
    fields.done()
    return found, first


def _amount(context: Context, value: Any, key: str, words: str) -> float | int | None:
    if type_mismatch("float", value):
        context.fault(key, f"must be {words}, got {value!r}.")
        return None
    if not SHARE_OR_COUNT[0](value):
        context.fault(key, f"must be {SHARE_OR_COUNT[1]}, got {value!r}.")
        return None
    return value
