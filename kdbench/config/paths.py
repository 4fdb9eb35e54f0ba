"""Locates the shipped recipes and groups, and resolves the name of a recipe to a file."""

from __future__ import annotations

from pathlib import Path

from kdbench.errors import ConfigError, Location, suggest

GROUPS = ("protocol", "pair")
"""The Hydra groups from which a recipe can select one file each. A later group overrides an earlier one."""


_PACKAGE = Path(__file__).resolve().parents[1]


def shared_folder(kind: str) -> Path:
    """Returns the path of the folder `configs` or `recipes`, in the installed package or else in the git checkout."""
    installed = _PACKAGE / "_share" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def recipe_names() -> list[str]:
    """Returns the names of the shipped recipes, such as `digits/kd`."""
    root = shared_folder("recipes")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_recipe(recipe: str, folder: Path | None = None, location: Location | str = "") -> tuple[str, Path]:
    """Finds the file of a recipe.

    Args:
        recipe: name of a shipped recipe such as `digits/kd`, or a path with or without `.yaml`. An existing file has
            precedence.
        folder: folder in which a relative path begins. The working directory is searched next.
        location: location at which the recipe is named, for the error message.

    Returns:
        Name of the recipe (the shipped name, or the file name without suffix), and path of its file.

    Raises:
        ConfigError: there is neither such a file nor such a shipped recipe.
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
    hint = suggest(recipe, recipe_names(), listing="`kdbench list recipes` lists all shipped recipes.")
    raise ConfigError(f"{prefix}no recipe {recipe!r}: it is neither a file nor a shipped recipe.{hint}")


def _recipe_name(path: Path, shipped: Path) -> str:
    resolved = path.resolve()
    if resolved.is_relative_to(shipped.resolve()):
        return resolved.relative_to(shipped.resolve()).with_suffix("").as_posix()
    return resolved.stem


def group_files(group: str, recipe_folder: Path) -> dict[str, Path]:
    """Returns name -> path for the files of a group: the shipped files, and files in the folder of the recipe.

    Args:
        group: name of the group, such as `pair`.
    """
    files = {path.stem: path for path in sorted((shared_folder("configs") / group).glob("*.yaml"))}
    files.update({path.stem: path for path in sorted((recipe_folder / group).glob("*.yaml"))})
    return files
