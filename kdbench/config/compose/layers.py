"""Reads the layers of a recipe (its file and its group files), and writes the folder from which Hydra merges them.

The folder contains the recipe, all selectable group files, and the location of each key, so that a worker of joblib
or submitit can compose the same job. The files are in JSON, a subset of YAML without YAML's implicit types.
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


_NAME_SEGMENT = r"\w[^/\\$\x00-\x1f]*"


# A recipe's name becomes a folder below `runs`; Hydra would interpolate a `$` in it.
_RECIPE_NAME = re.compile(f"{_NAME_SEGMENT}(/{_NAME_SEGMENT})*")


ANY_OPTION = object()
"""Placeholder for the options of a sweep over a pattern, such as `pair=glob(resnet*)`. Hydra finds the options."""


@dataclass(frozen=True)
class ConfigLayers:
    """The layers of a recipe (its own file and its group files) before Hydra merges them.

    Attributes:
        file: name of the recipe's file in messages.
        path: full path of the original recipe file. Relative paths in the recipe begin in the folder of this file.
        groups: group (such as `pair`) -> name of a group file -> content of the file, for each file that the recipe or
            an override selects.
        choices: group -> name of the group file that the recipe selects, or None.
        runs: folder of all runs.
    """

    name: str
    file: str
    path: Path
    recipe: YamlSource
    groups: Mapping[str, Mapping[str, YamlSource]]
    choices: Mapping[str, str | None]
    runs: str

    def write(self, folder: Path, hydra: Mapping[str, Any] | None = None) -> None:
        """Writes the folder from which Hydra composes the jobs of a run or multirun.

        Args:
            hydra: content of the config key `hydra`.
        """
        body = {key: value for key, value in self.recipe.data.items() if key not in (*GROUPS, "origin")}
        defaults: list[Any] = [{group: self.choices[group]} for group in GROUPS]
        defaults += ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
        node = {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False, "name": "kdbench"}}
        config = {"defaults": defaults, **body, "hydra": {**node, **(hydra or {})}}
        folder.mkdir(parents=True, exist_ok=True)
        _write_if_changed(folder / f"{CONFIG_NAME}.yaml", json.dumps(config, indent=1))
        for group, options in self.groups.items():
            (folder / group).mkdir(exist_ok=True)
            for option, source in options.items():
                text = "# @package _global_\n" + json.dumps(dict(source.data))
                _write_if_changed(folder / group / f"{option}.yaml", text)
        _write_if_changed(folder / ORIGIN, json.dumps(self.origin(), indent=1))

    def origin(self) -> dict[str, Any]:
        """Returns the names, files, data and locations of all layers, as plain data."""
        layers = {"recipe": self.recipe} | {
            f"{group}/{option}": source for group, options in self.groups.items() for option, source in options.items()
        }
        return {
            "name": self.name,
            "file": self.file,
            "path": str(self.path),
            "choices": dict(_as_mapping(self.recipe.data.get("origin")).get("choices", {})),
            "data": {layer: dict(source.data) for layer, source in layers.items()},
            "locations": {layer: [asdict(p) for p in source.locations.values()] for layer, source in layers.items()},
        }

    def digest(self) -> str:
        """Returns a short hash of all layers and locations."""
        return hashlib.sha256(json.dumps(self.origin(), sort_keys=True).encode()).hexdigest()[:12]


def _write_if_changed(path: Path, text: str) -> None:
    """Writes a file atomically, unless it already has this content. Another process may be reading the file."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def read_layers(name: str, path: Path, overrides: Sequence[str] = ()) -> ConfigLayers:
    """Reads the file of a recipe, and the group files that the recipe and the overrides select.

    Args:
        name: name of the recipe, which a resolved recipe replaces by the name of the original recipe.

    Raises:
        ConfigError: a file has a mistake, or a selected group file does not exist.
    """
    recipe = _read_layer(path)
    origin = _as_mapping(recipe.data.get("origin"))
    errors = ErrorList()
    choices: dict[str, str | None] = {}
    groups: dict[str, dict[str, YamlSource]] = {}
    for group in GROUPS:
        files = group_files(group, path.parent)
        choice = recipe.data.get(group)
        if choice is not None and choice not in files:
            errors.add(recipe.locations[group], f"no {group} {choice!r}.{suggest(str(choice), files)}")
            choice = None
        choices[group] = choice
        options = {choice} if choice is not None else set()
        for option, override in _override_options(group, overrides):
            if option is ANY_OPTION:
                options |= set(files)
            elif option in files:
                options.add(option)
            elif option is not None:
                errors.add(Location(override=override), f"no {group} {option!r}.{suggest(str(option), files)}")
        groups[group] = {option: _read_group(files[option]) for option in sorted(options)}
    errors.raise_any(recipe.file)
    name = str(origin.get("name", name))
    if not _RECIPE_NAME.fullmatch(name):
        location = recipe.locations.get("origin.name", recipe.file)
        raise ConfigError(
            f"{location}: {name!r} cannot be a recipe's name; each part between `/` must begin with a letter or digit, "
            "without `$`."
        )
    # A resolved recipe is stored in a run's folder, but its relative paths start where it was first written.
    first_path = Path(origin["file"]) if isinstance(origin.get("file"), str) else path
    return ConfigLayers(name, recipe.file, first_path.resolve(), recipe, groups, choices, _runs(recipe, overrides))


def _runs(recipe: YamlSource, overrides: Sequence[str]) -> str:
    """Returns the folder of all runs: the value of the last override `runs=...`, or else of the key `runs`."""
    values = [override.value for override in recipe_overrides(overrides) if override.key == "runs"]
    return str(values[-1]) if values and values[-1] is not None else str(recipe.data.get("runs") or "runs")


def _read_layer(path: Path) -> YamlSource:
    source = name_listed_terms(read_yaml(path))
    return replace(source, data=expand(source.data))


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _override_options(group: str, overrides: Sequence[str]) -> list[tuple[Any, str]]:
    """Returns a pair (name of the group file, text of the override) for each file that an override selects.

    An override with a pattern such as `pair=glob(*)` gives `ANY_OPTION` as name.
    """
    return [
        (value, override.text)
        for override in recipe_overrides(overrides)
        if override.key == group
        for value in (override.values if override.values or not override.sweeps else (ANY_OPTION,))
    ]


def _read_group(path: Path) -> YamlSource:
    source = _read_layer(path)
    misplaced = [key for key in (*GROUPS, "stages", "origin") if key in source.data]
    if misplaced:
        raise ConfigError(
            f"{source.locations[misplaced[0]]}: a group file cannot set {misplaced[0]!r}; write it in the recipe."
        )
    return source
