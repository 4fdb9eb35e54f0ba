"""Every registered term, weigher and router, built and fed as a recipe on CIFAR-sized images would feed it.

Used by terms.py (what each costs) and scaling.py (how the cost grows). A part that is new is found by itself when it
compares logits or feature maps; else `tests/test_benchmarks.py` asks for a line in `OPERANDS`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kdbench.registry import ROUTERS, SAMPLE_WEIGHTS, TERMS, Entry, Registry

REGISTRIES: dict[str, Registry] = {"term": TERMS, "weigher": SAMPLE_WEIGHTS, "router": ROUTERS}
EDGES, WIDTH = 3, 64


@dataclass(frozen=True)
class Size:
    """batch: rows. classes: of the data. samples: of the source, for what remembers each of them."""

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
"""What an operand is, by name: logits, the last map of a resnet20, tokens of a small vision transformer, and so on."""
WITHOUT_ROWS = ("class means", "class matrices", "class counts", "statistics", "weights")
OPERANDS: dict[str, dict[str, str]] = {
    "fsp": {"student_from": "early map", "teacher_from": "early map"},
    "scar": {"student": "vector", "means": "class means", "precision": "class matrices"},
    "nd": {"student": "vector", "teacher": "vector", "means": "class means"},
    "bkd": {"counts": "class counts"},
    "bn_statistics": {"student": "map", "teacher": "statistics"},
    "binary": {"student": "one"},
    "joint_cross_entropy": {"student": "joint logits", "kind": "turns"},
    "total_variation": {"student": "image"},
    "image_norm": {"student": "image"},
    "ft": {"student": "map", "teacher": "map"},
    "reconstruction": {"student": "image", "teacher": "image"},
    "token_relation": {"student": "tokens", "teacher": "tokens"},
    "attention_relation": {"student": "tokens", "teacher": "tokens"},
    "load_balance": {"student": "gate"},
    "reinforce": {"student": "gate", "action": "gate", "reward": "rows"},
    "weight_distance": {"student": "weights", "teacher": "weights"},
    "ewc": {"student": "weights", "teacher": "weights", "fisher": "weights"},
    "rkd": {"student": "vector", "teacher": "vector"},
    "cc": {"student": "vector", "teacher": "vector"},
    "pkt": {"student": "vector", "teacher": "vector"},
    "crd": {"student": "vector", "teacher": "vector"},
    "info_nce": {"student": "vector", "teacher": "vector"},
    "outside": {"judge": "logits"},
    "given": {"route": "gate"},
    "learnt": {"by": "one"},
    "top_k": {"read": "vector"},
    "policy": {"read": "vector"},
}
"""What a part reads where that is neither two vectors of logits nor, with the fact `features`, two maps."""
PARAMS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "icarl": lambda size: {"old": list(range(size.classes // 2))},
    "outside": lambda size: {"classes": list(range(size.classes // 2))},
    "top_k": lambda size: {"k": 2},
}
SIMPLEX = ("load_balance", "reinforce")


@dataclass
class Built:
    """A part with its operands. `work` does what a step does with it: forward, and backward into the student's operand
    and its own parameters."""

    kind: str
    name: str
    part: nn.Module
    operands: dict[str, Any]
    learning: list[Tensor] = field(default_factory=list)

    def work(self) -> None:
        out = self.part(**self.operands)
        values = list(out.values()) if isinstance(out, dict) else [out]
        total = [value.float().mean() for value in values if value.requires_grad]
        if total:
            torch.autograd.grad(torch.stack(total).sum(), self.learning, allow_unused=True)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in self.operands.items() if isinstance(value, Tensor)}


def names() -> list[tuple[str, str]]:
    """(kind, name) of every registered part."""
    return [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.entries]


def build(kind: str, name: str, size: Size, device: torch.device | str) -> Built:
    """Builds a part for operands of a size, with random values that depend on its name alone.

    Raises:
        KeyError: it reads an operand of which `OPERANDS` says nothing.
    """
    entry = REGISTRIES[kind].entry(name)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    operands: dict[str, Any] = {}
    for operand in entry.inputs:
        value = _operand(entry, name, operand, size, generator)
        if value is not None:
            operands[operand] = [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
    shapes = {key: tuple(v.shape if _without_rows(name, key) else v.shape[1:]) for key, v in _tensors(operands)}
    facts = {"num_classes": size.classes, "samples": size.samples, "shapes": shapes, "edges": EDGES}
    part = REGISTRIES[kind].build(name, PARAMS.get(name, lambda _: {})(size), **facts).to(device).train()
    learning = [*part.parameters()]
    if "student" in operands:
        learning.append(operands["student"].requires_grad_())
    return Built(kind, name, part, operands, learning)


def _tensors(operands: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    return ((key, value) for key, value in operands.items() if isinstance(value, Tensor))


def _without_rows(name: str, operand: str) -> bool:
    return OPERANDS.get(name, {}).get(operand) in WITHOUT_ROWS


def _operand(entry: Entry, name: str, operand: str, size: Size, generator: torch.Generator) -> Any:
    """The value of one of a part's inputs; None leaves out what is optional."""
    if operand == "label":
        return torch.randint(size.classes, (size.batch,), generator=generator)
    if operand == "index":
        return torch.randperm(size.samples, generator=generator)[: size.batch]
    if operand == "losses":
        return torch.rand(size.batch, EDGES, generator=generator)
    if operand == "teachers":
        return [torch.randn(size.batch, size.classes, generator=generator) for _ in range(EDGES)]
    known = OPERANDS.get(name, {})
    if operand not in known and operand in entry.optional_inputs:
        return None
    default = {side: "map" if entry.facts.get("features") else "logits" for side in ("student", "teacher")}
    shape = SHAPES[{**default, **known}[operand]](size)
    if known.get(operand) == "turns":
        return torch.randint(4, shape, generator=generator)
    value = torch.randn(shape, generator=generator)
    if name in SIMPLEX or {**default, **known}[operand] == "gate":
        value = value.softmax(-1)
    return value.abs() + 0.1 if {**default, **known}[operand] in ("class counts", "statistics") else value


class Work(TorchDispatchMode):
    """Counts how much is done, free of any clock: elements that operations write, FLOPs of products, operations.

    A view writes nothing; what writes rows into a bank writes those rows, not the bank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = self.flops = 0
        self.largest: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        given = [a for a in args if isinstance(a, Tensor)]
        if func._schema.name.split("::")[1].rstrip("_") in ("index_put", "index_copy", "index_add", "scatter"):
            self.elements += given[-1].numel()
            return out
        memory = set() if func._schema.is_mutable else {value.untyped_storage()._cdata for value in given}
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in memory:
                self.elements += value.numel()
                if value.numel() > torch.Size(self.largest).numel() or not self.largest:
                    self.largest = tuple(value.shape)
        return out

    @property
    def total(self) -> int:
        """Elements written and FLOPs, as one number whose growth is the cost's."""
        return self.elements + self.flops


def count(work: Callable[[], None]) -> Work:
    with Work() as counted:
        work()
    return counted
