"""Registry entries of all torchvision and timm models, read from the source files without importing the libraries."""

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
"""Declaration of a model in both libraries. Detection, segmentation and video models are in subfolders, not listed."""


@cache
def _builder_files(library: str) -> dict[str, Path]:
    """Maps the models of an installed library, in alphabetical order, to their source files."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0], "models")
    files = {}
    for path in sorted(folder.glob("*.py")):
        for name in BUILDER_PATTERN.findall(path.read_text(encoding="utf-8")):
            files[name] = path
    return dict(sorted(files.items()))


def _library_entry(library: str, name: str) -> Entry:
    """Builds the registry entry of one model: first paragraph of its docstring, parameters of the builder here."""
    tree = ast.parse(_builder_files(library)[name].read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    summary = " ".join((ast.get_docstring(node) or f"{name} of {library}").split("\n\n", 1)[0].split())
    summary = re.sub(r"`([^`<]+?)\s*<([^>]+)>`_*", r"\1 (\2)", summary)  # reStructuredText links
    parameters = {parameter.name: parameter for parameter in LIBRARY_PARAMETERS[library]}
    size = 299 if name.startswith("inception") else 224
    facts = {"version": 1, "image": (3, size, size)}
    loader = partial(_load_builder, library, name)
    return Entry(
        f"{library}/{name}",
        "kdbench.models.external",
        library,
        f"{summary}\n\n{LIBRARY_DOCS[library]}",
        parameters,
        facts,
        loader=loader,
    )


def _load_builder(library: str, name: str) -> Any:
    external = importlib.import_module("kdbench.models.external")
    return partial(getattr(external, f"build_{library}"), name)


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
    "torchvision": """Built by torchvision.

Args:
    num_classes: outputs of the classifier; injected.
    weights: name of the model's pretrained weights, such as DEFAULT; torchvision downloads them once. If they have
        another number of classes, the classifier keeps its random initialisation.""",
    "timm": """Built by timm.

Args:
    num_classes: outputs of the classifier; injected.
    in_channels: channels of the image; injected.
    image_size: height and width of the image; injected, used only by models of fixed input size.
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
