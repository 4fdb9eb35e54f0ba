"""The dataclasses of optimizers, updates and artifacts, and the declarations of the keys that set their fields."""

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
    """An optimizer of torch.optim. `groups` has other settings for some of the trained parameters.

    A trained parameter gets the settings of the first group that matches the parameter.
    """

    type: str = field(default="SGD", metadata=declare("a name of `kdbench list optimizers`", example="type: AdamW"))
    params: Mapping[str, Any] = field(
        default_factory=dict, metadata=derived("the keys that are parameters of the optimizer")
    )
    groups: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata=declare(
            "settings for some of the trained parameters; a parameter gets the settings of the first group that "
            "matches the parameter",
            type="list[OptimizerGroup]",
            default_text="none",
            example="groups: [{type: norm, weight_decay: 0}]",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


OPTIMIZER_GROUP_KEYS = key_table(
    Key("path", "path of the module whose parameters belong to the group", type="str", example="path: layer4"),
    Key(
        "type",
        "class of the modules whose parameters belong to the group, or `norm` (all normalisation layers), or `bias` "
        "(all biases)",
        type="str",
        example="type: BatchNorm2d",
    ),
)
"""The keys of an optimizer group that select parameters of the networks. All other keys are settings."""


SCHEDULER_KEYS = key_table(
    Key(
        "warmup",
        "length of a linear warm-up, in epochs (with `by: step`: in steps), by which the schedule is multiplied",
        type="float",
        check=POSITIVE,
        example="warmup: 5",
    ),
)
"""The keys of `scheduler` that are not parameters of the schedule."""


CHAIN_PART_KEYS = key_table(
    Key(
        "length",
        "length of this schedule in the chain, in epochs (with `by: step`: in steps)",
        type="float",
        check=POSITIVE,
        example="length: 5",
    ),
)
"""The keys of an item of the schedule `chain` that are not parameters of the item's own schedule."""


@dataclass(frozen=True, kw_only=True)
class InnerStepConfig:
    """The inner step of a bilevel update: a virtual step of gradient descent that is differentiated, then discarded.

    Attributes:
        models: names of the roles that the inner step trains. Trainable parameters of `terms` are trained too.
        lr: learning rate. None: each parameter has the learning rate of the only update that trains the parameter.
    """

    models: tuple[str, ...] = field(
        metadata=declare(
            "trainable roles whose weights the inner step changes", type="str | list[str]", example="models: [student]"
        )
    )
    terms: tuple[str, ...] = field(
        metadata=declare("terms whose sum the inner step minimizes", type="str | list[str]", example="terms: [kd]")
    )
    lr: float | PartConfig | None = field(
        default=None,
        metadata=declare(
            "learning rate of the inner step: a number, or a schedule",
            type="float | Schedule",
            check=POSITIVE,
            default_text="for each parameter, the learning rate of the only update that trains the parameter",
            example="lr: 0.1",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """One update within a training step: an optimizer step of some roles with the gradient of some terms.

    Attributes:
        group: number of the group to which the update belongs, or None. All gradients of a group are computed before
            any update of the group changes a parameter.
        select: selector that chooses the rows of the batch from which the gradient is computed; None: all rows.
        keep: fraction or number of rows that `select` keeps.
        inner_step: virtual step before the update, or None. The terms of the update are evaluated at the weights after
            the inner step, and gradients flow through the inner step.
    """

    models: tuple[str, ...] = field(
        metadata=declare(
            "trainable roles whose weights the update changes", type="str | list[str]", example="models: [student]"
        )
    )
    terms: tuple[str, ...] = field(
        metadata=declare("terms whose sum the update minimizes", type="str | list[str]", example="terms: [ce, kd]")
    )
    repeat: int = field(
        default=1,
        metadata=declare(
            "number of repetitions on the same batch, each with a new forward pass",
            check=AT_LEAST_ONE,
            example="repeat: 5",
        ),
    )
    optimizer: OptimizerConfig | None = field(
        default=None,
        metadata=declare(
            "optimizer of this update",
            type="Optimizer",
            default_text="the optimizer of the stage",
            example="optimizer: {type: SGD, lr: 0.1}",
        ),
    )
    group: int | None = field(default=None, metadata=derived("the position of a list within the list `updates`"))
    select: PartWithOperands | None = field(
        default=None,
        metadata=declare(
            "selector of the rows from which the gradient is computed: a name of `kdbench list selectors` with its "
            "parameters and operands, and `keep`",
            type="Selection",
            default_text="all rows",
            example="select: {type: random, keep: 16}",
        ),
    )
    keep: float | int | None = field(default=None, metadata=derived("`keep` of `select`"))
    inner_step: InnerStepConfig | None = field(
        default=None,
        metadata=declare(
            "virtual step before the update (bilevel optimisation), see below",
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
"""The keys of `select` that are not parameters or operands of the selector."""


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """A result that a stage produces at its end for later stages: a dataset, a subset, a tensor or a model.

    Attributes:
        part: artifact builder (a registered part). Its operands are evaluated on every sample of `source` in eval
            mode.
        previous: in a loop, the name `STAGE.NAME` of the same artifact of the previous round; else None.
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
            "source from whose samples the artifact is computed; roles read the unaugmented images of "
            "this source instead of their own `input`",
            default_text="train",
            example="source: pool",
        ),
    )
    previous: str | None = field(default=None, metadata=derived("the round before, in a loop"))
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)
