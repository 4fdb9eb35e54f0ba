"""Builds terms with their operand readers, adapters, combiners, sample weights and routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdbench.config.schedules import Schedule, build_schedule
from kdbench.config.schema import EdgeConfig, OperandConfig, PartConfig, PartWithOperands, StageConfig, TermConfig
from kdbench.engine.network.operands import OperandReader, operand_feature, operand_source
from kdbench.engine.network.resolved_stage import ResolvedStage
from kdbench.engine.network.terms import RowMask, TermEdge, TermGroup, WiredPart
from kdbench.errors import ConfigError, Location
from kdbench.randomness import seeded
from kdbench.registry import ADAPTERS, COMBINERS, ROUTERS, SAMPLE_WEIGHTS, TERMS, Entry, Registry

ScheduledTensors = list[tuple[Tensor, Schedule]]
"""Scalar tensors with the schedules that they follow."""


def build_part(registry: Registry, name: str, params: Mapping[str, Any], location: Location, **injected: Any) -> Any:
    """Builds a registered part: a term, an adapter, ...

    Raises:
        ConfigError: the constructor rejects the parameters. The message has the location in the recipe.
    """
    try:
        return registry.build(name, params, location, **injected)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(location)) else f"{location}: {message}") from None


@dataclass(frozen=True)
class TermBuilder:
    """Builds the terms of a stage. The shapes of a term's operands determine the sizes of its modules.

    The `key` arguments name random streams, which determine the initial weights of adapters, combiners and terms. So
    the strings in these keys ("combiner", "adapter", "weigh", "route", ...) must not change.

    Attributes:
        resolved: the stage with the order of its roles, its features and their shapes.
        artifacts: `STAGE.NAME` -> tensor artifact of an earlier stage.
    """

    stage: StageConfig
    resolved: ResolvedStage
    seed: int
    device: torch.device
    artifacts: Mapping[str, Tensor]

    # Shapes

    def operand_shape(self, operand: OperandConfig) -> Size:
        """Returns the shape of one sample of an operand, or the full shape if the operand has no batch dimension."""
        if operand.kind == "combined":
            return self.operand_shape(operand.parts[0])
        if operand.kind == "field":
            return Size(self.resolved.fields[operand.role][operand.path])
        if operand.kind == "term":
            return Size((len(self.stage.terms[operand.role].edges),))
        if operand.kind == "artifact":
            return self._artifact(operand).shape
        return Size(self.resolved.shapes[operand.role, operand_feature(operand)])

    def batched_shape(self, operand: OperandConfig) -> Size:
        """Returns the shape of an operand in a batch of two rows."""
        shape = self.operand_shape(operand)
        return shape if operand.kind == "artifact" or operand.is_state else Size((2, *shape))

    def _adapted_shape(self, operand: OperandConfig, adapter: nn.Module | None, target: OperandConfig | None) -> Size:
        """Returns the batched shape of an operand after its adapter, which maps it to the shape of `target`."""
        if adapter is None:
            return self.batched_shape(operand)
        shape = getattr(adapter, "shape", None)
        if isinstance(shape, tuple):  # an adapter that determines its own output shape
            return Size((2, *shape))
        return self.batched_shape(target) if target is not None else self.batched_shape(operand)

    def _artifact(self, operand: OperandConfig) -> Tensor:
        return self.artifacts[f"{operand.role}.{operand.path}"].to(self.device)

    # Operands

    def reader(self, operand: OperandConfig, *key: str) -> OperandReader:
        """Builds the reader of an operand that is not compared with another operand.

        The adapter of such an operand keeps the operand's shape.
        """
        adapter = self._adapter(operand, None, operand, *key) if operand.adapter is not None else None
        return self._reader(operand, adapter, *key)

    def _reader(self, operand: OperandConfig, adapter: nn.Module | None, *key: str) -> OperandReader:
        if operand.combiner is None:
            artifact = self._artifact(operand) if operand.kind == "artifact" else None
            return OperandReader(operand, adapter, artifact=artifact)
        part = operand.combiner
        facts = {"parts": len(operand.parts), "shapes": self._shapes(part.operands)}
        with seeded(self.seed, "term", *key, "combiner"):
            combiner = build_part(COMBINERS, part.type, part.params, part.location, **facts)
        parts = [self.reader(combined, *key, f"part{i}") for i, combined in enumerate(operand.parts)]
        operands = {name: self.reader(further, *key, name) for name, further in part.operands.items()}
        return OperandReader(operand, adapter, combiner=combiner, parts=parts, operands=operands)

    def _shapes(self, operands: Mapping[str, OperandConfig]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.operand_shape(operand)) for name, operand in operands.items()}

    def _adapter(
        self, operand: OperandConfig, default: str | None, target: OperandConfig, *key: str
    ) -> nn.Module | None:
        """Builds the adapter that maps an operand to the shape of a target. Returns None if no adapter is needed.

        Args:
            default: name of the adapter that the term's class declares. It is used if the recipe names none.
        """
        part = operand.adapter or (PartConfig(type=default) if default else None)
        if part is None or part.type == "identity":
            return None
        location = part.location if part.location != Location() else operand.location
        facts = {"source": tuple(self.operand_shape(operand)), "target": tuple(self.operand_shape(target))}
        with seeded(self.seed, "term", *key, "adapter"):
            try:
                return build_part(ADAPTERS, part.type, part.params, location, **facts)
            except ValueError as error:
                raise ConfigError(f"{location}: adapter {part.type!r} of term {key[0]!r}: {error}") from None

    # Terms

    def build_term(self, config: TermConfig, outputs_read: frozenset[str]) -> TermGroup:
        """Builds one entry of `terms`: an instance of the term's class with operand readers for each operand pair.

        Args:
            outputs_read: names of this term's outputs that later terms read.

        Raises:
            ConfigError: the term cannot compare its operands, or rejects its parameters.
        """
        entry = TERMS.entry(config.type)
        mask = RowMask("label" in entry.inputs, config.mask)
        scheduled: ScheduledTensors = []
        weight = self._scheduled_value(config.weight, scheduled)
        params = {key: self._scheduled_value(value, scheduled) for key, value in config.params.items()}
        edges = [
            self._build_edge(config, entry, edge, number, params, mask) for number, edge in enumerate(config.edges)
        ]
        sample_weight = route = None
        if config.sample_weight is not None:
            sample_weight = self._wired_part(config.sample_weight, SAMPLE_WEIGHTS, config, "weigh", scheduled)
        if config.route is not None:
            route = self._wired_part(config.route, ROUTERS, config, "route", scheduled)
        group = TermGroup(config, entry, edges, weight, mask, scheduled, sample_weight, route, outputs_read)
        return group.to(self.device)

    def _scheduled_value(self, value: Any, scheduled: ScheduledTensors) -> Any:
        """Replaces a schedule by a scalar tensor, which the runner fills in each step.

        Any other value is returned unchanged.

        Args:
            scheduled: list to which the tensor and its schedule are appended.
        """
        if not isinstance(value, PartConfig):
            return value
        schedule = build_schedule(value)
        tensor = torch.tensor(float(schedule(0.0, 1.0)), device=self.device)
        scheduled.append((tensor, schedule))
        return tensor

    def _build_edge(
        self,
        config: TermConfig,
        entry: Entry,
        edge: EdgeConfig,
        number: int,
        params: Mapping[str, Any],
        mask: RowMask,
    ) -> TermEdge:
        student_adapter, teacher_adapter = self._edge_adapters(config, entry, edge, number)
        shapes = {"student": self._adapted_shape(edge.student, student_adapter, edge.teacher)}
        if edge.teacher is not None:
            shapes["teacher"] = self._adapted_shape(edge.teacher, teacher_adapter, edge.student)
        shapes |= {name: self.batched_shape(operand) for name, operand in config.operands.items()}
        source = operand_source(edge.student, self.resolved.sources, self.stage.terms)
        if source is None:
            source = self.resolved.sources[self.stage.export]
        term = self._term(config, edge, number, params, source, shapes)
        key = (config.name, str(number))
        student = self._reader(edge.student, student_adapter, *key, "student")
        teacher = None if edge.teacher is None else self._reader(edge.teacher, teacher_adapter, *key, "teacher")
        operands = {name: self.reader(operand, *key, name) for name, operand in config.operands.items()}
        return TermEdge(edge, term, student, teacher, operands, source, entry.inputs, mask, config.teacher_grad)

    def _edge_adapters(
        self, config: TermConfig, entry: Entry, edge: EdgeConfig, number: int
    ) -> tuple[nn.Module | None, nn.Module | None]:
        """Returns the adapters of an edge's student and teacher operand. An adapter that is not needed is None."""
        student_key, teacher_key = f"{number}.student", f"{number}.teacher"
        if edge.teacher is None:
            if edge.student.adapter is None:
                return None, None
            return self._adapter(edge.student, None, edge.student, config.name, student_key), None
        student = self._adapter(edge.student, entry.facts.get("adapter"), edge.teacher, config.name, student_key)
        if edge.teacher.adapter is None:
            return student, None
        return student, self._adapter(edge.teacher, None, edge.student, config.name, teacher_key)

    def _term(
        self,
        config: TermConfig,
        edge: EdgeConfig,
        number: int,
        params: Mapping[str, Any],
        source: str,
        shapes: Mapping[str, Size],
    ) -> Any:
        """Builds the instance of a term's class for one pair of operands and checks the operands' shapes."""
        resolved = self.resolved
        facts = resolved.facts.get(edge.student.role, resolved.facts[self.stage.export]).injected
        facts["samples"] = resolved.samples.get(source, 0)
        facts["shapes"] = {name: tuple(shape[1:]) for name, shape in shapes.items()}
        with seeded(self.seed, "term", config.name, number):
            term = build_part(TERMS, config.type, params, config.location, **facts)
        try:
            term.check_shapes(**shapes)
        except ValueError as error:
            operands = f"{edge.student}" + (f" with {edge.teacher}" if edge.teacher else "")
            raise ConfigError(f"{config.location}: term {config.name!r} ({config.type}) {error} ({operands})") from None
        return term

    def _wired_part(
        self, part: PartWithOperands, registry: Registry, config: TermConfig, key: str, scheduled: ScheduledTensors
    ) -> WiredPart:
        """Builds the sample weight or the router of a term, with the readers of its operands."""
        shapes = self._shapes(part.operands)
        shapes["student"] = tuple(self.operand_shape(config.edges[0].student))
        if config.edges[0].teacher is not None:
            shapes["teacher"] = tuple(self.operand_shape(config.edges[0].teacher))
        params = {name: self._scheduled_value(value, scheduled) for name, value in part.params.items()}
        facts = self.resolved.facts[self.stage.export].injected | {"edges": len(config.edges), "shapes": shapes}
        with seeded(self.seed, "term", config.name, key):
            module = build_part(registry, part.type, params, part.location, **facts)
        operands = {name: self.reader(operand, config.name, key, name) for name, operand in part.operands.items()}
        return WiredPart(module, registry.entry(part.type), operands)
