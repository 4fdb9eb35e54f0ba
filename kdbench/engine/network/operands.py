"""Readers of operands in a step. An operand is a tensor that a term reads, such as `teacher:layer3`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from kdbench.config.schema import OperandConfig, TermConfig
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.network.features import Feature

Values: TypeAlias = dict[tuple[str, Any], Tensor]
"""The outputs of a step so far: features by (role, feature), outputs of terms by ("term:NAME", output)."""


def operand_feature(operand: OperandConfig) -> Feature:
    """Returns the feature (module path, call, side) in the address of an operand."""
    return Feature(operand.path, operand.call, operand.side)


def term_key(name: str, output: str) -> tuple[str, str]:
    """Returns the key under which an output of a term is stored in the dictionary of a step's values.

    The key contains a colon, so it differs from the name of every role.
    """
    return f"term:{name}", output


class OperandReader(nn.Module):
    """Reads one operand in each step: looks up its tensor, or combines several tensors, and applies its adapter.

    Args:
        operand: the operand with its address.
        adapter: module that maps the operand to another shape, or None.
        combiner: module that computes the operand from several tensors, or None.
        parts: readers of the tensors that the combiner combines.
        operands: name -> reader, for further operands of the combiner.
        artifact: tensor of an earlier stage, if the operand's address is `artifact:STAGE.NAME`.

    Attributes:
        has_rows: whether the operand's tensor has one row per sample.
    """

    def __init__(
        self,
        operand: OperandConfig,
        adapter: nn.Module | None = None,
        *,
        combiner: nn.Module | None = None,
        parts: Sequence[OperandReader] = (),
        operands: Mapping[str, OperandReader] | None = None,
        artifact: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.operand = operand
        self.kind = operand.kind
        self.owner, self.name = operand.role, operand.path
        self.key: tuple[str, Any] = (operand.role, operand_feature(operand))
        if operand.kind == "term":
            self.key = term_key(operand.role, operand.path)
        self.has_rows = operand.kind != "artifact" and operand.side not in ("stats", "weights")
        self.adapter = adapter
        self.combiner = combiner
        self.parts = nn.ModuleList(parts)
        self.operands = nn.ModuleDict(operands or {})
        self.register_buffer("artifact", artifact, persistent=False)

    def forward(self, values: Values, batches: MicroBatch, detach: bool = False) -> Tensor:
        """Returns the operand's tensor in the current step.

        Args:
            values: features and outputs of terms that this step has computed so far.
            batches: source -> its batch.
            detach: whether gradients stop at the tensor that is read. A combiner and an adapter after it are still
                trained.
        """
        if self.combiner is not None:
            parts = [part(values, batches, detach) for part in self.parts]
            further = {name: reader(values, batches, detach) for name, reader in self.operands.items()}
            value = self.combiner(parts, **further)
        elif self.kind == "field":
            value = batches[self.owner].fields[self.name]
        elif self.kind == "artifact":
            assert isinstance(self.artifact, Tensor)
            value = self.artifact
        else:
            value = values[self.key]
            value = value.detach() if detach else value
        return value if self.adapter is None else self.adapter(value)


def operand_source(operand: OperandConfig, sources: Mapping[str, str], terms: Mapping[str, TermConfig]) -> str | None:
    """Returns the name of the source whose samples are the rows of an operand, or None for an operand without rows.

    Args:
        sources: role -> name of the source from which its input comes.
        terms: name -> config of the stage's terms.
    """
    if operand.kind == "field":
        return operand.role
    if operand.kind == "term":
        return operand_source(terms[operand.role].edges[0].student, sources, terms)
    if operand.kind == "combined":
        candidates = (operand_source(part, sources, terms) for part in operand.parts)
        return next((source for source in candidates if source is not None), None)
    return sources[operand.role] if operand.kind == "role" else None
