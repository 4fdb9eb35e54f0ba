"""Roles, features, the plan, stages, the runner and checkpoints. This file lists torch's optimizers, without torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from kdbench.registry import OPTIMIZERS, Entry, Family, Parameter, read_parameters


@cache
def _optimizer_files() -> dict[str, Path]:
    """Returns name -> path of the defining file, for every optimizer class that `torch.optim` exports."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0], "optim")
    exported = (folder / "__init__.py").read_text(encoding="utf-8")
    bases: dict[str, str] = {}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.py")):
        for name, base in re.findall(r"^class (\w+)\((\w+)\)", path.read_text(encoding="utf-8"), re.MULTILINE):
            bases[name], files[name] = base, path

    def is_optimizer(name: str) -> bool:
        base = bases.get(name)
        return base == "Optimizer" or (base is not None and is_optimizer(base))

    names = [name for name in bases if is_optimizer(name) and re.search(rf"\bimport {name}\b", exported)]
    return {name: files[name] for name in sorted(names)}


def _optimizer_entry(name: str) -> Entry:
    """Reads the constructor parameters of one optimizer from its source file.

    The parameter `params` is left out, because the engine supplies it.
    """
    tree = ast.parse(_optimizer_files()[name].read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    parameters = {key: _plain(p) for key, p in read_parameters(init, skip_self=True).items() if key != "params"}
    doc = f"torch.optim.{name}. See https://docs.pytorch.org/docs/stable/generated/torch.optim.{name}.html"
    return Entry(name, "torch.optim", name, doc, parameters, loader=partial(_load_optimizer, name))


def _load_optimizer(name: str) -> Any:
    return getattr(importlib.import_module("torch.optim"), name)


def _plain(parameter: Parameter) -> Parameter:
    """Simplifies a type annotation by removing `Tensor` and names of `typing`: `Union[float, Tensor]` -> `float`."""
    if not parameter.annotation:
        return parameter
    node = _Plain().visit(ast.parse(parameter.annotation, mode="eval").body)
    return replace(parameter, annotation=ast.unparse(node))


class _Plain(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        kind = node.value.id if isinstance(node.value, ast.Name) else ""
        if kind == "Optional":
            return ast.BinOp(node.slice, ast.BitOr(), ast.Constant(None))
        if kind == "Union" and isinstance(node.slice, ast.Tuple):
            first, *others = [part for part in node.slice.elts if not _is_tensor(part)]
            for part in others:
                first = ast.BinOp(first, ast.BitOr(), part)
            return first
        if kind in ("Tuple", "List", "Dict"):  # as older releases of torch write them
            return ast.Subscript(ast.Name(kind.lower()), node.slice)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if _is_tensor(node.right):
            return node.left
        return node.right if _is_tensor(node.left) else node


def _is_tensor(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "Tensor"


OPTIMIZERS.families.append(Family("", lambda: list(_optimizer_files()), _optimizer_entry))
