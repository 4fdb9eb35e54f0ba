"""`subset:` and `label_fraction:` of a source: numbers, parts, lists of them, and what an earlier stage chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.fields import SHARE_OR_COUNT, Context, Fields, named
from kdbench.config.schema import Named
from kdbench.errors import nearest
from kdbench.registry import SUBSETS, type_fault

Step = float | int | str | Named


def read_subset(context: Context, value: Any, key: str, made: Mapping[str, str]) -> Step | tuple[Step, ...] | None:
    """Reads `subset`: a number, `{type: NAME, ...}`, `{made: STAGE.NAME, first: ...}`, or a list of these.

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
    if isinstance(value, Mapping) and "made" in value:
        found, first = _chosen(context, value, key, made)
        return found if found is not None else read_subset(context, first, f"{key}.first", made)
    if isinstance(value, Mapping | str):
        return named(context, SUBSETS, value, key)
    return _amount(context, value, key, "a number, {type: SUBSET, ...}, {made: STAGE.NAME}, or a list of these")


def read_labels(context: Context, value: Any, key: str, made: Mapping[str, str]) -> float | int | str | None:
    """Reads `label_fraction`: a number, or `{made: STAGE.NAME, first: ...}`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        if "made" not in value:
            context.fault(key, f"must be a number or {{made: STAGE.NAME, first: NUMBER}}, got {value!r}.")
            return None
        found, first = _chosen(context, value, key, made)
        return found if found is not None else read_labels(context, first, f"{key}.first", made)
    return _amount(context, value, key, "a number or {made: STAGE.NAME, first: NUMBER}")


def made_name(context: Context, value: Any, key: str, made: Mapping[str, str], has_first: bool) -> str | None:
    """Reads a reference to what an earlier stage makes; returns `STAGE.NAME` in full, or None where none makes it."""
    if not isinstance(value, str) or "." not in value:
        context.fault(key, f"must be STAGE.NAME, what an earlier stage makes, got {value!r}.")
        return None
    if value in made:
        return made[value]
    if not has_first:
        known = nearest(value, made) if made else " No earlier stage makes anything."
        context.fault(key, f"no earlier stage makes {value!r}; write `first:` beside it for where none has yet.{known}")
    return None


def _chosen(context: Context, value: Mapping[str, Any], key: str, made: Mapping[str, str]) -> tuple[str | None, Any]:
    """Returns the choice in full, or None and what stands in its place."""
    fields = Fields(context, value, key, "a made choice")
    first = fields.raw("first")
    found = made_name(context, fields.raw("made"), fields.path("made"), made, first is not None)
    fields.done()
    return found, first


def _amount(context: Context, value: Any, key: str, words: str) -> float | int | None:
    if type_fault("float", value):
        context.fault(key, f"must be {words}, got {value!r}.")
        return None
    if not SHARE_OR_COUNT[0](value):
        context.fault(key, f"must be {SHARE_OR_COUNT[1]}, got {value!r}.")
        return None
    return value
