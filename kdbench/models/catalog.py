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
"""Matches the declaration of a model in the source of torchvision and of timm.

Detection, segmentation and video models are in subfolders and are not listed.
"""


@cache
def _builder_files(library: str) -> dict[str, Path]:
    """Returns the models of a library in alphabetical order: model name -> source file.

    The result is empty if the library is not installed.
    """
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
    """Builds the registry entry of one torchvision or timm model without importing the library.

    The description in the entry begins with the first paragraph of the model's docstring in the library. The
    parameters in the entry are those of `build_torchvision` or `build_timm`, which build the model.
    """
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
    "torchvision": """The model is built by torchvision.

Args:
    num_classes: number of outputs of the classifier (injected by kdbench).
    weights: name of pretrained weights of this model, such as DEFAULT, which torchvision downloads once. If the weights
        have another number of classes, the classifier keeps its random initialisation.""",
    "timm": """The model is built by timm.

Args:
    num_classes: number of outputs of the classifier (injected by kdbench).
    in_channels: channels of the image (injected by kdbench).
    image_size: height and width of the image (injected by kdbench). Only models of fixed input size use this number.
    pretrained: whether to load timm's default weights, which timm downloads once.""",
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
