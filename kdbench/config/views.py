"""`augment:` of a source: a list, or a mapping of views to lists, of which one may continue another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.fields import Context, Fields, named
from kdbench.config.schema import Named
from kdbench.errors import nearest
from kdbench.registry import AUGMENTS


def read_views(context: Context, value: Any, key: str) -> dict[str, tuple[Named, ...]]:
    """Reads `augment`: a list for the view `image`, or a mapping of views to lists.

    `{from: VIEW, then: [...]}` becomes a list that begins with `{type: same, view: VIEW}`.
    """
    if isinstance(value, list):
        views = {"image": _augmentations(context, value, key)}
    elif isinstance(value, Mapping):
        views: dict[str, tuple[Named, ...]] = {"image": ()}
        for view, items in value.items():
            views[view] = () if items is None else _view(context, items, f"{key}.{view}")
    else:
        context.fault(key, f"must be a list of augmentations, or a mapping of views to lists, got {value!r}.")
        return {"image": ()}
    for view, items in views.items():
        _check_same(context, view, items, views)
    return views


def _view(context: Context, value: Any, key: str) -> tuple[Named, ...]:
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
    same = Named(type="same", params={"view": start}, place=fields.place("from"))
    return (same, *_augmentations(context, then, fields.path("then")))


def _augmentations(context: Context, items: list[Any], key: str) -> tuple[Named, ...]:
    found = [named(context, AUGMENTS, item, f"{key}.{i}") for i, item in enumerate(items)]
    return tuple(item for item in found if item is not None)


def _check_same(context: Context, view: str, items: tuple[Named, ...], views: Mapping[str, tuple[Named, ...]]) -> None:
    """Finds fault with a view that continues one which does not exist, or itself."""
    for position, item in enumerate(items):
        if item.type != "same":
            continue
        if position:
            said = "`same` comes first in a view; what follows it is done to what it gives."
            context.faults.add(item.place, said)
            return
        path = [view]
        while (other := _continued(views[path[-1]])) is not None:
            if other not in views:
                if len(path) == 1:
                    context.faults.add(item.place, f"no view {other!r}.{nearest(other, views)}")
                return
            path.append(other)
            if other in path[:-1]:
                context.faults.add(item.place, f"views continue each other in a circle: {' -> '.join(path)}.")
                return


def _continued(items: tuple[Named, ...]) -> str | None:
    first = items[0] if items else None
    return str(first.params.get("view")) if first is not None and first.type == "same" else None
