"""Networks of a recipe and the origin of their weights."""

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
    """The origin of a role's weights; exactly one of `recipe`, `stage` and `path` is set."""

    recipe: str | None = field(
        default=None,
        metadata=declare(
            "recipe whose exported student it is, trained first if there is no run yet; a shipped name, or a path "
            "relative to this recipe's folder",
            example="recipe: digits/teacher",
        ),
    )
    model: Any = field(
        default=None,
        metadata=declare(
            "with `recipe`: replaces the model of that recipe's student", type="Model", example="model: resnet56"
        ),
    )
    epoch: int | None = field(
        default=None,
        metadata=declare(
            "with `recipe`: the epoch whose checkpoint is taken",
            check=NOT_NEGATIVE,
            default_text="the last",
            example="epoch: 30",
        ),
    )
    stage: str | None = field(
        default=None,
        metadata=declare_keys(
            Key(
                "stage",
                "earlier stage with this role; in a loop the latest one of that name; `previous` is the nearest one "
                "that has the role",
                type="str",
                example="stage: previous",
            ),
            Key(
                "initial",
                "with `stage`: the weights while there is no such stage yet. Without it a trainable role is "
                "initialised randomly",
                type="Weights",
                example="initial: {recipe: digits/teacher}",
            ),
        ),
    )
    role: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "another role of that run or stage; of several, the mean of their weights",
            type="str | list[str]",
            default_text="the exported role of a recipe, the role of the same name of a stage",
            example="role: [a, b]",
        ),
    )
    path: str | None = field(
        default=None,
        metadata=declare(
            "checkpoint file, relative to the working directory or else to the recipe's folder",
            example="path: resnet.pth",
        ),
    )
    key: str | None = field(
        default=None, metadata=declare("with `path`: entry of the file with the state dict", example="key: model")
    )
    strip: str | None = field(
        default=None, metadata=declare("prefix to remove from parameter names", example='strip: "module."')
    )
    rename: Mapping[str, str] = field(
        default_factory=dict,
        metadata=declare("prefixes of parameter names, old to new", example='rename: {"head.": "fc."}'),
    )
    strict: bool = field(
        default=True,
        metadata=declare(
            "whether missing and unexpected parameters are errors; otherwise a notice lists them",
            example="strict: false",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One network.

    Attributes:
        input: `SOURCE.FIELD`, or `ROLE:PATH` for the output of another role. extra_inputs: further arguments of the
            model.
        mode: `trainable`; `frozen` (eval mode, no gradients); `ema` (moving average of `source_role`); `snapshot`
            (periodic copy of `source_role`); `reuse` (the network `source_role`, or its module `module_path`, on
            another input).
        every_epochs, every_steps: interval between snapshots; 0 and 0: one snapshot, at the start of the stage.
        artifact: `STAGE.NAME` of the model that an earlier stage selects; `model` is then a candidate, for shapes.
    """

    name: str = field(metadata=derived("the key in `models`"))
    model: PartConfig | None = field(
        metadata=declare(
            "network: a name of `kdbench list models` with its parameters, or the model that a search in an earlier "
            "stage selected (`{artifact: STAGE.NAME}`)",
            type="Model",
            default=None,
            default_text="required without `ema`, `snapshot` or `reuse`",
            example="model: {type: torchvision/resnet18}",
        )
    )
    weights: WeightsConfig | None = field(
        default=None,
        metadata=declare(
            "origin of its weights, see below",
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
                "input: `SOURCE.FIELD` (a view, `label`, `index`), `FIELD` of the source `train`, or `ROLE:PATH`, "
                "the output of another role; a list for a model with several inputs. An evaluated role must not read "
                "labels",
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
                "whether its parameters are fixed; a frozen role is in eval mode",
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
            Key("ema", "it is a moving average of this role", type="str", example="ema: student"),
            Key("snapshot", "it is a periodic copy of this role", type="str", example="snapshot: student"),
            Key(
                "reuse",
                "it is the same network as this role, or as a module of it (`ROLE:PATH`), on its own `input`; no "
                "weights are copied",
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
            "with `snapshot`: epochs between copies, or `{steps: N}`; 0: one copy, at the start of the stage",
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
            "index of the random initialisation: another number is another initialisation from the same seed",
            check=NOT_NEGATIVE,
            example="init_index: 1",
        ),
    )
    artifact: str | None = field(default=None, metadata=derived("`model`, as an artifact reference"))
    transforms: tuple[PartConfig, ...] = field(
        default=(),
        metadata=declare(
            "transforms of its weights in every forward pass: a list of `kdbench list weight_transforms`; exported "
            "weights are transformed permanently",
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
            "metric -> value that a frozen role must reach on the evaluation split before training starts",
            type="dict[str, float]",
            default_text="none",
            example="require: {top1: 95}",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)

    @property
    def upstream_roles(self) -> tuple[str, ...]:
        """The roles whose outputs are inputs of this role."""
        return tuple(address.split(":", 1)[0] for address in (self.input, *self.extra_inputs) if ":" in address)


SNAPSHOT_INTERVAL_KEYS = key_table(
    Key("steps", "steps between copies", type="int", check=AT_LEAST_ONE, default=0, example="steps: 50"),
)
"""The keys of `every` as a mapping."""
