"""Locates the shipped recipes and groups, and resolves the name of a recipe to a file."""

from __future__ import annotations

from pathlib import Path

from kdbench.errors import ConfigError, Location, suggest

GROUPS = ("protocol", "pair")
"""The Hydra groups from which a recipe can select an option, from the lowest layer to the highest."""


_PACKAGE = Path(__file__).resolve().parents[1]


def shared_folder(kind: str) -> Path:
    """Returns the folder `configs` or `recipes`: of the installed wheel, or else of the checkout."""
    installed = _PACKAGE / "_share" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def recipe_names() -> list[str]:
    """Returns the names of the shipped recipes, such as `digits/kd`."""
    root = shared_folder("recipes")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_recipe(recipe: str, folder: Path | None = None, location: Location | str = "") -> tuple[str, Path]:
    """Resolves a recipe to its file.

    Args:
        recipe: a shipped name such as `digits/kd`, or a path with or without `.yaml`. An existing file wins.
        folder: searched for a path before the working directory.
        location: location of the reference, for the error message.

    Returns:
        The recipe's name (the shipped name, or the file's stem) and its path.

    Raises:
        ConfigError: neither a file nor a shipped recipe exists.
    """
    shipped = shared_folder("recipes")
    for parent in (folder, Path.cwd()):
        if parent is None:
            continue
        path = Path(recipe).expanduser()
        path = path if path.is_absolute() else parent / path
        for candidate in (path, path.with_name(f"{path.name}.yaml")):
            if candidate.suffix in (".yaml", ".yml") and candidate.is_file():
                return _recipe_name(candidate, shipped), candidate.resolve()
    path = shipped / f"{recipe}.yaml"
    if recipe and path.resolve().is_relative_to(shipped.resolve()) and path.is_file():
        return recipe, path
    prefix = f"{location}: " if str(location) else ""
    raise ConfigError(
        f"{prefix}no recipe {recipe!r}: it is neither a file nor a shipped recipe.{suggest(recipe, recipe_names())}"
    )


def _recipe_name(path: Path, shipped: Path) -> str:
    resolved = path.resolve()
    if resolved.is_relative_to(shipped.resolve()):
        return resolved.relative_to(shipped.resolve()).with_suffix("").as_posix()
    return resolved.stem


def group_files(group: str, recipe_folder: Path) -> dict[str, Path]:
    """Returns option -> file of a group: the shipped options, and those beside the user's recipe."""
    files = {path.stem: path for path in sorted((shared_folder("configs") / group).glob("*.yaml"))}
    files.update({path.stem: path for path in sorted((recipe_folder / group).glob("*.yaml"))})
    return files
