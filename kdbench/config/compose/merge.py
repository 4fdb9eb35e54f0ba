"""How one part of a recipe is laid over another: group under recipe under override, and top level under stage.

Mappings merge key by key, lists and values replace. Three things replace as a whole, because merging would mix two
choices into one: a part whose `type` or `combine` changes (the SGD of a protocol and the AdamW of a recipe), weights
from another kind of place, and `epochs` against `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_EXCLUSIVE = ("epochs", "steps")


_WEIGHT_KINDS = ("recipe", "stage", "path")


_KINDS = ("type", "dataset", "artifact", "combine")


def kind_of(name: str, part: Mapping[str, Any]) -> Any:
    """What a mapping is one of, or None when merging it with another is always right."""
    if name == "weights":
        return next((kind for kind in _WEIGHT_KINDS if part.get(kind) is not None), None)
    value = next((part[kind] for kind in _KINDS if part.get(kind) is not None), None)
    return value.get("type") if isinstance(value, Mapping) else value


def changes_kind(name: str, lower: Any, upper: Any) -> bool:
    """Whether `upper` names another kind than `lower`, so that nothing of `lower` may stay."""
    if not isinstance(lower, Mapping) or not isinstance(upper, Mapping):
        return False
    new, old = kind_of(name, upper), kind_of(name, lower)
    return new is not None and old is not None and new != old


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any], replaced: tuple[str, ...] = ()) -> dict[str, Any]:
    """Lays `upper` over `lower`; the keys of `replaced` are taken from `upper` as they are."""
    result = dict(lower)
    for ours, theirs in (_EXCLUSIVE, _EXCLUSIVE[::-1]):
        if upper.get(ours) is not None and upper.get(theirs) is None:
            result.pop(theirs, None)
    for key, value in upper.items():
        below = result.get(key)
        if key in replaced or not isinstance(below, Mapping) or not isinstance(value, Mapping):
            result[key] = value
        else:
            result[key] = value if changes_kind(key, below, value) else merge(below, value)
    return result


def stale_keys(lower: Mapping[str, Any], upper: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys that a plain merge (Hydra's) keeps from `lower` although `merge` drops them."""
    for ours, theirs in (_EXCLUSIVE, _EXCLUSIVE[::-1]):
        if upper.get(ours) is not None and upper.get(theirs) is None and theirs in lower:
            yield f"{prefix}{theirs}"
    for key, value in upper.items():
        below = lower.get(key)
        if not isinstance(below, Mapping) or not isinstance(value, Mapping):
            continue
        if changes_kind(key, below, value):
            yield from _only_below(below, value, f"{prefix}{key}.")
        else:
            yield from stale_keys(below, value, f"{prefix}{key}.")


def _only_below(lower: Mapping[str, Any], upper: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in lower.items():
        if key not in upper:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and isinstance(upper[key], Mapping):
            yield from _only_below(value, upper[key], f"{prefix}{key}.")


def remove_key(data: dict[str, Any], dotted: str) -> None:
    """Removes a dotted key from nested mappings, where it is there."""
    *parents, last = dotted.split(".")
    node: Any = data
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)
