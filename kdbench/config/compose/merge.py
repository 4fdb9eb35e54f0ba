"""Merges the layers of a recipe (groups, recipe, overrides), and the keys of a stage over those of the top level.

Mappings are merged key by key. A list or a plain value replaces the earlier value. In three cases the later layer
replaces the earlier keys, because a merge would mix two alternatives: a part whose `type` or `combine` changes (such as
SGD in a group file and AdamW in the recipe), `weights` from another origin, and `epochs` in place of `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_EXCLUSIVE_KEYS = ("epochs", "steps")


_WEIGHTS_KINDS = ("recipe", "stage", "path")


_PART_KINDS = ("type", "dataset", "artifact", "combine")


def kind_of(name: str, part: Mapping[str, Any]) -> Any:
    """Returns the value that distinguishes alternatives of a mapping, such as the `type` of an optimizer, or None.

    Args:
        name: key of the mapping `part`.
    """
    if name == "weights":
        return next((kind for kind in _WEIGHTS_KINDS if part.get(kind) is not None), None)
    value = next((part[kind] for kind in _PART_KINDS if part.get(kind) is not None), None)
    return value.get("type") if isinstance(value, Mapping) else value


def changes_kind(name: str, lower: Any, upper: Any) -> bool:
    """Returns whether two mappings are alternatives (such as two optimizers), so that `upper` replaces `lower`."""
    if not isinstance(lower, Mapping) or not isinstance(upper, Mapping):
        return False
    new, old = kind_of(name, upper), kind_of(name, lower)
    return new is not None and old is not None and new != old


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any], replaced: tuple[str, ...] = ()) -> dict[str, Any]:
    """Merges the mapping `upper` over the mapping `lower`. The result has the values of `upper` where both have a key.

    Args:
        replaced: keys whose mappings are replaced, not merged.
    """
    result = dict(lower)
    for key in _excluded_keys(upper):
        result.pop(key, None)
    for key, value in upper.items():
        below = result.get(key)
        if key in replaced or not isinstance(below, Mapping) or not isinstance(value, Mapping):
            result[key] = value
        else:
            result[key] = value if changes_kind(key, below, value) else merge(below, value)
    return result


def stale_keys(lower: Mapping[str, Any], upper: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of `lower` that Hydra's merge of both mappings keeps, but `merge` drops."""
    for key in _excluded_keys(upper):
        if key in lower:
            yield f"{prefix}{key}"
    for key, value in upper.items():
        below = lower.get(key)
        if not isinstance(below, Mapping) or not isinstance(value, Mapping):
            continue
        if changes_kind(key, below, value):
            yield from _keys_only_in_lower(below, value, f"{prefix}{key}.")
        else:
            yield from stale_keys(below, value, f"{prefix}{key}.")


def hydra_merge(lower: Any, upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merges `upper` over `lower` as Hydra does: all mappings key by key, and items of lists by index."""
    result = dict(children(lower))
    for key, value in upper.items():
        below = result.get(key)
        indexed = isinstance(below, list) and isinstance(value, Mapping) and set(value) <= set(children(below))
        merges = indexed or (isinstance(below, Mapping) and isinstance(value, Mapping))
        result[key] = hydra_merge(below, value) if merges else value
    return result


def children(data: Any) -> Mapping[str, Any]:
    """Returns key -> value for a mapping, index -> item for a list, and an empty mapping for other values."""
    if isinstance(data, list):
        return {str(index): item for index, item in enumerate(data)}
    return data if isinstance(data, Mapping) else {}


def children_at(data: Any, dotted: str) -> Mapping[str, Any]:
    """Returns the entries of the mapping or list at a dotted key; an empty mapping if there is no such key."""
    for name in dotted.split(".") if dotted else ():
        data = children(data).get(name)
    return children(data)


def has_key(data: Any, dotted: str) -> bool:
    """Returns whether nested data contains a dotted key."""
    parent, _, name = dotted.rpartition(".")
    return name in children_at(data, parent)


def remove_key(data: dict[str, Any], dotted: str) -> None:
    """Removes a dotted key from nested mappings, if the key exists."""
    *parents, name = dotted.split(".")
    node: Any = data
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(name, None)


def _excluded_keys(upper: Mapping[str, Any]) -> Iterator[str]:
    """Yields `steps` if `upper` sets only `epochs`, and `epochs` if `upper` sets only `steps`."""
    for key, alternative in (_EXCLUSIVE_KEYS, _EXCLUSIVE_KEYS[::-1]):
        if upper.get(key) is not None and upper.get(alternative) is None:
            yield alternative


def _keys_only_in_lower(lower: Mapping[str, Any], upper: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in lower.items():
        if key not in upper:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and isinstance(upper[key], Mapping):
            yield from _keys_only_in_lower(value, upper[key], f"{prefix}{key}.")
