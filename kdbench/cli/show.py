"""`kdbench list` and `kdbench show`: what there is, read off the sources without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdbench.cli.methods import counts_text, list_methods, method_text, status_detail
from kdbench.config.method_list import Method, read_methods
from kdbench.config.parse.data import DATASET_INJECTED
from kdbench.config.paths import GROUPS, find_recipe, group_files, recipe_names, shared_folder
from kdbench.errors import ConfigError, suggest
from kdbench.registry import MODELS, REGISTRIES, REQUIRED, Entry, Parameter

KINDS = (*REGISTRIES, "recipes", *GROUPS, "methods")


_INJECTED = {"models": MODELS.injected, "datasets": DATASET_INJECTED, "adapters": ("source", "target")}


_WRAP_WIDTH = 95  # a line of a docstring longer than this goes on in the next


Row = tuple[str, str]


def list_kinds(kinds: Sequence[str]) -> int:
    """Prints one line for each part of the kinds; without any, of all kinds, foreign catalogues only counted."""
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kdbench list: no kind {kind!r}.{suggest(kind, KINDS, limit=len(KINDS))}")
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
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
        listed = read_methods(strict=False)
        if not full:
            return [("...", f"{counts_text(listed)} `kdbench list methods` lists them")]
        return [(method.id, f"{method.method}; {method.status}: {status_detail(method)}") for method in listed.methods]
    registry = REGISTRIES[kind]
    rows = [(name, entry.summary) for name, entry in sorted(registry.entries.items())]
    for family in registry.families:
        names = family.names()
        prefix = family.prefix or "torch.optim: "
        if not names:
            rows.append((f"{prefix}...", family.install_hint))
        elif full:
            rows += [(f"{family.prefix}{name}", "") for name in names]
        else:
            shown = ", ".join(names) if len(names) <= 20 else f"{len(names)} in all; `kdbench list {kind}` lists them"
            rows.append((prefix.rstrip(": ") if not family.prefix else f"{prefix}...", shown))
    return rows


def _file_title(path: Path) -> str:
    """The `title` of a recipe, or the comment on the first line of a file."""
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("title:"):
            return line.removeprefix("title:").strip().strip("'\"")
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def show(name: str) -> int:
    """Prints everything that `name` is; a name of several kinds is shown once for each.

    Raises:
        ConfigError: there is no such part, recipe or group file.
    """
    found = list(_find_items(name))
    if not found:
        known = {*recipe_names(), *(n for registry in REGISTRIES.values() for n in registry.entries)}
        raise ConfigError(f"kdbench show: nothing is called {name!r}.{suggest(name, known)}")
    if len(found) > 1:
        exact = ", ".join(f"{kind}/{name}" for kind, _ in found)
        print(f"{name!r} is the name of {len(found)} parts ({exact}).\n")
    texts = [_item_text(kind, item) for kind, item in found]
    _print_texts(texts, [kind for kind, _ in found])
    return 0


def _item_text(kind: str, item: Entry | Path | Method) -> str:
    if isinstance(item, Path):
        return item.read_text(encoding="utf-8")
    return method_text(item) if isinstance(item, Method) else describe_entry(kind, item)


def _find_items(name: str) -> Iterator[tuple[str, Entry | Path | Method]]:
    kind, _, rest = name.partition("/")
    only = {"term": "terms", "model": "models"}.get(kind, kind) if rest else None
    if only in KINDS:
        yield from _find_in_kind(str(only), rest)
        return
    for each in KINDS:
        yield from _find_in_kind(each, name)


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
        # A foreign name may lack its catalogue; then the registry says what to install.
        if any(f.prefix and name.startswith(f.prefix) for f in registry.families):
            raise


def describe_entry(kind: str, entry: Entry) -> str:
    lines = [f"{entry.name} ({REGISTRIES[kind].kind})", "", entry.doc.strip() or "(no description)"]
    if entry.facts.get("paper") and str(entry.facts["paper"]).removeprefix("arXiv:") not in entry.doc:
        lines += ["", f"Paper: {entry.facts['paper']}"]
    if entry.inputs and kind == "terms":
        reads = [f"{name}{' (where there is one)' if name in entry.optional_inputs else ''}" for name in entry.inputs]
        lines += ["", f"Reads: {', '.join(reads)}. Space of the loss: {entry.facts.get('space', 'row')}."]
    own = [p for p in entry.parameters.values() if p.name not in _injected_names(kind, entry)]
    lines += ["", "Parameters:" if own else "It has no parameters."]
    width = max((len(p.name) for p in own), default=0)
    lines += [f"  {p.name:<{width}}  {_type_text(p)}{_default_text(p)}" for p in own]
    example = _example_lines(kind, entry, own)
    if example:
        lines += ["", "Example:", *(f"  {line}" for line in example)]
    facts = [f"{key} {value}" for key, value in entry.facts.items() if key not in ("injected", "paper", "space")]
    lines += ["", f"Source: {entry.module}.{entry.symbol}" + (f" ({', '.join(facts)})" if facts else "")]
    return "\n".join(lines)


def _injected_names(kind: str, entry: Entry) -> set[str]:
    """Parameters that the engine gives. A model's are shown: a recipe may set them."""
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


def _example_lines(kind: str, entry: Entry, own: Sequence[Parameter]) -> list[str]:
    # The default of a term's number is worth showing; an optimiser's twelve switches are not.
    shown = [p for p in own if p.default is REQUIRED or (kind in ("terms", "augmentations") and p.default is not None)]
    params: Mapping[str, str] = {p.name: "..." if p.default is REQUIRED else _yaml_text(p.default) for p in shown[:5]}
    flow = ", ".join([f"type: {entry.name}", *(f"{key}: {value}" for key, value in params.items())])
    short = f"{{{flow}}}" if params else entry.name
    match kind:
        case "terms":
            features = "student: layer3, teacher: layer3, " if entry.facts.get("features") else ""
            rest = flow.removeprefix(f"type: {entry.name}").removeprefix(", ")
            options = f"{features}weight: 1{', ' + rest if rest else ''}"
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
    return []  # the description of a schedule has its own


def _print_texts(texts: Sequence[str], kinds: Sequence[str]) -> None:
    if not sys.stdout.isatty():
        print("\n\n".join(text.rstrip() for text in texts))
        return
    from rich.console import Console
    from rich.syntax import Syntax
    from rich.text import Text

    console = Console()
    for text, kind in zip(texts, kinds, strict=True):
        if kind in ("recipes", *GROUPS):
            console.print(Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default"))
            continue
        title, _, body = text.partition("\n")
        console.print(Text(title, style="bold cyan"))
        console.print(Text(_join_wrapped_lines(body)))


def _join_wrapped_lines(text: str) -> str:
    """Joins the lines of wrapped prose, so that a narrow terminal wraps them anew."""
    lines = [""]
    for line in text.splitlines():
        wrapped = len(lines[-1]) > _WRAP_WIDTH and line and not line.startswith((" ", "-"))
        lines[-1:] = [f"{lines[-1]} {line}"] if wrapped else [lines[-1], line]
    return "\n".join(lines[1:])
