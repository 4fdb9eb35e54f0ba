"""Dataclasses of registered parts (terms, models, ...) with their parameters, and of the operands that they read."""

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
    """A registered part with its parameters, written as `kd` or `{type: kd, temperature: 4}`."""

    type: str = field(metadata=declare("name of the part"))
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the part")
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


@dataclass(frozen=True, kw_only=True)
class OperandConfig:
    """An operand of a term or another part, and the adapter that is applied to the operand.

    Attributes:
        kind: kind of the operand. `role`: output of a network's module (`ROLE:PATH`); `field`: field of the batch
            (`SOURCE.FIELD`); `term`: output of another term (`term:NAME.loss`); `artifact`: result of an earlier stage
            (`artifact:STAGE.NAME`); `combined`: combination of several operands.
        role: name of the network (`role`), source (`field`), term (`term`) or stage (`artifact`).
        path: module path or `logits` (`role`), or name of the field, output or artifact.
        call: number of the call, from 1, if the forward calls the module several times.
        side: tensor that is read: output or input of the module, `stats` (running mean and variance of a BatchNorm,
            (2, channels)), or `weights` (all parameters of the module as one vector).
        adapter: module between the operand and the term. None: the default adapter of the term's class.
        combiner: part that combines the operands in `parts`; None for all other kinds.
    """

    role: str = field(
        metadata=declare(
            "role to which the operand belongs",
            default=None,
            default_text="`teacher` for the key `teacher`, otherwise the student",
            example="role: teacher",
        )
    )
    path: str = field(
        default="logits",
        metadata=declare(
            "path of a module in the role, optionally with `@CALL` and `/in`, `/stats` or `/weights`",
            example="path: layer2@2/in",
        ),
    )
    call: int = field(default=1, metadata=derived("`@CALL` of the address"))
    side: Literal["out", "in", "stats", "weights"] = field(default="out", metadata=derived("`/SIDE` of the address"))
    adapter: PartConfig | None = field(
        default=None,
        metadata=declare(
            "module between the operand and the term: a name of `kdbench list adapters` with its parameters",
            type="Adapter",
            default_text="the adapter of the term",
            example="adapter: conv1x1",
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
                "combiner of several operands: a name of `kdbench list combiners`; the parameters of the combiner are "
                "further keys of the mapping",
                type="Combiner",
                example="combine: mean_probabilities",
            ),
        ),
    )
    parts: tuple[OperandConfig, ...] = field(
        default=(),
        metadata=declare(
            "list of two or more operands to combine", name="of", type="list[Operand]", example="of: [t1, t2]"
        ),
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
        """Returns whether the operand consists of weights or BatchNorm statistics, which need no forward pass."""
        return self.side in ("stats", "weights")

    def leaves(self) -> Iterator[OperandConfig]:
        """Yields all operands in a combination (recursively); for any other operand, yields the operand itself."""
        if self.combiner is None:
            yield self
            return
        for part in (*self.parts, *self.combiner.operands.values()):
            yield from part.leaves()

    def feature_operands(self) -> Iterator[OperandConfig]:
        """Yields the operands in `leaves` that are read from a network, such as the output of a module."""
        return (leaf for leaf in self.leaves() if leaf.kind == "role")


@dataclass(frozen=True, kw_only=True)
class PartWithOperands:
    """A registered part with its parameters, and with the operands (name -> operand) that the part reads."""

    type: str = field(metadata=declare("name of the part"))
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the part")
    )
    operands: Mapping[str, OperandConfig] = field(
        default_factory=dict, metadata=derived("the keys that are operands of the part")
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)
