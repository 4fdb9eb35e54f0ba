"""A recipe."""

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
    """The published figure that a recipe reproduces."""

    top1: float = field(
        metadata=declare_keys(
            Key("top1", "top-1 accuracy in percent", type="float", check=PERCENTAGE, example="top1: 73.33"),
            Key(
                "pairs",
                "in place of `top1`: option of the group `pair` -> top-1",
                type="dict[str, float]",
                check=PERCENTAGE,
                default={},
                default_text="none",
                example="pairs: {resnet32x4_resnet8x4: 73.33}",
            ),
            Key(
                "models",
                "in place of `top1`: model of the exported role -> top-1",
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
        metadata=declare("publication and table", default_text="empty", example="source: CRD, ICLR 2020, table 1"),
    )
    epoch: Literal["last", "best", "unstated"] = field(
        default="unstated", metadata=declare("epoch that the figure reports", example="epoch: last")
    )
    tolerance: float | None = field(
        default=None,
        metadata=declare(
            "accepted difference in percentage points", check=POSITIVE, default_text="none", example="tolerance: 0.4"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Notes:
    """The relation of a recipe to the method whose name it bears."""

    basis: Literal["code", "text", "abstract"] = field(
        metadata=declare(
            "best available source: the authors' code, the paper's text, or only its abstract", example="basis: code"
        )
    )
    source: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "equations, sections, or files of the authors' code",
            type="str | list[str]",
            default_text="none",
            example="source: [equation 3]",
        ),
    )
    differs: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "differences from that source",
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
        name: `digits/kd`, or the stem of the user's file.
        file: the file as messages show it.
        path: full path of the file in which the recipe was first written; paths of other recipes are relative to its
            folder.
        resolved: the composed recipe as plain data, stored in the run's folder.
        locations: dotted key -> location, for messages.
        group_choices: group -> selected option, such as {"pair": "resnet56_resnet20"}.
        baseline_removed: descriptions of what `baseline: true` removed.
    """

    name: str = field(metadata=derived("the file's name"))
    file: str = field(metadata=derived("the file"))
    stages: tuple[StageConfig, ...] = field(
        metadata=declare_keys(
            Key(
                "stages",
                "stage name -> keys of the stage, or a loop of stages; in order",
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
                "free values that other keys refer to as `${vars.NAME}`; a pair uses them for feature paths",
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
            Key("origin", "written by kdbench into `resolved.yaml`", type="dict[str, Any]", in_identity=False),
        ),
    )
    group_choices: Mapping[str, str] = field(
        default_factory=dict,
        metadata=declare_keys(
            Key(
                "protocol",
                "a file of `configs/protocol/` (or of `protocol/` beside the recipe): the training settings shared "
                "by a table of results",
                type="str",
                default_text="none",
                example="protocol: cifar_240_epochs",
                section="composition",
                in_identity=False,
            ),
            Key(
                "pair",
                "a file of `configs/pair/` (or of `pair/` beside the recipe): a teacher and a student",
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
            "title in lists and summaries",
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
            "rows of `kdbench list methods` that the recipe is",
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
            "relation of the recipe to its method, see below",
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
            "train the same student without a teacher: removes roles that teach and terms that read them",
            example="baseline: true",
            section="training",
        ),
    )
    baseline_removed: tuple[str, ...] = field(default=(), metadata=derived("`baseline`"))
    published: Published | None = field(
        default=None,
        metadata=declare(
            "published top-1 accuracy in percent that the recipe reproduces: a number, or a mapping, see below",
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
            "whether `torch.compile` compiles the steps, see below",
            section="execution",
            example="compile: cuda_graph",
            in_identity=False,
        ),
    )
    frozen_forward: FrozenForwardMode = field(
        default="auto",
        metadata=declare(
            "when frozen roles run, see below",
            section="execution",
            example="frozen_forward: prefetch",
            in_identity=False,
        ),
    )
    frozen_batch_size: int = field(
        default=1024,
        metadata=declare(
            "rows of a batch of frozen roles that run outside of the step, approximately",
            check=AT_LEAST_ONE,
            section="execution",
            example="frozen_batch_size: 512",
            in_identity=False,
        ),
    )
    channels_last: bool | None = field(
        default=None,
        metadata=declare(
            "whether images have the memory format channels_last",
            default_text="chosen by the device",
            section="execution",
            example="channels_last: true",
            in_identity=False,
        ),
    )
    shard: bool | tuple[str, ...] = field(
        default=False,
        metadata=declare(
            "roles whose weights, gradients and optimizer state are sharded over the processes, or true for all "
            "that can be",
            type="bool | str | list[str]",
            section="execution",
            example="shard: [teacher]",
            in_identity=False,
        ),
    )
    workers: int = field(
        default=0,
        metadata=declare(
            "processes that decode the images of datasets which do not fit into memory",
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
            "folder of all runs; a run's folder is `runs/<recipe>/<id>`",
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
            "whether to start again if the run exists already, instead of continuing it",
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
        """True if torch.compile compiles the forward passes, the terms and the backward pass of a step."""
        return self.compile in (True, "max")

    def uses_cuda_graph(self, device_type: str) -> bool:
        """Returns whether a step is recorded as a CUDA graph."""
        return self.compile is not False and device_type == "cuda"
