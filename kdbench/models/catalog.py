"""Networks. This file lists those of torchvision and timm off their sources, without importing either."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

from kdbench.registry import MODELS, Entry, Family, Parameter

BUILDER_PATTERN = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
"""How both libraries declare a model. Those of `torchvision.models.detection` and so on lie in subfolders."""


@cache
def _builder_files(library: str) -> dict[str, Path]:
    """Every model of an installed library -> the file that declares it, in alphabetical order."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0], "models")
    found = {}
    for path in sorted(folder.glob("*.py")):
        for name in BUILDER_PATTERN.findall(path.read_text(encoding="utf-8")):
            found[name] = path
    return dict(sorted(found.items()))


def _library_entry(library: str, name: str) -> Entry:
    """Describes one model: how the library's docstring begins, and the parameters of the builder in `foreign.py`."""
    tree = ast.parse(_builder_files(library)[name].read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    about = " ".join((ast.get_docstring(node) or f"{name} of {library}").split("\n\n", 1)[0].split())
    about = re.sub(r"`([^`<]+?)\s*<([^>]+)>`_*", r"\1 (\2)", about)  # a link of reStructuredText
    parameters = {parameter.name: parameter for parameter in LIBRARY_PARAMETERS[library]}
    size = 299 if name.startswith("inception") else 224
    facts = {"version": 1, "image": (3, size, size)}
    loader = partial(_load_builder, library, name)
    return Entry(
        f"{library}/{name}",
        "kdbench.models.external",
        library,
        f"{about}\n\n{LIBRARY_DOCS[library]}",
        parameters,
        facts,
        loader=loader,
    )


def _load_builder(library: str, name: str) -> Any:
    foreign = importlib.import_module("kdbench.models.external")
    return partial(getattr(foreign, f"build_{library}"), name)


LIBRARY_PARAMETERS = {
    "torchvision": (Parameter("num_classes", "int", 1000), Parameter("weights", "str | None", None)),
    "timm": (
        Parameter("num_classes", "int", 1000),
        Parameter("in_channels", "int", 3),
        Parameter("pretrained", "bool", False),
        Parameter("image_size", "int | None", None),
    ),
}


LIBRARY_DOCS = {
    "torchvision": """Built by torchvision itself.

Args:
    num_classes: size of the classifier; the dataset gives it.
    weights: a name of the model's pretrained weights, such as DEFAULT; torchvision downloads them once. A classifier of
        another size than theirs keeps its random start.""",
    "timm": """Built by timm itself.

Args:
    num_classes, in_channels, image_size: the dataset gives them; only models of fixed size read the last.
    pretrained: load timm's default weights; timm downloads them once.""",
}


for _library in LIBRARY_PARAMETERS:
    MODELS.families.append(
        Family(
            f"{_library}/",
            lambda library=_library: list(_builder_files(library)),
            partial(_library_entry, _library),
            f"install it with `pip install {_library}`"
            + (" or `pip install kdbench[timm]`." if _library == "timm" else "."),
        )
    )
