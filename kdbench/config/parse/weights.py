"""Parses the key `weights` of a role: the result of another recipe, an earlier stage, or a checkpoint file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from kdbench.config.parse.keys import KeyReader
from kdbench.config.parse.parts import read_part
from kdbench.config.paths import find_recipe
from kdbench.config.schema import WeightsConfig, declared_keys
from kdbench.config.yaml_reader import iterate_scalars, read_yaml
from kdbench.errors import ConfigError
from kdbench.registry import MODELS

_KINDS = ("recipe", "stage", "path")


_KIND_OF_KEY = {"model": "recipe", "epoch": "recipe", "key": "path", "initial": "stage"}
"""Key of `weights` -> kind of weights to which the key applies."""


def read_weights(role: KeyReader, folder: Path, ancestors: tuple[str, ...]) -> WeightsConfig | None:
    """Parses the key `weights` of a role. References to stages are already resolved to full names.

    Args:
        role: reader of the role's keys.
        folder, ancestors: see `read_roles`.

    Returns:
        The origin of the weights, or None if the role has no `weights`, or after an error.
    """
    if not role.has("weights"):
        return None
    reader = KeyReader(
        role.context, role.get_raw("weights"), role.subkey("weights"), "weights", declared_keys(WeightsConfig)
    )
    kinds = [kind for kind in _KINDS if reader.has(kind)]
    if len(kinds) != 1:
        suffix = f", got {' and '.join(kinds)}" if kinds else ""
        reader.error("", f"weights need exactly one of the keys `recipe`, `stage` and `path`{suffix}.")
    for name, kind in _KIND_OF_KEY.items():
        if reader.has(name) and kinds and kind not in kinds:
            reader.error(name, f"`{name}` applies to weights with `{kind}`, not with `{kinds[0]}`.")
    model = reader.get_raw("model")
    if model is not None:
        read_part(reader.context, MODELS, model, reader.subkey("model"), MODELS.injected)
    fields = reader.read_plain_fields(WeightsConfig)
    if len(set(fields["role"])) < len(fields["role"]):
        reader.error("role", f"a role is listed twice in {', '.join(fields['role'])}.")
    fields |= {
        "recipe": _resolve_recipe(reader, folder, ancestors),
        "model": model,
        "stage": reader.read("stage"),
        "location": reader.location(),
    }
    return WeightsConfig(**fields) if len(kinds) == 1 else None


def _resolve_recipe(reader: KeyReader, folder: Path, ancestors: tuple[str, ...]) -> str | None:
    """Returns the name of the recipe that has the weights, if kdbench ships this recipe, else the full path."""
    recipe = reader.read("recipe")
    if recipe is None:
        return None
    try:
        name, path = find_recipe(recipe, folder, reader.location("recipe"))
    except ConfigError as error:
        reader.context.errors.add("", str(error))
        return recipe
    if _needs_any(path, ancestors):
        reader.error("recipe", f"the recipes form a cycle: {recipe!r} takes weights from this recipe.")
    return name if recipe == name else str(path)


def _needs_any(path: Path, ancestors: tuple[str, ...]) -> bool:
    """Returns whether a recipe takes weights from a recipe in `ancestors`, directly or through other recipes."""
    pending, visited = [path], set()
    while pending:
        current = pending.pop()
        if str(current.resolve()) in ancestors:
            return True
        if current in visited:
            continue
        visited.add(current)
        # A mistake in another recipe is reported when that recipe is loaded.
        with suppress(ConfigError):
            references = [
                value
                for key, value in iterate_scalars(read_yaml(current).data)
                if key.endswith(("weights.recipe", "weights.initial.recipe"))
            ]
            pending += [find_recipe(str(reference), current.parent)[1] for reference in references]
    return False
