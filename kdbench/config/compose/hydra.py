"""Merges the files of a recipe and its overrides with Hydra into plain data with the location of every key."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.config.compose.layers import CONFIG_NAME, ORIGIN, ConfigLayers
from kdbench.config.compose.merge import children_at, has_key, hydra_merge, remove_key, stale_keys
from kdbench.config.compose.overrides import (
    RecipeOverride,
    hydra_error_message,
    hydra_overrides,
    recipe_overrides,
    value_overrides,
)
from kdbench.config.compose.shorthand import expand
from kdbench.config.error_list import ErrorList
from kdbench.config.paths import GROUPS
from kdbench.config.yaml_reader import interpolation_error, iterate_scalars
from kdbench.errors import ConfigError, Location, suggest


@dataclass(frozen=True)
class ComposedRecipe:
    """A recipe after its group files and overrides were merged into it, as plain data.

    Attributes:
        file: name of the recipe's file in messages.
        path: full path of the recipe's file.
        locations: dotted key -> location (file and line, or override) at which the key was set.
        group_choices: group (`protocol` or `pair`) -> name of the selected group file.
    """

    name: str
    file: str
    path: str
    data: Mapping[str, Any]
    locations: Mapping[str, Location]
    group_choices: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@contextmanager
def job_composer(layers: ConfigLayers) -> Iterator[Callable[[Sequence[str]], ComposedRecipe]]:
    """Context manager that yields a function from a list of overrides to the composed recipe.

    Raises:
        ConfigError: the yielded function cannot apply an override, or an override has several values (a sweep).
    """
    with _initialized_hydra(layers):

        def compose_job(overrides: Sequence[str]) -> ComposedRecipe:
            return _compose_one(layers, overrides, {})

        yield compose_job


def compose(
    layers: ConfigLayers, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> ComposedRecipe:
    """Composes a recipe: merges its layers (files) and overrides.

    Args:
        values: dotted key -> plain value. The values are applied after the overrides.

    Raises:
        ConfigError: an override cannot be applied.
    """
    with _initialized_hydra(layers):
        return _compose_one(layers, overrides, values or {})


@contextmanager
def _initialized_hydra(layers: ConfigLayers) -> Iterator[None]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with tempfile.TemporaryDirectory(prefix="kdbench-") as folder:
        layers.write(Path(folder))
        # Hydra is a singleton: a job of a multirun composes its teacher's recipe while its own Hydra is active.
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(config_dir=folder, version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = outer


def _compose_one(layers: ConfigLayers, overrides: Sequence[str], values: Mapping[str, Any]) -> ComposedRecipe:
    import hydra

    texts = hydra_overrides(overrides)
    sweep = next((override for override in recipe_overrides(overrides) if override.sweeps), None)
    if sweep is not None:
        location = Location(override=sweep.text)
        raise ConfigError(f"{location}: an override with several values needs a multirun; add `-m` to `kdbench train`.")
    _check_removals(layers, overrides)
    with translate_hydra_errors(overrides):
        try:
            config = hydra.compose(config_name=CONFIG_NAME, overrides=texts, return_hydra_config=True)
        except ValueError as error:  # Hydra's error for a group override whose value is not a name
            raise ConfigError(hydra_error_message(error, overrides)) from error
        return _read_config(config, layers.origin(), overrides, value_overrides(values))


def _check_removals(layers: ConfigLayers, overrides: Sequence[str]) -> None:
    """Raises a ConfigError for an override `~key` whose key does not exist."""
    choices = {**layers.choices, **{o.key: o.value for o in recipe_overrides(overrides) if o.selects_group}}
    data: Mapping[str, Any] = {}
    for group in GROUPS:
        source = layers.groups[group].get(str(choices[group]))
        data = hydra_merge(data, source.data) if source is not None else data
    data = hydra_merge(data, layers.recipe.data)
    for override in recipe_overrides(overrides):
        if override.selects_group or override.sweeps:
            continue
        removes = override.text.startswith("~") or (
            override.value is None and override.key.split(".")[0] in ("terms", "models", "data", "stages")
        )
        if removes and not has_key(data, override.key):
            parent, _, name = override.key.rpartition(".")
            hint = suggest(name, children_at(data, parent))
            message = f"the key {override.key!r}, which the override removes, does not exist.{hint}"
            raise ConfigError(f"{Location(override=override.text)}: {message}")
        data = hydra_merge(data, override.as_mapping())


def compose_job(config: Any, folder: Path, hydra_config: Any) -> ComposedRecipe:
    """Converts the config that Hydra composed for one job of its run or multirun to plain data with locations.

    Args:
        config: config of the job without the key `hydra`.
        folder: folder from which Hydra composed the job (see `ConfigLayers.write`).
        hydra_config: content of the key `hydra`.
    """
    from omegaconf import OmegaConf, open_dict

    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    full_config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    with open_dict(full_config):
        full_config.hydra = {"runtime": {"choices": dict(hydra_config.runtime.choices)}}
    overrides = job_overrides(hydra_config)
    with translate_hydra_errors(overrides):
        return _read_config(full_config, origin, overrides, [])


def job_overrides(hydra_config: Any) -> list[str]:
    """Returns the overrides of a job of Hydra as the user wrote them, without resolving interpolations."""
    from omegaconf import OmegaConf

    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return overrides


@dataclass
class _LayerStack:
    """Merges layers (group files, recipe, overrides) one after another, and records the location of every key.

    Attributes:
        stale: dotted keys of replaced parts. A later layer replaced the part, but Hydra's merge kept these keys of it.
    """

    data: dict[str, Any] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)

    def add_layer(self, layer: Mapping[str, Any], locations: Mapping[str, Location]) -> None:
        self._mark_stale(layer)
        self.data = hydra_merge(self.data, layer)
        self.locations |= locations

    def add_override(self, override: RecipeOverride) -> None:
        layer = override.as_mapping()
        if override.replaces:
            self._mark_stale(layer)
        self.data = hydra_merge(self.data, layer)
        self.locations |= override.key_locations()
        # Parents that no file contains, such as `optimiser` of `optimiser.lr=1`, were written by the override.
        for parent in _parent_keys(override.key):
            self.locations.setdefault(parent, Location(key=parent, override=override.text))

    def _mark_stale(self, layer: Mapping[str, Any]) -> None:
        self.stale = [key for key in self.stale if not has_key(layer, key)] + list(stale_keys(self.data, layer))


def _read_config(
    config: Any, origin: Mapping[str, Any], overrides: Sequence[str], extra_overrides: Sequence[RecipeOverride]
) -> ComposedRecipe:
    """Converts Hydra's config to plain data with locations.

    Removes keys of parts that a later layer replaced, and resolves interpolations.
    """
    from omegaconf import OmegaConf

    choices = {g: str(c) for g, c in config.hydra.runtime.choices.items() if g in GROUPS and c is not None}
    data: Any = OmegaConf.to_container(config, resolve=False)
    data.pop("hydra", None)
    stack = _LayerStack()
    # The order of the layers is that of Hydra's defaults list: groups, recipe, overrides.
    for layer in [*(f"{group}/{choices[group]}" for group in GROUPS if group in choices), "recipe"]:
        locations = {entry["key"]: Location(**entry) for entry in origin["locations"][layer]}
        stack.add_layer(origin["data"][layer], locations)
    for override in recipe_overrides(overrides):
        if not override.selects_group:
            stack.add_override(override)
    for override in extra_overrides:
        stack.add_override(override)
        data = hydra_merge(data, override.as_mapping())
    for key in stack.stale:
        remove_key(data, key)
    data = _resolve_interpolations(data, stack.locations, origin["file"])
    for group in (*GROUPS, "origin"):
        data.pop(group, None)
    return ComposedRecipe(
        name=origin["name"],
        file=origin["file"],
        path=origin["path"],
        data=expand(data),
        locations=stack.locations,
        group_choices={**{group: str(choice) for group, choice in origin["choices"].items()}, **choices},
        overrides=(*overrides, *(override.text for override in extra_overrides)),
    )


def _resolve_interpolations(data: Any, locations: Mapping[str, Location], file: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    errors = ErrorList()
    for key, value in iterate_scalars(data):
        message = interpolation_error(value) if isinstance(value, str) else None
        if message:
            errors.add(nearest_location(locations, key), message)
    errors.raise_any(file)
    try:
        return OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except InterpolationResolutionError as error:
        key = str(error.full_key)
        value = dict(iterate_scalars(data)).get(key, key)
        hint = suggest(str(value).strip("${}"), [name for name, _ in iterate_scalars(data)])
        message = f"{value!r} refers to itself, or to a key that does not exist.{hint}"
        raise ConfigError(f"{nearest_location(locations, key)}: {message}") from None


def _parent_keys(dotted: str) -> list[str]:
    """Returns all parents of a dotted key, such as `a.b` and `a` for `a.b.c`."""
    names = dotted.split(".")
    return [".".join(names[:count]) for count in range(len(names) - 1, 0, -1)]


def nearest_location(locations: Mapping[str, Location], key: str) -> Location:
    """Returns the location of a dotted key, or else the location of its nearest parent with a known location."""
    for parent in (key, *_parent_keys(key)) if key else ():
        if parent in locations:
            location = locations[parent]
            if parent == key:
                return location
            return Location(key=key, file=location.file, line=location.line, override=location.override)
    return Location(key=key, file=locations.get("", Location()).file)


@contextmanager
def translate_hydra_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Context manager that converts exceptions of Hydra and OmegaConf to a ConfigError that names the override."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(hydra_error_message(error, overrides)) from error
