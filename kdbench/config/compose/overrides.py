"""The overrides of a command line, as the user wrote them and as Hydra gets them.

A plain `key=value` goes in as `++key=value`, because Hydra refuses a key that the recipe leaves at its default; the
validator refuses the keys that do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kdbench.config.paths import GROUPS
from kdbench.config.yaml_reader import interpolation_error
from kdbench.errors import ConfigError, Location


@dataclass(frozen=True)
class RecipeOverride:
    """One override of a recipe's key. `values` has several entries only where it sweeps."""

    text: str
    key: str
    values: tuple[Any, ...]
    sweeps: bool = False

    @property
    def value(self) -> Any:
        return self.values[0] if self.values else None

    @property
    def selects_group(self) -> bool:
        return self.key in GROUPS

    def as_mapping(self) -> dict[str, Any]:
        """The override as a fragment of a recipe: `a.b=1` is {a: {b: 1}}."""
        result: Any = self.value
        for name in reversed(self.key.split(".")):
            result = {name: result}
        return result

    def locations(self) -> dict[str, Location]:
        keys = [self.key]
        if isinstance(self.value, Mapping):
            keys += [f"{self.key}.{name}" for name in _paths(self.value)]
        return {key: Location(key=key, override=self.text) for key in keys}


def _paths(data: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in data.items():
        found.append(str(name))
        if isinstance(value, Mapping):
            found += [f"{name}.{inner}" for inner in _paths(value)]
    return found


@lru_cache(maxsize=1024)
def _parse(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except HydraException as error:
        said = " ".join(str(error).split("\nSee https", 1)[0].split())
        raise ConfigError(
            f"{Location(override=text)}: this is no override such as `seed=2`, `terms.kd.temperature=4` or `~terms.kd` "
            f"({said})"
        ) from None


def is_hydra_override(text: str) -> bool:
    """Whether an override is meant for Hydra's own node (`hydra.sweep.dir=...`, `hydra/launcher=joblib`)."""
    key = _parse(text).key_or_group
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def override_value(text: str) -> Any:
    """The value of one override."""
    return _parse(text).value()


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra gets them.

    Raises:
        ConfigError: one is malformed, or reaches for a resolver.
    """
    result = []
    for text in overrides:
        parsed = _parse(text)
        key = parsed.key_or_group
        if key == "hydra":
            raise ConfigError(
                f"{Location(override=text)}: `hydra` is Hydra's own node; set one of its keys, hydra.KEY=..."
            )
        if is_hydra_override(text):
            result.append(text)
            continue
        fault = interpolation_error(text)
        if fault is None and any(part.startswith("_") and part.endswith("_") for part in key.split(".")):
            fault = f"the key {key!r} is refused; a recipe cannot call Python."
        if fault is not None:
            raise ConfigError(f"{Location(override=text)}: {fault}")
        bare = text.lstrip("+")
        result.append(text if parsed.is_delete() else bare if key in GROUPS else f"++{bare}")
    return result


def recipe_overrides(overrides: Sequence[str]) -> list[RecipeOverride]:
    """The overrides of the recipe's own keys."""
    return [_assignment(text) for text in overrides if not is_hydra_override(text)]


def _assignment(text: str) -> RecipeOverride:
    parsed = _parse(text)
    shown = text.lstrip("+")
    if parsed.is_delete():
        return RecipeOverride(text, parsed.key_or_group, (None,))
    if not parsed.is_sweep_override():
        return RecipeOverride(shown, parsed.key_or_group, (parsed.value(),))
    from hydra.core.override_parser.types import QuotedString, ValueType

    if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP or not parsed.is_discrete_sweep():
        return RecipeOverride(shown, parsed.key_or_group, (), sweeps=True)
    values = tuple(v.text if isinstance(v, QuotedString) else v for v in parsed.sweep_iterator())
    return RecipeOverride(shown, parsed.key_or_group, values, sweeps=True)


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs that Hydra's basic sweeper makes of the overrides, each as a list without sweeps.

    Needs an initialised Hydra, which knows the options that `pair=glob(*)` stands for.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    own = [text for text in hydra_overrides(overrides) if not is_hydra_override(text)]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(own)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def hydra_error_message(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's or OmegaConf's complaint in one paragraph, with the override that it is about."""
    parts = [str(error)]
    cause = error.__cause__
    if cause is not None and str(cause) not in parts[0]:
        parts.append(str(cause))
    said = " ".join(" ".join(parts).split())
    named = [text for text in overrides if text.lstrip("+~").split("=", 1)[0] in said]
    place = Location(override=named[0]) if named else ""
    if named and "Cannot merge DictConfig with ListConfig" in said:
        key = named[0].lstrip("+~").split("=", 1)[0]
        said = f"a list stands there, and a mapping is laid over mappings only; write `{key}=null` before it."
    return f"{place}: {said}" if place else said
