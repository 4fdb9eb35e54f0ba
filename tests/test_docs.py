"""Tests the documentation: snippets run, links and file names resolve, imports follow the documented layers."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdbench.config.paths import recipe_names
from kdbench.registry import ARTIFACTS, COMBINERS, ROUTERS, SAMPLE_WEIGHTS, SELECTORS, TERMS, WEIGHT_TRANSFORMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

LAYERS = (
    {"errors", "entries", "files", "registry", "randomness", "config", "run_folder"},
    {"models", "data", "terms", "wiring"},
    {"engine"},
    {"speed", "report"},
    {"artifacts"},
    {"experiment"},
    {"cli", "plugins"},
)


def blocks(page: Path, language: str) -> list[str]:
    """Returns the code blocks of one language."""
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def layer(module: str) -> int | None:
    """Returns the index of a module's layer in `LAYERS`; None for `kdbench` itself."""
    part = [*module.split("."), ""][1]
    return next((number for number, names in enumerate(LAYERS) if part in names), None)


def imports(path: Path) -> set[str]:
    """Returns the modules of kdbench that a file imports."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {name for name in modules if name.split(".")[0] == "kdbench"}


def test_imports_do_not_go_to_higher_layers():
    files = list((ROOT / "kdbench").rglob("*.py"))
    assert len(files) > 50
    wrong = []
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module_layer = layer(module)
        if module_layer is None:  # the package itself and __main__
            continue
        for imported in imports(path):
            imported_layer = layer(imported)
            if imported_layer is not None and imported_layer > module_layer:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, wrong


def test_layers_contain_every_package():
    paths = [path for path in (ROOT / "kdbench").iterdir() if path.suffix in ("", ".py")]
    parts = {path.stem for path in paths if not path.name.startswith("_")}
    assert parts == set().union(*LAYERS)


def test_parts_of_the_architecture_page_train(tmp_path):
    """Trains with the page's term, model and dataset in a user's module."""
    page = ROOT / "docs" / "architecture.md"
    source = blocks(page, "python")
    assert len(source) == 3
    (tmp_path / "my_parts.py").write_text("\n".join(source), encoding="utf-8")
    (tmp_path / "bars.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    command = [sys.executable, "-m", "kdbench", "train", "bars.yaml", "--plugin", "my_parts", "out=run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["last"]["metrics"]["student"]["test"]["top1"] > 80


def test_term_of_the_architecture_page_is_a_divergence(tmp_path):
    source = blocks(ROOT / "docs" / "architecture.md", "python")[0]
    path = tmp_path / "my_term.py"
    path.write_text(re.sub(r"^@TERMS.*$", "", source, flags=re.MULTILINE), encoding="utf-8")  # registers nothing here
    spec = importlib.util.spec_from_file_location("my_term", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    term = module.ReverseKD(temperature=2.0)
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(term(teacher, teacher), torch.zeros(8), check_dtype=False)
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    torch.testing.assert_close(
        term(student, teacher), 4 * (p * (p / q).log()).sum(1), check_dtype=False, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        if file and not (page.parent / file).exists():
            missing.append(target)
        if not file and anchor not in headings:
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_in_backticks_exist(page: Path):
    """Checks paths that start with a folder of the checkout."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    names = re.findall(r"`((?:kdbench|configs|recipes|benchmarks|scripts|tests|docs|examples)/[\w./-]+)`", text)
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_engine_and_speed_name_no_method():
    """Checks that no file contains the name of a registered part as a constant, or of a method as a word."""
    kinds = (TERMS, ROUTERS, SAMPLE_WEIGHTS, COMBINERS, ARTIFACTS, SELECTORS, WEIGHT_TRANSFORMS)
    parts = {name for registry in kinds for name in registry.entries}
    methods = {word for recipe in recipe_names() if recipe.startswith("digits/") for word in [recipe.split("/")[1]]}
    methods -= {"teacher", "one"}  # words of the grammar
    parts -= {"confidence", "weighted"}  # a metric's column, a key of the log
    files = sorted(path for folder in ("engine", "speed") for path in (ROOT / "kdbench" / folder).rglob("*.py"))
    assert len(files) > 15 and len(methods) > 40 and len(parts) > 60
    problems = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        words = set(re.findall(r"[a-z_0-9]+", text.lower()))
        constants = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
        problems += [f"{path.name}: {name}" for name in sorted((parts & constants) | (methods & words))]
    assert problems == []
