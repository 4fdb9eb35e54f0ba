"""The list of methods: `configs/methods.yaml`, and what the shipped recipes say they are.

A status is computed. A recipe that names a row under its key `methods` makes it *runs*; without one, the row's own
facts decide: `same_as` (runs as another recipe with keys), `unstated`, else *not yet*, with what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdbench.config.paths import recipe_names, shared_folder
from kdbench.config.yaml_reader import read_yaml
from kdbench.errors import ConfigError, suggest

RUNS, RUNS_AS, NOT_YET, NOT_STATED = "runs", "runs as", "not yet", "not stated"


STATUSES = (RUNS, RUNS_AS, NOT_YET, NOT_STATED)


_FACTS = ("same_as", "missing", "unstated")


_TEXTS = ("title", "paper", "field", "mechanism")


_KEYS = ("method", *_TEXTS, *_FACTS)


@dataclass(frozen=True)
class Variant:
    """Another recipe's wiring: `recipe` with the overrides `keys` is this method."""

    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One published method.

    id: its row, such as `m058`, or `x-kd` for a method beyond the catalogue (`beyond`). method: how the field calls it.
    paper: an arXiv id (`arXiv:1503.02531`) or a venue; empty where none was found. mechanism: one line of what it does.
    recipes: the shipped recipes that are this method. unstated: what the abstract does not tell and was not found.
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
        if self.recipes:
            return RUNS
        if self.variant_of is not None:
            return RUNS_AS
        return NOT_STATED if self.unstated else NOT_YET

    @property
    def link(self) -> str:
        """Where the paper is; empty where only its venue is known."""
        return f"https://arxiv.org/abs/{self.paper.removeprefix('arXiv:')}" if self.paper.startswith("arXiv:") else ""


@dataclass(frozen=True)
class MethodList:
    """Every row, in the order of the file, and the rows that need a language model: id -> name."""

    methods: tuple[Method, ...]
    language_model: Mapping[str, str]

    def counts(self) -> dict[str, int]:
        """How many rows have each status."""
        return {status: sum(method.status == status for method in self.methods) for status in STATUSES}


def read_methods(
    path: Path | None = None, claims: Mapping[str, Sequence[str]] | None = None, *, strict: bool = True
) -> MethodList:
    """Reads the list and gives each row the recipes that claim it.

    Args:
        path: another file than the shipped `configs/methods.yaml`.
        claims: id -> recipes; those of the shipped recipes by default.

    Raises:
        ConfigError: a row lacks its name, has a key or a fact too many, or a recipe claims a row that there is not.
    """
    source = read_yaml(path or shared_folder("configs") / "methods.yaml")
    claims = recipe_claims() if claims is None else claims
    rows: dict[str, Method] = {}
    for section in ("methods", "beyond"):
        for name, row in (source.data.get(section) or {}).items():
            rows[name] = _method(name, row, section == "beyond", tuple(claims.get(name, ())))
    language = dict(source.data.get("language_model") or {})
    for name, recipes in claims.items():
        if strict and name not in rows:
            known = "it needs a language model there" if name in language else suggest(name, rows).strip()
            raise ConfigError(f"{recipes[0]}: methods: no row {name!r} in the list of methods. {known}".rstrip())
    return MethodList(tuple(rows.values()), language)


def recipe_claims() -> dict[str, list[str]]:
    """Which shipped recipes say that they are which method: id -> names of recipes."""
    found: dict[str, list[str]] = {}
    for recipe in recipe_names():
        for name in _claims_of(shared_folder("recipes") / f"{recipe}.yaml"):
            found.setdefault(name, []).append(recipe)
    return found


def _claims_of(path: Path) -> list[str]:
    """The key `methods` of a recipe, without reading the rest of it: all recipes are read for one list."""
    own: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("methods:") or (own and (not line or line[0] in " -#")):
            own.append(line)
        elif own:
            break
    named = yaml.safe_load("\n".join(own))["methods"] if own else []
    return [str(name) for name in (named if isinstance(named, list) else [named])]


def _method(name: str, row: Any, beyond: bool, recipes: tuple[str, ...]) -> Method:
    where = f"configs/methods.yaml: {name}"
    if not isinstance(row, dict) or not row.get("method"):
        raise ConfigError(f"{where}: a mapping with the key `method` was expected.")
    for key in row:
        if key not in _KEYS:
            raise ConfigError(f"{where}: no key {key!r}.{suggest(key, _KEYS)}")
    facts = [fact for fact in _FACTS if row.get(fact)]
    if len(facts) > 1:
        raise ConfigError(f"{where}: {' and '.join(facts)} exclude each other.")
    texts: dict[str, Any] = {key: str(row[key]) for key in ("method", *_TEXTS, "missing", "unstated") if row.get(key)}
    same = _same_as(row["same_as"], where) if row.get("same_as") else None
    return Method(id=name, recipes=recipes, variant_of=same, beyond=beyond, **texts)


def _same_as(value: Any, where: str) -> Variant:
    if not isinstance(value, dict) or set(value) != {"recipe", "keys"} or not isinstance(value["keys"], list):
        raise ConfigError(f"{where}: same_as: {{recipe: NAME, keys: [key=value, ...]}} was expected.")
    return Variant(str(value["recipe"]), tuple(str(key) for key in value["keys"]))
