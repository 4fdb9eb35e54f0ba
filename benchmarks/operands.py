"""Operands of every registered term, sample weight and router, as in a recipe on CIFAR-sized images.

Used by terms.py (cost of each part) and scaling.py (growth of the cost). Terms take their operands from their test case
(tests/helpers/cases), sample weights and routers from `WIRING_OPERANDS`. Default operands are logits, and feature maps
for terms with the fact `features`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kdbench.registry import REQUIRED, ROUTERS, SAMPLE_WEIGHTS, TERMS, Entry, Registry

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.cases import CASES

REGISTRIES: dict[str, Registry] = {"term": TERMS, "sample weight": SAMPLE_WEIGHTS, "router": ROUTERS}
EDGES, WIDTH = 3, 64


@dataclass(frozen=True)
class Size:
    """Sizes of a benchmark.

    Attributes:
        batch: rows.
        classes: classes of the data.
        samples: size of the source, for terms with a memory.
    """

    batch: int = 64
    classes: int = 100
    samples: int = 50_000


SHAPES: dict[str, Callable[[Size], tuple[int, ...]]] = {
    "logits": lambda size: (size.batch, size.classes),
    "joint logits": lambda size: (size.batch, 4 * size.classes),
    "turns": lambda size: (size.batch,),
    "map": lambda size: (size.batch, WIDTH, 8, 8),
    "early map": lambda size: (size.batch, 16, 32, 32),
    "vector": lambda size: (size.batch, WIDTH),
    "tokens": lambda size: (size.batch, 65, 192),
    "image": lambda size: (size.batch, 3, 32, 32),
    "one": lambda size: (size.batch, 1),
    "gate": lambda size: (size.batch, EDGES),
    "rows": lambda size: (size.batch,),
    "class means": lambda size: (size.classes, WIDTH),
    "class matrices": lambda size: (size.classes, WIDTH, WIDTH),
    "class counts": lambda size: (size.classes,),
    "statistics": lambda size: (2, WIDTH),
    "weights": lambda size: (278_324,),
}
"""Shapes of the kinds of operands: logits, the last map of a resnet20, tokens of a small vision transformer, ..."""
KINDS_WITHOUT_ROWS = ("class means", "class matrices", "class counts", "statistics", "weights")
WIRING_OPERANDS: dict[str, dict[str, str]] = {
    "outside": {"judge": "logits"},
    "given": {"route": "gate"},
    "learnt": {"by": "one"},
    "top_k": {"read": "vector"},
    "policy": {"read": "vector"},
}
"""Kinds of the operands of a sample weight or router, if they are not logits."""
WIRING_PARAMS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "outside": lambda size: {"classes": list(range(size.classes // 2))},
    "top_k": lambda size: {"k": 2},
}


@dataclass
class BuiltPart:
    """A part with its operands.

    Attributes:
        differentiated: tensors that get a gradient: the parameters of the part and the student operand.
    """

    kind: str
    name: str
    part: nn.Module
    operands: dict[str, Any]
    differentiated: list[Tensor] = field(default_factory=list)

    def work(self) -> None:
        """Runs the part forward and backward, as one training step does."""
        output = self.part(**self.operands)
        values = list(output.values()) if isinstance(output, dict) else [output]
        means = [value.float().mean() for value in values if value.requires_grad]
        if means:
            torch.autograd.grad(torch.stack(means).sum(), self.differentiated, allow_unused=True)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in self.operands.items() if isinstance(value, Tensor)}


def names() -> list[tuple[str, str]]:
    """Returns (kind, name) of every registered part."""
    return [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.entries]


def build(kind: str, name: str, size: Size, device: torch.device | str) -> BuiltPart:
    """Builds a part with random operands, which depend only on its name and the sizes.

    Raises:
        KeyError: the kind of an operand is not declared, neither in the term's test case nor in `WIRING_OPERANDS`.
    """
    entry = REGISTRIES[kind].entry(name)
    kinds = operand_kinds(kind, entry)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    operands: dict[str, Any] = {}
    for operand in entry.inputs:
        value = _draw_operand(operand, kinds, size, generator, optional=operand in entry.optional_inputs)
        if value is not None:
            operands[operand] = [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
    shapes = {
        operand: tuple(value.shape if kinds.get(operand) in KINDS_WITHOUT_ROWS else value.shape[1:])
        for operand, value in operands.items()
        if isinstance(value, Tensor)
    }
    injected = {"num_classes": size.classes, "samples": size.samples, "shapes": shapes, "edges": EDGES}
    params = _required_params(entry) if kind == "term" else WIRING_PARAMS.get(name, lambda _: {})(size)
    part = REGISTRIES[kind].build(name, params, **injected).to(device).train()
    differentiated = [*part.parameters()]
    if "student" in operands:
        differentiated.append(operands["student"].requires_grad_())
    return BuiltPart(kind, name, part, operands, differentiated)


def operand_kinds(kind: str, entry: Entry) -> dict[str, str]:
    """Returns the kind of each float operand of a part, by name."""
    default = "map" if entry.facts.get("features") else "logits"
    declared: Mapping[str, str] = WIRING_OPERANDS.get(entry.name, {})
    if kind == "term":
        declared = CASES[entry.name].benchmark if entry.name in CASES else {}
    return {"student": default, "teacher": default, **declared}


def _required_params(entry: Entry) -> dict[str, Any]:
    """Returns the constructor parameters without a default, with the values of the test case."""
    params = CASES[entry.name].params if entry.name in CASES else {}
    return {name: value for name, value in params.items() if entry.parameters[name].default is REQUIRED}


def _draw_operand(
    operand: str, kinds: Mapping[str, str], size: Size, generator: torch.Generator, *, optional: bool
) -> Any:
    """Draws one operand; None leaves out an optional one."""
    if operand == "label":
        return torch.randint(size.classes, (size.batch,), generator=generator)
    if operand == "index":
        return torch.randperm(size.samples, generator=generator)[: size.batch]
    if operand == "losses":
        return torch.rand(size.batch, EDGES, generator=generator)
    if operand == "teachers":
        return [torch.randn(size.batch, size.classes, generator=generator) for _ in range(EDGES)]
    if operand not in kinds and optional:
        return None
    kind = kinds[operand]
    shape = SHAPES[kind](size)
    if kind == "turns":
        return torch.randint(4, shape, generator=generator)
    value = torch.randn(shape, generator=generator)
    if kind == "gate":
        value = value.softmax(-1)
    return value.abs() + 0.1 if kind in ("class counts", "statistics") else value


class WorkCounter(TorchDispatchMode):
    """Counts work without a clock: elements that operations write, FLOPs of products, operations.

    A view writes nothing. A write of rows into a bank counts the rows, not the bank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = self.flops = 0
        self.largest: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        inputs = [a for a in args if isinstance(a, Tensor)]
        if func._schema.name.split("::")[1].rstrip("_") in ("index_put", "index_copy", "index_add", "scatter"):
            self.elements += inputs[-1].numel()
            return output
        input_storages = set() if func._schema.is_mutable else {value.untyped_storage()._cdata for value in inputs}
        for value in output if isinstance(output, list | tuple) else [output]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in input_storages:
                self.elements += value.numel()
                if value.numel() > torch.Size(self.largest).numel() or not self.largest:
                    self.largest = tuple(value.shape)
        return output

    @property
    def total(self) -> int:
        """Elements written plus FLOPs: one number for the growth of the cost."""
        return self.elements + self.flops


def count(work: Callable[[], None]) -> WorkCounter:
    """Counts the work of one call."""
    with WorkCounter() as counter:
        work()
    return counter
