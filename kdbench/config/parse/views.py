"""Reads `augment`: a list for the view `image`, or a mapping of views to lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.parts import read_part
from kdbench.config.schema import PartConfig
from kdbench.config.schema.data import VIEW_KEYS
from kdbench.errors import suggest
from kdbench.registry import AUGMENTATIONS

Augmentations = tuple[PartConfig, ...]


def read_views(reader: KeyReader) -> dict[str, Augmentations]:
    """Reads the views of a source: image field -> augmentations.

    `{from: VIEW, then: [...]}` becomes a list that begins with `{type: same, view: VIEW}`.
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
    reader = KeyReader(context, value, key, "a view that continues another", VIEW_KEYS)
    start = reader.read("from")
    if start is None:
        reader.error("", "needs `from`: the view that it continues.")
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
    """Reports a view that continues a missing view, or itself."""
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
