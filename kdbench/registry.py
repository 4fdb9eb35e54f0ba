"""Registries of the parts (terms, models, datasets, ...) that a recipe can name. torch is not imported.

A decorator on a class or function declares a part: `@TERMS.register("kd", space="row", version=1)`. A registry reads
these declarations (name, keyword arguments, constructor signature, docstring) from the syntax trees of its package.
A recipe is therefore checked in milliseconds; the module of a part is imported when the part is first built.
`Registry.add_plugin` adds the parts of a user's module, and a `Family` adds the parts of another library.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from kdbench.errors import ConfigError, Location, did_you_mean, suggest


class _Required:
    def __repr__(self) -> str:
        return "(required)"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a registered part. `annotation` is the source text of the parameter's type."""

    name: str
    annotation: str
    default: Any = REQUIRED

    @property
    def schedulable(self) -> bool:
        """True if a recipe may set the parameter to a schedule instead of a number."""
        return "Number" in self.annotation

    def __str__(self) -> str:
        text = f"{self.name}: {self.annotation}" if self.annotation else self.name
        return text if self.default is REQUIRED else f"{text} = {self.default!r}"


@dataclass(frozen=True)
class Entry:
    """The declaration of a registered part (a term, a model, ...), read from its source code.

    Attributes:
        symbol: name of the class or function in `module`.
        facts: keyword arguments of the decorator, such as `space` and `version`.
        inputs: parameters of `forward` (or `__call__`) after self. They are the operands of the part.
        optional_inputs: names in `inputs` that have a default.
    """

    name: str
    module: str
    symbol: str
    doc: str
    parameters: Mapping[str, Parameter]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: tuple[str, ...] = ()
    optional_inputs: tuple[str, ...] = ()
    loader: Callable[[], Any] | None = field(default=None, compare=False)
    module_doc: str = ""

    @property
    def version(self) -> int:
        """Version number of the part, which its author increases when its results change. It is in a run's hash."""
        return int(self.facts.get("version", 1))

    @property
    def summary(self) -> str:
        """First line of the part's docstring."""
        return self.doc.strip().split("\n", 1)[0] if self.doc.strip() else ""

    def describe_parameters(self) -> str:
        """Returns "Its parameters: name: type = default, ...", without the parameters that the framework injects."""
        injected = self.facts.get("injected", ())
        parameters = [str(parameter) for parameter in self.parameters.values() if parameter.name not in injected]
        return f"Its parameters: {', '.join(parameters)}." if parameters else "It has no parameters."

    def describe_missing(self, names: Collection[str]) -> str:
        """Returns "needs `a`. Its parameters: ..."; empty if `names` contains every required parameter."""
        required = (parameter.name for parameter in self.parameters.values() if parameter.default is REQUIRED)
        missing = [f"`{name}`" for name in required if name not in names]
        return f"needs {', '.join(missing)}. {self.describe_parameters()}" if missing else ""

    def load(self) -> Any:
        """Imports the part; returns its class or function."""
        if self.loader is not None:
            return self.loader()
        return getattr(importlib.import_module(self.module), self.symbol)


@dataclass(frozen=True)
class Family:
    """The parts of another library under a common or empty prefix, such as `torchvision/` in `torchvision/resnet18`.

    Attributes:
        names: function that returns all names without the prefix, or an empty list if the library is not installed.
        entry: function that returns the declaration of the part with a given name.
        install_hint: text for error messages that explains how to install the library.
    """

    prefix: str
    names: Callable[[], list[str]]
    entry: Callable[[str], Entry]
    install_hint: str = ""


class Registry:
    """Registry of all parts of one kind, such as all terms or all models.

    Args:
        variable: name of the global variable that contains this registry, such as `TERMS`.
        kind: name of the kind in messages, such as `term`.
        package: package whose modules declare the parts.
        injected: constructor parameters that the framework sets unless the recipe sets them.
        catalog: module that adds families (parts of other libraries) to the registry when it is imported.
    """

    def __init__(
        self, variable: str, kind: str, package: str, injected: tuple[str, ...] = (), catalog: str = ""
    ) -> None:
        self.variable = variable
        self.kind = kind
        self.package = package
        self.injected = injected
        self.catalog = catalog
        self.families: list[Family] = []
        self._plugin_entries: dict[str, Entry] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        """Returns a decorator that registers a class or function under `name`.

        Args:
            facts: properties of the part. They must be literals, because they are read from the source code.
        """

        def decorate(part: Any) -> Any:
            part.registered_name = name
            part.version = int(facts.get("version", 1))
            return part

        return decorate

    @cached_property
    def _shipped_entries(self) -> dict[str, Entry]:
        if self.catalog:
            importlib.import_module(self.catalog)  # adds its families to this registry, without importing torch
        root = Path(__file__).parent
        entries: dict[str, Entry] = {}
        for path in sorted(root.joinpath(*self.package.split(".")[1:]).rglob("*.py")):
            module = ".".join((root.name, *path.relative_to(root).with_suffix("").parts))
            self._add_entries(entries, self._read_declarations(path, module))
        return entries

    def add_plugin(self, module: str) -> None:
        """Adds the parts of a user's module. The module is imported when one of its parts is first built.

        Raises:
            ConfigError: there is no such module, or the module declares a name that already exists.
        """
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"plug-in {module!r}: no such module; install it or run kdbench in its folder.")
        entries = self._read_declarations(Path(spec.origin), module)
        self._add_entries(self._plugin_entries, entries, reserved=self._shipped_entries)

    @property
    def plural(self) -> str:
        """Plural of the kind, such as `sample_weights`. It is an argument of `kdbench list`."""
        return f"{self.kind.replace(' ', '_')}s"

    @property
    def listing(self) -> str:
        """Sentence for messages, such as "`kdbench list terms` lists all terms."."""
        return f"`kdbench list {self.plural}` lists all {self.plural.replace('_', ' ')}."

    @property
    def entries(self) -> dict[str, Entry]:
        """Name -> declaration, for all parts except those of other libraries."""
        return {**self._shipped_entries, **self._plugin_entries}

    def names(self) -> list[str]:
        """Returns the names of all parts, including the parts of other installed libraries."""
        names = list(self.entries)  # read first: this imports the catalog, which adds the families
        return names + [f"{family.prefix}{name}" for family in self.families for name in family.names()]

    def entry(self, name: str, location: Location | str = "") -> Entry:
        """Returns the declaration of the part called `name`.

        Raises:
            ConfigError: there is no such part (the message suggests the nearest name), or its library is missing.
        """
        if (entry := self.entries.get(name)) is not None:
            return entry
        candidates = list(self.entries)
        for family in self.families:
            if not str(name).startswith(family.prefix):
                continue
            family_names = family.names()
            suffix = str(name)[len(family.prefix) :]
            if suffix in family_names:
                return family.entry(suffix)
            if family.prefix and not family_names:
                raise ConfigError(f"{location}: {name!r} needs another package: {family.install_hint}")
            if family.prefix:
                # The prefix is right, so only names with it are worth suggesting.
                candidates = [f"{family.prefix}{family_name}" for family_name in family_names]
                break
            candidates += family_names
        message = f"no {self.kind} {name!r}.{suggest(name, candidates, listing=self.listing)}"
        raise ConfigError(f"{location}: {message}".lstrip(": "))

    def check(self, name: str, params: Mapping[str, Any], location: Location | str = "") -> Entry:
        """Checks parameters of a part against its signature, without importing the part. Returns its declaration.

        Raises:
            ConfigError: the part does not exist, or a parameter is unknown, is missing or has the wrong type.
        """
        entry = self.entry(name, location)
        for key, value in params.items():
            parameter = entry.parameters.get(key)
            if parameter is None:
                raise ConfigError(
                    f"{location}: {self.kind} {name!r} has no parameter {key!r}.{did_you_mean(key, entry.parameters)} "
                    f"{entry.describe_parameters()}"
                )
            if expected_type := type_mismatch(parameter.annotation, value):
                raise ConfigError(f"{location}: {self.kind} {name!r}: {key} must be {expected_type}, got {value!r}.")
        self._check_required(entry, {*params, *entry.facts.get("injected", ()), *self.injected}, location)
        return entry

    def build(self, name: str, params: Mapping[str, Any], location: Location | str = "", **injected: Any) -> Any:
        """Checks the parameters and builds the part.

        Args:
            injected: values from the framework. A value is passed if the signature has the parameter.

        Raises:
            ConfigError: a parameter is unknown, is missing or has the wrong type.
        """
        entry = self.check(name, {k: v for k, v in params.items() if not _is_tensor(v)}, location)
        defaults = {key: value for key, value in injected.items() if key in entry.parameters and key not in params}
        self._check_required(entry, {*defaults, *params}, location)
        return entry.load()(**{**defaults, **params})

    def _check_required(self, entry: Entry, names: Collection[str], location: Location | str) -> None:
        if missing := entry.describe_missing(names):
            raise ConfigError(f"{location}: {self.kind} {entry.name!r} {missing}".lstrip(": "))

    def _add_entries(
        self, target: dict[str, Entry], entries: list[Entry], reserved: Mapping[str, Entry] | None = None
    ) -> None:
        for entry in entries:
            namesake = target.get(entry.name) or (reserved or {}).get(entry.name)
            if namesake is not None:
                raise ConfigError(
                    f"two {self.kind}s are called {entry.name!r}: {namesake.module}.{namesake.symbol} "
                    f"and {entry.module}.{entry.symbol}"
                )
            target[entry.name] = entry

    def _read_declarations(self, path: Path, module: str) -> list[Entry]:
        text = path.read_text(encoding="utf-8")
        if f"@{self.variable}.register(" not in text:
            return []
        tree = ast.parse(text, filename=str(path))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        module_doc = ast.get_docstring(tree) or ""
        entries: list[Entry] = []
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            calls = [decorator for decorator in node.decorator_list if self._is_registration(decorator)]
            entries += [_build_entry(node, call, module, classes, module_doc) for call in calls]
        return entries

    def _is_registration(self, node: ast.expr) -> TypeGuard[ast.Call]:
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "register"
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == self.variable
        )


def _is_tensor(value: Any) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "Tensor"


def _build_entry(
    node: ast.ClassDef | ast.FunctionDef,
    decorator: ast.Call,
    module: str,
    classes: Mapping[str, ast.ClassDef],
    module_doc: str,
) -> Entry:
    name = ast.literal_eval(decorator.args[0])
    facts = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg}
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    if isinstance(node, ast.ClassDef):
        init = _find_method(node, "__init__", classes)
        parameters = read_parameters(init, skip_self=True) if init else {}
        forward = _find_method(node, "forward", classes) or _find_method(node, "__call__", classes)
        if forward is not None:
            operands = read_parameters(forward, skip_self=True)
            inputs = tuple(operands)
            optional = tuple(key for key, parameter in operands.items() if parameter.default is not REQUIRED)
    else:
        parameters = read_parameters(node, skip_self=False)
    doc = ast.get_docstring(node) or ""
    return Entry(name, module, node.name, doc, parameters, facts, inputs, optional, module_doc=module_doc)


def _find_method(node: ast.ClassDef, name: str, classes: Mapping[str, ast.ClassDef]) -> ast.FunctionDef | None:
    """Returns the method of a class or of its base classes in the same file, or None."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return item
    for base in node.bases:
        parent = classes.get(base.id) if isinstance(base, ast.Name) else None
        if parent is not None and (method := _find_method(parent, name, classes)):
            return method
    return None


def read_parameters(node: ast.FunctionDef, *, skip_self: bool) -> dict[str, Parameter]:
    """Reads a function's parameters from its syntax tree. A default that is not a literal is stored as source text."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults, strict=True))[1 if skip_self else 0 :]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    result: dict[str, Parameter] = {}
    for argument, default in pairs:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        value = REQUIRED if default is None else _literal_or_source(default)
        result[argument.arg] = Parameter(argument.arg, annotation, value)
    return result


def _literal_or_source(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def type_mismatch(annotation: str, value: Any) -> str | None:
    """Returns None if a value has the type of an annotation, else a description of the expected type.

    Supports built-in types, Literal, unions, and Number (a number or a schedule). Other annotations accept any value.
    """
    if not annotation:
        return None
    node = ast.parse(annotation, mode="eval").body
    return None if _matches_type(node, value) else _describe_type(node)


def _matches_type(node: ast.expr, value: Any) -> bool:
    if isinstance(node, ast.BinOp):
        return _matches_type(node.left, value) or _matches_type(node.right, value)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _matches_type(ast.parse(node.value, mode="eval").body, value)
        return value is node.value
    if isinstance(node, ast.Name):
        return _matches_name(node.id, value)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return _matches_generic(node.value.id, node.slice, value)
    return True


def _matches_name(name: str, value: Any) -> bool:
    """Returns whether a value has a type without type arguments, such as `int`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)  # Python's bool is an int
    match name:
        case "int":
            return isinstance(value, int) and is_number
        case "float":
            return is_number
        case "Number":
            return is_number or (_is_mapping(value) and "type" in value) or hasattr(value, "params")
        case "str":
            return isinstance(value, str)
        case "bool":
            return isinstance(value, bool)
        case "list" | "tuple" | "Sequence":
            return _is_list(value)
        case "dict" | "Mapping":
            return _is_mapping(value)
        case _:
            return True


def _matches_generic(name: str, arguments: ast.expr, value: Any) -> bool:
    """Returns whether a value has a type with type arguments, such as `list[int]`."""
    items = arguments.elts if isinstance(arguments, ast.Tuple) else [arguments]
    match name:
        case "Literal":
            return any(isinstance(item, ast.Constant) and item.value == value for item in items)
        case "list" | "Sequence":
            return _is_list(value) and all(_matches_type(arguments, item) for item in value)
        case "tuple":
            if not _is_list(value):
                return False
            if len(items) == 2 and isinstance(items[1], ast.Constant) and items[1].value is ...:
                return all(_matches_type(items[0], item) for item in value)
            pairs = zip(items, value, strict=False)
            return len(items) == len(value) and all(_matches_type(item_type, item) for item_type, item in pairs)
        case "dict" | "Mapping":
            return _is_mapping(value) and all(_matches_type(items[-1], item) for item in value.values())
        case _:
            return True


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def _describe_type(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return f"{_describe_type(node.left)} or {_describe_type(node.right)}"
    if isinstance(node, ast.Constant):
        return "null" if node.value is None else str(node.value)
    if isinstance(node, ast.Name):
        names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
        names |= {"Number": "a number or a schedule", "dict": "a mapping", "list": "a list", "tuple": "a list"}
        return names.get(node.id, node.id)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return "one of " + ", ".join(str(getattr(p, "value", "?")) for p in parts)
        if node.value.id in ("list", "tuple", "Sequence"):
            return "a list of " + " and ".join(_describe_type(p) for p in parts if ast.unparse(p) != "...")
        if node.value.id in ("dict", "Mapping"):
            return f"a mapping of names to {_describe_type(parts[-1])}"
    return ast.unparse(node)


MODELS = Registry(
    "MODELS",
    "model",
    "kdbench.models",
    injected=("num_classes", "in_channels", "image_size", "input_shape", "image_shape"),
    catalog="kdbench.models.catalog",
)
DATASETS = Registry("DATASETS", "dataset", "kdbench.data.datasets")
AUGMENTATIONS = Registry("AUGMENTATIONS", "augmentation", "kdbench.data.augment")
TERMS = Registry("TERMS", "term", "kdbench.terms")
ADAPTERS = Registry("ADAPTERS", "adapter", "kdbench.wiring")
SAMPLE_WEIGHTS = Registry("SAMPLE_WEIGHTS", "sample weight", "kdbench.wiring")
ROUTERS = Registry("ROUTERS", "router", "kdbench.wiring")
COMBINERS = Registry("COMBINERS", "combiner", "kdbench.wiring")
WEIGHT_TRANSFORMS = Registry("WEIGHT_TRANSFORMS", "weight transform", "kdbench.models")
SUBSETS = Registry("SUBSETS", "subset", "kdbench.data.sampling")
RELABELS = Registry("RELABELS", "relabelling", "kdbench.data.sampling")
ARTIFACTS = Registry("ARTIFACTS", "artifact", "kdbench.artifacts")
SELECTORS = Registry("SELECTORS", "selector", "kdbench.artifacts")
METRICS = Registry("METRICS", "metric", "kdbench.engine.evaluation")
SCHEDULES = Registry("SCHEDULES", "schedule", "kdbench.config")
OPTIMIZERS = Registry(
    "OPTIMIZERS", "optimizer", "kdbench.engine.train", catalog="kdbench.engine.train.optimizer_catalog"
)

REGISTRIES = {
    registry.plural: registry
    for registry in (
        MODELS,
        DATASETS,
        AUGMENTATIONS,
        TERMS,
        ADAPTERS,
        SAMPLE_WEIGHTS,
        ROUTERS,
        COMBINERS,
        WEIGHT_TRANSFORMS,
        SUBSETS,
        RELABELS,
        ARTIFACTS,
        SELECTORS,
        METRICS,
        SCHEDULES,
        OPTIMIZERS,
    )
}
