"""Parses the overrides of a command line and converts them to overrides of Hydra.

A plain `key=value` becomes `++key=value`, because Hydra rejects an override of a key that no file contains. Unknown
keys are reported later, when the composed recipe is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kdbench.config.paths import GROUPS
from kdbench.config.yaml_reader import interpolation_error
from kdbench.errors import ConfigError, Location


@dataclass(frozen=True)
class RecipeOverride:
    """A parsed override of a key of the recipe.

    Attributes:
        text: override as the user wrote it.
        key: dotted key that the override sets.
        values: one value, or all values of a sweep. Empty for a sweep over a pattern such as `glob(resnet*)`.
        sweeps: whether the override is a sweep, which only a multirun allows.
    """

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

    @property
    def replaces(self) -> bool:
        """Returns whether the override may replace keys of the files: it sets a mapping, `epochs` or `steps`."""
        return isinstance(self.value, Mapping) or self.key.rpartition(".")[2] in ("epochs", "steps")

    def as_mapping(self) -> dict[str, Any]:
        """Returns the override as a nested mapping, such as {a: {b: 1}} for `a.b=1`."""
        result: Any = self.value
        for name in reversed(self.key.split(".")):
            result = {name: result}
        return result

    def key_locations(self) -> dict[str, Location]:
        """Returns dotted key -> location, for the key of the override and for every key in its value."""
        keys = [self.key]
        if isinstance(self.value, Mapping):
            keys += [f"{self.key}.{name}" for name in _dotted_keys(self.value)]
        return {key: Location(key=key, override=self.text) for key in keys}


def _dotted_keys(data: Mapping[str, Any]) -> list[str]:
    keys = []
    for name, value in data.items():
        keys.append(str(name))
        if isinstance(value, Mapping):
            keys += [f"{name}.{key}" for key in _dotted_keys(value)]
    return keys


@lru_cache(maxsize=1024)
def _parse(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except HydraException as error:
        reason = " ".join(str(error).split("\nSee https", 1)[0].split())
        raise ConfigError(
            f"{Location(override=text)}: an override has a form such as `seed=2`, `terms.kd.temperature=4` or "
            f"`~terms.kd` ({reason})"
        ) from None


def is_hydra_override(text: str) -> bool:
    """Returns whether an override is for Hydra itself (such as `hydra.sweep.dir=...` or `hydra/launcher=joblib`)."""
    key = _parse(text).key_or_group
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def override_value(text: str) -> Any:
    """Returns the value in the text of an override, such as 2 for `seed=2`, as plain data."""
    return _parse(text).value()


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Converts the user's overrides to Hydra's syntax, such as `seed=2` to `++seed=2`.

    Raises:
        ConfigError: an override is malformed, or uses a resolver such as `${oc.env:HOME}`.
    """
    rewritten = []
    for text in overrides:
        parsed = _parse(text)
        key = parsed.key_or_group
        if key == "hydra":
            raise ConfigError(
                f"{Location(override=text)}: `hydra` cannot be replaced; set one of its keys: `hydra.KEY=VALUE`."
            )
        if is_hydra_override(text):
            rewritten.append(text)
            continue
        error = interpolation_error(text)
        if error is None and any(part.startswith("_") and part.endswith("_") for part in key.split(".")):
            error = f"the key {key!r} is rejected, because a recipe cannot call Python."
        if error is not None:
            raise ConfigError(f"{Location(override=text)}: {error}")
        bare = text.lstrip("+")
        rewritten.append(text if parsed.is_delete() else bare if key in GROUPS else f"++{bare}")
    return rewritten


def recipe_overrides(overrides: Sequence[str]) -> list[RecipeOverride]:
    """Parses the overrides of the recipe's keys. Overrides for Hydra itself are left out."""
    return [_recipe_override(text) for text in overrides if not is_hydra_override(text)]


def value_overrides(values: Mapping[str, Any]) -> list[RecipeOverride]:
    """Converts a mapping (dotted key -> plain value) to overrides. The values keep their types."""
    return [RecipeOverride(f"{key}={json.dumps(value)}", key, (value,)) for key, value in values.items()]


def _recipe_override(text: str) -> RecipeOverride:
    parsed = _parse(text)
    without_plus = text.lstrip("+")
    if parsed.is_delete():
        return RecipeOverride(text, parsed.key_or_group, (None,))
    if not parsed.is_sweep_override():
        return RecipeOverride(without_plus, parsed.key_or_group, (parsed.value(),))
    from hydra.core.override_parser.types import QuotedString, ValueType

    if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP or not parsed.is_discrete_sweep():
        return RecipeOverride(without_plus, parsed.key_or_group, (), sweeps=True)
    values = tuple(value.text if isinstance(value, QuotedString) else value for value in parsed.sweep_iterator())
    return RecipeOverride(without_plus, parsed.key_or_group, values, sweeps=True)


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Expands overrides with several values to jobs, as Hydra's basic sweeper does.

    Hydra must be initialised, because it finds the group files of an override such as `pair=glob(*)`.

    Returns:
        For each job, a list of overrides with one value each.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    texts = [text for text in hydra_overrides(overrides) if not is_hydra_override(text)]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def hydra_error_message(error: Exception, overrides: Sequence[str]) -> str:
    """Converts an exception of Hydra or OmegaConf to a message of one paragraph that names the responsible override."""
    messages = [str(error)]
    cause = error.__cause__
    if cause is not None and str(cause) not in messages[0]:
        messages.append(str(cause))
    message = " ".join(" ".join(messages).split())
    culprits = [text for text in overrides if text.lstrip("+~").split("=", 1)[0] in message]
    if not culprits:
        return message
    if "Cannot merge DictConfig with ListConfig" in message:
        key = culprits[0].lstrip("+~").split("=", 1)[0]
        message = f"a mapping cannot be merged with the list under `{key}`; put `{key}=null` before this override."
    return f"{Location(override=culprits[0])}: {message}"
