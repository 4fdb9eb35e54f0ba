"""The dataclasses of a recipe, its published accuracy and its notes, with the declarations of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.config.schema.keys import (
    AT_LEAST_ONE,
    DEVICE,
    NOT_NEGATIVE,
    PERCENTAGE,
    POSITIVE,
    Key,
    declare,
    declare_keys,
    derived,
)
from kdbench.config.schema.stage import StageConfig
from kdbench.errors import Location

CompileMode = bool | Literal["max", "cuda_graph"]


FrozenForwardMode = Literal["auto", "inline", "prefetch", "cache"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published accuracy that a recipe is to reproduce."""

    top1: float = field(
        metadata=declare_keys(
            Key("top1", "published top-1 accuracy in percent", type="float", check=PERCENTAGE, example="top1: 73.33"),
            Key(
                "pairs",
                "in place of `top1`: file of the group `pair` -> published top-1 accuracy",
                type="dict[str, float]",
                check=PERCENTAGE,
                default={},
                default_text="none",
                example="pairs: {resnet32x4_resnet8x4: 73.33}",
            ),
            Key(
                "models",
                "in place of `top1`: model of the exported role -> published top-1 accuracy",
                type="dict[str, float]",
                check=PERCENTAGE,
                default={},
                default_text="none",
                example="models: {resnet8x4: 72.5}",
            ),
        )
    )
    source: str = field(
        default="",
        metadata=declare(
            "publication and table with the accuracy", default_text="empty", example="source: CRD, ICLR 2020, table 1"
        ),
    )
    epoch: Literal["last", "best", "unstated"] = field(
        default="unstated", metadata=declare("epoch whose accuracy was published", example="epoch: last")
    )
    tolerance: float | None = field(
        default=None,
        metadata=declare(
            "accepted difference to the published accuracy, in percentage points",
            check=POSITIVE,
            default_text="none",
            example="tolerance: 0.4",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Notes:
    """The relation of a recipe to the published method that it implements: basis, source and differences."""

    basis: Literal["code", "text", "abstract"] = field(
        metadata=declare(
            "best source from which the recipe was written: the authors' code, the text of the paper, or its abstract",
            example="basis: code",
        )
    )
    source: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "equations or sections of the paper, or files of the authors' code, that the recipe follows",
            type="str | list[str]",
            default_text="none",
            example="source: [equation 3]",
        ),
    )
    differs: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "differences between the recipe and the method in `source`",
            type="str | list[str]",
            default_text="none",
            example="differs: [no warm-up]",
        ),
    )
    scaled_down: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "changes that only fit the method to a small dataset",
            type="str | list[str]",
            default_text="none",
            example="scaled_down: [64 samples]",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: name of a shipped recipe such as `digits/kd`, or file name of another recipe without suffix.
        file: name of the recipe's file in messages.
        path: full path of the original recipe file. Paths of other recipes in it are relative to the folder of this
            file.
        resolved: the recipe merged with its group files and overrides, as plain data. It is stored in the run folder.
        locations: dotted key -> location (file and line, or override) at which the key was set, for messages.
        group_choices: group -> name of the selected group file, such as {"pair": "resnet56_resnet20"}.
        baseline_removed: descriptions of the roles (networks) and terms that `baseline: true` removed.
    """

    name: str = field(metadata=derived("the file's name"))
    file: str = field(metadata=derived("the file"))
    stages: tuple[StageConfig, ...] = field(
        metadata=declare_keys(
            Key(
                "stages",
                "stage name -> keys of the stage, or a loop of stages. Stages run in this order",
                type="dict[str, Stage | Loop]",
                default_text="one stage",
                example="stages: {hint: {epochs: 30}, distil: {epochs: 210}}",
                section="stages",
            ),
        )
    )
    resolved: Mapping[str, Any] = field(
        metadata=declare_keys(
            Key(
                "vars",
                "values of your choice, to which other keys refer as `${vars.NAME}`, such as feature paths",
                type="dict[str, Any]",
                default={},
                default_text="none",
                example="vars: {layer: layer3}",
                section="composition",
                in_identity=False,
            ),
        )
    )
    locations: Mapping[str, Location] = field(metadata=derived("the file and the overrides"))
    path: str = field(
        default="",
        metadata=declare_keys(
            Key(
                "origin",
                "name and file of the original recipe; kdbench writes this key into `resolved.yaml`",
                type="dict[str, Any]",
                in_identity=False,
            ),
        ),
    )
    group_choices: Mapping[str, str] = field(
        default_factory=dict,
        metadata=declare_keys(
            Key(
                "protocol",
                "name of a file in `configs/protocol/` (or in `protocol/` in the recipe's folder) with the training "
                "settings that all results of a published table share",
                type="str",
                default_text="none",
                example="protocol: cifar_240_epochs",
                section="composition",
                in_identity=False,
            ),
            Key(
                "pair",
                "name of a file in `configs/pair/` (or in `pair/` in the recipe's folder) with a teacher and a student",
                type="str",
                default_text="none",
                example="pair: resnet56_resnet20",
                section="composition",
                in_identity=False,
            ),
        ),
    )
    overrides: tuple[str, ...] = field(default=(), metadata=derived("the command line"))
    title: str = field(
        default="",
        metadata=declare(
            "title of the recipe in lists and summaries",
            default_text="empty",
            example="title: soft targets",
            section="composition",
            in_identity=False,
        ),
    )
    paper: str = field(
        default="",
        metadata=declare(
            "arXiv id or venue of the paper",
            default_text="empty",
            example='paper: "arXiv:1503.02531"',
            section="composition",
            in_identity=False,
        ),
    )
    methods: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "ids of the methods in `kdbench list methods` that the recipe implements",
            type="str | list[str]",
            default_text="none",
            example="methods: [m001]",
            section="composition",
            in_identity=False,
        ),
    )
    notes: Notes | None = field(
        default=None,
        metadata=declare(
            "relation of the recipe to the published method, see below",
            type="Notes",
            default_text="none",
            example="notes: {basis: code}",
            section="composition",
            in_identity=False,
        ),
    )
    seed: int = field(default=1, metadata=declare("seed of all random draws", example="seed: 3", section="training"))
    baseline: bool = field(
        default=False,
        metadata=declare(
            "whether to train the same student without a teacher: roles that teach, and terms that read them, are "
            "removed",
            example="baseline: true",
            section="training",
        ),
    )
    baseline_removed: tuple[str, ...] = field(default=(), metadata=derived("`baseline`"))
    published: Published | None = field(
        default=None,
        metadata=declare(
            "published top-1 accuracy in percent that the recipe is to reproduce: a number, or a mapping, see below",
            type="float | Published",
            check=PERCENTAGE,
            default_text="none",
            example="published: 73.33",
            section="records",
            in_identity=False,
        ),
    )
    device: str = field(
        default="auto",
        metadata=declare(
            "device of the run", check=DEVICE, section="execution", example="device: cpu", in_identity=False
        ),
    )
    compile: CompileMode = field(
        default=False,
        metadata=declare(
            "whether training steps are compiled by `torch.compile`, or recorded as a CUDA graph, see below",
            section="execution",
            example="compile: cuda_graph",
            in_identity=False,
        ),
    )
    frozen_forward: FrozenForwardMode = field(
        default="auto",
        metadata=declare(
            "when the forward pass of frozen roles runs, see below",
            section="execution",
            example="frozen_forward: prefetch",
            in_identity=False,
        ),
    )
    frozen_batch_size: int = field(
        default=1024,
        metadata=declare(
            "approximate batch size of frozen roles whose forward pass runs before the training step",
            check=AT_LEAST_ONE,
            section="execution",
            example="frozen_batch_size: 512",
            in_identity=False,
        ),
    )
    channels_last: bool | None = field(
        default=None,
        metadata=declare(
            "whether images have the memory format `channels_last`",
            default_text="chosen by the device",
            section="execution",
            example="channels_last: true",
            in_identity=False,
        ),
    )
    shard: bool | tuple[str, ...] = field(
        default=False,
        metadata=declare(
            "roles whose weights, gradients and optimizer state are sharded over the processes; true: all roles that "
            "can be sharded",
            type="bool | str | list[str]",
            section="execution",
            example="shard: [teacher]",
            in_identity=False,
        ),
    )
    workers: int = field(
        default=0,
        metadata=declare(
            "number of processes that decode images, for datasets that do not fit into memory",
            check=NOT_NEGATIVE,
            section="execution",
            example="workers: 8",
            in_identity=False,
        ),
    )
    data_root: str = field(
        default="data",
        metadata=declare("folder of all datasets", section="execution", example="data_root: data", in_identity=False),
    )
    runs: str = field(
        default="runs",
        metadata=declare(
            "folder of all runs; the folder of one run is `RUNS/RECIPE/ID`",
            section="execution",
            example="runs: runs",
            in_identity=False,
        ),
    )
    out: str | None = field(
        default=None,
        metadata=declare(
            "folder of this run",
            default_text="a folder in `runs`",
            section="execution",
            example="out: out/kd",
            in_identity=False,
        ),
    )
    fresh: bool = field(
        default=False,
        metadata=declare(
            "whether to restart a run that exists already, instead of continuing it",
            section="execution",
            example="fresh: true",
            in_identity=False,
        ),
    )
    tensorboard: bool = field(
        default=True,
        metadata=declare(
            "whether to write TensorBoard events", section="records", example="tensorboard: false", in_identity=False
        ),
    )
    keep_epochs: tuple[int, ...] = field(
        default=(),
        metadata=declare(
            "epochs whose checkpoints are kept, in addition to the last and the best",
            default_text="none",
            section="records",
            example="keep_epochs: [30, 60]",
            in_identity=False,
        ),
    )

    @property
    def uses_compiler(self) -> bool:
        """Returns whether torch.compile compiles the forward passes, the losses and the backward pass of a step."""
        return self.compile in (True, "max")

    def uses_cuda_graph(self, device_type: str) -> bool:
        """Returns whether the training step is recorded as a CUDA graph."""
        return self.compile is not False and device_type == "cuda"
