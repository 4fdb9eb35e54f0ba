"""What a recipe says, checked and spelled out: plain frozen values, no OmegaConf and no torch.

The loader (`kdbench.config.load`) is the last place that knows YAML, Hydra and OmegaConf. What comes out of it is a
`Recipe`: one `StageConfig` per stage, with every shorthand of the grammar expanded and every default filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.errors import Location

NO_LOCATION = Location()


Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]


CompileMode = bool | Literal["max", "cuda_graph"]


FrozenForwardMode = Literal["auto", "inline", "prefetch", "cache"]


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A registered part with its parameters: `kd`, or `{type: kd, temperature: 4}`."""

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Where a role's weights come from; exactly one of `recipe`, `stage` and `path` is set.

    recipe: the student that this recipe produced (trained first when missing); `model` replaces its student's model,
        `epoch` takes that epoch's checkpoint instead of the last.
    stage: the role of the same name as an earlier stage left it, or the roles of that stage in `role`: of several, the
        mean of their weights.
    path: a checkpoint file; `key` is the entry that holds the state dict, `strip` a prefix to cut off every name.
    rename: a mapping of name prefixes, old to new; `strict: false` accepts missing and unexpected names.
    """

    recipe: str | None = None
    model: Any = None
    epoch: int | None = None
    stage: str | None = None
    role: tuple[str, ...] = ()
    path: str | None = None
    key: str | None = None
    strip: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    strict: bool = True
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """A named network.

    mode: `trainable`; `frozen` (eval mode, parameters without gradient); `ema` (follows `of` with `decay`);
        `snapshot` (a copy of `of`, renewed every `every` epochs, or every `every_steps` steps; 0: as it was when the
        stage began); `reuse` (the very network `of`, or its module `part`, on another input).
    input: `SOURCE.FIELD`, or `ROLE:PATH` for another role's output. also: further inputs, passed after the first.
    draw: which draw of its initial weights; other numbers are other draws of the same seed.
    made: `STAGE.NAME` of the choice that an earlier stage makes of the model; `model` is then what the plan rehearses.
    transforms: what is done to the weights in every forward, such as quantising them; baked in when exported.
    freeze: module paths whose parameters do not train (and whose BatchNorm statistics stay).
    require: metric -> value on the evaluation split that a frozen role must reach before training starts.
    """

    name: str
    model: PartConfig | None
    weights: WeightsConfig | None = None
    input: str = "train.image"
    extra_inputs: tuple[str, ...] = ()
    mode: Literal["trainable", "frozen", "ema", "snapshot", "reuse"] = "trainable"
    source_role: str | None = None
    module_path: str | None = None
    decay: float = 0.999
    every_epochs: int = 0
    every_steps: int = 0
    init_index: int = 0
    artifact: str | None = None
    transforms: tuple[PartConfig, ...] = ()
    freeze: tuple[str, ...] = ()
    require: Mapping[str, float] = field(default_factory=dict)
    location: Location = field(default=NO_LOCATION, compare=False)

    @property
    def upstream_roles(self) -> tuple[str, ...]:
        """The roles whose outputs it sees."""
        return tuple(address.split(":", 1)[0] for address in (self.input, *self.extra_inputs) if ":" in address)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A named source of samples.

    views: the image fields that the source offers, each with its list of augmentations, applied in order;
        `image` is always there. The evaluation and validation sources have an empty list.
    labels: a share in (0, 1] or a number (2 or more) of samples whose label is kept; None keeps all.
    subset: None, or a share or number of samples to keep (class-balanced, drawn by the seed), or a part of SUBSETS;
        several are applied in order.
    relabel: how labels are changed (a part of RELABELS), such as noise.
    made: `STAGE.NAME` of the dataset that an earlier stage makes; `dataset` is then `made`.
    overlap: whether each batch begins with the new half of the batch before, under other augmentations.
    Where `labels` or `subset` is a text, it is `STAGE.NAME` of the choice that an earlier stage makes.
    places: where `batch_size`, `labels`, `subset` and (of `train`) `validation` were written, for messages.
    """

    name: str
    dataset: PartConfig
    split: str = "train"
    batch_size: int = 64
    views: Mapping[str, tuple[PartConfig, ...]] = field(default_factory=lambda: {"image": ()})
    label_fraction: float | int | str | None = None
    subset: float | int | str | PartConfig | tuple[float | int | str | PartConfig, ...] | None = None
    relabel: PartConfig | None = None
    artifact: str | None = None
    overlap: bool = False
    location: Location = field(default=NO_LOCATION, compare=False)
    locations: Mapping[str, Location] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
class OperandConfig:
    """What a term reads, spelled out, and the adapter that it passes through.

    kind: what `role` and `path` name: a feature of a role (`ROLE:PATH[@K][/in]`), a field of a source
        (`SOURCE.FIELD`), what another term gives out (`term:NAME.loss`), what an earlier stage made
        (`artifact:STAGE.NAME`), or the combination of several operands (`combine` of `parts`).
    role: the role, source, term or stage. path: a module path inside the role, or `logits`; the field; the output.
    call: which call of the module (1-based).
    side: the module's output or its input; `stats`: running mean and variance of a BatchNorm, [2, channels];
        `weights`: all parameters of the module as one vector.
    adapter: None: what the term's class declares as its default.
    """

    role: str
    path: str = "logits"
    call: int = 1
    side: Literal["out", "in", "stats", "weights"] = "out"
    adapter: PartConfig | None = None
    kind: Literal["role", "field", "term", "artifact", "combined"] = "role"
    combiner: PartWithOperands | None = None
    parts: tuple[OperandConfig, ...] = ()
    location: Location = field(default=NO_LOCATION, compare=False)

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
        """Whether it is read off a network that need not run."""
        return self.side in ("stats", "weights")

    def leaves(self) -> Iterator[OperandConfig]:
        """The operand itself, or all that a combination is made of."""
        if self.combiner is None:
            yield self
            return
        for part in (*self.parts, *self.combiner.operands.values()):
            yield from part.leaves()

    def feature_operands(self) -> Iterator[OperandConfig]:
        """Those of the leaves that are features of roles."""
        return (leaf for leaf in self.leaves() if leaf.kind == "role")


@dataclass(frozen=True, kw_only=True)
class PartWithOperands:
    """A registered part with its parameters, and the operands that it reads by name."""

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)
    operands: Mapping[str, OperandConfig] = field(default_factory=dict)
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """One pair of operands that a term compares. `teachers` has more than one entry only for `others`-like lists."""

    student: OperandConfig
    teacher: OperandConfig | None


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One entry of `terms`. A list of operands makes one edge per element; the losses of the edges are summed.

    weight: a number, or a schedule (a `Named` of SCHEDULES).
    sample_weight: a part of WEIGHERS: how much each sample counts. route: a part of ROUTERS: how much each edge counts for
        each sample.
    operands: what the term reads besides student and teacher, by the names that its class declares.
    where: a boolean field of the batch that masks the term's space.
    params: the parameters of the term's class; a schedulable one may hold a `Named` of SCHEDULES.
    """

    name: str
    type: str
    weight: float | PartConfig = 1.0
    edges: tuple[EdgeConfig, ...] = ()
    mask: str | None = None
    teacher_grad: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    sample_weight: PartWithOperands | None = None
    route: PartWithOperands | None = None
    operands: Mapping[str, OperandConfig] = field(default_factory=dict)
    location: Location = field(default=NO_LOCATION, compare=False)

    def read_operands(self) -> Iterator[OperandConfig]:
        """Everything that the term, its weigher and its router read, combinations taken apart."""
        named = [*self.operands.values()]
        for part in (self.sample_weight, self.route):
            named += part.operands.values() if part is not None else ()
        for edge in self.edges:
            named += [edge.student, *([edge.teacher] if edge.teacher is not None else [])]
        for operand in named:
            yield from operand.leaves()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimiser of torch.optim. `groups` override its parameters for a part of the model, first match wins.

    A group is `{path: layer4}` or `{type: BatchNorm2d}` or `{type: norm}` (every normalisation layer) or
    `{type: bias}`, with the parameters to override, such as `weight_decay: 0`.
    """

    type: str = "SGD"
    params: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class InnerStepConfig:
    """A step that is never taken: these models (and their terms' own parameters) by one plain gradient step.

    lr: its learning rate, a number or a schedule; None: for each parameter the rate of the update that moves it.
    """

    models: tuple[str, ...]
    terms: tuple[str, ...]
    lr: float | PartConfig | None = None
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """One move within a step: these models by these terms, `repeat` times with a fresh forward each.

    together: updates with the same number see the same weights: all their gradients are taken before any of them moves.
    select: a part of SELECTORS that chooses the rows of the batch by which this update moves; keep: a share in (0, 1)
        or the number of rows that it keeps.
    after: its terms are taken at the weights to which this virtual step leads, and its gradient goes through the step.
    """

    models: tuple[str, ...]
    terms: tuple[str, ...]
    repeat: int = 1
    optimizer: OptimizerConfig | None = None
    group: int | None = None
    select: PartWithOperands | None = None
    keep: float | int | None = None
    inner_step: InnerStepConfig | None = None
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """Something that a stage makes at its end, for later stages: a dataset, a choice of samples, a tensor, a model.

    part: of MAKERS; its operands are what the roles say of `source`, sample by sample, in eval mode.
    previous: `STAGE.NAME` of what the round before made under this name, in a loop.
    """

    name: str
    part: PartWithOperands
    source: str | None = None
    previous: str | None = None
    location: Location = field(default=NO_LOCATION, compare=False)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Everything that one stage trains by: the recipe's top level with the stage's fragment laid over it.

    epochs/steps: exactly one is set; 0 is allowed (evaluate only).
    make: what the stage makes at its end, by name. evaluate: roles that are measured besides the exported one.
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
    artifacts: Mapping[str, ArtifactConfig] = field(default_factory=dict)
    export: str = "student"
    evaluate: tuple[str, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: PartConfig | None = None
    epochs: int | None = None
    steps: int | None = None
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    validation: float | int | None = None
    metrics: tuple[PartConfig, ...] = ()
    eval_every: int = 1
    eval_batch_size: int = 512
    checkpoint_every: Mapping[str, float] = field(default_factory=dict)
    log_every: int = 50
    precision: Precision = "float32"
    sync_batchnorm: bool = False

    def observers(self) -> dict[str, PartWithOperands]:
        """The makers and selectors, which read operands beside the terms, by who they are."""
        found = {f"make.{name}": make.part for name, make in self.artifacts.items()}
        return found | {f"select.{i}": u.select for i, u in enumerate(self.updates) if u.select is not None}

    def read_operands(
        self, terms: Iterable[str] | None = None, *, include_artifacts: bool = True
    ) -> Iterator[OperandConfig]:
        """Everything that terms (all, unless some are named), selectors and makers read, combinations taken apart.

        Args:
            makers: false leaves out what is read at the end of the stage, not in its steps.
        """
        for name in self.terms if terms is None else terms:
            yield from self.terms[name].read_operands()
        for owner, part in self.observers().items():
            if include_artifacts or not owner.startswith("make."):
                for operand in part.operands.values():
                    yield from operand.leaves()


@dataclass(frozen=True, kw_only=True)
class Published:
    """The figure that the recipe is to reproduce: top-1 in percent, its source, and which epoch it reports."""

    top1: float
    source: str = ""
    epoch: Literal["last", "best", "unstated"] = "unstated"
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Notes:
    """The relation of a recipe to the method that it bears the name of.

    basis: the best source that was available: the authors' code, the paper's text, or its abstract alone.
    source: equation, section, or file of the authors' code. differs: differences from that source.
    scaled_down: changes that only make the recipe small enough for its data set.
    """

    basis: Literal["code", "text", "abstract"]
    source: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    scaled_down: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, ready to plan.

    name: `digits/kd`, or the stem of the user's file. file: where it was read, as messages give it.
    path: the whole path of the file in which it was first written; paths of other recipes in it begin there.
    resolved: the composed recipe as plain data, as it is written into the run's folder (and read back from there).
    places: dotted key -> where it was written, for messages.
    choices: the groups that were chosen, such as {"pair": "resnet56_resnet20"}.
    dropped: what `baseline: true` left out, in words.
    methods: rows of the list of methods (`kdbench list methods`) that this recipe is. notes: where it follows the
        authors' code, and where the text.
    frozen_forward: when roles that do not move are run: in the step, some steps ahead of it, or once for each image
        that they can be shown. frozen_batch_size: about how many rows they are run on at once outside the step.
    """

    name: str
    file: str
    stages: tuple[StageConfig, ...]
    resolved: Mapping[str, Any]
    locations: Mapping[str, Location]
    path: str = ""
    group_choices: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    title: str = ""
    paper: str = ""
    methods: tuple[str, ...] = ()
    notes: Notes | None = None
    seed: int = 1
    baseline: bool = False
    baseline_removed: tuple[str, ...] = ()
    published: Published | None = None
    # Below: no part of a run's identity.
    device: str = "auto"
    compile: CompileMode = False
    frozen_forward: FrozenForwardMode = "auto"
    frozen_batch_size: int = 1024
    channels_last: bool | None = None
    shard: bool | tuple[str, ...] = False
    workers: int = 0
    data_root: str = "data"
    runs: str = "runs"
    out: str | None = None
    fresh: bool = False
    tensorboard: bool = True
    keep_epochs: tuple[int, ...] = ()

    @property
    def uses_compiler(self) -> bool:
        """Whether the forward, the terms and the backward of a step go through torch.compile."""
        return self.compile in (True, "max")

    def uses_cuda_graph(self, device_type: str) -> bool:
        """Whether a step is recorded as a CUDA graph."""
        return self.compile is not False and device_type == "cuda"
