"""Random operands (inputs) for every registered term, sample weight and router, as in a recipe on CIFAR-sized images.

terms.py (cost of each part) and scaling.py (growth of the cost) use this module. The kinds of operands are declared in
the test case of a term (tests/helpers/cases), and in `WIRING_OPERANDS` for sample weights and routers. By default,
operands are logits, or feature maps for terms that are registered with `features=True`.
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
        batch: number of rows (samples) of a batch.
        classes: number of classes of the data.
        samples: number of training samples, for terms with one stored vector per sample.
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
"""Kind of operand -> shape: logits, the last map of a resnet20, tokens of a small vision transformer, ..."""
KINDS_WITHOUT_ROWS = ("class means", "class matrices", "class counts", "statistics", "weights")
WIRING_OPERANDS: dict[str, dict[str, str]] = {
    "outside": {"judge": "logits"},
    "given": {"route": "gate"},
    "learnt": {"by": "one"},
    "top_k": {"read": "vector"},
    "policy": {"read": "vector"},
}
"""Sample weight or router -> operand -> kind of the operand. All other operands are logits."""
WIRING_PARAMS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "outside": lambda size: {"classes": list(range(size.classes // 2))},
    "top_k": lambda size: {"k": 2},
}


@dataclass
class BuiltPart:
    """A part (a term, sample weight or router) with its operands.

    Attributes:
        differentiated: tensors for which a gradient is computed: parameters of the part, and the student operand.
    """

    kind: str
    name: str
    part: nn.Module
    operands: dict[str, Any]
    differentiated: list[Tensor] = field(default_factory=list)

    def work(self) -> None:
        """Runs one forward and backward pass of the part, as a training step does."""
        output = self.part(**self.operands)
        values = list(output.values()) if isinstance(output, dict) else [output]
        means = [value.float().mean() for value in values if value.requires_grad]
        if means:
            torch.autograd.grad(torch.stack(means).sum(), self.differentiated, allow_unused=True)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in self.operands.items() if isinstance(value, Tensor)}


def names() -> list[tuple[str, str]]:
    """Returns pairs (kind, name) of all registered terms, sample weights and routers."""
    return [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.entries]


def build(kind: str, name: str, size: Size, device: torch.device | str) -> BuiltPart:
    """Builds a part (a term, sample weight or router) with random operands. They depend only on its name and the sizes.

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
    """Returns operand -> kind, for all float operands of a part (a term, sample weight or router)."""
    default = "map" if entry.facts.get("features") else "logits"
    declared: Mapping[str, str] = WIRING_OPERANDS.get(entry.name, {})
    if kind == "term":
        declared = CASES[entry.name].benchmark if entry.name in CASES else {}
    return {"student": default, "teacher": default, **declared}


def _required_params(entry: Entry) -> dict[str, Any]:
    """Returns the required constructor parameters of a term, with values from the test case of the term."""
    params = CASES[entry.name].params if entry.name in CASES else {}
    return {name: value for name, value in params.items() if entry.parameters[name].default is REQUIRED}


def _draw_operand(
    operand: str, kinds: Mapping[str, str], size: Size, generator: torch.Generator, *, optional: bool
) -> Any:
    """Draws a random operand. Returns None for an optional operand without a declared kind."""
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
    """Counts the work of torch operations: number of operations, elements that they write, and FLOPs of products.

    A view writes no elements. An operation that writes rows into a larger tensor counts only these rows.
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
        """Number of written elements plus FLOPs, as one measure of the cost."""
        return self.elements + self.flops


def count(work: Callable[[], None]) -> WorkCounter:
    """Counts the work (operations, written elements, FLOPs) of one call of `work`."""
    with WorkCounter() as counter:
        work()
    return counter
