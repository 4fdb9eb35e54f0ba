"""What a term, a weigher, a router, a selector or a maker reads: one tensor by its address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from kdbench.config.schema import OperandConfig, TermConfig
from kdbench.engine.network.features import Feature

Batch: TypeAlias = dict[str, dict[str, Tensor]]
"""The fields of each source: `batch["train"]["image"]`."""


Values: TypeAlias = dict[tuple[str, Any], Tensor]
"""What the roles and the terms of a step have given so far: by (role, feature), and by ("term:NAME", output)."""


def operand_feature(operand: OperandConfig) -> Feature:
    return Feature(operand.path, operand.call, operand.side)


def term_key(name: str, output: str) -> tuple[str, str]:
    """Where a term's own output stands among the values; a role's name has no colon."""
    return f"term:{name}", output


def given_key(role: str, feature: Feature) -> str:
    """The field of a role's source that holds a feature which was computed before the step; no other field has a colon.

    Whoever puts it there (a teacher that runs ahead, a table of its logits) gives every feature that the role captures,
    a row for each sample of the batch; the role then does not run.
    """
    return f"{role}:{feature}"


class OperandReader(nn.Module):
    """Reads one operand: looks it up, combines its parts, and passes it through its adapter.

    Args:
        operand: what to read.
        adapter: owned by whoever reads.
        combiner: of a combined operand, with its parts and its own operands.
        artifact: the tensor that an earlier stage made, of an operand that names one.
    """

    def __init__(
        self,
        operand: OperandConfig,
        adapter: nn.Module | None = None,
        *,
        combiner: nn.Module | None = None,
        parts: Sequence[OperandReader] = (),
        named: Mapping[str, OperandReader] | None = None,
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
        """Whether the tensor has one row per sample."""
        self.adapter = adapter
        self.combiner = combiner
        self.parts = nn.ModuleList(parts)
        self.named = nn.ModuleDict(named or {})
        self.register_buffer("artifact", artifact, persistent=False)

    def forward(self, values: Values, batch: Batch, detach: bool = False) -> Tensor:
        """Args: detach: no gradient reaches what is read; parameters of a combiner or an adapter still learn."""
        if self.combiner is not None:
            parts = [part(values, batch, detach) for part in self.parts]
            value = self.combiner(parts, **{name: read(values, batch, detach) for name, read in self.named.items()})
        elif self.kind == "field":
            value = batch[self.owner][self.name]
        elif self.kind == "artifact":
            assert isinstance(self.artifact, Tensor)
            value = self.artifact
        else:
            value = values[self.key]
            value = value.detach() if detach else value
        return value if self.adapter is None else self.adapter(value)


def operand_source(operand: OperandConfig, sources: Mapping[str, str], terms: Mapping[str, TermConfig]) -> str | None:
    """The source whose samples are an operand's rows; None where it has no rows.

    Args:
        sources: the source at the root of each role's input.
        terms: those of the stage.
    """
    if operand.kind == "field":
        return operand.role
    if operand.kind == "term":
        return operand_source(terms[operand.role].edges[0].student, sources, terms)
    if operand.kind == "combined":
        found = (operand_source(part, sources, terms) for part in operand.parts)
        return next((source for source in found if source is not None), None)
    return sources[operand.role] if operand.kind == "role" else None
