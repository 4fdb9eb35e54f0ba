"""Expands shorthands: `student: resnet20` is `student: {model: {type: resnet20}}`.

Shorthands are expanded before the layers (group files, recipe) are merged, so that mappings are merged with mappings.
In the recipe that a run stores, mappings are contracted to shorthands again.
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
"""Function of a part and a key (such as `type`) that converts a bare name to {key: name}, or the reverse."""


def expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces each part of a recipe that is written as a bare name, such as `SGD`, by a mapping `{type: SGD}`."""
    rewrite = _Rewrite(lambda value, key: {key: value} if isinstance(value, str) else value, inner_first=False)
    return rewrite.rewrite_recipe(data)


def contract(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces each part of a recipe that has only a name, such as `{type: SGD}`, by the bare name `SGD`."""

    def shorten(value: Any, key: str) -> Any:
        is_bare = isinstance(value, Mapping) and set(value) == {key} and isinstance(value[key], str)
        return value[key] if is_bare else value

    return _Rewrite(shorten, inner_first=True).rewrite_recipe(data)


@dataclass(frozen=True)
class _Rewrite:
    """Applies the function `change` to every part (model, term, optimizer, ...) of a recipe.

    Attributes:
        change: function of a part and of the key that contains its name. It returns the changed part.
        inner_first: whether the model of a role is changed before the role, and the dataset of a source before the
            source. True for contraction, False for expansion.
    """

    change: Change
    inner_first: bool

    def rewrite_recipe(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return self.rewrite_fragment(data) | change_stages(data, lambda stage, _: self.rewrite_fragment(stage))

    def rewrite_fragment(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Changes the parts of one fragment: the top level of a recipe, a stage, or a round of a loop."""
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
        """Changes a mapping with a part under `key`: a role (with its model) or a source (with its dataset)."""
        value = value if self.inner_first else self.change(value, key)
        if isinstance(value, Mapping) and key in value:
            value = {**value, key: self.change(value[key], "type")}
        if isinstance(value, Mapping) and "augment" in value:
            value = {**value, "augment": self._augmentations(value["augment"])}
        return self.change(value, key) if self.inner_first else value

    def _augmentations(self, value: Any) -> Any:
        """Changes a list of augmentations, or a mapping of views to lists of augmentations."""
        if isinstance(value, list):
            return [self.change(item, "type") for item in value]
        if not isinstance(value, Mapping):
            return value
        return {view: self._augmentations(items) for view, items in value.items()}


def change_stages(
    data: Mapping[str, Any], change_fragment: Callable[[Mapping[str, Any], str], Any], prefix: str = ""
) -> dict[str, Any]:
    """Changes the mappings under `stages`: each stage, each stage in a loop, and each round of a loop.

    Args:
        change_fragment: function of such a mapping and of the prefix of its keys. It returns the changed mapping.

    Returns:
        A mapping with the changed key `stages`, or an empty mapping if `data` has no stages.
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
    """Converts each list under the key `terms` to a mapping. An entry is named by its type, a second `kd` by `kd_2`.

    A mapping can be merged with other files, and an override can address its entries (`terms.kd.temperature=4`).
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
