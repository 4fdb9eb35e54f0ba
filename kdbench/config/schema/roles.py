"""The dataclasses of roles (the networks of a recipe) and of the origin of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.config.schema.keys import (
    AT_LEAST_ONE,
    FRACTION,
    NOT_NEGATIVE,
    Key,
    declare,
    declare_keys,
    derived,
    key_table,
)
from kdbench.config.schema.parts import LOCATION, NO_LOCATION, PartConfig
from kdbench.errors import Location


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The origin of the initial weights of a role (a network). Exactly one of `recipe`, `stage` and `path` is set."""

    recipe: str | None = field(
        default=None,
        metadata=declare(
            "recipe whose exported role has the weights; it is trained first if it has no finished run. Name of a "
            "shipped recipe, or path relative to the folder of this recipe",
            example="recipe: digits/teacher",
        ),
    )
    model: Any = field(
        default=None,
        metadata=declare(
            "with `recipe`: model that replaces the model of the student in the other recipe",
            type="Model",
            example="model: resnet56",
        ),
    )
    epoch: int | None = field(
        default=None,
        metadata=declare(
            "with `recipe`: epoch whose checkpoint is loaded",
            check=NOT_NEGATIVE,
            default_text="the last epoch",
            example="epoch: 30",
        ),
    )
    stage: str | None = field(
        default=None,
        metadata=declare_keys(
            Key(
                "stage",
                "name of the earlier stage that has the weights (in a loop: the latest round of this stage); "
                "`previous`: the nearest earlier stage that has the role",
                type="str",
                example="stage: previous",
            ),
            Key(
                "initial",
                "with `stage`: weights that are used if there is no such earlier stage, for example in the first round "
                "of a loop. Without `initial`, a trainable role is then initialised randomly",
                type="Weights",
                example="initial: {recipe: digits/teacher}",
            ),
        ),
    )
    role: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "role of the recipe or stage whose weights are loaded; a list: the mean of the weights of these roles",
            type="str | list[str]",
            default_text="with `recipe`: the exported role; with `stage`: the role of the same name",
            example="role: [a, b]",
        ),
    )
    path: str | None = field(
        default=None,
        metadata=declare(
            "checkpoint file; a relative path begins in the working directory, or else in the folder of the recipe",
            example="path: resnet.pth",
        ),
    )
    key: str | None = field(
        default=None,
        metadata=declare("with `path`: entry of the file that contains the state dict", example="key: model"),
    )
    strip: str | None = field(
        default=None, metadata=declare("prefix that is removed from parameter names", example='strip: "module."')
    )
    rename: Mapping[str, str] = field(
        default_factory=dict,
        metadata=declare(
            "prefix of parameter names in the checkpoint -> new prefix", example='rename: {"head.": "fc."}'
        ),
    )
    strict: bool = field(
        default=True,
        metadata=declare(
            "whether missing and unexpected parameters are errors; if false, a notice lists them",
            example="strict: false",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """A role: one network of a stage, such as `teacher` or `student`.

    Attributes:
        input: first input of the network: `SOURCE.FIELD` (a field of the batch), or `ROLE:PATH` (the output of
            another network).
        extra_inputs: further inputs of the network.
        mode: `trainable`; `frozen` (eval mode, no gradients); `ema` (moving average of `source_role`); `snapshot`
            (periodic copy of `source_role`); `reuse` (the network `source_role`, or its module `module_path`, applied
            to another input).
        every_epochs, every_steps: interval between snapshots. If both are 0, the only snapshot is made at the start
            of the stage.
        artifact: name `STAGE.NAME` of the result of an earlier stage (a model search) that selects the model, or
            None. If `artifact` is set, `model` is one of the candidates.
    """

    name: str = field(metadata=derived("the key in `models`"))
    model: PartConfig | None = field(
        metadata=declare(
            "network: a name of `kdbench list models` with its parameters, or the model that an earlier stage selected "
            "(`{artifact: STAGE.NAME}`)",
            type="Model",
            default=None,
            default_text="required without `ema`, `snapshot` or `reuse`",
            example="model: {type: torchvision/resnet18}",
        )
    )
    weights: WeightsConfig | None = field(
        default=None,
        metadata=declare(
            "origin of the role's initial weights, see below",
            type="Weights",
            default_text="initialised from the seed",
            example="weights: {recipe: digits/teacher}",
        ),
    )
    input: str = field(
        default="train.image",
        metadata=declare_keys(
            Key(
                "input",
                "input of the network: `SOURCE.FIELD` (a view, `label` or `index`), `FIELD` of the source `train`, or "
                "`ROLE:PATH` (the output of another role). A list is for a model with several inputs. The output of an "
                "evaluated role must not depend on labels",
                type="str | list[str]",
                default_text="train.image",
                example='input: "generator:image"',
            ),
        ),
    )
    extra_inputs: tuple[str, ...] = field(default=(), metadata=derived("`input`, from its second element"))
    mode: Literal["trainable", "frozen", "ema", "snapshot", "reuse"] = field(
        default="trainable",
        metadata=declare_keys(
            Key(
                "frozen",
                "whether the parameters of the role are fixed; a frozen role is in eval mode",
                type="bool",
                default_text="true for the role `teacher`",
                example="frozen: true",
            ),
            Key(
                "trainable",
                "the opposite of `frozen`",
                type="bool",
                default_text="false for the role `teacher`",
                example="trainable: true",
            ),
        ),
    )
    source_role: str | None = field(
        default=None,
        metadata=declare_keys(
            Key(
                "ema",
                "role whose weights are averaged: the network is an exponential moving average of this role",
                type="str",
                example="ema: student",
            ),
            Key(
                "snapshot",
                "role that is copied: the network is a periodic copy of this role",
                type="str",
                example="snapshot: student",
            ),
            Key(
                "reuse",
                "role or module (`ROLE:PATH`) that is reused: it is applied to another `input`, and no weights are "
                "copied",
                type="str",
                example='reuse: "teacher:fc"',
            ),
        ),
    )
    module_path: str | None = field(default=None, metadata=derived("`reuse`, after the colon"))
    decay: float = field(
        default=0.999,
        metadata=declare("with `ema`: decay of the moving average", check=FRACTION, example="decay: 0.99"),
    )
    every_epochs: int = field(
        default=0,
        metadata=declare(
            "with `snapshot`: number of epochs between copies, or `{steps: N}`; 0: one copy at the start of the stage",
            name="every",
            type="int | SnapshotInterval",
            check=NOT_NEGATIVE,
            example="every: {steps: 50}",
        ),
    )
    every_steps: int = field(default=0, metadata=derived("`every`, as a mapping"))
    init_index: int = field(
        default=0,
        metadata=declare(
            "number of the random initialisation: roles with different numbers start from different weights",
            check=NOT_NEGATIVE,
            example="init_index: 1",
        ),
    )
    artifact: str | None = field(default=None, metadata=derived("`model`, as an artifact reference"))
    transforms: tuple[PartConfig, ...] = field(
        default=(),
        metadata=declare(
            "weight transforms (`kdbench list weight_transforms`), applied to the role's weights in every forward "
            "pass; exported weights are transformed permanently",
            name="transform",
            type="WeightTransform | list[WeightTransform]",
            default_text="none",
            example="transform: [{type: quantize, bits: 4}]",
        ),
    )
    freeze: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "module paths whose parameters and BatchNorm statistics are fixed",
            type="str | list[str]",
            default_text="none",
            example="freeze: [layer1]",
        ),
    )
    require: Mapping[str, float] = field(
        default_factory=dict,
        metadata=declare(
            "metric -> value that a frozen role must reach on the source `eval` before training starts",
            type="dict[str, float]",
            default_text="none",
            example="require: {top1: 95}",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)

    @property
    def upstream_roles(self) -> tuple[str, ...]:
        """Names of the roles (networks) whose outputs are inputs of this role."""
        return tuple(address.split(":", 1)[0] for address in (self.input, *self.extra_inputs) if ":" in address)


SNAPSHOT_INTERVAL_KEYS = key_table(
    Key("steps", "steps between copies", type="int", check=AT_LEAST_ONE, default=0, example="steps: 50"),
)
"""The keys of a mapping under `every` (the interval between snapshots)."""
