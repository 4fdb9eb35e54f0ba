"""One entry of `terms` inside a step: its edges, what weighs and routes them, and how its losses are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdbench.config.schedules import Schedule
from kdbench.config.schema import EdgeConfig, TermConfig
from kdbench.engine.distributed.world import World, all_gather_rows
from kdbench.engine.network.operands import Batch, OperandReader, Values, term_key
from kdbench.registry import Entry
from kdbench.terms.base import Term

Count: TypeAlias = "int | Tensor"
"""By how many valid entries a term's sum is divided: those of the whole effective batch, on all ranks."""


class TermEdge(nn.Module):
    """One pair of operands of a term: its own instance of the term's class, and what reads each operand."""

    def __init__(
        self,
        edge: EdgeConfig,
        term: Term,
        student: OperandReader,
        teacher: OperandReader | None,
        named: Mapping[str, OperandReader],
        source: str,
    ) -> None:
        super().__init__()
        self.edge = edge
        self.term = term
        self.student = student
        self.teacher = teacher
        self.named = nn.ModuleDict(named)
        self.source = source
        """The source whose samples are the rows of the loss."""

    @property
    def adapter(self) -> nn.Module | None:
        return self.student.adapter


class WiredPart(nn.Module):
    """A weigher or a router, with what it reads besides the operands of its term."""

    def __init__(self, part: nn.Module, entry: Entry, named: Mapping[str, OperandReader]) -> None:
        super().__init__()
        self.part = part
        self.inputs = entry.inputs
        self.named = nn.ModuleDict(named)

    def forward(self, own: Mapping[str, Any], fields: Mapping[str, Tensor], values: Values, batch: Batch) -> Any:
        """Args: own: operands of the term, by name. fields: those of its source."""
        given: dict[str, Any] = {}
        for name in self.inputs:
            if name in self.named:
                given[name] = self.named[name](values, batch)
            elif name in own:
                given[name] = own[name]
            elif name in fields:
                given[name] = fields[name]
        return self.part(**given)


class TermGroup(nn.Module):
    """One entry of `terms`: its edges, its weight, and the reduction of its losses.

    The weight and the scheduled parameters are 0-dim tensors that `move` sets before a step; constants stay numbers.

    Args:
        gives: what later terms read of this one: `loss`, `route`, or what its router calls its outputs.
    """

    def __init__(
        self,
        config: TermConfig,
        entry: Entry,
        edges: Sequence[TermEdge],
        weight: float | Tensor,
        moving: Sequence[tuple[Tensor, Schedule]] = (),
        sample_weight: WiredPart | None = None,
        route: WiredPart | None = None,
        gives: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.config = config
        self.edges = nn.ModuleList(edges)
        self.space: str = entry.facts.get("space", "row")
        self.couples: bool = self.space == "batch" or bool(entry.facts.get("state"))
        """Whether a row's loss depends on other rows, now or through what the term remembers."""
        self.inputs = entry.inputs
        self.reads_label = "label" in entry.inputs
        self.weight = weight
        self.scheduled = tuple(moving)
        self.sample_weight, self.route, self.outputs_read = sample_weight, route, gives
        self.plain = sample_weight is None and route is None and not gives
        self.source: str = edges[0].source

    def set_scheduled(self, value: Callable[[Schedule], float]) -> None:
        """Sets every scheduled value for the coming step."""
        for tensor, schedule in self.scheduled:
            tensor.fill_(value(schedule))

    def mask(self, fields: Mapping[str, Tensor]) -> Tensor | None:
        """Which entries of the batch count: real rows, with a label where one is read, inside `mask`. None: all."""
        names = ["valid"]
        if self.reads_label:
            names.append("labelled")
        masks = [fields[name] for name in names if name in fields]
        if self.config.mask is not None:
            masks.append(fields[self.config.mask])
        result = None
        for mask in masks:  # rows first: a mask of rows holds for every token of the row
            result = mask if result is None else _spread(result, mask) & mask
        return result

    def count(self, window: Sequence[Mapping[str, Tensor]], world: World) -> Count:
        """Counts the valid entries of a whole effective batch: all micro-batches, all ranks."""
        masks = [self.mask(fields) for fields in window]
        if all(mask is None for mask in masks):
            return sum(next(iter(fields.values())).shape[0] for fields in window) * world.size
        rows = [next(iter(fields.values())) for fields in window]
        counts = [
            mask.sum() if mask is not None else torch.full((), len(row), dtype=torch.int64, device=row.device)
            for mask, row in zip(masks, rows, strict=True)
        ]
        return world.all_reduce_sum_(torch.stack(counts).sum()).clamp(min=1)

    def forward(self, values: Values, batch: Batch, count: Count, share: float, world: World) -> Tensor:
        """Returns the term's reduced, unweighted loss: this process's share of the whole batch's value."""
        losses: list[Tensor] = []
        if self.plain:
            for edge in self.edges:
                read = self._read(edge, values, batch, world)  # type: ignore[arg-type]
                losses.append(self._reduced(edge, self._loss(edge, read), batch, None, count, share, world))  # type: ignore[arg-type]
        else:
            losses = self._routed(values, batch, count, share, world)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total

    def _read(self, edge: TermEdge, values: Values, batch: Batch, world: World) -> dict[str, Any]:
        """The arguments of one edge's term, rows of all ranks where it couples them."""
        fields = batch[edge.source]
        gather = self.couples and world.size > 1
        given: dict[str, Any] = {}
        for name in self.inputs:
            of_rows = True
            if name == "student":
                value: Any = edge.student(values, batch)
                of_rows = edge.student.has_rows
            elif name == "teacher":
                if edge.teacher is None:
                    continue
                value = edge.teacher(values, batch, not self.config.teacher_grad)
                of_rows = edge.teacher.has_rows
            elif name in edge.named:
                reader = edge.named[name]
                value, of_rows = reader(values, batch), reader.of_rows
            elif name == "mask":
                value = self.mask(fields)
            elif name == "weight":
                value = fields.get("weight")
            elif name in fields:
                value = fields[name]
            else:
                continue
            given[name] = all_gather_rows(value, world) if gather and of_rows and value is not None else value
        return given

    def _loss(self, edge: TermEdge, given: Mapping[str, Any]) -> Tensor:
        return edge.term(**given)

    def _reduced(
        self,
        edge: TermEdge,
        loss: Tensor,
        batch: Batch,
        weight: Tensor | None,
        count: Count,
        share: float,
        world: World,
    ) -> Tensor:
        """Sum of the valid entries, weighted, over the count of the whole effective batch."""
        if self.space == "batch":
            return loss / world.size if world.size > 1 else loss
        if self.space == "model":
            return loss * share
        fields = batch[edge.source]
        mask, own = self.mask(fields), fields.get("weight")
        if self.couples and world.size > 1:  # every rank has the loss of all rows, and takes its share of it
            mask = None if mask is None else all_gather_rows(mask, world)
            own = None if own is None else all_gather_rows(own, world)
            weight = None if weight is None else all_gather_rows(weight, world)
            share_of_ranks = 1.0 / world.size
        else:
            share_of_ranks = 1.0
        if weight is not None:
            loss = loss * _spread(weight, loss)
        if own is not None and "weight" not in self.inputs:
            loss = loss * _spread(own, loss)
        if mask is not None:
            loss = torch.where(_spread(mask, loss), loss, 0.0)
        inner = loss[0].numel() if mask is None or mask.dim() == 1 else 1
        total = loss.sum() / (count * inner)
        return total if share_of_ranks == 1.0 else total * share_of_ranks

    def _rows(self, batch: Batch) -> int:
        return next(iter(batch[self.source].values())).shape[0]

    def _routed(self, values: Values, batch: Batch, count: Count, share: float, world: World) -> list[Tensor]:
        """The same with weights of samples and edges, and with what later terms read of this one."""
        edges: list[TermEdge] = list(self.edges)  # type: ignore[arg-type]
        alone = World()  # weights are of this rank's rows; what couples ranks gathers them with the rows
        read = [self._read(edge, values, batch, alone) for edge in edges]
        by_row = self.space not in ("batch", "model")
        losses: list[Tensor] = []
        if by_row:
            gathered = read if world.size == 1 else [self._read(edge, values, batch, world) for edge in edges]
            losses = [self._loss(edge, given) for edge, given in zip(edges, gathered, strict=True)]
            if self.route is not None or "loss" in self.outputs_read:
                flat = torch.stack([_per_row(loss) for loss in losses], 1)
                values[term_key(self.config.name, "loss")] = flat
        weights: list[Tensor | None] = [None] * len(edges)
        if self.route is not None:
            own = {"student": read[0].get("student"), "teachers": [given.get("teacher") for given in read]}
            if by_row:
                own["losses"] = values[term_key(self.config.name, "loss")].detach()
            routed = self.route(own, batch[self.source], values, batch)
            given_out = routed if isinstance(routed, dict) else {"route": routed}
            for name, value in given_out.items():
                values[term_key(self.config.name, name)] = value
            _refuse_shape("router", given_out["route"], self._rows(batch), len(edges))
            weights = [given_out["route"][:, number] for number in range(len(edges))]
        if self.sample_weight is not None:
            for number, (edge, given) in enumerate(zip(edges, read, strict=True)):
                weight = self.sample_weight(given, batch[edge.source], values, batch)
                _refuse_shape("weigher", weight, self._rows(batch))
                before = weights[number]
                weights[number] = weight if before is None else weight * before
        if by_row:
            return [
                self._reduced(edge, loss, batch, weight, count, share, world)
                for edge, loss, weight in zip(edges, losses, weights, strict=True)
            ]
        result = []
        for edge, weight in zip(edges, weights, strict=True):
            fields = dict(batch[edge.source])
            if weight is not None:
                fields["weight"] = weight if "weight" not in fields else weight * fields["weight"]
            weighed = {**batch, edge.source: fields}
            loss = self._loss(edge, self._read(edge, values, weighed, world))
            result.append(self._reduced(edge, loss, batch, None, count, share, world))
        return result


def _refuse_shape(what: str, weight: Tensor, *expected: int) -> None:
    """Raises ValueError for weights that would be spread over the loss in another way than meant."""
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"the {what} gives weights of shape {list(weight.shape)} where {list(expected)} was expected: one for each "
            "sample; it may not fit operands of this shape"
        )


def _per_row(loss: Tensor) -> Tensor:
    """One number per sample: the mean over tokens or pixels."""
    return loss if loss.dim() == 1 else loss.flatten(1).mean(1)


def _spread(rows: Tensor, loss: Tensor) -> Tensor:
    return rows.reshape(rows.shape + (1,) * (loss.dim() - rows.dim()))
