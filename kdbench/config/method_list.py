"""Reads the list of methods: `configs/methods.yaml`, and the `methods` and `notes` of the shipped recipes.

The status of a method is computed. It is *runs* if a recipe names the method under its key `methods`. Otherwise the row
decides: `variant_of` (runs as another recipe with overrides), `unstated` (not stated), else *not yet*.
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
    """The recipe and the overrides that turn it into another method."""

    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        id: the row's key, such as `m058`, or `x-kd` for a method beyond the catalogue.
        method: the usual name of the method.
        title: the title of the paper.
        paper: an arXiv id (`arXiv:1503.02531`) or a venue; empty if none was found.
        field: the field of application.
        mechanism: a summary of the method in one line.
        recipes: names of the shipped recipes that implement the method.
        variant_of: another recipe that implements the method with overrides.
        missing: the features that kdbench lacks for this method.
        unstated: the details that the abstract does not state and that were found nowhere else.
        beyond: True for a method that the catalogue does not count.
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
        """One of `STATUSES`."""
        if self.recipes:
            return RUNS
        if self.variant_of is not None:
            return RUNS_AS
        return NOT_STATED if self.unstated else NOT_YET

    @property
    def link(self) -> str:
        """The paper's address on arXiv; empty if only the venue is known."""
        return f"https://arxiv.org/abs/{self.paper.removeprefix('arXiv:')}" if self.paper.startswith("arXiv:") else ""


@dataclass(frozen=True)
class MethodList:
    """All methods in the order of the file, and the methods that need a language model: id -> name."""

    methods: tuple[Method, ...]
    language_model: Mapping[str, str]

    def counts(self) -> dict[str, int]:
        """Counts the methods of each status."""
        return {status: sum(method.status == status for method in self.methods) for status in STATUSES}


def read_methods(
    path: Path | None = None, claims: Mapping[str, Sequence[str]] | None = None, *, strict: bool = True
) -> MethodList:
    """Reads the list and assigns to each method the recipes that claim it.

    Args:
        path: another file than the shipped `configs/methods.yaml`.
        claims: id -> recipes; by default the claims of the shipped recipes.
        strict: False ignores claims of ids that the list does not contain.

    Raises:
        ConfigError: a row lacks `method`, has an unknown key or two exclusive keys, or a recipe claims an unknown id.
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
    """Reads which methods the shipped recipes implement: method id -> names of recipes."""
    claims: dict[str, list[str]] = {}
    for recipe in recipe_names():
        value = _top_level_value(shared_folder("recipes") / f"{recipe}.yaml", "methods") or []
        for method_id in value if isinstance(value, list) else [value]:
            claims.setdefault(str(method_id), []).append(recipe)
    return claims


def recipe_notes(recipe: str) -> Notes | None:
    """Reads the `notes` of a shipped recipe; None if it has none."""
    notes = _top_level_value(shared_folder("recipes") / f"{recipe}.yaml", "notes")
    if notes is None:
        return None
    return Notes(basis=notes["basis"], **{key: tuple(notes.get(key, ())) for key in _NOTE_LISTS})


def _top_level_value(path: Path, key: str) -> Any:
    """Parses one top-level key of a recipe; None if the file lacks it."""
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
