"""Declared file contents: types are checked, and problems are reported by entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import pytest

from kdbench.entries import EntryError, read_entries, write_entries


class Point(TypedDict):
    x: int


@dataclass
class Inner:
    name: str


@dataclass
class Outer:
    number: int
    ratio: float
    flag: bool
    kind: Literal["a", "b"]
    inner: Inner
    table: Mapping[str, float | str]
    points: list[Point]
    optional: int | None
    anything: Any
    later: list[int] = field(default_factory=list)


CONTENT = {
    "number": 1,
    "ratio": 2,
    "flag": True,
    "kind": "a",
    "inner": {"name": "x", "undeclared": 1},
    "table": {"a": 1.5, "b": "nan", "c": 2},
    "points": [{"x": 1}],
    "optional": None,
    "anything": object(),
    "undeclared": 3,
}


def test_declared_entries_are_read_and_written():
    outer = read_entries(Outer, CONTENT)
    assert outer.inner == Inner("x") and outer.later == [] and outer.ratio == 2
    entries = write_entries(outer)
    assert entries == {**{k: v for k, v in CONTENT.items() if k != "undeclared"}, "inner": {"name": "x"}, "later": []}
    assert read_entries(Outer, entries) == outer


@pytest.mark.parametrize("entry", [name for name in CONTENT if name != "undeclared"])
def test_a_missing_entry_is_reported(entry):
    with pytest.raises(EntryError, match=f"entry '{entry}' is missing"):
        read_entries(Outer, {key: value for key, value in CONTENT.items() if key != entry})


@pytest.mark.parametrize(
    ("entry", "value", "problem"),
    [
        ("number", True, "'number' is of type bool; expected int"),
        ("number", 1.0, "'number' is of type float; expected int"),
        ("ratio", "2", "'ratio' is of type str; expected float"),
        ("ratio", True, "'ratio' is of type bool; expected float"),
        ("flag", 1, "'flag' is of type int; expected bool"),
        ("kind", "c", "'kind' is 'c'; expected one of 'a', 'b'"),
        ("kind", [], r"'kind' is \[\]; expected one of"),
        ("inner", None, r"'inner' is empty \(None\); expected a mapping"),
        ("inner", {}, "'inner.name' is missing"),
        ("inner", {"name": 1}, "'inner.name' is of type int; expected str"),
        ("table", {"a": None}, "'table.a' is empty"),
        ("table", {1: 1.0}, "'table key' is of type int; expected str"),
        ("points", {}, "'points' is of type dict; expected list"),
        ("points", [{"x": 1}, {}], "'points.1.x' is missing"),
        ("points", [3], "'points.0' is of type int; expected a mapping"),
        ("optional", "1", "'optional' is of type str; expected int"),
        ("later", ["1"], "'later.0' is of type str; expected int"),
    ],
)
def test_a_wrong_type_is_reported(entry, value, problem):
    with pytest.raises(EntryError, match=problem):
        read_entries(Outer, {**CONTENT, entry: value})


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_content_that_is_not_a_mapping_is_reported(content):
    with pytest.raises(EntryError, match=r"the content is .*; expected a mapping"):
        read_entries(Outer, content)
