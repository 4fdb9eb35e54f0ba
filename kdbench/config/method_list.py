"""Reads the list of methods: `configs/methods.yaml`, and the `methods` and `notes` of the shipped recipes.

The status of a method is computed. It is *runs* if a recipe has the id of the method under its key `methods`.
Otherwise it follows from the row of the method in the list: *runs as* if the row has `variant_of` (another recipe
with overrides), *not stated* if the row has `unstated`, else *not yet*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdbench.config.paths import recipe_names, shared_folder
from kdbench.config.schema import Notes
from kdbench.config.yaml_reader import read_yaml
from kdbench.errors import ConfigError, suggest

RUNS, RUNS_AS, NOT_YET, NOT_STATED = "runs", "runs as", "not yet", "not stated"


STATUSES = (RUNS, RUNS_AS, NOT_YET, NOT_STATED)


_EXCLUSIVE_KEYS = ("variant_of", "missing", "unstated")


_TEXT_KEYS = ("title", "paper", "field", "mechanism")


_ROW_KEYS = ("method", *_TEXT_KEYS, *_EXCLUSIVE_KEYS)


_NOTE_LISTS = ("source", "differs", "scaled_down")


@dataclass(frozen=True)
class Variant:
    """The recipe and the overrides that implement a method which has no recipe of its own."""

    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        id: key of the method in the list, such as `m058`, or `x-kd` for a method of the section `beyond`.
        method: usual name of the method.
        title: title of the paper.
        paper: arXiv id (`arXiv:1503.02531`) or venue of the paper; empty if neither was found.
        field: field of application.
        mechanism: summary of the method in one line.
        recipes: names of the shipped recipes that implement the method.
        variant_of: recipe and overrides that implement the method; None: there is no such variant.
        missing: features that the method needs and kdbench does not have yet.
        unstated: details of the method that neither the paper's abstract nor another source states.
        beyond: whether the method is in the section `beyond` of the list, whose methods are not counted.
    """

    id: str
    method: str
    title: str = ""
    paper: str = ""
    field: str = ""
    mechanism: str = ""
    recipes: tuple[str, ...] = ()
    variant_of: Variant | None = None
    missing: str = "a recipe"
    unstated: str = ""
    beyond: bool = False

    @property
    def status(self) -> str:
        """Status of the method: "runs", "runs as" (a recipe with overrides), "not yet" or "not stated"."""
        if self.recipes:
            return RUNS
        if self.variant_of is not None:
            return RUNS_AS
        return NOT_STATED if self.unstated else NOT_YET

    @property
    def link(self) -> str:
        """Web address of the paper on arXiv, or an empty string if only the venue is known."""
        return f"https://arxiv.org/abs/{self.paper.removeprefix('arXiv:')}" if self.paper.startswith("arXiv:") else ""


@dataclass(frozen=True)
class MethodList:
    """The list of methods.

    Attributes:
        methods: all methods in the order of the file.
        language_model: id -> name of each method that needs a language model. kdbench does not implement them.
    """

    methods: tuple[Method, ...]
    language_model: Mapping[str, str]

    def counts(self) -> dict[str, int]:
        """Returns status -> number of methods."""
        return {status: sum(method.status == status for method in self.methods) for status in STATUSES}


def read_methods(
    path: Path | None = None, claims: Mapping[str, Sequence[str]] | None = None, *, strict: bool = True
) -> MethodList:
    """Reads the list of methods, and finds the recipes that implement each method.

    Args:
        path: path of the list; None: the shipped `configs/methods.yaml`.
        claims: id -> names of recipes that implement the method; None: read from the shipped recipes.
        strict: whether an unknown id in the key `methods` of a recipe is an error. False: the id is ignored.

    Raises:
        ConfigError: a row lacks `method`, has an unknown key or has two keys that exclude each other, or (if `strict`)
            a recipe has an unknown id.
    """
    source = read_yaml(path or shared_folder("configs") / "methods.yaml")
    claims = recipe_claims() if claims is None else claims
    rows: dict[str, Method] = {}
    for section in ("methods", "beyond"):
        for name, row in (source.data.get(section) or {}).items():
            rows[name] = _method(name, row, section == "beyond", tuple(claims.get(name, ())))
    language_model = dict(source.data.get("language_model") or {})
    for name, recipes in claims.items():
        if strict and name not in rows:
            hint = "This method needs a language model." if name in language_model else suggest(name, rows).strip()
            raise ConfigError(f"{recipes[0]}: methods: no method {name!r} in configs/methods.yaml. {hint}".rstrip())
    return MethodList(tuple(rows.values()), language_model)


def recipe_claims() -> dict[str, list[str]]:
    """Returns method id -> names of the shipped recipes that implement the method."""
    claims: dict[str, list[str]] = {}
    for recipe in recipe_names():
        value = _top_level_value(shared_folder("recipes") / f"{recipe}.yaml", "methods") or []
        for method_id in value if isinstance(value, list) else [value]:
            claims.setdefault(str(method_id), []).append(recipe)
    return claims


def recipe_notes(recipe: str) -> Notes | None:
    """Returns the `notes` of a shipped recipe, or None if the recipe has none."""
    notes = _top_level_value(shared_folder("recipes") / f"{recipe}.yaml", "notes")
    if notes is None:
        return None
    return Notes(basis=notes["basis"], **{key: tuple(notes.get(key, ())) for key in _NOTE_LISTS})


def _top_level_value(path: Path, key: str) -> Any:
    """Parses the value of one top-level key of a recipe file. Returns None if the file does not have the key."""
    # The list reads all recipes: parsing their whole files takes a second.
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:") or (lines and (not line or line[0] in " -#")):
            lines.append(line)
        elif lines:
            break
    return yaml.safe_load("\n".join(lines))[key] if lines else None


def _method(name: str, row: Any, beyond: bool, recipes: tuple[str, ...]) -> Method:
    location = f"configs/methods.yaml: {name}"
    if not isinstance(row, dict) or not row.get("method"):
        raise ConfigError(f"{location}: expected a mapping with the key `method`.")
    for key in row:
        if key not in _ROW_KEYS:
            raise ConfigError(f"{location}: no key {key!r}.{suggest(key, _ROW_KEYS)}")
    present = [key for key in _EXCLUSIVE_KEYS if row.get(key)]
    if len(present) > 1:
        raise ConfigError(f"{location}: {' and '.join(present)} exclude each other.")
    texts: dict[str, Any] = {
        key: str(row[key]) for key in ("method", *_TEXT_KEYS, "missing", "unstated") if row.get(key)
    }
    variant = _variant(row["variant_of"], location) if row.get("variant_of") else None
    return Method(id=name, recipes=recipes, variant_of=variant, beyond=beyond, **texts)


def _variant(value: Any, location: str) -> Variant:
    if not isinstance(value, dict) or set(value) != {"recipe", "overrides"} or not isinstance(value["overrides"], list):
        raise ConfigError(f"{location}: expected variant_of: {{recipe: NAME, overrides: [key=value, ...]}}.")
    return Variant(str(value["recipe"]), tuple(str(override) for override in value["overrides"]))
