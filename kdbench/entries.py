"""Dataclasses that declare the content of a file; the types of the entries are checked when the file is read.

Each kind of file that kdbench reads back has a dataclass that declares the file's entries. `read_entries` builds the
dataclass from the mapping in the file, and reports the name of an entry that is missing or has the wrong type.
Annotations may be plain types, unions, `Literal`, `list[...]`, mappings, nested dataclasses and `TypedDict`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class EntryError(ValueError):
    """Error for an entry of a file that is missing or has the wrong type. The message names the entry."""


def read_entries(declaration: type[T], content: Any) -> T:
    """Builds a dataclass from a mapping after checking the types of all entries, including nested entries.

    Entries without a default are required. Entries that the dataclass does not declare are ignored.

    Args:
        declaration: the dataclass.
        content: the mapping, as read from a file.

    Raises:
        EntryError: an entry is missing or has the wrong type.
    """
    return _read_dataclass(declaration, content, "")


def write_entries(instance: Any) -> dict[str, Any]:
    """Returns a dataclass as a mapping from field name to value, in which nested dataclasses are mappings too."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {name: write_entries(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _read_dataclass(declaration: type[T], content: Any, name: str) -> T:
    if not isinstance(content, Mapping):
        raise EntryError(f"{_entry(name)} is {_type_of(content)}; expected a mapping")
    values = {}
    for field in dataclasses.fields(declaration):  # type: ignore[arg-type]
        path = f"{name}.{field.name}" if name else field.name
        if field.name in content:
            values[field.name] = _read_value(_type_hints(declaration)[field.name], content[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise EntryError(f"entry {path!r} is missing")
    return declaration(**values)


@cache
def _type_hints(declaration: type) -> dict[str, Any]:
    return typing.get_type_hints(declaration)


def _read_value(hint: Any, value: Any, name: str) -> Any:
    """Checks one value against its type annotation, and returns it. A mapping becomes the declared dataclass."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, value, name)  # type: ignore[arg-type]
    if typing.is_typeddict(hint):
        return _check_typed_dict(hint, value, name)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, name)
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise EntryError(f"{_entry(name)} is {value!r}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if not _is_instance(value, origin or hint):
        raise EntryError(f"{_entry(name)} is {_type_of(value)}; expected {(origin or hint).__name__}")
    if origin is not None and issubclass(origin, Mapping):
        for key, item in value.items():
            _read_value(arguments[0], key, f"{name} key")
            _read_value(arguments[1], item, f"{name}.{key}")
    elif origin in (list, tuple):
        for position, item in enumerate(value):
            _read_value(arguments[0], item, f"{name}.{position}")
    return value


def _check_typed_dict(declaration: Any, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise EntryError(f"{_entry(name)} is {_type_of(value)}; expected a mapping")
    for key, hint in _type_hints(declaration).items():
        if key in value:
            _read_value(hint, value[key], f"{name}.{key}")
        elif key in declaration.__required_keys__:
            raise EntryError(f"entry {f'{name}.{key}'!r} is missing")
    return value


def _read_union(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    """Returns a value that fits one member of a union.

    Raises:
        EntryError: the value fits no member. The message describes the mismatch with the last member.
    """
    if value is None and type(None) in hints:
        return None
    members = [hint for hint in hints if hint is not type(None)]
    for hint in members[:-1]:
        try:
            return _read_value(hint, value, name)
        except EntryError:
            continue
    return _read_value(members[-1], value, name)


def _is_instance(value: Any, expected: type) -> bool:
    """Returns whether a value has the expected type. A bool is not an int, and an int is accepted as a float."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def _entry(name: str) -> str:
    return f"entry {name!r}" if name else "the content"


def _type_of(value: Any) -> str:
    return "empty (None)" if value is None else f"of type {type(value).__name__}"
