"""Writes the tables of keys in docs/recipe.md from the declarations of the keys.

A table is between the markers `<!-- keys: NAME -->` and `<!-- end of keys -->`. `kdbench schema --markdown
docs/recipe.md` updates the page after a change of a declaration. A test compares the page with the declarations.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.config.schema import (
    ArtifactConfig,
    InnerStepConfig,
    Key,
    Notes,
    OperandConfig,
    Published,
    Recipe,
    RoleConfig,
    SourceConfig,
    StageConfig,
    TermConfig,
    UpdateConfig,
    WeightsConfig,
    declared_keys,
)
from kdbench.config.schema.data import VIEW_KEYS
from kdbench.config.schema.stage import CHECKPOINT_KEYS, LOOP_KEYS
from kdbench.config.schema.updates import OPTIMIZER_GROUP_KEYS, SCHEDULER_KEYS, SELECTION_KEYS
from kdbench.errors import ConfigError, suggest

_MARKED_TABLE = re.compile(r"(<!-- keys: (?P<name>[\w ]+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)


_HEADER = "| key | value | default | meaning | example |\n|---|---|---|---|---|\n"


_TYPE_NAMES = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "dict": "mapping"}


def key_tables() -> dict[str, Mapping[str, Key]]:
    """Returns name of a table (the name in the table's marker) -> keys of the table."""
    top_level = {**declared_keys(StageConfig), **declared_keys(Recipe)}
    sections = sorted({key.section for key in top_level.values()} - {""})
    tables = {section: {name: key for name, key in top_level.items() if key.section == section} for section in sections}
    return tables | {
        "notes": declared_keys(Notes),
        "role": declared_keys(RoleConfig),
        "weights": declared_keys(WeightsConfig),
        "source": declared_keys(SourceConfig),
        "view": VIEW_KEYS,
        "term": declared_keys(TermConfig),
        "operand": declared_keys(OperandConfig),
        "optimizer group": OPTIMIZER_GROUP_KEYS,
        "scheduler": SCHEDULER_KEYS,
        "loop": LOOP_KEYS,
        "artifact": declared_keys(ArtifactConfig),
        "update": declared_keys(UpdateConfig),
        "selection": SELECTION_KEYS,
        "inner step": declared_keys(InnerStepConfig),
        "checkpoint interval": CHECKPOINT_KEYS,
        "published": declared_keys(Published),
    }


def update_tables(page: str) -> str:
    """Replaces all marked tables in the text of a Markdown page, and returns the new text.

    Raises:
        ConfigError: a marker names a table that does not exist.
    """
    tables = key_tables()

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise ConfigError(f"<!-- keys: {name} -->: no table {name!r}.{suggest(name, tables)}")
        return f"{match[1]}{render_table(tables[name])}{match[3]}"

    return _MARKED_TABLE.sub(replace, page)


def update_file(path: str) -> None:
    """Replaces all marked tables in a Markdown file.

    Raises:
        ConfigError: the file does not exist, or a marker names a table that does not exist.
    """
    page = Path(path)
    if not page.is_file():
        raise ConfigError(f"{path}: there is no such file.")
    page.write_text(update_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def render_table(keys: Mapping[str, Key]) -> str:
    """Returns a Markdown table with one row per key."""
    rows = (
        f"| `{key.name}` | {_value_text(key)} | {_default_text(key)} | {key.doc} | {_code(key.example)} |\n"
        for key in keys.values()
    )
    return _HEADER + "".join(rows)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _value_text(key: Key) -> str:
    """Returns a description of the type of a key, and of the condition on its value, such as "number (above 0)"."""
    text = _type_text(ast.parse(key.type, mode="eval").body)
    return f"{text} ({key.check.text})" if key.check is not None else text


def _type_text(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return _alternatives([_type_text(alternative) for alternative in _union_members(node)])
    if isinstance(node, ast.Name):
        # `ArtifactReference` -> "artifact reference"
        return _TYPE_NAMES.get(node.id) or re.sub(r"(?<!^)(?=[A-Z])", " ", node.id).lower()
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return _alternatives([_code(str(item.value)) for item in items if isinstance(item, ast.Constant)])
        prefix = "mapping of names to" if node.value.id == "dict" else "list of"
        is_union = len(_union_members(items[-1])) > 1
        return f"{prefix} ({_type_text(items[-1])})" if is_union else f"{prefix} {_type_text(items[-1])}"
    return ast.unparse(node)


def _union_members(node: ast.expr) -> list[ast.expr]:
    """Returns the alternatives of a union type without None, because null always means the default."""
    if isinstance(node, ast.BinOp):
        return _union_members(node.left) + _union_members(node.right)
    return [] if isinstance(node, ast.Constant) and node.value is None else [node]


def _alternatives(texts: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _default_text(key: Key) -> str:
    if key.default_text:
        return key.default_text
    if key.required:
        return "required"
    default: Any = key.default
    if default in (None, (), {}):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return _code(default) if isinstance(default, str) else str(default)
