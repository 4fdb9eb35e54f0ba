"""Optimizers and the updates of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.schema.keys import (
    AT_LEAST_ONE,
    MISSING,
    POSITIVE,
    PROPER_FRACTION_OR_COUNT,
    Key,
    declare,
    declare_keys,
    derived,
    key_table,
)
from kdbench.config.schema.parts import LOCATION, NO_LOCATION, PartConfig, PartWithOperands
from kdbench.errors import Location


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer of torch.optim, with other settings for groups of parameters; the first matching group wins."""

    type: str = field(default="SGD", metadata=declare("a name of `kdbench list optimizers`", example="type: AdamW"))
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the optimizer")
    )
    groups: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata=declare(
            "other settings for some parameters; the first group that matches a parameter wins",
            type="list[OptimizerGroup]",
            default_text="none",
            example="groups: [{type: norm, weight_decay: 0}]",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


OPTIMIZER_GROUP_KEYS = key_table(
    Key("path", "module path", type="str", example="path: layer4"),
    Key(
        "type",
        "class of the module, or `norm` (every normalisation layer), or `bias`",
        type="str",
        example="type: BatchNorm2d",
    ),
)
"""The keys of an optimizer group, beside the parameters that it overrides."""


SCHEDULER_KEYS = key_table(
    Key(
        "warmup",
        "epochs (or steps) of linear warm-up, a factor of the schedule",
        type="float",
        check=POSITIVE,
        example="warmup: 5",
    ),
)
"""The keys of `scheduler` beside the parameters of its schedule."""


CHAIN_PART_KEYS = key_table(
    Key("length", "epochs (or steps) of this part", type="float", check=POSITIVE, example="length: 5"),
)
"""The keys of a part of the schedule `chain` beside the parameters of its schedule."""


@dataclass(frozen=True, kw_only=True)
class InnerStepConfig:
    """The inner step of a bilevel update: a plain gradient step that is differentiated and then discarded.

    Attributes:
        models: the roles that the step moves; the parameters of its terms move too.
        lr: None: for each parameter the learning rate of the update that moves it.
    """

    models: tuple[str, ...] = field(
        metadata=declare("trainable roles that the step moves", type="str | list[str]", example="models: [student]")
    )
    terms: tuple[str, ...] = field(
        metadata=declare("terms whose sum it descends", type="str | list[str]", example="terms: [kd]")
    )
    lr: float | PartConfig | None = field(
        default=None,
        metadata=declare(
            "learning rate of the step: a number, or a schedule",
            type="float | Schedule",
            check=POSITIVE,
            default_text="for each parameter that of the only update that moves it",
            example="lr: 0.1",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """One update within a step: moves some roles along the gradient of some terms.

    Attributes:
        group: updates with the same number compute all their gradients before any of them moves a parameter.
        keep: fraction or number of the batch's rows that `select` keeps.
        inner_step: the terms are evaluated at the weights after this step, and their gradient flows through it.
    """

    models: tuple[str, ...] = field(
        metadata=declare("trainable roles that the update moves", type="str | list[str]", example="models: [student]")
    )
    terms: tuple[str, ...] = field(
        metadata=declare("terms whose sum it descends", type="str | list[str]", example="terms: [ce, kd]")
    )
    repeat: int = field(
        default=1,
        metadata=declare(
            "repetitions on the same batch, each with a new forward pass", check=AT_LEAST_ONE, example="repeat: 5"
        ),
    )
    optimizer: OptimizerConfig | None = field(
        default=None,
        metadata=declare(
            "its own optimizer",
            type="Optimizer",
            default_text="that of the stage",
            example="optimizer: {type: SGD, lr: 0.1}",
        ),
    )
    group: int | None = field(default=None, metadata=derived("the position of a list within the list `updates`"))
    select: PartWithOperands | None = field(
        default=None,
        metadata=declare(
            "rows of the batch that count: a name of `kdbench list selectors` with its parameters and operands, and "
            "`keep`",
            type="Selection",
            default_text="all rows",
            example="select: {type: random, keep: 16}",
        ),
    )
    keep: float | int | None = field(default=None, metadata=derived("`keep` of `select`"))
    inner_step: InnerStepConfig | None = field(
        default=None,
        metadata=declare(
            "an inner step before the update (bilevel optimisation), see below",
            type="InnerStep",
            default_text="none",
            example="inner_step: {models: [student], terms: [kd]}",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


SELECTION_KEYS = key_table(
    Key(
        "keep",
        "fraction or number of rows to keep",
        type="float",
        check=PROPER_FRACTION_OR_COUNT,
        default=MISSING,
        example="keep: 16",
    ),
)
"""The keys of `select` beside the parameters and operands of its selector."""


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """A result that a stage produces at its end for later stages: a dataset, a subset, a tensor or a model.

    Attributes:
        part: a part of ARTIFACTS; its operands are evaluated on every sample of `source`, in eval mode.
        previous: `STAGE.NAME` of the artifact that the round before produced under the same name.
    """

    name: str = field(metadata=derived("the key in `artifacts`"))
    part: PartWithOperands = field(
        metadata=declare_keys(
            Key("type", "a name of `kdbench list artifacts`", type="str", default=MISSING, example="type: choose"),
        )
    )
    source: str | None = field(
        default=None,
        metadata=declare(
            "source over whose samples it is computed; roles see its images, not augmented, instead of their own "
            "inputs",
            default_text="train",
            example="source: pool",
        ),
    )
    previous: str | None = field(default=None, metadata=derived("the round before, in a loop"))
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)
