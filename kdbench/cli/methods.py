"""`kdbench list methods`: which published methods run, as what, and what the others lack; the same as a page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

from kdbench.config.method_list import NOT_STATED, NOT_YET, RUNS, RUNS_AS, STATUSES, Method, MethodList, read_methods

_HEAD = {
    RUNS: "Runs",
    RUNS_AS: "Runs as another recipe, with other keys",
    NOT_YET: "Not yet",
    NOT_STATED: "Not stated",
}


_SAYS = {
    RUNS: "The recipe is the method, with a test of what it does.",
    RUNS_AS: "The wiring is that of another row's recipe; these overrides make it this method.",
    NOT_YET: "By field, with what is missing: a kind of data, a family of networks, a term, or a wiring.",
    NOT_STATED: "The abstract gives too little, and neither the paper's text nor code was found.",
}


_INTRO = """\
# Methods

<!-- Written by `kdbench list methods --markdown`, and compared by a test. Change configs/methods.yaml or a recipe. -->

Which published methods run here, as which recipe, and what the others lack. Rows `m...` are those of the catalogue of
papers that kdbench is to serve; rows `x-...` stand beyond it. `kdbench show m058` prints one of them,
`kdbench check RECIPE` says in words what a recipe does."""


def list_methods(status: str = "") -> int:
    """Prints the rows, of one status or grouped by status, and how many there are of each."""
    listed = read_methods()
    groups = [(each, [m for m in listed.methods if m.status == each]) for each in STATUSES if status in ("", each)]
    if sys.stdout.isatty():
        _print_tables([(each, rows) for each, rows in groups if rows])
    else:
        ids = max(len(method.id) for method in listed.methods)
        names = max(len(method.method) for method in listed.methods)
        for each, rows in groups:
            print(f"{each}:" if rows else f"{each}: none")
            for method in rows:
                print(f"  {method.id:<{ids}}  {method.method:<{names}}  {status_detail(method)}")
            print()
    print(counts_text(listed))
    return 0


def status_detail(method: Method) -> str:
    """What a status means for this row: its recipes, the recipe and keys it runs as, what is missing, or not told."""
    if method.status == RUNS:
        return ", ".join(method.recipes)
    if method.variant_of is not None:
        return " ".join((method.variant_of.recipe, *method.variant_of.overrides))
    return method.missing if method.status == NOT_YET else method.unstated


def counts_text(listed: MethodList) -> str:
    """How many rows of each status, in one sentence."""
    counts = listed.counts()
    return (
        f"{len(listed.methods)} methods: {counts[RUNS]} run, {counts[RUNS_AS]} run as another recipe with other keys, "
        f"{counts[NOT_YET]} do not yet, {counts[NOT_STATED]} are not stated. "
        f"{len(listed.language_model)} more need a language model."
    )


def method_text(method: Method) -> str:
    """One row in full, for `kdbench show`."""
    lines = [f"{method.id} (method): {method.method}", ""]
    told = {
        "Paper": ", ".join(text for text in (method.title, method.link or method.paper) if text),
        "What it does": method.mechanism,
        "Field": method.field,
        {RUNS: "Runs", RUNS_AS: "Runs as", NOT_YET: "Not yet; missing"}.get(method.status, "Not stated; not told"): status_detail(
            method
        ),
    }
    return "\n".join([*lines, *(f"{key}: {text}" for key, text in told.items() if text)])


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


def methods_page(listed: MethodList | None = None) -> str:
    """The page docs/methods.md."""
    listed = read_methods() if listed is None else listed
    lines = [_INTRO, "", *_count_table(listed)]
    for status in STATUSES:
        rows = [method for method in listed.methods if method.status == status]
        if not rows:
            continue
        lines += ["", f"## {_HEAD[status]}", "", _SAYS[status]]
        if status != NOT_YET:
            lines += ["", *_table(rows, status)]
            continue
        for (_, field), some in groupby(sorted(rows, key=_field), key=_field):
            lines += ["", f"### {field.capitalize()}", "", *_table(list(some), status)]
    text = ", ".join(f"{key} {name}" for key, name in listed.language_model.items())
    lines += ["", "## Needs a language model", "", "The student or the teacher reads or writes text.", "", f"{text}."]
    return "\n".join(lines) + "\n"


def _field(method: Method) -> tuple[bool, str]:
    return method.beyond, "beyond the catalogue" if method.beyond else method.field


def _count_table(listed: MethodList) -> Iterator[str]:
    yield "| status | of the catalogue | beyond it |"
    yield "|---|---:|---:|"
    for status in STATUSES:
        own = [method.beyond for method in listed.methods if method.status == status]
        yield f"| {_HEAD[status].lower()} | {own.count(False)} | {own.count(True)} |"
    yield f"| needs a language model | {len(listed.language_model)} | |"


def _table(methods: Sequence[Method], status: str) -> Iterator[str]:
    last = {RUNS: "recipe", RUNS_AS: "recipe and keys", NOT_YET: "what is missing", NOT_STATED: "what is not told"}[status]
    yield f"| id | method | what it does | {last} |"
    yield "|---|---|---|---|"
    for method in methods:
        name = f"[{method.method}]({method.link})" if method.link else _with_venue(method)
        cells = [method.id, name, method.mechanism, _last(method)]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _with_venue(method: Method) -> str:
    return f"{method.method} ({method.paper})" if method.paper else method.method


def _last(method: Method) -> str:
    if method.status == RUNS:
        return ", ".join(_recipe(name) for name in method.recipes)
    if method.variant_of is not None:
        return " ".join((_recipe(method.variant_of.recipe), *(f"`{key}`" for key in method.variant_of.overrides)))
    return status_detail(method)


def _recipe(name: str) -> str:
    return f"[{name}](../recipes/{name}.yaml)"
