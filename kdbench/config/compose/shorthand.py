"""Expands shorthands: `student: resnet20` is `student: {model: {type: resnet20}}`.

Parts are expanded before layers are merged, so that the override `student.weights.path=...` meets a mapping, and the
AdamW of a recipe replaces the SGD of a protocol. The resolved recipe is contracted to the short spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdbench.config.yaml_reader import YamlSource
from kdbench.errors import Location

_ROLES = ("teacher", "student")


_PARTS = ("dataset", "optimizer", "scheduler")


Change = Callable[[Any, str], Any]
"""(value, key under which a bare name belongs) -> changed value."""


def expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Expands every part of a recipe that is written as a bare name."""
    rewrite = _Rewrite(lambda value, key: {key: value} if isinstance(value, str) else value, inner_first=False)
    return rewrite.rewrite_recipe(data)


def contract(data: Mapping[str, Any]) -> dict[str, Any]:
    """Contracts every part that has a name and nothing else to its bare name."""

    def shorten(value: Any, key: str) -> Any:
        is_bare = isinstance(value, Mapping) and set(value) == {key} and isinstance(value[key], str)
        return value[key] if is_bare else value

    return _Rewrite(shorten, inner_first=True).rewrite_recipe(data)


@dataclass(frozen=True)
class _Rewrite:
    """Applies `change` to every part of a recipe.

    Attributes:
        inner_first: whether the model of a role (the dataset of a source) changes before the role. Contraction needs
            this order, expansion the opposite one.
    """

    change: Change
    inner_first: bool

    def rewrite_recipe(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return self.rewrite_fragment(data) | change_stages(data, lambda stage, _: self.rewrite_fragment(stage))

    def rewrite_fragment(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Changes the parts at the top level of a recipe, in a stage or in a round."""
        result = dict(data)
        if "augment" in result:
            result["augment"] = self._augmentations(result["augment"])
        for name in _ROLES:
            if name in result:
                result[name] = self._holder(result[name], "model")
        for name in _PARTS:
            if name in result:
                result[name] = self.change(result[name], "type")
        for name, change_entry in (
            ("models", lambda value: self._holder(value, "model")),
            ("data", lambda value: self._holder(value, "dataset")),
            ("terms", lambda value: self.change(value, "type")),
        ):
            if isinstance(result.get(name), Mapping):
                result[name] = {key: change_entry(value) for key, value in result[name].items()}
        return result

    def _holder(self, value: Any, key: str) -> Any:
        """Changes a mapping that contains one part under `key`: a role its model, a source its dataset."""
        value = value if self.inner_first else self.change(value, key)
        if isinstance(value, Mapping) and key in value:
            value = {**value, key: self.change(value[key], "type")}
        if isinstance(value, Mapping) and "augment" in value:
            value = {**value, "augment": self._augmentations(value["augment"])}
        return self.change(value, key) if self.inner_first else value

    def _augmentations(self, value: Any) -> Any:
        """Changes a list of augmentations, or a mapping of views to lists."""
        if isinstance(value, list):
            return [self.change(item, "type") for item in value]
        if not isinstance(value, Mapping):
            return value
        return {view: self._augmentations(items) for view, items in value.items()}


def change_stages(
    data: Mapping[str, Any], change_fragment: Callable[[Mapping[str, Any], str], Any], prefix: str = ""
) -> dict[str, Any]:
    """Changes every fragment under `stages`: of a stage, of a stage in a loop, and of a round.

    Args:
        change_fragment: (fragment, prefix of its keys) -> changed fragment.
    """
    stages = data.get("stages")
    if not isinstance(stages, Mapping):
        return {}
    result: dict[str, Any] = {}
    for name, stage in stages.items():
        key = f"{prefix}stages.{name}."
        if not isinstance(stage, Mapping):
            result[name] = stage
        elif "rounds" not in stage:
            result[name] = change_fragment(stage, key)
        else:
            rounds = stage["rounds"]
            if isinstance(rounds, list):
                rounds = [
                    change_fragment(fragment, f"{key}rounds.{index}.") if isinstance(fragment, Mapping) else fragment
                    for index, fragment in enumerate(rounds)
                ]
            result[name] = {**stage, "rounds": rounds, **change_stages(stage, change_fragment, key)}
    return {"stages": result}


def name_listed_terms(source: YamlSource) -> YamlSource:
    """Turns a list of `terms`, at the top level or in a stage, into a mapping by type name (a second kd is `kd_2`).

    Layers can merge with a mapping, and a sweep can address its entries (`terms.kd.temperature=1,2,4`).
    """
    data = dict(source.data)
    locations = dict(source.locations)
    data.update(_name_terms(data, "", locations))
    data.update(change_stages(data, lambda stage, prefix: _name_terms(stage, prefix, locations)))
    return replace(source, data=data, locations=locations)


def _name_terms(fragment: Mapping[str, Any], prefix: str, locations: dict[str, Location]) -> dict[str, Any]:
    result = dict(fragment)
    if not isinstance(fragment.get("terms"), list):
        return result
    terms: dict[str, Any] = {}
    for index, entry in enumerate(fragment["terms"]):
        kind = entry.get("type") if isinstance(entry, Mapping) else entry
        stem = kind if isinstance(kind, str) and kind else "term"
        name, number = stem, 1
        while name in terms:
            number += 1
            name = f"{stem}_{number}"
        terms[name] = entry
        _rename_key(locations, f"{prefix}terms.{index}", f"{prefix}terms.{name}")
    result["terms"] = terms
    return result


def _rename_key(locations: dict[str, Location], old: str, new: str) -> None:
    for key in [key for key in locations if key == old or key.startswith(f"{old}.")]:
        renamed = new + key[len(old) :]
        locations[renamed] = replace(locations.pop(key), key=renamed)
