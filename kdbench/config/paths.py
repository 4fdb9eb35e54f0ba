"""Where the shipped recipes and groups lie, and how a recipe's name is turned into a file."""

from __future__ import annotations

from pathlib import Path

from kdbench.errors import ConfigError, Location, suggest

GROUPS = ("protocol", "pair")
"""The Hydra groups that a recipe may choose from, in the order in which they are laid under it."""


_PACKAGE = Path(__file__).resolve().parents[1]


def shared_folder(kind: str) -> Path:
    """The folder `configs` or `recipes`: inside an installed wheel, else beside the package in the checkout."""
    installed = _PACKAGE / "_share" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def recipe_names() -> list[str]:
    """The shipped recipes, such as `digits/kd`."""
    root = shared_folder("recipes")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_recipe(recipe: str, folder: Path | None = None, location: Location | str = "") -> tuple[str, Path]:
    """Finds a shipped recipe by name, or a file by its path.

    Args:
        recipe: `digits/kd`, or a path, with or without `.yaml`; a path wins when it names an existing file.
        base: another folder to look in for a path, before the working folder.
        where: the place that names it, for the message.

    Returns:
        its name (the shipped name, or the file's stem) and its path.
    """
    shipped = shared_folder("recipes")
    for parent in (folder, Path.cwd()):
        if parent is None:
            continue
        path = Path(recipe).expanduser()
        path = path if path.is_absolute() else parent / path
        for candidate in (path, path.with_name(f"{path.name}.yaml")):
            if candidate.suffix in (".yaml", ".yml") and candidate.is_file():
                return _name(candidate, shipped), candidate.resolve()
    path = shipped / f"{recipe}.yaml"
    if recipe and path.resolve().is_relative_to(shipped.resolve()) and path.is_file():
        return recipe, path
    place = f"{location}: " if str(location) else ""
    raise ConfigError(
        f"{place}no recipe {recipe!r}: it is neither a file nor a shipped recipe.{suggest(recipe, recipe_names())}"
    )


def _name(path: Path, shipped: Path) -> str:
    resolved = path.resolve()
    if resolved.is_relative_to(shipped.resolve()):
        return resolved.relative_to(shipped.resolve()).with_suffix("").as_posix()
    return resolved.stem


def group_files(group: str, recipe_folder: Path) -> dict[str, Path]:
    """The options of a group: shipped ones, and those in a folder of the group's name beside the user's recipe."""
    found = {path.stem: path for path in sorted((shared_folder("configs") / group).glob("*.yaml"))}
    found.update({path.stem: path for path in sorted((recipe_folder / group).glob("*.yaml"))})
    return found
