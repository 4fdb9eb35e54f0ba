"""The data of a stage: `dataset:` with `augment:` and `batch_size:` beside it, and the named sources of `data:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.fields import AT_LEAST_ONE, SHARE_OR_COUNT, Context, Fields, named
from kdbench.config.schema import Named, SourceConfig
from kdbench.registry import AUGMENTS, DATASETS

DATASET_INJECTED = ("split", "data_root")
_EVALUATION = ("eval", "validation")
_OWN = ("dataset", "split", "batch_size", "augment", "label_fraction", "subset")


def read_sources(context: Context, top: Fields, eval_batch_size: int) -> dict[str, SourceConfig]:
    """Reads every source. `dataset: NAME` alone makes `train` (split train) and `eval` (split test)."""
    dataset = top.raw("dataset")
    batch_size = top.take("batch_size", "int", 64, AT_LEAST_ONE)
    augment = top.raw("augment")
    labels = top.take("label_fraction", "float", None, SHARE_OR_COUNT)
    shared = _Shared(dataset, top.path("dataset"), augment, top.path("augment"), batch_size, eval_batch_size, labels)
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


class _Shared:
    """What the top level says for sources that do not say it themselves."""

    def __init__(
        self,
        dataset: Any,
        dataset_key: str,
        augment: Any,
        augment_key: str,
        batch_size: int,
        evaluation: int,
        labels: Any,
    ) -> None:
        self.dataset = dataset
        self.dataset_key = dataset_key
        self.augment = augment
        self.augment_key = augment_key
        self.batch_size = batch_size
        self.evaluation = evaluation
        self.labels = labels


def _source(context: Context, name: str, key: str, value: Any, shared: _Shared, written: bool) -> SourceConfig | None:
    if isinstance(value, str):
        value = {"dataset": value}
    fields = Fields(context, value, key, f"source {name!r}")
    own = {option: fields.raw(option) for option in ("dataset", "augment")}
    split = fields.take("split", "str", "test" if name in _EVALUATION else "train")
    default = shared.evaluation if name in _EVALUATION else shared.batch_size
    batch_size = fields.take("batch_size", "int", default, AT_LEAST_ONE)
    labels = fields.take("label_fraction", "float", shared.labels if name == "train" else None, SHARE_OR_COUNT)
    subset = fields.take("subset", "float", None, SHARE_OR_COUNT)
    if fields.has("type"):
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
    if own["augment"] is not None:
        views = read_views(context, own["augment"], fields.path("augment"))
    elif name == "train" and shared.augment is not None:
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
    if name == "train" and "validation" in context.places:
        places["validation"] = context.place("validation")
    return SourceConfig(
        name=name,
        dataset=dataset,
        split=split,
        batch_size=batch_size,
        views=views,
        labels=labels,
        subset=subset,
        place=place,
        places=places,
    )


def read_views(context: Context, value: Any, key: str) -> dict[str, tuple[Named, ...]]:
    """Reads `augment`: a list for the view `image`, or a mapping of views to lists."""
    if isinstance(value, list):
        return {"image": _augmentations(context, value, key)}
    if not isinstance(value, Mapping):
        context.fault(key, f"must be a list of augmentations, or a mapping of views to lists, got {value!r}.")
        return {"image": ()}
    views: dict[str, tuple[Named, ...]] = {"image": ()}
    for view, items in value.items():
        if isinstance(items, list):
            views[view] = _augmentations(context, items, f"{key}.{view}")
        elif items is None:
            views[view] = ()
        else:
            context.fault(f"{key}.{view}", f"must be a list of augmentations, got {items!r}.")
    return views


def _augmentations(context: Context, items: list[Any], key: str) -> tuple[Named, ...]:
    found = [named(context, AUGMENTS, item, f"{key}.{i}") for i, item in enumerate(items)]
    return tuple(item for item in found if item is not None)
