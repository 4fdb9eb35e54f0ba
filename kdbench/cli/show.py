"""`kdbench list` and `kdbench show`: print models, terms, recipes, methods, ... without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kdbench.cli.methods import counts_text, list_methods, method_text, status_detail
from kdbench.config.method_list import Method, read_methods
from kdbench.config.parse.data import DATASET_INJECTED
from kdbench.config.paths import GROUPS, find_recipe, group_files, recipe_names, shared_folder
from kdbench.errors import ConfigError, suggest
from kdbench.registry import MODELS, REGISTRIES, REQUIRED, Entry, Family, Parameter

KINDS = (*REGISTRIES, "recipes", *GROUPS, "methods")

_INJECTED = {"models": MODELS.injected, "datasets": DATASET_INJECTED, "adapters": ("source", "target")}

_WRAP_WIDTH = 95
"""A docstring's line of more characters continues in the next line."""

_PARTS_INTRO = """\
# Parts

<!-- Written by `kdbench list --markdown` from the docstrings; a test compares it. -->

All registered parts by kind. `kdbench show NAME` prints a part's formula, paper, parameters and an example;
`kdbench list KIND` prints one of these tables, with the parts of other libraries."""

Row = tuple[str, str]


def list_kinds(kinds: Sequence[str]) -> int:
    """Prints one line per name and returns the exit code, 0.

    Args:
        kinds: kinds to print, from `KINDS`. Empty: all kinds, but only the number of models of other libraries.

    Raises:
        ConfigError: a kind is unknown.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"list: no kind {kind!r}.{suggest(kind, KINDS, limit=len(KINDS))}")
    if list(kinds) == ["methods"]:
        return list_methods()
    sections = [(kind, _kind_rows(kind, full=bool(kinds))) for kind in kinds or KINDS]
    if sys.stdout.isatty():
        _print_tables(sections)
        return 0
    for position, (kind, rows) in enumerate(sections):
        if len(sections) > 1:
            print(f"{chr(10) if position else ''}{kind}:")
        width = max((len(name) for name, _ in rows), default=0)
        for name, summary in rows:
            print(f"{'  ' if len(sections) > 1 else ''}{name:<{width}}  {summary}".rstrip())
    return 0


def _print_tables(sections: Sequence[tuple[str, list[Row]]]) -> None:
    console = Console()
    for kind, rows in sections:
        table = Table(box=box.SIMPLE, show_header=False, title=kind, title_justify="left", title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, summary in rows:
            table.add_row(Text(name), Text(summary))
        console.print(table)


def _kind_rows(kind: str, full: bool) -> list[Row]:
    if kind == "recipes":
        return [(name, _file_title(shared_folder("recipes") / f"{name}.yaml")) for name in recipe_names()]
    if kind in GROUPS:
        return [(name, _file_title(path)) for name, path in group_files(kind, Path.cwd()).items()]
    if kind == "methods":
        methods = read_methods(strict=False)
        if not full:
            return [("...", f"{counts_text(methods)} `kdbench list methods` lists them")]
        return [(method.id, f"{method.method}; {method.status}: {status_detail(method)}") for method in methods.methods]
    registry = REGISTRIES[kind]
    rows = [(name, entry.summary) for name, entry in sorted(registry.entries.items())]
    for family in registry.families:
        rows += _family_rows(family, kind, full)
    return rows


def parts_page() -> str:
    """Returns the page docs/parts.md, which lists all registered parts (models, terms, ...) and all shipped recipes.

    The parts of another library share one row, because their names depend on the installed version.
    """
    lines = [_PARTS_INTRO]
    for kind, registry in REGISTRIES.items():
        rows = [(f"`{name}`", entry.summary) for name, entry in sorted(registry.entries.items())]
        count = f" ({len(rows)})" if rows else ""
        rows += [
            (f"`{family.prefix}...`" if family.prefix else "any of `torch.optim`", "") for family in registry.families
        ]
        lines += ["", f"## {kind.replace('_', ' ').capitalize()}{count}", "", "| name | summary |", "|---|---|"]
        lines += [f"| {name} | {summary.replace('|', chr(92) + '|')} |" for name, summary in rows]
    names = recipe_names()
    lines += ["", f"## Recipes ({len(names)})", "", "| name | title |", "|---|---|"]
    lines += [
        f"| [{name}](../recipes/{name}.yaml) | {_file_title(shared_folder('recipes') / f'{name}.yaml')} |"
        for name in names
    ]
    return "\n".join(lines) + "\n"


def _family_rows(family: Family, kind: str, full: bool) -> list[Row]:
    names = family.names()
    if not names:
        return [(f"{family.prefix}...", family.install_hint)]
    if full:
        return [(f"{family.prefix}{name}", "") for name in names]
    summary = ", ".join(names) if len(names) <= 20 else f"{len(names)} names; `kdbench list {kind}` lists them"
    return [(f"{family.prefix}..." if family.prefix else "torch.optim", summary)]


def _file_title(path: Path) -> str:
    """Returns the `title` of a recipe, or the comment on the first line of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("title:"):
            return line.removeprefix("title:").strip().strip("'\"")
    return lines[0].lstrip("# ").strip() if lines and lines[0].startswith("#") else ""


def show(name: str) -> int:
    """Prints the full description of every part, recipe, ... that has a given name. Returns the exit code, 0.

    Raises:
        ConfigError: no part, recipe, group file or method has this name.
    """
    items = list(_find_items(name))
    if not items:
        names = {*recipe_names(), *(name for registry in REGISTRIES.values() for name in registry.entries)}
        raise ConfigError(f"show: no part, recipe or method is called {name!r}.{suggest(name, names)}")
    if len(items) > 1:
        full_names = ", ".join(f"{kind}/{name}" for kind, _ in items)
        print(f"{name!r} is the name of {len(items)} parts: {full_names}.\n")
    texts = [_item_text(kind, item) for kind, item in items]
    _print_texts(texts, [kind for kind, _ in items])
    return 0


def _item_text(kind: str, item: Entry | Path | Method) -> str:
    if isinstance(item, Path):
        return item.read_text(encoding="utf-8")
    return method_text(item) if isinstance(item, Method) else describe_entry(kind, item)


def _find_items(name: str) -> Iterator[tuple[str, Entry | Path | Method]]:
    """Yields pairs (kind, item) of all parts, recipes, ... with a given name, which is `NAME` or `KIND/NAME`."""
    prefix, _, name_in_kind = name.partition("/")
    kind = prefix if prefix in KINDS else f"{prefix}s"  # accepts `term/kd` too
    if name_in_kind and kind in KINDS:
        yield from _find_in_kind(kind, name_in_kind)
        return
    for kind in KINDS:
        yield from _find_in_kind(kind, name)


def _find_in_kind(kind: str, name: str) -> Iterator[tuple[str, Entry | Path | Method]]:
    if kind == "recipes":
        if name in recipe_names() or Path(name).suffix in (".yaml", ".yml"):
            yield kind, find_recipe(name)[1]
        return
    if kind in GROUPS:
        files = group_files(kind, Path.cwd())
        if name in files:
            yield kind, files[name]
        return
    if kind == "methods":
        yield from ((kind, method) for method in read_methods(strict=False).methods if method.id == name)
        return
    registry = REGISTRIES[kind]
    try:
        yield kind, registry.entry(name)
    except ConfigError:
        # A name with a family's prefix fails when its library is not installed; that error says what to install.
        if any(family.prefix and name.startswith(family.prefix) for family in registry.families):
            raise


def describe_entry(kind: str, entry: Entry) -> str:
    """Returns the description of a part (a model, a term, ...) that `kdbench show` prints.

    The description contains the docstring, operands, parameters with defaults, an example, and the source file.
    """
    facts = entry.facts
    lines = [f"{entry.name} ({REGISTRIES[kind].kind})", "", entry.doc.strip() or "(no description)"]
    if facts.get("paper") and str(facts["paper"]).removeprefix("arXiv:") not in entry.doc:
        lines += ["", f"Paper: {facts['paper']}"]
    if entry.inputs and kind == "terms":
        inputs = [f"{name} (optional)" if name in entry.optional_inputs else name for name in entry.inputs]
        lines += ["", f"Operands: {', '.join(inputs)}.", f"Space of the loss: {facts.get('space', 'row')}."]
    injected = _injected_names(kind, entry)
    parameters = [parameter for parameter in entry.parameters.values() if parameter.name not in injected]
    lines += ["", "Parameters:" if parameters else "Parameters: none."]
    width = max((len(parameter.name) for parameter in parameters), default=0)
    lines += [f"  {p.name:<{width}}  {_type_text(p)}{_default_text(p)}" for p in parameters]
    example = _example_lines(kind, entry, parameters)
    if example and "Example" not in entry.doc:
        lines += ["", "Example (recipe):", *(f"  {line}" for line in example)]
    details = [f"{key} {value}" for key, value in facts.items() if key not in ("injected", "paper", "space")]
    lines += ["", f"Source: {entry.module}.{entry.symbol}" + (f" ({', '.join(details)})" if details else "")]
    return "\n".join(lines)


def _injected_names(kind: str, entry: Entry) -> set[str]:
    """Returns the parameters of a part that the engine sets.

    Those of a model are omitted, since a recipe may set them.
    """
    injected = set(entry.facts.get("injected", ()))
    return injected if kind == "models" else injected | set(_INJECTED.get(kind, ()))


def _type_text(parameter: Parameter) -> str:
    return parameter.annotation.replace("Number", "number or schedule") or "any value"


def _default_text(parameter: Parameter) -> str:
    return ", required" if parameter.default is REQUIRED else f" = {_yaml_text(parameter.default)}"


def _yaml_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml_text(item) for item in value)}]"
    return str(value)


def _example_lines(kind: str, entry: Entry, parameters: Sequence[Parameter]) -> list[str]:
    """Returns an example of a part (a model, a term, ...) in a recipe, as lines.

    For kinds whose docstrings contain examples, the result is empty.
    """
    # Defaults of terms and augmentations are worth showing; an optimizer's twelve switches are not.
    has_defaults = kind in ("terms", "augmentations")
    example_parameters = [p for p in parameters if p.default is REQUIRED or (has_defaults and p.default is not None)]
    params = {p.name: "..." if p.default is REQUIRED else _yaml_text(p.default) for p in example_parameters[:5]}
    flow = ", ".join([f"type: {entry.name}", *(f"{key}: {value}" for key, value in params.items())])
    short = f"{{{flow}}}" if params else entry.name
    match kind:
        case "terms":
            features = "student: layer3, teacher: layer3, " if entry.facts.get("features") else ""
            term_params = "".join(f", {key}: {value}" for key, value in params.items())
            options = f"{features}weight: 1{term_params}"
            return ["terms:", f"  {entry.name}: {{type: {entry.name}, {options}}}"]
        case "models":
            return [f"student: {{model: {short}}}"]
        case "datasets":
            return [f"dataset: {short}"]
        case "augmentations":
            return [f"augment: [{short}]"]
        case "adapters":
            return [f"student: {{path: layer3, adapter: {short}}}"]
        case "metrics":
            return [f"metrics: [top1, {short}]" if entry.name != "top1" else "metrics: [top1]"]
        case "optimizers":
            rate = ", lr: 0.1" if "lr" in entry.parameters else ""
            return [f"optimizer: {{{flow}{rate}}}"]
    return []


def _print_texts(texts: Sequence[str], kinds: Sequence[str]) -> None:
    if not sys.stdout.isatty():
        print("\n\n".join(text.rstrip() for text in texts))
        return
    console = Console()
    for text, kind in zip(texts, kinds, strict=True):
        if kind in ("recipes", *GROUPS):
            console.print(Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default"))
            continue
        title, _, body = text.partition("\n")
        console.print(Text(title, style="bold cyan"))
        console.print(Text(_join_wrapped_lines(body)))


def _join_wrapped_lines(text: str) -> str:
    """Joins the lines of each wrapped paragraph, so that the text can be wrapped to the width of the terminal."""
    lines = [""]
    for line in text.splitlines():
        is_continuation = len(lines[-1]) > _WRAP_WIDTH and line and not line.startswith((" ", "-"))
        lines[-1:] = [f"{lines[-1]} {line}"] if is_continuation else [lines[-1], line]
    return "\n".join(lines[1:])
