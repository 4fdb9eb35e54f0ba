"""Declarations of a recipe's keys. A key is declared in the metadata of the dataclass field that it sets:

    clip: float | None = field(default=None, metadata=declare("largest gradient norm", check=POSITIVE))

The class of the field determines where the key may be written: a key of `Recipe` at the top level only, a key of
`StageConfig` at the top level and in a stage, a key of `RoleConfig` in an entry of `models`, and so on.

The parsers (`kdbench.config.parse`), the JSON schema (`kdbench.config.json_schema`) and the tables of docs/recipe.md
(`kdbench.config.key_tables`) use these declarations. A key has the type and the default of its field, unless the
declaration states others.
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
    """A condition on the value of a key, in addition to the type of the key.

    Attributes:
        holds: function that returns whether a value satisfies the condition.
        text: text of the condition that follows "must be" in messages.
        json_schema: the condition as keywords of JSON schema.
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
    "a fraction in (0, 1], or a whole number of at least 2",
    {"anyOf": [{"exclusiveMinimum": 0, "maximum": 1}, {"minimum": 2, "multipleOf": 1}]},
)


PROPER_FRACTION_OR_COUNT = Check(
    lambda n: 0 < n < 1 or (n > 1 and float(n).is_integer()),
    "a fraction in (0, 1), or a whole number of at least 2",
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
        name: name of the key in a recipe. The default is the name of the field.
        doc: description of the key in one line.
        type: type of the value in the recipe, written as a Python annotation. A name that is not a Python type (such
            as `Operand` or `Weights`) denotes a special syntax with its own parser.
        check: condition on the value. If several types are allowed, the condition applies to numbers.
        default: value of a key that is absent or null; MISSING if the key is required.
        default_text: description of the default in the documentation, if the default is not a fixed value.
        example: the key with an example value in YAML.
        section: section of docs/recipe.md that documents the key, for keys of the top level.
        in_identity: whether the key can change the results of a run. If True, the key is part of the hash that
            identifies the run.
        field: name of the dataclass field that the key sets.
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
        """Returns whether `type` has only Python types, so that the value needs no special parser."""
        names = {node.id for node in ast.walk(ast.parse(self.type, mode="eval")) if isinstance(node, ast.Name)}
        return names <= _PLAIN_NAMES

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def takes_strings(self) -> bool:
        """Returns whether the value is a list of strings, which may be written as a single string."""
        return "str | list[str]" in self.type


_PLAIN_NAMES = {"int", "float", "str", "bool", "list", "dict", "Literal"}


_DECLARATION = "kdbench"


_FROM_FIELD = object()


def declare(doc: str, **options: Any) -> Mapping[str, Any]:
    """Returns the metadata of a dataclass field that one key sets.

    Args:
        doc: description of the key.
        options: other attributes of `Key`. By default the key has the name, type and default of the field.
    """
    return declare_keys(Key(doc=doc, **{"name": "", "default": _FROM_FIELD, **options}))


def declare_keys(*declared: Key) -> Mapping[str, Any]:
    """Returns the metadata of a dataclass field that several keys set."""
    return {_DECLARATION: declared}


def derived(source: str) -> Mapping[str, Any]:
    """Returns the metadata of a dataclass field that is computed, not set by a key.

    Args:
        source: text that describes the origin of the value, such as "the key in `models`".
    """
    return {_DECLARATION: source}


def key_table(*declared: Key) -> Mapping[str, Key]:
    """Returns name -> declaration for the keys of a recipe mapping that has no dataclass."""
    return MappingProxyType({item.name: item for item in declared})


@cache
def declared_keys(config_class: type) -> Mapping[str, Key]:
    """Returns name -> declaration for all keys that set fields of a dataclass.

    Raises:
        TypeError: a field has no declaration (`declare`, `declare_keys` or `derived`), or two fields declare the same
            key.
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
    """Returns the keys of a dataclass that need no special parser.

    Such a key has only Python types, and no other key sets the same field.
    """
    declared = declared_keys(config_class).values()
    count = Counter(item.field for item in declared)
    return tuple(item for item in declared if item.is_plain and count[item.field] == 1)


def _complete(declared: Key, item: dataclasses.Field[Any], annotation: Any) -> Key:
    """Fills in the name, type and default of a key from its dataclass field, if the declaration omits them."""
    default = declared.default
    if default is _FROM_FIELD:
        default = item.default_factory() if item.default_factory is not MISSING else item.default
    name, type_text = declared.name or item.name, declared.type or _type_text(annotation)
    return dataclasses.replace(declared, name=name, type=type_text, default=default, field=item.name)


def _type_text(annotation: Any) -> str:
    """Converts the annotation of a field to the type in YAML: None is omitted, and a tuple becomes a list."""
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
