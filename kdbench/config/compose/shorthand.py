"""`student: resnet20` is short for `student: {model: {type: resnet20}}`, and so on.

Parts are spelled out before layers are laid over each other, so that `student.weights.path=...` finds a mapping below
it, and the AdamW of a recipe replaces the SGD of a protocol; the resolved recipe gets the short spelling back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kdbench.config.yaml_reader import YamlSource
from kdbench.errors import Location

_ROLES = ("teacher", "student")


_PARTS = ("dataset", "optimizer", "scheduler")


Change = Callable[[Any, str], Any]


def expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Spells out every part of a recipe that is given by its bare name."""
    return _recipe(data, lambda value, key: {key: value} if isinstance(value, str) else value, inside_first=False)


def contract(data: Mapping[str, Any]) -> dict[str, Any]:
    """Writes every part that has a name and nothing else as its bare name."""

    def shorten(value: Any, key: str) -> Any:
        alone = isinstance(value, Mapping) and set(value) == {key} and isinstance(value[key], str)
        return value[key] if alone else value

    return _recipe(data, shorten, inside_first=True)


def _recipe(data: Mapping[str, Any], change: Change, inside_first: bool) -> dict[str, Any]:
    result = _fragment(data, change, inside_first)
    return result | _stages(data, lambda stage, _: _fragment(stage, change, inside_first))


def _stages(data: Mapping[str, Any], each: Callable[[Mapping[str, Any], str], Any], prefix: str = "") -> dict[str, Any]:
    """`stages` with every fragment changed: those of stages, of the stages of a loop, and of its rounds."""
    stages = data.get("stages")
    if not isinstance(stages, Mapping):
        return {}
    changed: dict[str, Any] = {}
    for name, stage in stages.items():
        key = f"{prefix}stages.{name}."
        if not isinstance(stage, Mapping):
            changed[name] = stage
        elif "rounds" not in stage:
            changed[name] = each(stage, key)
        else:
            rounds = stage["rounds"]
            if isinstance(rounds, list):
                rounds = [each(r, f"{key}rounds.{i}.") if isinstance(r, Mapping) else r for i, r in enumerate(rounds)]
            changed[name] = {**stage, "rounds": rounds, **_stages(stage, each, key)}
    return {"stages": changed}


def _fragment(data: Mapping[str, Any], change: Change, inside_first: bool) -> dict[str, Any]:
    def holder(value: Any, key: str) -> Any:
        """A mapping that holds one part under `key`: a role its model, a source its dataset."""
        value = value if inside_first else change(value, key)
        if isinstance(value, Mapping) and key in value:
            value = {**value, key: change(value[key], "type")}
        if isinstance(value, Mapping) and "augment" in value:
            value = {**value, "augment": augmentations(value["augment"])}
        return change(value, key) if inside_first else value

    def augmentations(value: Any) -> Any:
        """A list, or a mapping of views to lists."""
        if isinstance(value, list):
            return [change(item, "type") for item in value]
        return {view: augmentations(items) for view, items in value.items()} if isinstance(value, Mapping) else value

    result = dict(data)
    if "augment" in result:
        result["augment"] = augmentations(result["augment"])
    for name in _ROLES:
        if name in result:
            result[name] = holder(result[name], "model")
    for name in _PARTS:
        if name in result:
            result[name] = change(result[name], "type")
    for name, each in (
        ("models", lambda value: holder(value, "model")),
        ("data", lambda value: holder(value, "dataset")),
        ("terms", lambda value: change(value, "type")),
    ):
        if isinstance(result.get(name), Mapping):
            result[name] = {key: each(value) for key, value in result[name].items()}
    return result


def name_listed_terms(source: YamlSource) -> YamlSource:
    """Turns `terms:` given as a list, at the top or in a stage, into a mapping by type name (a second kd is `kd_2`).

    A mapping is what layers can be laid over and what a sweep can address (`terms.kd.temperature=1,2,4`).
    """
    data = dict(source.data)
    places = dict(source.locations)
    data.update(_named_terms(data, "", places))
    data.update(_stages(data, lambda stage, prefix: _named_terms(stage, prefix, places)))
    return replace(source, data=data, places=places)


def _named_terms(fragment: Mapping[str, Any], prefix: str, places: dict[str, Location]) -> dict[str, Any]:
    result = dict(fragment)
    if not isinstance(fragment.get("terms"), list):
        return result
    terms: dict[str, Any] = {}
    for position, entry in enumerate(fragment["terms"]):
        kind = entry.get("type") if isinstance(entry, Mapping) else entry
        stem = kind if isinstance(kind, str) and kind else "term"
        name, copy = stem, 1
        while name in terms:
            copy += 1
            name = f"{stem}_{copy}"
        terms[name] = entry
        _rename(places, f"{prefix}terms.{position}", f"{prefix}terms.{name}")
    result["terms"] = terms
    return result


def _rename(places: dict[str, Location], old: str, new: str) -> None:
    for key in [k for k in places if k == old or k.startswith(f"{old}.")]:
        moved = new + key[len(old) :]
        places[moved] = replace(places.pop(key), key=moved)
