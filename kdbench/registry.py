"""Names and signatures of everything that a recipe can name, known without importing torch.

A part is declared once, where it is written:

    @TERMS.register("kd", space="row", version=1)
    class SoftTargets(Term): ...

The registry reads these declarations (name, facts, constructor signature, docstring) off the syntax trees of its
package, so that a recipe is checked in milliseconds; the module is imported when the part is first built.
Plug-ins add modules with `Registry.scan`; whole foreign catalogues (torchvision, timm, torch.optim) add a `Family`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdbench.errors import ConfigError, Location, suggest


class _Required:
    def __repr__(self) -> str:
        return "(required)"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a registered part. `annotation` is the source text of its type."""

    name: str
    annotation: str
    default: Any = REQUIRED

    @property
    def schedulable(self) -> bool:
        """Whether a schedule may stand in place of the number."""
        return "Number" in self.annotation

    def __str__(self) -> str:
        text = f"{self.name}: {self.annotation}" if self.annotation else self.name
        return text if self.default is REQUIRED else f"{text} = {self.default!r}"


@dataclass(frozen=True)
class Entry:
    """A registered part as it stands in the source."""

    name: str
    module: str
    symbol: str
    doc: str
    parameters: Mapping[str, Parameter]
    facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    """Parameters of `forward` (or `__call__`) after self: what the part reads when it runs."""
    optional_inputs: tuple[str, ...] = ()
    """Those of `inputs` that have a default."""
    loader: Callable[[], Any] | None = field(default=None, compare=False)
    module_doc: str = ""

    @property
    def version(self) -> int:
        """Raised by the author when the part's maths changes; it is part of a run's identity."""
        return int(self.facts.get("version", 1))

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n", 1)[0] if self.doc.strip() else ""

    def signature(self) -> str:
        """As a recipe may write it: without what the framework itself fills in."""
        injected = self.facts.get("injected", ())
        return f"{self.name}({', '.join(str(p) for p in self.parameters.values() if p.name not in injected)})"

    def load(self) -> Any:
        """Imports the part and returns its class or function."""
        if self.loader is not None:
            return self.loader()
        return getattr(importlib.import_module(self.module), self.symbol)


@dataclass(frozen=True)
class Family:
    """A foreign catalogue under a prefix, such as `torchvision/resnet18`; an empty prefix adds plain names.

    Attributes:
        names: lists the names without importing the library; empty when it is not installed.
        entry: describes one of them.
        missing: what to tell the user when the library is not installed.
    """

    prefix: str
    names: Callable[[], list[str]]
    entry: Callable[[str], Entry]
    install_hint: str = ""


class Registry:
    """The named parts of one kind.

    Args:
        variable: the name of the variable that holds this registry, as decorators spell it (`TERMS`).
        kind: what messages call such a part (`term`).
        package: the package whose modules declare the shipped parts.
        given: parameters that the framework fills in wherever a signature has them; a recipe may say otherwise.
        catalog: a module that adds families of third-party parts when it is imported.
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
        """Declares a class or function under `name`; the facts are literals that can be read without importing."""

        def decorate(part: Any) -> Any:
            part.registered_name = name
            part.version = int(facts.get("version", 1))
            return part

        return decorate

    @cached_property
    def _shipped_entries(self) -> dict[str, Entry]:
        if self.catalog:
            importlib.import_module(self.catalog)  # adds families; it imports no torch
        root = Path(__file__).parent
        entries: dict[str, Entry] = {}
        for path in sorted(root.joinpath(*self.package.split(".")[1:]).rglob("*.py")):
            module = ".".join((root.name, *path.relative_to(root).with_suffix("").parts))
            self._add_entries(entries, self._read_declarations(path, module))
        return entries

    def add_plugin(self, module: str) -> None:
        """Adds the declarations of a plug-in module. It is imported only when one of its parts is built."""
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"plug-in {module!r}: no such module can be found.")
        self._add_entries(self._plugin_entries, self._read_declarations(Path(spec.origin), module), reserved=self._shipped_entries)

    @property
    def entries(self) -> dict[str, Entry]:
        """All parts by name, those of the families left out."""
        return {**self._shipped_entries, **self._plugin_entries}

    def names(self) -> list[str]:
        """All names, those of the installed families included."""
        own = list(self.entries)
        return [*own, *(f"{f.prefix}{name}" for f in self.families for name in f.names())]

    def entry(self, name: str, location: Location | str = "") -> Entry:
        """Returns the entry called `name`.

        Raises:
            ConfigError: there is none; the message names the nearest.
        """
        found = self.entries.get(name)
        if found is not None:
            return found
        known = list(self.entries)
        for family in self.families:
            if not str(name).startswith(family.prefix):
                continue
            bare, names = str(name)[len(family.prefix) :], family.names()
            if bare in names:
                return family.entry(bare)
            if family.prefix and not names:
                raise ConfigError(f"{location}: {name!r} needs another package: {family.install_hint}")
            if family.prefix:
                known = [f"{family.prefix}{n}" for n in names]
                break
            known += names
        raise ConfigError(f"{location}: no {self.kind} {name!r}.{suggest(name, known)}".lstrip(": "))

    def check(self, name: str, params: Mapping[str, Any], location: Location | str = "") -> Entry:
        """Checks the names and the types of parameters against the signature, without importing the part.

        Raises:
            ConfigError: unknown name, unknown or missing parameter, or wrong type.
        """
        entry = self.entry(name, location)
        for key, value in params.items():
            parameter = entry.parameters.get(key)
            if parameter is None:
                raise ConfigError(
                    f"{location}: {self.kind} {name!r} has no parameter {key!r}.{suggest(key, entry.parameters)} "
                    f"Write {entry.signature()}"
                )
            fault = type_mismatch(parameter.annotation, value)
            if fault:
                raise ConfigError(f"{location}: {self.kind} {name!r}: {key} must be {fault}, got {value!r}")
        self._check_required(entry, {*params, *entry.facts.get("injected", ()), *self.injected}, location)
        return entry

    def build(self, name: str, params: Mapping[str, Any], location: Location | str = "", **injected: Any) -> Any:
        """Builds the part. `injected` values are passed only where the signature asks for them."""
        entry = self.check(name, {k: v for k, v in params.items() if not _is_tensor(v)}, location)
        given = {key: value for key, value in injected.items() if key in entry.parameters and key not in params}
        self._check_required(entry, {*given, *params}, location)
        return entry.load()(**{**given, **params})

    def _check_required(self, entry: Entry, names: Collection[str], location: Location | str) -> None:
        missing = [p.name for p in entry.parameters.values() if p.default is REQUIRED and p.name not in names]
        if missing:
            raise ConfigError(
                f"{location}: {self.kind} {entry.name!r} needs {', '.join(missing)}. Write {entry.signature()}".lstrip(
                    ": "
                )
            )

    def _add_entries(self, target: dict[str, Entry], entries: list[Entry], reserved: Mapping[str, Entry] | None = None) -> None:
        for entry in entries:
            other = target.get(entry.name) or (reserved or {}).get(entry.name)
            if other is not None:
                raise ConfigError(
                    f"two {self.kind}s are called {entry.name!r}: {other.module}.{other.symbol} "
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
        found = []
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if self._is_registration(decorator):
                    found.append(_build_entry(node, decorator, module, classes, module_doc))  # type: ignore[arg-type]
        return found

    def _is_registration(self, node: ast.expr) -> bool:
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
            read = read_parameters(forward, skip_self=True)
            inputs = tuple(read)
            optional = tuple(key for key, parameter in read.items() if parameter.default is not REQUIRED)
    else:
        parameters = read_parameters(node, skip_self=False)
    doc = ast.get_docstring(node) or ""
    return Entry(name, module, node.name, doc, parameters, facts, inputs, optional, module_doc=module_doc)


def _find_method(node: ast.ClassDef, name: str, classes: Mapping[str, ast.ClassDef]) -> ast.FunctionDef | None:
    """The method itself, or the one that a base class of the same file gives."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return item
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found = _find_method(classes[base.id], name, classes)
            if found is not None:
                return found
    return None


def read_parameters(node: ast.FunctionDef, *, skip_self: bool) -> dict[str, Parameter]:
    """Reads the parameters of a function off its syntax tree; defaults that are no literals stay as source text."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults, strict=True))[1 if skip_self else 0 :]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    result = {}
    for argument, default in pairs:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        result[argument.arg] = Parameter(argument.arg, annotation, REQUIRED if default is None else _literal_or_source(default))
    return result


def _literal_or_source(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def type_mismatch(annotation: str, value: Any) -> str | None:
    """Says in words what `value` should have been under the annotation, or None when it fits.

    Knows int, float, str, bool, None, list[...], tuple[...], dict, Literal[...], unions, and Number (a number
    or a schedule). Annotations that it does not know accept anything.
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
        number = isinstance(value, int | float) and not isinstance(value, bool)
        match node.id:
            case "int":
                return isinstance(value, int) and not isinstance(value, bool)
            case "float":
                return number
            case "Number":
                return number or (isinstance(value, Mapping) and "type" in value) or hasattr(value, "params")
            case "str":
                return isinstance(value, str)
            case "bool":
                return isinstance(value, bool)
            case "list" | "tuple" | "Sequence":
                return isinstance(value, list | tuple)
            case "dict" | "Mapping":
                return isinstance(value, Mapping)
        return True
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice
        match node.value.id:
            case "Literal":
                options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                return any(isinstance(o, ast.Constant) and o.value == value for o in options)
            case "list" | "Sequence":
                return isinstance(value, list | tuple) and all(_matches_type(inner, v) for v in value)
            case "tuple":
                if not isinstance(value, list | tuple):
                    return False
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                if len(parts) == 2 and isinstance(parts[1], ast.Constant) and parts[1].value is ...:
                    return all(_matches_type(parts[0], v) for v in value)
                return len(parts) == len(value) and all(_matches_type(p, v) for p, v in zip(parts, value, strict=True))
            case "dict" | "Mapping":
                return isinstance(value, Mapping)
    return True


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
        inner = node.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if node.value.id == "Literal":
            return "one of " + ", ".join(str(getattr(p, "value", "?")) for p in parts)
        if node.value.id in ("list", "tuple", "Sequence"):
            return "a list of " + " and ".join(_describe_type(p) for p in parts if ast.unparse(p) != "...")
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
    "models": MODELS,
    "datasets": DATASETS,
    "augmentations": AUGMENTATIONS,
    "terms": TERMS,
    "adapters": ADAPTERS,
    "sample_weights": SAMPLE_WEIGHTS,
    "routers": ROUTERS,
    "combiners": COMBINERS,
    "weight_transforms": WEIGHT_TRANSFORMS,
    "subsets": SUBSETS,
    "relabellings": RELABELS,
    "artifacts": ARTIFACTS,
    "selectors": SELECTORS,
    "metrics": METRICS,
    "schedules": SCHEDULES,
    "optimizers": OPTIMIZERS,
}
