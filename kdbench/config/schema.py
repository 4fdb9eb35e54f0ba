"""What a recipe says, checked and spelled out: plain frozen values, no OmegaConf and no torch.

The loader (`kdbench.config.load`) is the last place that knows YAML, Hydra and OmegaConf. What comes out of it is a
`Recipe`: one `StageConfig` per stage, with every shorthand of the grammar expanded and every default filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.errors import Place

NOWHERE = Place()

Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Named:
    """A registered part with its parameters: `kd`, or `{type: kd, temperature: 4}`."""

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)
    place: Place = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where a role's weights come from; exactly one of `recipe`, `stage` and `path` is set.

    recipe: the student that this recipe produced (trained first when missing); `model` replaces its student's model,
        `epoch` takes that epoch's checkpoint instead of the last.
    stage: the role of the same name as an earlier stage left it, or `role` of that stage.
    path: a checkpoint file; `key` is the entry that holds the state dict, `strip` a prefix to cut off every name,
        `rename` a mapping of name prefixes, old to new; `strict: false` accepts missing and unexpected names.
    """

    recipe: str | None = None
    model: Any = None
    epoch: int | None = None
    stage: str | None = None
    role: str | None = None
    path: str | None = None
    key: str | None = None
    strip: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    strict: bool = True
    place: Place = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """A named network.

    mode: `trainable`; `frozen` (eval mode, parameters without gradient); `ema` (follows `of` with `decay`);
        `snapshot` (a copy of `of`, renewed every `every` epochs; 0: as it was when the stage began).
    input: `SOURCE.FIELD`, or `ROLE:PATH` for another role's output.
    freeze: module paths whose parameters do not train (and whose BatchNorm statistics stay).
    accuracy: top-1 in percent on the evaluation split that a frozen role must reach before training starts.
    """

    name: str
    model: Named | None
    weights: Weights | None = None
    input: str = "train.image"
    mode: Literal["trainable", "frozen", "ema", "snapshot"] = "trainable"
    of: str | None = None
    decay: float = 0.999
    every: int = 0
    freeze: tuple[str, ...] = ()
    accuracy: float | None = None
    place: Place = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A named source of samples.

    views: the image fields that the source offers, each with its list of augmentations, applied in order;
        `image` is always there. The evaluation and validation sources have an empty list.
    labels: a share in (0, 1] or a number (2 or more) of samples whose label is kept; None keeps all.
    subset: None, or a share or number of samples to keep (class-balanced, drawn by the seed).
    places: where `batch_size`, `labels`, `subset` and (of `train`) `validation` were written, for messages.
    """

    name: str
    dataset: Named
    split: str = "train"
    batch_size: int = 64
    views: Mapping[str, tuple[Named, ...]] = field(default_factory=lambda: {"image": ()})
    labels: float | int | None = None
    subset: float | int | None = None
    place: Place = field(default=NOWHERE, compare=False)
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
class Operand:
    """What a term reads: `ROLE:PATH[@K][/in]`, spelled out, and the adapter that it passes through.

    role: a role's name. path: a module path inside it, or `logits`. call: which call of the module (1-based).
    side: the module's output or its input. adapter: None: what the term's class declares as its default.
    """

    role: str
    path: str = "logits"
    call: int = 1
    side: Literal["out", "in"] = "out"
    adapter: Named | None = None
    place: Place = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        call = f"@{self.call}" if self.call != 1 else ""
        return f"{self.role}:{self.path}{call}{'/in' if self.side == 'in' else ''}"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One pair of operands that a term compares. `teachers` has more than one entry only for `others`-like lists."""

    student: Operand
    teacher: Operand | None


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One entry of `terms`. A list of operands makes one edge per element; the losses of the edges are summed.

    weight: a number, or a schedule (a `Named` of SCHEDULES).
    where: a boolean field of the batch that masks the term's space.
    params: the parameters of the term's class; a schedulable one may hold a `Named` of SCHEDULES.
    """

    name: str
    type: str
    weight: float | Named = 1.0
    edges: tuple[Edge, ...] = ()
    where: str | None = None
    teacher_grad: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    place: Place = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimiser of torch.optim. `groups` override its parameters for a part of the model, first match wins.

    A group is `{path: layer4}` or `{type: BatchNorm2d}` or `{type: norm}` (every normalisation layer) or
    `{type: bias}`, with the parameters to override, such as `weight_decay: 0`.
    """

    type: str = "SGD"
    params: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()
    place: Place = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """One move within a step: these models by these terms, `repeat` times with a fresh forward each."""

    models: tuple[str, ...]
    terms: tuple[str, ...]
    repeat: int = 1
    optimizer: OptimizerConfig | None = None
    place: Place = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Everything that one stage trains by: the recipe's top level with the stage's fragment laid over it.

    epochs/steps: exactly one is set; 0 is allowed (evaluate only).
    updates: empty means one update of all trainable roles by all terms.
    validation: share or number of training samples held out; evaluated as `validation`, chooses the best epoch.
    clip: largest gradient norm. accumulate: micro-batches per step. ema: decay of the exported role's average.
    checkpoint_every: `{"steps": n}`, `{"minutes": x}` or empty (after every evaluation only).
    eval_every: epochs between evaluations; the last epoch is always evaluated.
    """

    name: str
    roles: Mapping[str, RoleConfig]
    data: Mapping[str, SourceConfig]
    terms: Mapping[str, TermConfig]
    updates: tuple[UpdateConfig, ...] = ()
    export: str = "student"
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: Named | None = None
    epochs: int | None = None
    steps: int | None = None
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    validation: float | int | None = None
    metrics: tuple[Named, ...] = ()
    eval_every: int = 1
    eval_batch_size: int = 512
    checkpoint_every: Mapping[str, float] = field(default_factory=dict)
    log_every: int = 50
    precision: Precision = "float32"
    sync_batchnorm: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """The figure that the recipe is to reproduce: top-1 in percent, its source, and which epoch it reports."""

    top1: float
    source: str = ""
    epoch: Literal["last", "best", "unstated"] = "unstated"
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, ready to plan.

    name: `digits/kd`, or the stem of the user's file. file: where it was read, as messages give it.
    path: the whole path of the file in which it was first written; paths of other recipes in it begin there.
    resolved: the composed recipe as plain data, as it is written into the run's folder (and read back from there).
    places: dotted key -> where it was written, for messages.
    choices: the groups that were chosen, such as {"pair": "resnet56_resnet20"}.
    dropped: what `twin: true` left out, in words.
    """

    name: str
    file: str
    stages: tuple[StageConfig, ...]
    resolved: Mapping[str, Any]
    places: Mapping[str, Place]
    path: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    title: str = ""
    paper: str = ""
    seed: int = 1
    twin: bool = False
    dropped: tuple[str, ...] = ()
    published: Published | None = None
    # Below: no part of a run's identity.
    device: str = "auto"
    compile: bool = False
    channels_last: bool | None = None
    workers: int = 0
    data_root: str = "data"
    runs: str = "runs"
    out: str | None = None
    fresh: bool = False
    tensorboard: bool = True
    keep_epochs: tuple[int, ...] = ()
