"""Computes the identity of a run: a hash of everything in the recipe that can change the results of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kdbench.config.schema import (
    OptimizerConfig,
    PartConfig,
    PartWithOperands,
    Recipe,
    TermConfig,
    WeightsConfig,
    declared_keys,
)
from kdbench.registry import (
    ADAPTERS,
    ARTIFACTS,
    AUGMENTATIONS,
    COMBINERS,
    DATASETS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    RELABELS,
    ROUTERS,
    SAMPLE_WEIGHTS,
    SCHEDULES,
    SELECTORS,
    SUBSETS,
    TERMS,
    WEIGHT_TRANSFORMS,
    Registry,
)

_REGISTRY_OF_FIELD = {
    "model": MODELS,
    "dataset": DATASETS,
    "views": AUGMENTATIONS,
    "adapter": ADAPTERS,
    "metrics": METRICS,
    "transforms": WEIGHT_TRANSFORMS,
    "subset": SUBSETS,
    "relabel": RELABELS,
    "sample_weight": SAMPLE_WEIGHTS,
    "route": ROUTERS,
    "combiner": COMBINERS,
    "select": SELECTORS,
    "part": ARTIFACTS,
}
"""Field of a schema dataclass -> registry of the part in this field. A part in any other field is a schedule."""


def identity(recipe: Recipe, extra: Mapping[str, Any] | None = None, length: int = 8) -> str:
    """Returns the identity of a run, a short hexadecimal hash. The run's folder is `runs/RECIPE/IDENTITY`.

    The hash includes every stage with shorthands expanded and defaults filled in, the `version` of each registered
    part, the seed and `extra`. Equivalent recipes (`teacher:` or `models.teacher:`, 4 or 4.0, another order of keys)
    have equal identities. Keys that the schema declares with `in_identity=False` (device, runs, log_every, ...) are
    left out.

    Args:
        recipe: a loaded recipe.
        extra: data outside of the recipe that can change results, such as checksums of the dataset.
        length: number of hexadecimal digits.
    """
    fields_of_result = {key.field for key in declared_keys(Recipe).values() if key.in_identity}
    content = {name: _plain(getattr(recipe, name)) for name in sorted(fields_of_result)} | {
        "extra": _plain(extra or {})
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any, registry: Registry = SCHEDULES) -> Any:
    """Converts a config dataclass to plain data that is equal for equivalent configs. Default values are left out.

    Args:
        registry: registry of the parts in `value`.
    """
    if isinstance(value, PartConfig):
        return _part(value.type, value.params, registry)
    if isinstance(value, PartWithOperands):
        return {**_part(value.type, value.params, registry), "operands": _plain(value.operands)}
    if isinstance(value, OptimizerConfig):
        return {**_part(value.type, value.params, OPTIMIZERS), "groups": _plain(value.groups)}
    if isinstance(value, TermConfig):
        return {**_dataclass(value, ("params", "type")), **_part(value.type, value.params, TERMS)}
    if isinstance(value, WeightsConfig) and value.recipe is not None:
        # The path of the teacher's recipe does not matter: `extra` contains the identity of its result.
        return {**_dataclass(value, ("recipe",)), "recipe": Path(value.recipe).stem}
    if is_dataclass(value):
        return _dataclass(value, _fields_without_effect(type(value)))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, registry) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, registry) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@cache
def _fields_without_effect(config_class: type) -> tuple[str, ...]:
    """Returns the names of the fields of a dataclass that cannot change results, by the declarations of their keys."""
    keys = declared_keys(config_class).values()
    with_effect = {key.field for key in keys if key.in_identity}
    return tuple({key.field for key in keys} - with_effect)


def _dataclass(config: Any, leave_out: tuple[str, ...]) -> dict[str, Any]:
    result = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in leave_out or not item.compare:  # locations are not compared
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if value != default:
            result[item.name] = _plain(value, _REGISTRY_OF_FIELD.get(item.name, SCHEDULES))
    return result


def part_identity(part: PartConfig, registry: Registry) -> dict[str, Any]:
    """Returns a registered part as plain data: name, parameters with defaults filled in, and version."""
    return _part(part.type, part.params, registry)


def _part(kind: str, params: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    entry = registry.entry(kind)
    defaults = {p.name: p.default for p in entry.parameters.values() if isinstance(p.default, str | int | float | bool)}
    return {"type": kind, "params": _plain({**defaults, **params}), "version": entry.version}
