"""Registered parts as a recipe writes them, and the operands that they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.config.schema.keys import Key, declare, declare_keys, derived
from kdbench.errors import Location

NO_LOCATION = Location()


LOCATION = derived("the location of the mapping")
"""Metadata of the fields `location`."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A registered part with its parameters: `kd`, or `{type: kd, temperature: 4}`."""

    type: str = field(metadata=declare("name of the part"))
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the part")
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


@dataclass(frozen=True, kw_only=True)
class OperandConfig:
    """An operand of a term or another part, and the adapter applied to it.

    Attributes:
        kind: the kind of operand: a feature of a role (`ROLE:PATH[@K][/in]`), a field of a source (`SOURCE.FIELD`), an
            output of another term (`term:NAME.loss`), an artifact (`artifact:STAGE.NAME`), or a combination of several
            operands (`combine` of `parts`).
        role: the role, source, term or stage.
        path: a module path inside the role, or `logits`; the field; the output; the artifact.
        call: number of the module's call, from 1.
        side: output or input of the module; `stats`: running mean and variance of a BatchNorm, (2, channels);
            `weights`: all parameters of the module as one vector.
        adapter: None: the default that the term's class declares.
        combiner: the part that combines `parts`.
    """

    role: str = field(
        metadata=declare(
            "role whose feature it is", default=None, default_text="the operand's own role", example="role: teacher"
        )
    )
    path: str = field(
        default="logits", metadata=declare("module path, with call and side", example="path: layer2@2/in")
    )
    call: int = field(default=1, metadata=derived("`@CALL` of the address"))
    side: Literal["out", "in", "stats", "weights"] = field(default="out", metadata=derived("`/SIDE` of the address"))
    adapter: PartConfig | None = field(
        default=None,
        metadata=declare(
            "layer between feature and term", type="Adapter", default_text="the term's", example="adapter: conv1x1"
        ),
    )
    kind: Literal["role", "field", "term", "artifact", "combined"] = field(
        default="role", metadata=derived("the form of the address")
    )
    combiner: PartWithOperands | None = field(
        default=None,
        metadata=declare_keys(
            Key(
                "combine",
                "combiner of several operands; its parameters and operands are keys beside it",
                type="Combiner",
                example="combine: mean_probabilities",
            ),
        ),
    )
    parts: tuple[OperandConfig, ...] = field(
        default=(),
        metadata=declare("operands to combine, two or more", name="of", type="list[Operand]", example="of: [t1, t2]"),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)

    def __str__(self) -> str:
        if self.combiner is not None:
            return f"{self.combiner.type} of {', '.join(str(part) for part in self.parts)}"
        if self.kind == "field":
            return f"{self.role}.{self.path}"
        if self.kind != "role":
            return f"{self.kind}:{self.role}.{self.path}"
        call = f"@{self.call}" if self.call != 1 else ""
        return f"{self.role}:{self.path}{call}{'' if self.side == 'out' else '/' + self.side}"

    @property
    def is_state(self) -> bool:
        """True for parameters and statistics, which are read without running the network."""
        return self.side in ("stats", "weights")

    def leaves(self) -> Iterator[OperandConfig]:
        """Yields the operand itself, or the operands of a combination."""
        if self.combiner is None:
            yield self
            return
        for part in (*self.parts, *self.combiner.operands.values()):
            yield from part.leaves()

    def feature_operands(self) -> Iterator[OperandConfig]:
        """Yields the leaves that are features of roles."""
        return (leaf for leaf in self.leaves() if leaf.kind == "role")


@dataclass(frozen=True, kw_only=True)
class PartWithOperands:
    """A registered part with its parameters, and the operands that it reads by name."""

    type: str = field(metadata=declare("name of the part"))
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the part")
    )
    operands: Mapping[str, OperandConfig] = field(
        default_factory=dict, metadata=derived("the keys that are operands of the part")
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)
