"""Hydra composes the layers of a recipe; what comes out is plain data that knows where each key was written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.config.compose.layers import CONFIG_NAME, ORIGIN, ConfigLayers
from kdbench.config.compose.merge import remove_key, stale_keys
from kdbench.config.compose.overrides import hydra_error_message, hydra_overrides, recipe_overrides
from kdbench.config.compose.shorthand import expand
from kdbench.config.error_list import ErrorList
from kdbench.config.paths import GROUPS
from kdbench.config.yaml_reader import interpolation_error, iterate_scalars
from kdbench.errors import ConfigError, Location, suggest


@dataclass(frozen=True)
class ComposedRecipe:
    """A recipe with its groups and overrides laid over each other, as plain data.

    file: its name in messages. path: where it lies. places: dotted key -> where its value was written.
    """

    name: str
    file: str
    path: str
    data: Mapping[str, Any]
    locations: Mapping[str, Location]
    group_choices: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@contextmanager
def job_composer(prepared: ConfigLayers) -> Iterator[Callable[[Sequence[str]], ComposedRecipe]]:
    """Gives a function that composes one job from its overrides, as the user wrote them.

    Raises:
        ConfigError: (the function) an override cannot be applied, or sweeps.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    def compose_one(overrides: Sequence[str]) -> ComposedRecipe:
        given = hydra_overrides(overrides)
        swept = [a for a in recipe_overrides(overrides) if a.sweeps]
        if swept:
            place = Location(override=swept[0].text)
            raise ConfigError(f"{place}: several values need a multirun; add -m to `kdbench train`.")
        _check_removals(prepared, overrides)
        with translate_hydra_errors(overrides):
            try:
                config = hydra.compose(config_name=CONFIG_NAME, overrides=given, return_hydra_config=True)
            except ValueError as error:  # Hydra's own complaint about a group override that is no name
                raise ConfigError(hydra_error_message(error, overrides)) from error
            return _read(config, prepared.origin(), overrides)

    with tempfile.TemporaryDirectory(prefix="kdbench-") as folder:
        prepared.write(Path(folder))
        outer = GlobalHydra.instance().hydra  # a job of Hydra's own asks for its teacher's recipe
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(config_dir=folder, version_base="1.3"):
                yield compose_one
        finally:
            GlobalHydra.instance().hydra = outer


def _check_removals(prepared: ConfigLayers, overrides: Sequence[str]) -> None:
    """Finds fault with an override that removes something which is not there."""
    chosen = {**prepared.choices, **{a.key: a.value for a in recipe_overrides(overrides) if a.selects_group}}
    below: Mapping[str, Any] = {}
    for group in GROUPS:
        source = prepared.groups[group].get(str(chosen[group]))
        below = _deep(below, source.data) if source is not None else below
    below = _deep(below, prepared.recipe.data)
    for assignment in recipe_overrides(overrides):
        removes = assignment.text.startswith("~") or (
            assignment.value is None and assignment.key.split(".")[0] in ("terms", "models", "data", "stages")
        )
        if removes and not assignment.selects_group and not assignment.sweeps and not _has(below, assignment.key):
            parent, _, last = assignment.key.rpartition(".")
            siblings = _at(below, parent)
            raise ConfigError(
                f"{Location(override=assignment.text)}: there is no {assignment.key!r} to remove.{suggest(last, siblings)}"
            )
        if not assignment.selects_group and not assignment.sweeps:
            below = _deep(below, assignment.as_mapping())


def compose(prepared: ConfigLayers, overrides: Sequence[str] = ()) -> ComposedRecipe:
    """Composes one job, without a sweep.

    Raises:
        ConfigError: an override cannot be applied.
    """
    with job_composer(prepared) as compose_one:
        return compose_one(overrides)


def compose_job(config: Any, folder: Path, hydra_config: Any) -> ComposedRecipe:
    """What a job of Hydra's own run or multirun got; `config` is the job's config without Hydra's node."""
    from omegaconf import OmegaConf, open_dict

    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    whole = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    with open_dict(whole):
        whole.hydra = {"runtime": {"choices": dict(hydra_config.runtime.choices)}}
    overrides = job_overrides(hydra_config)
    with translate_hydra_errors(overrides):
        return _read(whole, origin, overrides)


def job_overrides(hydra_config: Any) -> list[str]:
    """The overrides of a job as they were written: read item by item, Hydra's node gives values for references."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return written


def _read(config: Any, origin: Mapping[str, Any], overrides: Sequence[str]) -> ComposedRecipe:
    """Turns Hydra's config into plain data with places, and takes out what no layer above meant to keep."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    choices = {g: str(c) for g, c in config.hydra.runtime.choices.items() if g in GROUPS and c is not None}
    recorded = {g: str(c) for g, c in origin["choices"].items()}
    given = [a for a in recipe_overrides(overrides) if not a.selects_group]
    raw: Any = OmegaConf.to_container(config, resolve=False)
    raw.pop("hydra", None)
    places: dict[str, Location] = {}
    below: dict[str, Any] = {}
    stale: list[str] = []
    for layer in [*(f"{group}/{choices[group]}" for group in GROUPS if group in choices), "recipe"]:
        data = origin["data"][layer]
        stale = [key for key in stale if not _has(data, key)] + list(stale_keys(below, data))
        below = _deep(below, data)
        places |= {entry["key"]: Location(**entry) for entry in origin["places"][layer]}
    for assignment in given:
        data = assignment.as_mapping()
        if isinstance(assignment.value, Mapping) or assignment.key.rpartition(".")[2] in ("epochs", "steps"):
            stale = [key for key in stale if not _has(data, key)] + list(stale_keys(below, data))
        below = _deep(below, data)
        places |= assignment.locations()
        for around in _around(assignment.key):  # where no file wrote `optimiser`, `optimiser.lr=1` did
            places.setdefault(around, Location(key=around, override=assignment.text))
    for key in stale:
        remove_key(raw, key)
    faults = ErrorList()
    for key, value in iterate_scalars(raw):
        fault = interpolation_error(value) if isinstance(value, str) else None
        if fault:
            faults.add(nearest_location(places, key), fault)
    faults.raise_any(origin["file"])
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except InterpolationResolutionError as error:
        key = str(error.full_key)
        value = dict(iterate_scalars(raw)).get(key, key)
        known = suggest(str(value).strip("${}"), [name for name, _ in iterate_scalars(raw)])
        said = f"{value!r} refers to a key that does not exist, or back to itself.{known}"
        raise ConfigError(f"{nearest_location(places, key)}: {said}") from None
    for group in (*GROUPS, "origin"):
        resolved.pop(group, None)
    resolved = expand(resolved)
    return ComposedRecipe(
        origin["name"], origin["file"], origin["path"], resolved, places, {**recorded, **choices}, tuple(overrides)
    )


def _around(dotted: str) -> list[str]:
    """The keys around a dotted key: those of `a.b.c` are `a.b` and `a`."""
    names = dotted.split(".")
    return [".".join(names[:count]) for count in range(len(names) - 1, 0, -1)]


def _inside(data: Any) -> Mapping[str, Any]:
    """What a dotted key goes on to: the keys of a mapping, the numbers of a list."""
    if isinstance(data, list):
        return {str(number): item for number, item in enumerate(data)}
    return data if isinstance(data, Mapping) else {}


def _at(data: Any, dotted: str) -> Mapping[str, Any]:
    """What is at a dotted key, by name; empty where there is nothing inside."""
    for name in dotted.split(".") if dotted else ():
        data = _inside(data).get(name)
    return _inside(data)


def _has(data: Any, dotted: str) -> bool:
    parent, _, last = dotted.rpartition(".")
    return last in _at(data, parent)


def _deep(lower: Any, upper: Mapping[str, Any]) -> dict[str, Any]:
    """A plain deep merge, as Hydra does it; into a list by the numbers of its items."""
    result = dict(_inside(lower))
    for key, value in upper.items():
        below = result.get(key)
        numbered = isinstance(below, list) and isinstance(value, Mapping) and set(value) <= set(_inside(below))
        merges = numbered or (isinstance(below, Mapping) and isinstance(value, Mapping))
        result[key] = _deep(below, value) if merges else value
    return result


def nearest_location(locations: Mapping[str, Location], key: str) -> Location:
    """The place of a dotted key, or of the nearest mapping around it that was written somewhere."""
    around = key
    while around:
        if around in locations:
            found = locations[around]
            return (
                found if around == key else Location(key=key, file=found.file, line=found.line, override=found.override)
            )
        around = around.rpartition(".")[0]
    found = locations.get("", Location())
    return Location(key=key, file=found.file)


@contextmanager
def translate_hydra_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turns the exceptions of Hydra and OmegaConf into a ConfigError that names the override."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(hydra_error_message(error, overrides)) from error
