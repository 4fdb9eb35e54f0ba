"""`kdbench inspect MODEL`: the module paths of a model with their shapes, to copy into a recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from kdbench.errors import ConfigError
from kdbench.registry import MODELS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdbench.engine.plan.trace import ModuleCall


COLUMNS = ("path", "type", "output", "parameters", "notes")


def inspect_model(
    model: str,
    params: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    image: Sequence[int] | None = None,
    depth: int | None = None,
    file: TextIO | None = None,
) -> int:
    """Prints a table of the model's modules: path, type, output shape per sample, parameters, and what to heed.

    One line per call: the second call of a module has the path `PATH@2`. The shapes come from a forward of two images
    on the meta device, in eval mode; a model that cannot be built there is built on the CPU.

    Args:
        model: a name of `kdbench list models`.
        params: further parameters of the model.
        num_classes: size of the classifier; None: the model's default.
        image: channels, height and width; None: what the model says of itself (a head may see a vector), else
            3, 224, 224.
        depth: show only paths of at most this many parts.
        file: where to print; None: standard output. A terminal gets a coloured table, anything else plain columns.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: unknown model or parameter, or a model that refuses the image.
    """
    params = dict(params or {})
    entry = MODELS.check(model, params, "inspect")  # before torch is imported
    shape = tuple(image or entry.facts.get("image", (3, 224, 224)))
    if (image and len(shape) != 3) or min(shape) < 1:
        raise ConfigError(f"inspect: image must be channels, height and width, such as 3,32,32; got {list(shape)}")
    injected = {"in_channels": shape[0], **({} if num_classes is None else {"num_classes": num_classes})}
    network, calls = _trace_model(model, params, injected, shape)
    rows = [row for call, row in zip(calls, _module_rows(network, calls), strict=True) if _is_within_depth(call.path, depth)]
    total = sum(p.numel() for p in network.parameters())
    seen = f"{'image' if len(shape) == 3 else 'vector'} {_shape_text(shape)}"
    title = f"{model}: {total:,} parameters, {type(network).__name__}, {seen}"
    _print_rows(title, rows, file or sys.stdout)
    return 0


def _trace_model(
    name: str, params: Mapping[str, Any], injected: Mapping[str, Any], image: tuple[int, ...]
) -> tuple[nn.Module, list[ModuleCall]]:
    import torch

    from kdbench.engine.plan.trace import trace_modules

    def attempt(device: torch.device) -> tuple[nn.Module, list[ModuleCall]]:
        with device:
            network = MODELS.build(name, params, "inspect", **injected).to(device).eval()
            return network, trace_modules(network, torch.zeros(2, *image))

    try:
        return attempt(torch.device("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        pass  # some models read a value of a tensor, which meta tensors do not have; the CPU decides
    try:
        return attempt(torch.device("cpu"))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise ConfigError(
            f"inspect: model {name!r} does not take an image of {_shape_text(image)}: {error}. What it sees in a recipe, "
            "and the features that are read of it, are in the tables of `kdbench check RECIPE`"
        ) from error


def _module_rows(network: nn.Module, calls: Sequence[ModuleCall]) -> list[tuple[str, ...]]:
    modules = dict(network.named_modules())
    most: dict[str, int] = {}
    for call in calls:
        most[call.path] = max(call.call, most.get(call.path, 0))
    rows = []
    for call in calls:
        path = call.path or "logits"
        notes = []
        if most[call.path] > 1:
            notes.append(f"called {most[call.path]} times")
        if call.output is not None and call.output.overwritten:
            notes.append("overwritten later: captured as a copy")
        own = sum(p.numel() for p in modules[call.path].parameters()) if call.call == 1 else 0
        rows.append(
            (
                f"{path}@{call.call}" if call.call > 1 else path,
                call.type,
                _shape_text(call.output.shape[1:]) if call.output is not None else "no tensor",
                f"{own:,}" if own else "",
                "; ".join(notes),
            )
        )
    return rows


def _is_within_depth(path: str, depth: int | None) -> bool:
    return depth is None or path.count(".") < depth


def _shape_text(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape) or "scalar"


def _print_rows(title: str, rows: Sequence[tuple[str, ...]], file: TextIO) -> None:
    if not file.isatty():
        widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
        print(title, file=file)
        for row in (COLUMNS, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=file)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for path, *others in rows:
        # The path is copied into recipes: indented names would read well but copy badly, so weight shows the level.
        style = "bold" if "." not in path else "dim" if path.count(".") > 1 else ""
        table.add_row(path, *others, style=style)
    Console(file=file).print(table)
