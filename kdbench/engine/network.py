"""All roles and terms of a stage as one module: a batch in, one reduced loss per term out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdbench.config.schedules import Schedule
from kdbench.config.schema import Edge, Operand, RoleConfig, TermConfig
from kdbench.engine.distributed import SyncBatchNorm, World, gather_rows
from kdbench.engine.features import Capture, Feature, find_module
from kdbench.registry import Entry
from kdbench.terms.base import Term

Batch: TypeAlias = dict[str, dict[str, Tensor]]
"""The fields of each source: `batch["train"]["image"]`."""

Count: TypeAlias = "int | Tensor"
"""By how many valid entries a term's sum is divided: those of the whole effective batch, on all ranks."""


def feature_of(operand: Operand) -> Feature:
    return Feature(operand.path, operand.call, operand.side)


class Role(nn.Module):
    """A named network, and what is captured inside it.

    A frozen role stays in eval mode whatever anyone calls, so that its statistics and its dropout never move.
    """

    def __init__(
        self,
        config: RoleConfig,
        model: nn.Module,
        features: Iterable[Feature],
        overwritten: frozenset[Feature] = frozenset(),
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(self.learns and parameter.requires_grad)
        self.frozen = [find_module(model, path, config.place)[1] for path in config.freeze]
        for module in self.frozen:
            module.requires_grad_(False)
        self.synced = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
        self.capture = Capture(model, features, overwritten=overwritten, stop=True)
        self.train(self.learns)

    @property
    def learns(self) -> bool:
        return self.config.mode == "trainable"

    def train(self, mode: bool = True) -> Role:
        super().train(mode and self.learns)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, value: Tensor) -> dict[Feature, Tensor]:
        return self.capture(value)


class TermEdge(nn.Module):
    """One pair of operands of a term: its own instance of the term's class, and the student operand's adapter."""

    def __init__(self, edge: Edge, term: Term, adapter: nn.Module | None, teacher_adapter: nn.Module | None) -> None:
        super().__init__()
        self.edge = edge
        self.term = term
        self.adapter = adapter
        self.teacher_adapter = teacher_adapter


class TermGroup(nn.Module):
    """One entry of `terms`: its edges, its weight, and the reduction of its losses.

    The weight and the scheduled parameters are 0-dim tensors that `move` sets before a step; constants stay numbers.
    """

    def __init__(
        self,
        config: TermConfig,
        entry: Entry,
        edges: Sequence[TermEdge],
        weight: float | Tensor,
        moving: Sequence[tuple[Tensor, Schedule]] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.edges = nn.ModuleList(edges)
        self.space: str = entry.facts.get("space", "sample")
        self.inputs = entry.inputs
        self.optional = entry.optional_inputs
        self.reads_label = "label" in entry.inputs
        self.weight = weight
        self.moving = tuple(moving)

    def move(self, value: Callable[[Schedule], float]) -> None:
        """Sets every scheduled value for the coming step."""
        for tensor, schedule in self.moving:
            tensor.fill_(value(schedule))

    def mask(self, fields: Mapping[str, Tensor]) -> Tensor | None:
        """Which entries of the batch count: real rows, with a label where one is read, inside `where`. None: all."""
        names = ["valid"]
        if self.reads_label:
            names.append("labelled")
        masks = [fields[name] for name in names if name in fields]
        if self.config.where is not None:
            masks.append(fields[self.config.where])
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
        return world.sum_(torch.stack(counts).sum()).clamp(min=1)

    def forward(
        self,
        features: Mapping[tuple[str, Feature], Tensor],
        batch: Batch,
        sources: Mapping[str, str],
        count: Count,
        share: float,
        world: World,
    ) -> Tensor:
        """Returns the term's reduced, unweighted loss: this process's share of the whole batch's value."""
        total: Tensor | None = None
        for edge in self.edges:
            assert isinstance(edge, TermEdge)
            loss = self._edge_loss(edge, features, batch[sources[edge.edge.student.role]], count, share, world)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _edge_loss(
        self,
        edge: TermEdge,
        features: Mapping[tuple[str, Feature], Tensor],
        fields: Mapping[str, Tensor],
        count: Count,
        share: float,
        world: World,
    ) -> Tensor:
        mask = self.mask(fields)
        couples = self.space == "batch" and world.size > 1
        values: dict[str, Any] = {}
        for name in self.inputs:
            if name == "student":
                value = features[edge.edge.student.role, feature_of(edge.edge.student)]
                value = edge.adapter(value) if edge.adapter is not None else value
            elif name == "teacher":
                assert edge.edge.teacher is not None
                value = features[edge.edge.teacher.role, feature_of(edge.edge.teacher)]
                value = value if self.config.teacher_grad else value.detach()
                value = edge.teacher_adapter(value) if edge.teacher_adapter is not None else value
            elif name == "mask":
                value = mask
            elif name == "weight":
                value = fields.get("weight")
            elif name in fields:
                value = fields[name]
            else:
                continue
            values[name] = gather_rows(value, world) if couples and value is not None else value
        loss = edge.term(**values)
        if self.space == "batch":
            return loss / world.size if couples else loss
        if self.space == "model":
            return loss * share
        if "weight" in fields and "weight" not in self.inputs:
            loss = loss * _spread(fields["weight"], loss)
        if mask is not None:
            loss = torch.where(_spread(mask, loss), loss, 0.0)
        inner = loss[0].numel() if mask is None or mask.dim() == 1 else 1
        return loss.sum() / (count * inner)


def _spread(rows: Tensor, loss: Tensor) -> Tensor:
    return rows.reshape(rows.shape + (1,) * (loss.dim() - rows.dim()))


class Network(nn.Module):
    """The roles and terms of a stage, wired.

    Args:
        roles: in an order in which each role's input is there when it runs.
        terms: by name; those of constant weight 0 are left out by the plan.
        sources: which source's fields go with each role (the one at the root of its input).
        world: this process among all.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        terms: Mapping[str, TermGroup],
        sources: Mapping[str, str],
        world: World = World(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.roles = nn.ModuleDict(roles)
        self.terms = nn.ModuleDict(terms)
        self.sources = dict(sources)
        self.world = world
        self.lap: Callable[[str], None] | None = None  # set by the runner where it times the parts of a step

    def role(self, name: str) -> Role:
        role = self.roles[name]
        assert isinstance(role, Role)
        return role

    def term(self, name: str) -> TermGroup:
        term = self.terms[name]
        assert isinstance(term, TermGroup)
        return term

    def needed(self, terms: Iterable[str]) -> set[str]:
        """The roles that must run for these terms, those upstream included."""
        wanted: list[str] = []
        for name in terms:
            for edge in self.term(name).config.edges:
                wanted += [o.role for o in (edge.student, edge.teacher) if o is not None]
        found: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name not in found:
                found.add(name)
                upstream = upstream_role(self.role(name).config)
                wanted += [upstream] if upstream else []
        return found

    def counts(self, window: Sequence[Batch], terms: Iterable[str]) -> dict[str, Count]:
        """What each term's sum is divided by over one effective batch."""
        result = {}
        for name in terms:
            group = self.term(name)
            source = self.sources[group.config.edges[0].student.role]
            result[name] = group.count([batch[source] for batch in window], self.world)
        return result

    def run_roles(self, batch: Batch, terms: Iterable[str], moving: Iterable[str]) -> dict[tuple[str, Feature], Tensor]:
        """Runs each needed role once. Without gradient where nothing that moves is the role or stands upstream."""
        needed, moving = self.needed(terms), set(moving)
        with_gradient: set[str] = set()
        features: dict[tuple[str, Feature], Tensor] = {}
        for name in self.roles:
            if name not in needed:
                continue
            role = self.role(name)
            upstream = upstream_role(role.config)
            if name in moving or upstream in with_gradient:
                with_gradient.add(name)
            for module in role.synced:
                module.valid = batch[self.sources[name]].get("valid")
            with nullcontext() if name in with_gradient else torch.no_grad():
                for feature, value in role(self.role_input(role.config, batch, features)).items():
                    features[name, feature] = value
            if self.lap is not None:
                self.lap("student" if role.learns else "teacher")
        return features

    def role_input(self, config: RoleConfig, batch: Batch, features: Mapping[tuple[str, Feature], Tensor]) -> Tensor:
        if upstream_role(config) is None:
            source, field = config.input.split(".", 1)
            return batch[source][field]
        return features[input_address(config)]

    def forward(
        self, batch: Batch, counts: Mapping[str, Count], terms: Sequence[str], moving: Sequence[str], share: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted total, and one detached vector: the loss of each term, then each one weighted.

        Args:
            batch: one micro-batch.
            counts: as `counts` gave them for the effective batch that this micro-batch is part of.
            terms: the terms of this update.
            moving: the roles that this update moves.
            share: this micro-batch's share of the effective batch, for terms that depend on no row.
        """
        features = self.run_roles(batch, terms, moving)
        total: Tensor | None = None
        losses, shares = [], []
        for name in terms:
            group = self.term(name)
            loss = group(features, batch, self.sources, counts[name], share, self.world)
            weighted = group.weight * loss
            total = weighted if total is None else total + weighted
            losses.append(loss.detach().float())
            shares.append(weighted.detach().float())
        assert total is not None
        if self.lap is not None:
            self.lap("terms")
        return total, torch.stack([*losses, *shares])


def upstream_role(config: RoleConfig) -> str | None:
    """The role whose output a role sees, or None when it sees a field of a source."""
    return config.input.split(":", 1)[0] if ":" in config.input else None


def input_address(config: RoleConfig) -> tuple[str, Feature]:
    """The role and the feature that a role's `ROLE:PATH` input names."""
    role, path = config.input.split(":", 1)
    return role, Feature(path or "logits")
