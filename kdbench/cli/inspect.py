"""`kdbench inspect MODEL`: prints the paths of a model's modules and the shapes of their outputs.

A recipe can name these paths as operands of losses, for example `student:layer2`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

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
    """Prints a table of the model's modules: path, type, output shape of one sample, parameters, notes.

    The table has one line per call of a module. The second call of a module has the path `PATH@2`. The shapes come
    from a forward pass of two images in eval mode, on the meta device or (for a model that cannot run on meta
    tensors) on the CPU.

    Args:
        model: name of a model, as in `kdbench list models`.
        params: parameters of the model.
        num_classes: size of the classifier; None: the model's default.
        image: channels, height and width; None: the input shape that the model declares (a vector for some heads),
            otherwise 3, 224, 224.
        depth: maximum number of components of the paths that are shown; None: no limit.
        file: output file; None: standard output. The table is coloured on a terminal.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: the model or a parameter is unknown, or the model cannot process the image.
    """
    params = dict(params or {})
    entry = MODELS.check(model, params, "inspect")  # before torch is imported, so that a wrong name is reported at once
    shape = tuple(image or entry.facts.get("image", (3, 224, 224)))
    if (image and len(shape) != 3) or min(shape) < 1:
        raise ConfigError(f"inspect: --image must be channels, height and width, such as 3,32,32; got {list(shape)}")
    injected = {"in_channels": shape[0], **({} if num_classes is None else {"num_classes": num_classes})}
    network, calls = _trace_model(model, params, injected, shape)
    pairs = zip(calls, _module_rows(network, calls), strict=True)
    rows = [row for call, row in pairs if _is_within_depth(call.path, depth)]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    input_text = f"{'image' if len(shape) == 3 else 'vector'} {_shape_text(shape)}"
    title = f"{model}: {parameters:,} parameters, {type(network).__name__}, {input_text}"
    _print_rows(title, rows, file or sys.stdout)
    return 0


def _trace_model(
    name: str, params: Mapping[str, Any], injected: Mapping[str, Any], image: tuple[int, ...]
) -> tuple[nn.Module, list[ModuleCall]]:
    """Builds a model and records the calls of its modules in one forward pass. Returns the model and the calls."""
    import torch  # not at the top: a wrong name is reported without it

    from kdbench.engine.plan.trace import trace_modules

    def trace_on(device: torch.device) -> tuple[nn.Module, list[ModuleCall]]:
        with device:
            network = MODELS.build(name, params, "inspect", **injected).to(device).eval()
            return network, trace_modules(network, torch.zeros(2, *image))

    try:
        return trace_on(torch.device("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        pass  # the model may read values, which meta tensors do not have; the CPU shows whether it runs
    try:
        return trace_on(torch.device("cpu"))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise ConfigError(
            f"inspect: model {name!r} does not accept an image of {_shape_text(image)}: {error}. To see the "
            "input and the features of this model in a recipe, use `kdbench check RECIPE`"
        ) from error


def _module_rows(network: nn.Module, calls: Sequence[ModuleCall]) -> list[tuple[str, ...]]:
    """Returns one row per module call, in the order of `COLUMNS`.

    Only the row of the first call has the number of parameters.
    """
    modules = dict(network.named_modules())
    call_counts = Counter(call.path for call in calls)
    rows = []
    for call in calls:
        path = call.path or "logits"
        notes = [f"called {call_counts[call.path]} times"] if call_counts[call.path] > 1 else []
        if call.output is not None and call.output.overwritten:
            notes.append("overwritten in place by a later layer, so a recipe reads a copy")
        parameters = sum(p.numel() for p in modules[call.path].parameters()) if call.call == 1 else 0
        rows.append(
            (
                f"{path}@{call.call}" if call.call > 1 else path,
                call.type,
                _shape_text(call.output.shape[1:]) if call.output is not None else "no tensor",
                f"{parameters:,}" if parameters else "",
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
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for path, *cells in rows:
        # Users copy whole paths into recipes, so the font weight shows the level instead of an indentation.
        style = "bold" if "." not in path else "dim" if path.count(".") > 1 else ""
        table.add_row(path, *cells, style=style)
    Console(file=file).print(table)
