"""The layers of a recipe, read from files, and the folder that Hydra composes them from.

The folder is complete in itself (the recipe, every option of every group, the line of each key), so that a worker of
joblib or submitit composes the same job again from it. Its files are JSON, which is YAML without YAML's surprises.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdbench.config.compose.overrides import recipe_overrides
from kdbench.config.compose.shorthand import expand, name_listed_terms
from kdbench.config.error_list import ErrorList
from kdbench.config.paths import GROUPS, group_files
from kdbench.config.yaml_reader import YamlSource, read_yaml
from kdbench.errors import ConfigError, Location, suggest

CONFIG_NAME = "recipe"


ORIGIN = "origin.json"


_PART = r"\w[^/\\$\x00-\x1f]*"


_NAME = re.compile(f"{_PART}(/{_PART})*")  # it becomes a folder below `runs`, and Hydra reads `$` in it


ALL = object()
"""A sweep over a pattern, such as `pair=glob(resnet*)`: which options it takes, Hydra finds out."""


@dataclass(frozen=True)
class ConfigLayers:
    """The layers of a recipe, read from files and not yet composed."""

    name: str
    file: str
    path: Path
    recipe: YamlSource
    groups: Mapping[str, Mapping[str, YamlSource]]
    choices: Mapping[str, str | None]
    runs: str

    def write(self, folder: Path, hydra: Mapping[str, Any] | None = None) -> None:
        """Writes the folder that Hydra composes from; `hydra` goes into its own node."""
        body = {key: value for key, value in self.recipe.data.items() if key not in (*GROUPS, "origin")}
        defaults: list[Any] = [{group: self.choices[group]} for group in GROUPS]
        defaults += ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
        node = {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False, "name": "kdbench"}}
        config = {"defaults": defaults, **body, "hydra": {**node, **(hydra or {})}}
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{CONFIG_NAME}.yaml", json.dumps(config, indent=1))
        for group, options in self.groups.items():
            (folder / group).mkdir(exist_ok=True)
            for option, source in options.items():
                _write(folder / group / f"{option}.yaml", "# @package _global_\n" + json.dumps(dict(source.data)))
        _write(folder / ORIGIN, json.dumps(self.origin(), indent=1))

    def origin(self) -> dict[str, Any]:
        """What the composed config alone does not say: names, files and lines."""
        layers = {"recipe": self.recipe} | {
            f"{g}/{o}": s for g, options in self.groups.items() for o, s in options.items()
        }
        return {
            "name": self.name,
            "file": self.file,
            "path": str(self.path),
            "choices": dict(_mapping(self.recipe.data.get("origin")).get("choices", {})),
            "data": {layer: dict(source.data) for layer, source in layers.items()},
            "places": {layer: [asdict(p) for p in source.locations.values()] for layer, source in layers.items()},
        }

    def digest(self) -> str:
        """A short name for the content of the folder."""
        return hashlib.sha256(json.dumps(self.origin(), sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a worker may be reading the folder of an equal earlier sweep."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def read_layers(name: str, path: Path, overrides: Sequence[str] = ()) -> ConfigLayers:
    """Reads the recipe and the options of its groups.

    Raises:
        ConfigError: something in them is refused, or a chosen option does not exist.
    """
    recipe = _layer(path)
    origin = _mapping(recipe.data.get("origin"))
    faults = ErrorList()
    choices: dict[str, str | None] = {}
    groups: dict[str, dict[str, YamlSource]] = {}
    chosen = {group: _chosen(group, overrides) for group in GROUPS}
    for group in GROUPS:
        files = group_files(group, path.parent)
        own = recipe.data.get(group)
        if own is not None and own not in files:
            place = recipe.locations[group]
            faults.add(place, f"no {group} {own!r}.{suggest(str(own), files)}")
            own = None
        choices[group] = own
        wanted = {own} if own is not None else set()
        for option, override in chosen[group]:
            if option is ALL:
                wanted |= set(files)
            elif option in files:
                wanted.add(option)
            elif option is not None:
                faults.add(Location(override=override), f"no {group} {option!r}.{suggest(str(option), files)}")
        groups[group] = {option: _group(files[option]) for option in sorted(wanted)}
    faults.raise_any(recipe.file)
    runs = next((str(a.value) for a in reversed(recipe_overrides(overrides)) if a.key == "runs"), None)
    runs = runs if runs is not None else str(recipe.data.get("runs") or "runs")
    name = str(origin.get("name", name))
    if not _NAME.fullmatch(name):
        place = recipe.locations.get("origin.name", recipe.file)
        raise ConfigError(
            f"{place}: {name!r} cannot be a recipe's name; it begins with a letter or digit, without `$`."
        )
    written = Path(origin["file"]) if isinstance(origin.get("file"), str) else path  # where its relative paths begin
    return ConfigLayers(name, recipe.file, written.resolve(), recipe, groups, choices, runs)


def _layer(path: Path) -> YamlSource:
    source = name_listed_terms(read_yaml(path))
    return replace(source, data=expand(source.data))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _chosen(group: str, overrides: Sequence[str]) -> list[tuple[Any, str]]:
    found = [a for a in recipe_overrides(overrides) if a.key == group]
    return [(value, a.text) for a in found for value in (a.values if a.values or not a.sweeps else (ALL,))]


def _group(path: Path) -> YamlSource:
    source = _layer(path)
    inner = [key for key in (*GROUPS, "stages", "origin") if key in source.data]
    if inner:
        raise ConfigError(f"{source.locations[inner[0]]}: a group file cannot set {inner[0]!r}; write it in the recipe.")
    return source
