"""Structure of the code, read from its syntax trees: no object replaces a method of another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kdbench"


def method_names(trees: dict[str, ast.Module]) -> set[str]:
    """Returns the names of all methods of all classes; properties are no methods."""
    names = set()
    for tree in trees.values():
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for item in owner.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(item):
                    names.add(item.name)
    return names


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(text in ("property", "cached_property") or text.endswith(".setter") for text in decorators)


def replaced_methods(trees: dict[str, ast.Module]) -> list[str]:
    """Returns assignments to attributes that are named like a method, except on `self` inside `__init__`."""
    names = method_names(trees)
    problems = []
    for file, tree in trees.items():
        for function, node in _nodes_with_function(tree, None):
            for attribute in _assigned_attributes(node):
                is_own = isinstance(attribute.value, ast.Name) and attribute.value.id == "self"
                if attribute.attr in names and not (is_own and function == "__init__"):
                    problems.append(f"{file}:{attribute.lineno} assigns {ast.unparse(attribute)}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                problems.append(f"{file}:{node.lineno} calls setattr")
    return problems


def _nodes_with_function(node: ast.AST, function: str | None) -> Iterator[tuple[str | None, ast.AST]]:
    """Yields every node with the name of the innermost function that contains it."""
    for child in ast.iter_child_nodes(node):
        yield function, child
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from _nodes_with_function(child, inner)


def _assigned_attributes(node: ast.AST) -> list[ast.Attribute]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    parts = (part for target in targets for part in ast.walk(target))
    return [part for part in parts if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)]


def test_no_method_is_replaced_from_outside():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    trees = {path.relative_to(PACKAGE.parent).as_posix(): ast.parse(path.read_text("utf-8")) for path in files}
    assert replaced_methods(trees) == []


CLASS = "class Runner:\n    def __init__(self):\n        self.step = None\n\n    def step(self): ...\n"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("", None),
        ("def use(runner):\n    runner.strategy = 1\n", None),
        ("def use(runner):\n    runner.step = print\n", "runner.step"),
        ("def use(runner):\n    runner.a, runner.step = 1, print\n", "runner.step"),
        ("class Other:\n    def use(self):\n        self.step = print\n", "self.step"),
        ("def use(runner):\n    setattr(runner, 'step', print)\n", "setattr"),
    ],
)
def test_replaced_method_is_found(code, problem):
    """Negative controls of the test above."""
    problems = replaced_methods({"a.py": ast.parse(CLASS), "b.py": ast.parse(code)})
    assert (problems == []) if problem is None else (len(problems) == 1 and problem in problems[0])
