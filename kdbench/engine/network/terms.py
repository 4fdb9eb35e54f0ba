"""One entry of `terms` inside a step: its operand pairs, sample weights and router (weights of several teachers), and
the reduction of its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from kdbench.config.schedules import Schedule
from kdbench.config.schema import EdgeConfig, TermConfig
from kdbench.data.loading.batch import Batch, MicroBatch
from kdbench.engine.distributed.world import World, all_gather_rows
from kdbench.engine.network.operands import OperandReader, Values, term_key
from kdbench.registry import Entry
from kdbench.terms.base import Term

Count: TypeAlias = "int | Tensor"
"""The divisor of a term's sum: the valid entries of the whole effective batch, on all ranks."""


class Argument(NamedTuple):
    """One argument for the `forward` of a part (term, sample weight or router).

    Attributes:
        name: name of the parameter of `forward`.
        read: function that returns the value, or None if the batch has no such field (`forward` then uses its
            default).
        has_rows: whether the value has one row per sample. Such a value is gathered over ranks for a term whose rows
            depend on each other.
    """

    name: str
    read: Callable[[Values, MicroBatch], Tensor | None]
    has_rows: bool = True


def operand_argument(name: str, reader: OperandReader, detach: bool = False) -> Argument:
    """Returns an argument whose value is an operand.

    Args:
        name: name of the parameter of `forward`.
        reader: reader of the operand.
        detach: whether gradients stop at the operand.
    """
    return Argument(name, lambda values, batches: reader(values, batches, detach), reader.has_rows)


def field_argument(name: str, source: str) -> Argument:
    """Returns an argument whose value is a field of a source's batch.

    Args:
        name: name of the parameter of `forward` and of the field.
        source: name of the source.
    """
    return Argument(name, lambda values, batches: batches[source].fields.get(name))


class RowMask:
    """Computes which rows or positions of a term's source are valid.

    An entry is valid if it is not padding, has a label (if the term reads labels), and is inside the term's `mask:`.

    Args:
        reads_label: whether the term reads labels.
        field: name of the boolean field in the term's `mask:`, or None.
    """

    def __init__(self, reads_label: bool, field: str | None) -> None:
        # Masks of rows come first: each holds for every position of its row.
        self.optional = ("valid", "labelled") if reads_label else ("valid",)
        self.field = field

    def __call__(self, batch: Batch) -> Tensor | None:
        """Returns a boolean mask (rows,) or (rows, ...), or None if all entries are valid."""
        masks = [batch.fields[name] for name in self.optional if name in batch.fields]
        if self.field is not None:
            masks.append(batch.fields[self.field])
        result = None
        for mask in masks:
            result = mask if result is None else _expand(result, mask) & mask
        return result


class TermEdge(nn.Module):
    """One edge of a term: a pair of a student operand and a teacher operand, with an instance of the term's class.

    Args:
        config: configuration of the two operands.
        term: instance of the term's class for this edge.
        student, teacher: readers of the two operands.
        operands: name -> reader, for further operands.
        source: name of the source whose samples are the rows of the loss.
        inputs: parameter names of the term's `forward`.
        mask: function that computes the mask of the source's valid rows.
        teacher_grad: whether gradients reach the teacher operand.
    """

    def __init__(
        self,
        config: EdgeConfig,
        term: Term,
        student: OperandReader,
        teacher: OperandReader | None,
        operands: Mapping[str, OperandReader],
        source: str,
        inputs: Sequence[str],
        mask: RowMask,
        teacher_grad: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.term = term
        self.student = student
        self.teacher = teacher
        self.operands = nn.ModuleDict(operands)
        self.source = source
        self.arguments = tuple(self._resolve(inputs, mask, teacher_grad))

    def _resolve(self, inputs: Sequence[str], mask: RowMask, teacher_grad: bool) -> list[Argument]:
        arguments = []
        for name in inputs:
            if name == "student":
                arguments.append(operand_argument(name, self.student))
            elif name == "teacher":
                if self.teacher is not None:
                    arguments.append(operand_argument(name, self.teacher, detach=not teacher_grad))
            elif name in self.operands:
                arguments.append(operand_argument(name, self.operands[name]))  # type: ignore[arg-type]
            elif name == "mask":
                arguments.append(Argument(name, lambda values, batches: mask(batches[self.source])))
            else:  # a field of the batch, `weight` included
                arguments.append(field_argument(name, self.source))
        return arguments

    @property
    def adapter(self) -> nn.Module | None:
        return self.student.adapter

    def read(self, values: Values, batches: MicroBatch, world: World, gather: bool) -> dict[str, Tensor | None]:
        """Reads the values of the arguments of the term's `forward`.

        Args:
            gather: whether to gather the rows of all ranks, for a term whose rows depend on each other.

        Returns:
            Argument name -> value.
        """
        arguments: dict[str, Tensor | None] = {}
        for name, read, has_rows in self.arguments:
            value = read(values, batches)
            if value is not None:
                arguments[name] = all_gather_rows(value, world) if gather and has_rows else value
            elif name in ("mask", "weight"):
                arguments[name] = None
        return arguments


class WiredPart(nn.Module):
    """A router or a sample weight of a term, with the readers of its operands.

    The part can also read the operands of the term and the fields of the batch.
    """

    def __init__(self, part: nn.Module, entry: Entry, operands: Mapping[str, OperandReader]) -> None:
        super().__init__()
        self.part = part
        self.inputs = entry.inputs
        self.operands = nn.ModuleDict(operands)

    def forward(self, term_operands: Mapping[str, Any], batch: Batch, values: Values, batches: MicroBatch) -> Any:
        """Computes the weights of the router, or the sample weights.

        Args:
            term_operands: name -> operand of the term.
            batch: batch of the term's source.
        """
        arguments: dict[str, Any] = {}
        for name in self.inputs:
            if name in self.operands:
                arguments[name] = self.operands[name](values, batches)
            elif name in term_operands:
                arguments[name] = term_operands[name]
            elif name in batch.fields:
                arguments[name] = batch.fields[name]
        return self.part(**arguments)


class ReductionContext(NamedTuple):
    """The inputs of a reduction from one loss per row to a scalar, other than the losses.

    Attributes:
        batch: batch of the term's source on this rank.
        mask: function that computes the mask of the valid rows of a batch.
        weight: weights of the rows (rows,), or None.
        applies_weight: whether the reduction has to multiply by the batch's field `weight`, because the term does
            not.
        valid_count: number of valid entries of the whole effective batch.
        fraction: this micro-batch's fraction of the effective batch.
        couples: whether the loss of a row depends on other rows, which are then gathered over all ranks.
    """

    batch: Batch
    mask: RowMask
    weight: Tensor | None
    applies_weight: bool
    valid_count: Count
    fraction: float
    couples: bool
    world: World


def reduce_rows(loss: Tensor, context: ReductionContext) -> Tensor:
    """Returns the weighted sum of the valid losses, divided by the valid count of the whole effective batch.

    Args:
        loss: one loss per row (rows,) or per position (rows, ...).
    """
    world, mask = context.world, context.mask(context.batch)
    weights = [context.weight, context.batch.fields.get("weight") if context.applies_weight else None]
    gathered = context.couples and world.size > 1
    if gathered:  # every rank has the losses of all rows, and contributes its fraction of their sum
        mask = None if mask is None else all_gather_rows(mask, world)
        weights = [None if weight is None else all_gather_rows(weight, world) for weight in weights]
    for weight in weights:
        if weight is not None:
            loss = loss * _expand(weight, loss)
    if mask is not None:
        loss = torch.where(_expand(mask, loss), loss, 0.0)
    positions = loss[0].numel() if mask is None or mask.dim() == 1 else 1
    total = loss.sum() / (context.valid_count * positions)
    return total * (1.0 / world.size) if gathered else total


def reduce_batch(loss: Tensor, context: ReductionContext) -> Tensor:
    """Returns this rank's part of a scalar loss that was computed on the rows of all ranks."""
    return loss / context.world.size if context.world.size > 1 else loss


def reduce_model(loss: Tensor, context: ReductionContext) -> Tensor:
    """Returns this micro-batch's part of a scalar loss that does not depend on the rows."""
    return loss * context.fraction


REDUCTIONS = {"row": reduce_rows, "batch": reduce_batch, "model": reduce_model}
"""How the losses of each space become one scalar."""


class TermGroup(nn.Module):
    """One entry of `terms`: its operand pairs, its weight, and the reduction of its losses to a scalar.

    A scheduled weight or parameter is a scalar tensor, which `set_scheduled` fills before each step. A constant
    weight or parameter is a number.

    Args:
        mask: function that computes the mask of the valid rows of the term's source.
        scheduled: pairs of a scalar tensor and its schedule.
        outputs_read: names of outputs that later terms read: `loss`, `route`, or further outputs of the router.
    """

    def __init__(
        self,
        config: TermConfig,
        entry: Entry,
        edges: Sequence[TermEdge],
        weight: float | Tensor,
        mask: RowMask,
        scheduled: Sequence[tuple[Tensor, Schedule]] = (),
        sample_weight: WiredPart | None = None,
        route: WiredPart | None = None,
        outputs_read: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.config = config
        self.edges = nn.ModuleList(edges)
        self.space: str = entry.facts.get("space", "row")
        self.reduction = REDUCTIONS[self.space]
        self.couples: bool = self.space == "batch" or bool(entry.facts.get("state"))
        """True if a row's loss depends on other rows, of this batch or of earlier ones."""
        self.reads_weight = "weight" in entry.inputs
        self.weight = weight
        self.mask = mask
        self.scheduled = tuple(scheduled)
        self.sample_weight, self.route, self.outputs_read = sample_weight, route, outputs_read
        self.plain = sample_weight is None and route is None and not outputs_read
        self.source: str = edges[0].source

    def set_scheduled(self, value_of: Callable[[Schedule], float]) -> None:
        """Sets every scheduled tensor to its value at the next step."""
        for tensor, schedule in self.scheduled:
            tensor.fill_(value_of(schedule))

    def valid_count(self, window: Sequence[Batch], world: World) -> Count:
        """Returns the number of valid entries in a whole effective batch.

        The count is summed over micro-batches and over ranks. Padded, unlabelled and masked entries are not valid.
        """
        masks = [self.mask(batch) for batch in window]
        if all(mask is None for mask in masks):
            return sum(batch.size for batch in window) * world.size
        counts = []
        for mask, batch in zip(masks, window, strict=True):
            if mask is None:
                device = next(iter(batch.fields.values())).device
                counts.append(torch.full((), batch.size, dtype=torch.int64, device=device))
            else:
                counts.append(mask.sum())
        return world.all_reduce_sum_(torch.stack(counts).sum()).clamp(min=1)

    def forward(self, values: Values, batches: MicroBatch, count: Count, fraction: float, world: World) -> Tensor:
        """Returns the term's unweighted loss on this micro-batch, a scalar.

        The sum over all micro-batches and ranks is the loss of the effective batch.

        Args:
            values: the features that this step has computed.
            batches: source -> its batch.
            count: the return value of `valid_count` for the effective batch.
            fraction: this micro-batch's fraction of the effective batch.
        """
        if self.plain:
            gather = self.couples and world.size > 1
            losses = []
            for edge in self.edges:
                loss = edge.term(**edge.read(values, batches, world, gather))  # type: ignore[union-attr, operator]
                context = self._context(batches[edge.source], None, count, fraction, world)  # type: ignore[index]
                losses.append(self.reduction(loss, context))
        else:
            losses = self._weighted_losses(values, batches, count, fraction, world)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total

    def _context(
        self, batch: Batch, weight: Tensor | None, count: Count, fraction: float, world: World
    ) -> ReductionContext:
        applies_weight = not self.reads_weight  # otherwise the term itself has applied it
        return ReductionContext(batch, self.mask, weight, applies_weight, count, fraction, self.couples, world)

    def _weighted_losses(
        self, values: Values, batches: MicroBatch, count: Count, fraction: float, world: World
    ) -> list[Tensor]:
        """Computes one loss per edge, for a term with sample weights, a router, or outputs that later terms read."""
        edges: list[TermEdge] = list(self.edges)  # type: ignore[arg-type]
        # Sample weights are those of this rank's rows; the reduction gathers them together with the rows.
        operands = [edge.read(values, batches, world, gather=False) for edge in edges]
        losses: list[Tensor] = []
        if self.space == "row":
            losses = self._row_losses(edges, operands, values, batches, world)
        weights = self._edge_weights(edges, operands, values, batches)
        if self.space == "row":
            return [
                self.reduction(loss, self._context(batches[edge.source], weight, count, fraction, world))
                for edge, loss, weight in zip(edges, losses, weights, strict=True)
            ]
        result = []
        for edge, weight in zip(edges, weights, strict=True):
            batch = batches[edge.source]
            if weight is not None:  # a term that couples rows applies the weights itself
                stored = batch.fields.get("weight")
                batch = batch.with_fields({"weight": weight if stored is None else weight * stored})
            weighted: MicroBatch = {**batches, edge.source: batch}
            loss = edge.term(**edge.read(values, weighted, world, self.couples and world.size > 1))
            result.append(self.reduction(loss, self._context(batches[edge.source], None, count, fraction, world)))
        return result

    def _row_losses(
        self,
        edges: Sequence[TermEdge],
        operands: Sequence[Mapping[str, Tensor | None]],
        values: Values,
        batches: MicroBatch,
        world: World,
    ) -> list[Tensor]:
        """Computes the unreduced losses of all edges, and stores them in `values` for routers and later terms."""
        arguments = operands
        if self.couples and world.size > 1:
            arguments = [edge.read(values, batches, world, gather=True) for edge in edges]
        losses = [edge.term(**of_edge) for edge, of_edge in zip(edges, arguments, strict=True)]
        if self.route is not None or "loss" in self.outputs_read:
            values[term_key(self.config.name, "loss")] = torch.stack([_per_sample(loss) for loss in losses], 1)
        return losses

    def _edge_weights(
        self,
        edges: Sequence[TermEdge],
        operands: Sequence[Mapping[str, Tensor | None]],
        values: Values,
        batches: MicroBatch,
    ) -> list[Tensor | None]:
        """Returns one weight per sample (rows,) for each edge: the router's weight times the sample weight.

        The weight of an edge is None if the term has neither a router nor sample weights.
        """
        weights: list[Tensor | None] = [None] * len(edges)
        rows = batches[self.source].size
        if self.route is not None:
            term_operands: dict[str, Any] = {
                "student": operands[0].get("student"),
                "teachers": [of_edge.get("teacher") for of_edge in operands],
            }
            if self.space == "row":
                term_operands["losses"] = values[term_key(self.config.name, "loss")].detach()
            outputs = self.route(term_operands, batches[self.source], values, batches)
            outputs = outputs if isinstance(outputs, dict) else {"route": outputs}
            for name, value in outputs.items():
                values[term_key(self.config.name, name)] = value
            _check_weight_shape("router", outputs["route"], rows, len(edges))
            weights = [outputs["route"][:, i] for i in range(len(edges))]
        if self.sample_weight is not None:
            for number, (edge, of_edge) in enumerate(zip(edges, operands, strict=True)):
                weight = self.sample_weight(of_edge, batches[edge.source], values, batches)
                _check_weight_shape("sample weight", weight, rows)
                routed = weights[number]
                weights[number] = weight if routed is None else weight * routed
        return weights


def _check_weight_shape(part: str, weight: Tensor, *expected: int) -> None:
    """Raises ValueError if weights do not have the expected shape, because they would broadcast over the loss."""
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"the {part} returned weights of shape {list(weight.shape)} instead of {list(expected)}, that is, one for "
            f"each sample. The {part} may not support operands of this shape"
        )


def _per_sample(loss: Tensor) -> Tensor:
    """Returns the mean loss over the positions of each sample, (rows,)."""
    return loss if loss.dim() == 1 else loss.flatten(1).mean(1)


def _expand(rows: Tensor, target: Tensor) -> Tensor:
    """Appends dimensions of size 1 until `rows` broadcasts over `target`."""
    return rows.reshape(rows.shape + (1,) * (target.dim() - rows.dim()))
