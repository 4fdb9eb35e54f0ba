"""Declares the keys of a recipe beside the dataclass fields that they set.

    clip: float | None = field(default=None, metadata=declare("largest gradient norm", check=POSITIVE))

The class of a field is the level of its key: keys of `Recipe` belong to the top level only, those of `StageConfig` to
the top level and to stages, those of `RoleConfig` to an entry of `models`, and so on.

The parsers (`kdbench.config.parse`), the JSON schema (`kdbench.config.json_schema`) and the tables of docs/recipe.md
(`kdbench.config.key_tables`) read these declarations. Type and default of a key are those of its field, unless the
declaration says otherwise.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Check:
    """A condition on a value, in addition to its type.

    Attributes:
        holds: value -> whether the condition holds.
        text: the condition as it follows "must be".
        json_schema: the same condition as keywords of JSON schema.
    """

    holds: Callable[[Any], bool]
    text: str
    json_schema: Mapping[str, Any]


POSITIVE = Check(lambda n: n > 0 and math.isfinite(n), "above 0", {"exclusiveMinimum": 0})


NOT_NEGATIVE = Check(lambda n: n >= 0 and math.isfinite(n), "0 or more", {"minimum": 0})


AT_LEAST_ONE = Check(lambda n: n >= 1, "1 or more", {"minimum": 1})


FRACTION = Check(lambda n: 0 < n < 1, "between 0 and 1, both excluded", {"exclusiveMinimum": 0, "exclusiveMaximum": 1})


FRACTION_OR_COUNT = Check(
    lambda n: 0 < n <= 1 or (n > 1 and float(n).is_integer()),
    "a fraction above 0 up to 1, or a whole number of samples from 2",
    {"anyOf": [{"exclusiveMinimum": 0, "maximum": 1}, {"minimum": 2, "multipleOf": 1}]},
)


PROPER_FRACTION_OR_COUNT = Check(
    lambda n: 0 < n < 1 or (n > 1 and float(n).is_integer()),
    "a fraction above 0 and below 1, or a whole number of samples from 2",
    {"anyOf": [{"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"minimum": 2, "multipleOf": 1}]},
)


PERCENTAGE = Check(lambda n: 0 <= n <= 100, "a percentage from 0 to 100", {"minimum": 0, "maximum": 100})


DEVICE = Check(
    lambda text: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text) is not None,
    "auto, cpu, mps, cuda or cuda:N",
    {"pattern": r"^(auto|cpu|mps|cuda(:\d+)?)$"},
)


Section = Literal["", "composition", "networks", "data", "terms", "training", "stages", "records", "execution"]
"""The section of docs/recipe.md whose table lists a key of the top level."""


@dataclass(frozen=True)
class Key:
    """The declaration of one key.

    Attributes:
        name: the key as a recipe spells it; by default the name of the field.
        doc: one-line description.
        type: type of the written value, in the language of `kdbench.registry.type_mismatch`. A name that is not one of
            Python's types (`Operand`, `Weights`) is a form with a grammar of its own, which a parser checks.
        check: a condition on the value; in a union, on the numbers.
        default: the value of a key that is absent or null; MISSING if the key is required.
        default_text: the default in documentation, where it is not a value.
        example: the key in YAML.
        section: for keys of the top level.
        in_identity: whether the key can change the result of a run, and so the run's identity.
        field: the field of the dataclass that the key sets.
    """

    name: str
    doc: str
    type: str = ""
    check: Check | None = None
    default: Any = None
    default_text: str = ""
    example: str = ""
    section: Section = ""
    in_identity: bool = True
    field: str = ""

    @property
    def is_plain(self) -> bool:
        """True if type and check describe the value completely, so that it needs no parser of its own."""
        names = {node.id for node in ast.walk(ast.parse(self.type, mode="eval")) if isinstance(node, ast.Name)}
        return names <= _PLAIN_NAMES

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def takes_strings(self) -> bool:
        """True for a list of texts that may be written as one text."""
        return "str | list[str]" in self.type


_PLAIN_NAMES = {"int", "float", "str", "bool", "list", "dict", "Literal"}


_DECLARATION = "kdbench"


_FROM_FIELD = object()


def declare(doc: str, **options: Any) -> Mapping[str, Any]:
    """Returns the metadata of a field that one key sets. Name, type and default are those of the field by default.

    Args:
        options: attributes of `Key`.
    """
    return declare_keys(Key(doc=doc, **{"name": "", "default": _FROM_FIELD, **options}))


def declare_keys(*declared: Key) -> Mapping[str, Any]:
    """Returns the metadata of a field that several keys set."""
    return {_DECLARATION: declared}


def derived(source: str) -> Mapping[str, Any]:
    """Returns the metadata of a field without a key.

    Args:
        source: the origin of its value, such as "the key in `models`".
    """
    return {_DECLARATION: source}


def key_table(*declared: Key) -> Mapping[str, Key]:
    """Returns the keys of a mapping that no dataclass represents, by name."""
    return MappingProxyType({item.name: item for item in declared})


@cache
def declared_keys(config_class: type) -> Mapping[str, Key]:
    """Returns the keys of a dataclass of the schema, by name in the order of declaration.

    Raises:
        TypeError: a field has neither `declare`, `declare_keys` nor `derived`, or two fields declare the same key.
    """
    result: dict[str, Key] = {}
    annotations = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        declaration = item.metadata.get(_DECLARATION)
        if declaration is None:
            raise TypeError(f"{config_class.__name__}.{item.name}: declare its key, or `derived` if it has none.")
        for declared in () if isinstance(declaration, str) else declaration:
            completed = _complete(declared, item, annotations[item.name])
            if completed.name in result:
                raise TypeError(f"{config_class.__name__}: the key {completed.name!r} is declared twice.")
            result[completed.name] = completed
    return MappingProxyType(result)


@cache
def plain_keys(config_class: type) -> tuple[Key, ...]:
    """Returns the keys that set a field alone and have a plain type: they need no parser of their own."""
    declared = declared_keys(config_class).values()
    count = Counter(item.field for item in declared)
    return tuple(item for item in declared if item.is_plain and count[item.field] == 1)


def _complete(declared: Key, item: dataclasses.Field[Any], annotation: Any) -> Key:
    """Fills in what the declaration leaves to its field: name, type and default."""
    default = declared.default
    if default is _FROM_FIELD:
        default = item.default_factory() if item.default_factory is not MISSING else item.default
    name, type_text = declared.name or item.name, declared.type or _type_text(annotation)
    return dataclasses.replace(declared, name=name, type=type_text, default=default, field=item.name)


def _type_text(annotation: Any) -> str:
    """Writes a type as in a declaration: without None, and tuples as the lists that YAML has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " | ".join(_type_text(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return f"Literal[{', '.join(repr(argument) for argument in arguments)}]"
    if origin is tuple:
        return f"list[{_type_text(arguments[0])}]"
    if origin is not None and issubclass(origin, Mapping):
        return f"dict[{', '.join(_type_text(argument) for argument in arguments)}]"
    return str(annotation.__name__)
