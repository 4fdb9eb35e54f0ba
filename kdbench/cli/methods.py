"""Prints published methods and the recipes that implement them: as a list, as one full entry, or as docs/methods.md."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from kdbench.config.method_list import (
    NOT_STATED,
    NOT_YET,
    RUNS,
    RUNS_AS,
    STATUSES,
    Method,
    MethodList,
    read_methods,
    recipe_notes,
)
from kdbench.config.schema import Notes

_HEADINGS = {
    RUNS: "Runs",
    RUNS_AS: "Runs as another recipe with overrides",
    NOT_YET: "Not yet",
    NOT_STATED: "Not stated",
}


_EXPLANATIONS = {
    RUNS: "A shipped recipe implements the method, and a test checks its mechanism.",
    RUNS_AS: "The recipe of another method implements this method with the overrides in the last column.",
    NOT_YET: "By field, with the missing feature: a kind of data, a family of networks, a term, or a wiring.",
    NOT_STATED: "The abstract states too little, and neither the paper's text nor code was found.",
}


_LAST_COLUMNS = {
    RUNS: "recipe | basis",
    RUNS_AS: "recipe and overrides",
    NOT_YET: "missing",
    NOT_STATED: "not stated",
}


_INTRO = """\
# Methods

<!-- Written by `kdbench list methods --markdown` from configs/methods.yaml and the recipes; a test compares it. -->

Published methods, the recipes that implement them, and the features that the others need. Rows `m...` belong to the
catalogue of papers that kdbench is to serve; rows `x-...` are beyond it. `kdbench show m058` prints one row with its
sources, `kdbench check RECIPE` describes what a recipe does."""


BASES = {"code": "released code", "text": "the paper's text", "abstract": "the abstract alone"}


_PAGE_WIDTH = 118


def list_methods(status: str = "") -> int:
    """Prints a list of methods and the number of methods of each status. Returns the exit code, 0.

    Args:
        status: status of the listed methods; empty: all methods, grouped by status.
    """
    method_list = read_methods()
    groups = [(each, [m for m in method_list.methods if m.status == each]) for each in STATUSES if status in ("", each)]
    if sys.stdout.isatty():
        _print_tables([(each, rows) for each, rows in groups if rows])
    else:
        id_width = max(len(method.id) for method in method_list.methods)
        name_width = max(len(method.method) for method in method_list.methods)
        for each, rows in groups:
            print(f"{each}:" if rows else f"{each}: none")
            for method in rows:
                print(f"  {method.id:<{id_width}}  {method.method:<{name_width}}  {status_detail(method)}")
            print()
    print(counts_text(method_list))
    return 0


def status_detail(method: Method) -> str:
    """Returns a text that explains a method's status, such as its recipes or the features that are missing for it."""
    if method.status == RUNS:
        return ", ".join(method.recipes)
    if method.variant_of is not None:
        return " ".join((method.variant_of.recipe, *method.variant_of.overrides))
    return method.missing if method.status == NOT_YET else method.unstated


def counts_text(method_list: MethodList) -> str:
    """Returns one line with the number of methods of each status."""
    counts = method_list.counts()
    return (
        f"{len(method_list.methods)} methods: {counts[RUNS]} run, "
        f"{counts[RUNS_AS]} run as another recipe with overrides, {counts[NOT_YET]} do not run yet, "
        f"{counts[NOT_STATED]} are not stated. "
        f"{len(method_list.language_model)} more need a language model."
    )


def method_text(method: Method) -> str:
    """Returns the text that `kdbench show` prints for one method. It contains the notes of the method's recipes."""
    status = {RUNS: "Runs", RUNS_AS: "Runs as", NOT_YET: "Not yet, missing", NOT_STATED: "Not stated"}[method.status]
    fields = {
        "Paper": ", ".join(text for text in (method.title, method.link or method.paper) if text),
        "Mechanism": method.mechanism,
        "Field": method.field,
        status: status_detail(method),
    }
    width = max(len(name) for name, text in fields.items() if text) + 2
    lines = [f"{method.id} (method): {method.method}", ""]
    lines += [line for name, text in fields.items() if text for line in _wrapped(f"{name + ':':<{width}}", text)]
    for recipe in method.recipes:
        notes = recipe_notes(recipe)
        if notes is not None:
            lines += ["", f"{recipe}:", *_notes_lines(notes)]
    return "\n".join(lines)


def _notes_lines(notes: Notes) -> Iterator[str]:
    yield f"  basis: {notes.basis}"
    for label, items in _labelled_notes(notes):
        yield f"  {label}:"
        for item in items:
            yield from _wrapped("    - ", item)


def _labelled_notes(notes: Notes) -> list[tuple[str, Sequence[str]]]:
    labelled = [("source", notes.source), ("differs", notes.differs), ("scaled down", notes.scaled_down)]
    return [(label, items) for label, items in labelled if items]


def _wrapped(start: str, text: str) -> list[str]:
    """Wraps `text` to the width of the terminal, at most 120 columns.

    The first line begins with `start`, and further lines are indented by the length of `start`.
    """
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    return _fill(start + text, width, " " * len(start))


def _fill(text: str, width: int, indent: str) -> list[str]:
    """Wraps a text to `width` columns. All lines except the first begin with `indent`."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _print_tables(groups: Sequence[tuple[str, list[Method]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for status, methods in groups:
        title = f"{status} ({len(methods)})"
        table = Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left", title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(max_width=30)
        table.add_column()
        for method in methods:
            table.add_row(Text(method.id), Text(method.method), Text(status_detail(method)))
        console.print(table)


def methods_page(method_list: MethodList | None = None) -> str:
    """Returns the page docs/methods.md."""
    method_list = read_methods() if method_list is None else method_list
    lines = [_INTRO, "", *_count_table(method_list)]
    for status in STATUSES:
        rows = [method for method in method_list.methods if method.status == status]
        if not rows:
            continue
        lines += ["", f"## {_HEADINGS[status]}", "", _EXPLANATIONS[status]]
        if status != NOT_YET:
            lines += ["", *_method_table(rows, status)]
            continue
        for (_, field), group in groupby(sorted(rows, key=_field_key), key=_field_key):
            lines += ["", f"### {field.capitalize()}", "", *_method_table(list(group), status)]
    text = "; ".join(f"{key} {name}" for key, name in method_list.language_model.items())
    lines += ["", "## Needs a language model", "", "The student or the teacher reads or writes text.", ""]
    lines += [*_fill(f"{text}.", _PAGE_WIDTH, ""), *_sources_section(method_list)]
    return "\n".join(lines) + "\n"


def _field_key(method: Method) -> tuple[bool, str]:
    return method.beyond, "beyond the catalogue" if method.beyond else method.field


def _count_table(method_list: MethodList) -> Iterator[str]:
    yield "| status | in the catalogue | beyond it |"
    yield "|---|---:|---:|"
    for status in STATUSES:
        beyond = [method.beyond for method in method_list.methods if method.status == status]
        yield f"| {_HEADINGS[status].lower()} | {beyond.count(False)} | {beyond.count(True)} |"
    yield f"| needs a language model | {len(method_list.language_model)} | |"


def _method_table(methods: Sequence[Method], status: str) -> Iterator[str]:
    columns = f"id | method | mechanism | {_LAST_COLUMNS[status]}"
    yield f"| {columns} |"
    yield "|" + "---|" * (columns.count("|") + 1)
    for method in methods:
        name = f"[{method.method}]({method.link})" if method.link else _name_with_venue(method)
        cells = [method.id, name, method.mechanism, *_last_cells(method)]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _name_with_venue(method: Method) -> str:
    return f"{method.method} ({method.paper})" if method.paper else method.method


def _last_cells(method: Method) -> list[str]:
    if method.status == RUNS:
        notes = {name: recipe_notes(name) for name in method.recipes}
        bases = [f"[{note.basis}](#{name.replace('/', '')})" for name, note in notes.items() if note is not None]
        return [", ".join(_recipe_link(name) for name in method.recipes), ", ".join(bases)]
    if method.variant_of is not None:
        overrides = (f"`{override}`" for override in method.variant_of.overrides)
        return [" ".join((_recipe_link(method.variant_of.recipe), *overrides))]
    return [status_detail(method)]


def _recipe_link(name: str) -> str:
    return f"[{name}](../recipes/{name}.yaml)"


def _sources_section(method_list: MethodList) -> Iterator[str]:
    """Yields the lines of the section "Sources and differences" of docs/methods.md: the notes of each recipe."""
    names = sorted({name for method in method_list.methods for name in method.recipes})
    notes = {name: note for name in names if (note := recipe_notes(name)) is not None}
    counts = Counter(note.basis for note in notes.values())
    bases = ", ".join(f"{text} ({counts[basis]} recipes)" for basis, text in BASES.items())
    yield from ("", "## Sources and differences", "")
    yield from _fill(
        f"The basis of a recipe is the best source that was available for it: {bases}. `differs` lists the differences "
        "from that source, `scaled down` the changes that only make the recipe small enough for its data set.",
        _PAGE_WIDTH,
        "",
    )
    for name, note in notes.items():
        yield from ("", f"### {name}", "", f"- basis: {note.basis}")
        for label, items in _labelled_notes(note):
            yield f"- {label}:"
            for item in items:
                yield from _fill(f"  - {item}", _PAGE_WIDTH, "    ")
