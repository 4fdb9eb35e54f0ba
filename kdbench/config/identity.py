"""What makes a run this run: everything of its recipe that can change its result, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from kdbench.config.schema import OptimizerConfig, PartConfig, PartWithOperands, Recipe, TermConfig, WeightsConfig
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

LOGGING = ("log_every", "checkpoint_every")
"""Keys of a stage that say how often something is written, not what is computed."""


_REGISTRIES = {
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
"""Which kind of part a field of the schema holds; any other named part is a schedule."""


def identity(recipe: Recipe, extra: Mapping[str, Any] | None = None, length: int = 8) -> str:
    """A short hexadecimal name for what a recipe computes; the folder of a run is `runs/<recipe>/<identity>`.

    It covers every stage as it was understood (so that `teacher:` and `models.teacher:`, 4 and 4.0, or the order of
    keys make no difference), the parameters that were left at their default, the `version` of each part, the seed, and
    `extra`. It leaves out where and how a run is executed (device, compile, frozen_forward, frozen_batch_size, shard,
    workers, out, runs, data_root, fresh, tensorboard), what is only told (title, paper, published) and how often
    something is logged or saved.

    Args:
        recipe: a loaded recipe.
        extra: what the recipe alone does not fix, such as checksums of the data and identities of teachers.
        length: how many hexadecimal digits.
    """
    content = {"stages": [_plain(stage) for stage in recipe.stages], "seed": recipe.seed, "extra": _plain(extra or {})}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any, registry: Registry = SCHEDULES) -> Any:
    """Plain data in one canonical form; what stands at its default in the schema is left out."""
    if isinstance(value, PartConfig):
        return _part(value.type, value.params, registry)
    if isinstance(value, PartWithOperands):
        return {**_part(value.type, value.params, registry), "operands": _plain(value.operands)}
    if isinstance(value, OptimizerConfig):
        return {**_part(value.type, value.params, OPTIMIZERS), "groups": _plain(value.groups)}
    if isinstance(value, TermConfig):
        return {**_dataclass(value, ("params", "type")), **_part(value.type, value.params, TERMS)}
    if isinstance(value, WeightsConfig) and value.recipe is not None:
        # Where the teacher's recipe lies is no matter; what it produced is told in `extra`.
        return {**_dataclass(value, ("recipe",)), "recipe": Path(value.recipe).stem}
    if is_dataclass(value):
        return _dataclass(value, LOGGING)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, registry) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, registry) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _dataclass(value: Any, leave_out: tuple[str, ...]) -> dict[str, Any]:
    result = {}
    for item in fields(value):
        own = getattr(value, item.name)
        if item.name in leave_out or not item.compare:  # places are no part of what a recipe says
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if own != default:
            result[item.name] = _plain(own, _REGISTRIES.get(item.name, SCHEDULES))
    return result


def part_identity(named: PartConfig, registry: Registry) -> dict[str, Any]:
    """What a part computes, as plain data: its name, its parameters with defaults filled in, and its version."""
    return _part(named.type, named.params, registry)


def _part(kind: str, params: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    entry = registry.entry(kind)
    defaults = {p.name: p.default for p in entry.parameters.values() if isinstance(p.default, str | int | float | bool)}
    return {"type": kind, "params": _plain({**defaults, **params}), "version": entry.version}
