"""Parses the overrides of a command line and rewrites them for Hydra.

A plain `key=value` becomes `++key=value`, because Hydra rejects a key that the recipe leaves at its default. Unknown
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
    """One override of a key of the recipe.

    Attributes:
        text: the override as the user wrote it.
        key: the dotted key.
        values: the value, or all values of a sweep. Empty for a sweep over a pattern such as `glob(resnet*)`.
        sweeps: whether it needs a multirun.
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
        """True for a mapping, `epochs` and `steps`, which may make keys of the layers below stale."""
        return isinstance(self.value, Mapping) or self.key.rpartition(".")[2] in ("epochs", "steps")

    def as_mapping(self) -> dict[str, Any]:
        """Returns the override as a fragment of a recipe: `a.b=1` is {a: {b: 1}}."""
        result: Any = self.value
        for name in reversed(self.key.split(".")):
            result = {name: result}
        return result

    def key_locations(self) -> dict[str, Location]:
        """Returns the location of the override's key and of every key below it."""
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
            f"{Location(override=text)}: not an override such as `seed=2`, `terms.kd.temperature=4` or `~terms.kd` "
            f"({reason})"
        ) from None


def is_hydra_override(text: str) -> bool:
    """Returns whether an override sets a key of Hydra's own node (`hydra.sweep.dir=...`, `hydra/launcher=joblib`)."""
    key = _parse(text).key_or_group
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def override_value(text: str) -> Any:
    """Returns the value of one override."""
    return _parse(text).value()


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Rewrites overrides for Hydra.

    Raises:
        ConfigError: an override is malformed, or uses a resolver.
    """
    rewritten = []
    for text in overrides:
        parsed = _parse(text)
        key = parsed.key_or_group
        if key == "hydra":
            raise ConfigError(
                f"{Location(override=text)}: `hydra` is Hydra's own node; set one of its keys, hydra.KEY=..."
            )
        if is_hydra_override(text):
            rewritten.append(text)
            continue
        error = interpolation_error(text)
        if error is None and any(part.startswith("_") and part.endswith("_") for part in key.split(".")):
            error = f"the key {key!r} is rejected; a recipe cannot call Python."
        if error is not None:
            raise ConfigError(f"{Location(override=text)}: {error}")
        bare = text.lstrip("+")
        rewritten.append(text if parsed.is_delete() else bare if key in GROUPS else f"++{bare}")
    return rewritten


def recipe_overrides(overrides: Sequence[str]) -> list[RecipeOverride]:
    """Parses the overrides of the recipe's own keys; leaves out those of Hydra's node."""
    return [_recipe_override(text) for text in overrides if not is_hydra_override(text)]


def value_overrides(values: Mapping[str, Any]) -> list[RecipeOverride]:
    """Returns plain values by dotted key as overrides, without a round trip through Hydra's override grammar."""
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
    """Returns the jobs of Hydra's basic sweeper, each as a list of overrides without sweeps.

    Needs an initialised Hydra, which resolves the options of `pair=glob(*)`.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    texts = [text for text in hydra_overrides(overrides) if not is_hydra_override(text)]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def hydra_error_message(error: Exception, overrides: Sequence[str]) -> str:
    """Returns an error of Hydra or OmegaConf as one paragraph, with the override that caused it."""
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
        message = f"the value below it is a list, and a mapping cannot merge with a list; write `{key}=null` before it."
    return f"{Location(override=culprits[0])}: {message}"
