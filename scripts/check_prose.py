#!/usr/bin/env python3
"""Checks names, prose, lengths and layout of the project's Python code.

    scripts/check_prose.py [FOLDER ...]

Ruff checks syntax and style; this script checks the rules of CONTRIBUTING.md that ruff cannot check: identifiers are
nouns, docstrings begin with a verb, sentences use common words, functions and modules are short. The script prints one
figure per rule. If a figure is above its limit, the script lists the lines that break the rule, and exits with 1.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kdbench", "tests", "benchmarks", "scripts", "examples")

BODY_LINES = 60
UNCOMMENTED_LINES = 40
MODULE_LINES = 500
PACKAGE_MODULES = 14

VAGUE_NAME = re.compile(
    "one|other|others|here|there|ours|theirs|own|whole|rest_of|found|told|said|given|made|wanted|kept|seen|named|known|"
    "chosen|left|listed|shown|drawn|taken|bound|moved|held|caught|asked|opened|planned|measured|waiting|written|changed|"
    "dropped|begun|done|gone|lost|parted"
)
"""Pronouns and participles. An identifier of this kind does not name the value."""

HEADLESS = re.compile(r"(What|Whatever|Who|Whoever|Which|How|Where|When|Why|Whether)\b")

DIALECT = {
    r"in words": "name what is printed: a description, a message",
    r"tells?|told": "returns, reports, raises, prints",
    r"stands?(?! for\b)": "is",
    r"lies?": "is",
    r"anew": "again",
    r"besides": "in addition",
    r"of (?:which|whom)": "begin a new sentence",
    r"those that": "name the things",
    r"finds? fault": "reports, raises",
    r"the very": "the same",
    r"go(?:es)? on": "continues",
    r"somebody's": "name the owner",
}
"""Phrase (regular expression) -> replacement, for phrases that machine-learning texts do not use."""

DIALECT_PHRASE = re.compile(r"\b(?:" + "|".join(DIALECT) + r")\b", re.IGNORECASE)
IGNORED_COMMENT = re.compile(r"#\s*(?:noqa|type:|!)")

NAMES = "variables named by a participle or pronoun"
OTHER_NAMES = "parameters, attributes and functions named so"
HEADLESS_DOCSTRINGS = "docstrings that begin with a relative clause"
DOCSTRINGS = "phrases of dialect in docstrings"
MESSAGES = "phrases of dialect in messages"
COMMENTS = "phrases of dialect in comments"
BODIES = f"function bodies over {BODY_LINES} lines"
UNCOMMENTED = f"functions over {UNCOMMENTED_LINES} lines with fewer than two comments"
MODULES = f"modules over {MODULE_LINES} lines"
PACKAGES = f"packages of one module, or of more than {PACKAGE_MODULES}"
PACKAGE_DOCSTRINGS = "packages without a docstring"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Rule:
    """One rule of prose or layout.

    Attributes:
        limit: largest allowed number of problems.
        percent: whether `limit` is a percentage of the checked names, docstrings, ... instead of a number.
        checked: number of checked names, docstrings, ...
        problems: one message per place that breaks the rule.
    """

    limit: float
    percent: bool = False
    checked: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def figure(self) -> float:
        count = len(self.problems)
        return 100 * count / max(self.checked, 1) if self.percent else float(count)

    @property
    def broken(self) -> bool:
        return self.figure > self.limit

    def __str__(self) -> str:
        unit = " %" if self.percent else ""
        return f"{self.figure:.{2 if self.percent else 0}f}{unit} (limit {self.limit:g}{unit})"


class Report:
    """All rules, with the problems that were found."""

    def __init__(self) -> None:
        self.rules = {
            NAMES: Rule(0.5, percent=True),
            OTHER_NAMES: Rule(1, percent=True),
            HEADLESS_DOCSTRINGS: Rule(2, percent=True),
            DOCSTRINGS: Rule(2, percent=True),
            MESSAGES: Rule(1, percent=True),
            COMMENTS: Rule(2, percent=True),
            BODIES: Rule(0),
            UNCOMMENTED: Rule(0),
            MODULES: Rule(0),
            PACKAGES: Rule(0),
            PACKAGE_DOCSTRINGS: Rule(0),
        }

    def add(self, rule: str, path: Path, line: int, problems: Sequence[str]) -> None:
        """Adds one checked name, docstring, ... and its problems to a rule."""
        self.rules[rule].checked += 1
        self.rules[rule].problems += [f"{path}:{line}: {problem}" for problem in problems]

    def text(self) -> str:
        """Returns one line per rule. Below a broken rule there is one line per problem."""
        lines = []
        for name, rule in self.rules.items():
            lines.append(f"{'ABOVE ' if rule.broken else ''}{name}: {rule}")
            lines += [f"  {problem}" for problem in rule.problems if rule.broken]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the folders in `arguments`, prints the report, and returns the exit code."""
    names = sys.argv[1:] if arguments is None else arguments
    folders = [Path(name) for name in names] or [ROOT / name for name in FOLDERS]
    report = check(folders)
    print(report.text())
    return int(any(rule.broken for rule in report.rules.values()))


def check(folders: Sequence[Path]) -> Report:
    """Checks every Python file in the folders and their subfolders, and returns the report."""
    report = Report()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            check_module(path, report)
        for init in sorted(folder.rglob("__init__.py")):
            check_package(init.parent, report)
    return report


def check_module(path: Path, report: Report) -> None:
    """Checks one Python file and adds its problems to the report."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    comments = read_comments(text)
    docstrings = find_docstrings(tree)
    check_names(tree, path, report)
    check_prose(tree, docstrings, comments, path, report)
    check_lengths(tree, comments, path, report)
    length = len(text.splitlines())
    report.add(MODULES, path, 1, [f"{length} lines"] if length > MODULE_LINES else [])


def read_comments(text: str) -> dict[int, str]:
    """Returns line number -> comment. Directives to tools, such as `noqa`, are left out."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokens
        if token.type == tokenize.COMMENT and not IGNORED_COMMENT.match(token.string)
    }


def find_docstrings(tree: ast.AST) -> dict[ast.AST, ast.Constant]:
    """Returns node -> docstring, for every module, class and function with a docstring."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {}
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, owners) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            docstrings[node] = first.value
    return docstrings


def check_names(tree: ast.AST, path: Path, report: Report) -> None:
    """Checks the names of variables, parameters, attributes, functions and classes."""
    for node in ast.walk(tree):
        for rule, name in assigned_names(node):
            vague = VAGUE_NAME.fullmatch(name.strip("_").lower())
            report.add(rule, path, getattr(node, "lineno", 1), [f"`{name}` does not name the value"] if vague else [])


def assigned_names(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields pairs (rule, name) for the names that one node of the syntax tree defines."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield NAMES, node.id
    elif isinstance(node, ast.arg):
        yield OTHER_NAMES, node.arg
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield OTHER_NAMES, node.attr
    elif isinstance(node, Function | ast.ClassDef):
        yield OTHER_NAMES, node.name


def check_prose(
    tree: ast.AST, docstrings: dict[ast.AST, ast.Constant], comments: dict[int, str], path: Path, report: Report
) -> None:
    """Checks the words of docstrings, comments and messages."""
    for constant in docstrings.values():
        text = str(constant.value).strip()
        headless = [text.splitlines()[0]] if HEADLESS.match(text) else []
        report.add(HEADLESS_DOCSTRINGS, path, constant.lineno, headless)
        report.add(DOCSTRINGS, path, constant.lineno, dialect(text))
    for line, text in comments.items():
        report.add(COMMENTS, path, line, dialect(text))
    for line, text in find_messages(tree, docstrings):
        report.add(MESSAGES, path, line, dialect(text))


def find_messages(tree: ast.AST, docstrings: dict[ast.AST, ast.Constant]) -> Iterator[tuple[int, str]]:
    """Yields pairs (line number, text) of all strings with more than three words, except for docstrings."""
    constants = set(docstrings.values())
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and node not in constants else None
        if isinstance(text, str) and len(text.split()) > 3:
            yield getattr(node, "lineno", 1), text


def dialect(text: str) -> list[str]:
    """Returns one message per phrase of `DIALECT` in a text."""
    return [f"'{match}': {replacement(match)}" for match in DIALECT_PHRASE.findall(text)]


def replacement(phrase: str) -> str:
    """Returns the replacement for a phrase that `DIALECT` matches."""
    return next(text for pattern, text in DIALECT.items() if re.match(pattern, phrase, re.IGNORECASE))


def check_lengths(tree: ast.AST, comments: dict[int, str], path: Path, report: Report) -> None:
    """Checks the length of every function, and that a long function has comments."""
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        last = node.end_lineno or node.lineno
        docstring = find_docstrings(node).get(node)
        described = docstring_lines(docstring) if docstring is not None else 0
        length = last - node.lineno + 1 - described
        report.add(BODIES, path, node.lineno, [f"{node.name}: {length} lines"] if length > BODY_LINES else [])
        reasons = sum(node.lineno <= line <= last for line in comments)
        lacking = length > UNCOMMENTED_LINES and reasons < 2
        report.add(UNCOMMENTED, path, node.lineno, [f"{node.name}: {length} lines, {reasons} comments"] * lacking)


def docstring_lines(docstring: ast.Constant) -> int:
    """Returns the number of lines of a docstring."""
    return (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1


def check_package(folder: Path, report: Report) -> None:
    """Checks the docstring of a package and the number of its modules."""
    init = folder / "__init__.py"
    docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    report.add(PACKAGE_DOCSTRINGS, init, 1, [] if docstring else ["no docstring"])
    modules = [path for path in folder.glob("*.py") if path != init]
    packages = list(folder.glob("*/__init__.py"))
    unfit = len(modules) > PACKAGE_MODULES or len(modules) + len(packages) == 1
    report.add(PACKAGES, init, 1, [f"{len(modules)} modules"] if unfit else [])


if __name__ == "__main__":
    sys.exit(main())
