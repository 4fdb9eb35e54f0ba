"""The dataclass of a stage of training, and the declarations of the keys that set its fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kdbench.config.schema.data import SourceConfig
from kdbench.config.schema.keys import (
    AT_LEAST_ONE,
    FRACTION,
    FRACTION_OR_COUNT,
    MISSING,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_FRACTION_OR_COUNT,
    Key,
    declare,
    declare_keys,
    derived,
    key_table,
)
from kdbench.config.schema.parts import OperandConfig, PartConfig, PartWithOperands
from kdbench.config.schema.roles import RoleConfig
from kdbench.config.schema.terms import TermConfig
from kdbench.config.schema.updates import ArtifactConfig, OptimizerConfig, UpdateConfig

Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training. The keys of a stage are merged over the keys of the recipe's top level.

    Attributes:
        epochs, steps: length of the stage. Exactly one of the two is set. A stage of length 0 only evaluates.
        updates: updates of a training step, in order. Empty: one update, in which all terms train all trainable roles.
        validation: fraction or number of training samples that are held out to select the best epoch.
    """

    name: str = field(metadata=derived("the key in `stages`"))
    roles: Mapping[str, RoleConfig] = field(
        metadata=declare_keys(
            Key(
                "models",
                "name of a role -> network",
                type="dict[str, Role]",
                default={},
                example="models: {a: resnet20, b: resnet20}",
                section="networks",
            ),
            Key(
                "teacher",
                "shorthand for `models.teacher`, which is frozen by default",
                type="Role",
                example="teacher: {model: resnet56}",
                section="networks",
            ),
            Key(
                "student",
                "shorthand for `models.student`",
                type="Role",
                example="student: resnet20",
                section="networks",
            ),
        )
    )
    data: Mapping[str, SourceConfig] = field(
        metadata=declare_keys(
            Key(
                "dataset",
                "dataset of the sources `train` (split train) and `eval` (split test): a name of `kdbench list "
                "datasets` with its parameters",
                type="Dataset",
                default_text="none",
                example="dataset: {type: image_folder, root: pets}",
                section="data",
            ),
            Key(
                "batch_size",
                "samples per step and process",
                type="int",
                check=AT_LEAST_ONE,
                default=64,
                example="batch_size: 128",
                section="data",
            ),
            Key(
                "augment",
                "list of augmentations of the source `train`, or a mapping of view names to such lists; each view is a "
                "field of the batch. The dataset's normalisation is applied last (`dataset: {type: NAME, normalize: "
                "false}` omits it)",
                type="list[Augmentation] | dict[str, View]",
                default_text="none",
                example="augment: [{type: crop, padding: 4}, flip]",
                section="data",
            ),
            Key(
                "label_fraction",
                "fraction (up to 1) or number (2 or more) of training samples that keep their label, or a subset that "
                "an earlier stage computes",
                type="float | ArtifactReference",
                check=FRACTION_OR_COUNT,
                default_text="all",
                example="label_fraction: 50",
                section="data",
            ),
            Key(
                "relabel",
                "change of the labels of `train`: a name of `kdbench list relabellings` with its parameters",
                type="Relabelling",
                default_text="none",
                example="relabel: {type: symmetric_noise, rate: 0.4}",
                section="data",
            ),
            Key(
                "data",
                "name of a source -> source: additional sources, or changes to `train` and `eval`",
                type="dict[str, Source]",
                default={},
                default_text="none",
                example="data: {extra: {dataset: digits, subset: 0.5}}",
                section="data",
            ),
        )
    )
    terms: Mapping[str, TermConfig] = field(
        metadata=declare_keys(
            Key(
                "terms",
                "name of your choice -> term of the loss; or a list of terms, whose names are then their types (a "
                "second `kd` is called `kd_2`)",
                type="dict[str, Term] | list[Term]",
                default={},
                default_text="none",
                example="terms: {ce: cross_entropy, kd: {type: kd, temperature: 4}}",
                section="terms",
            ),
        )
    )
    updates: tuple[UpdateConfig, ...] = field(
        default=(),
        metadata=declare(
            "updates of one training step, in order; a list within the list is a group of simultaneous updates",
            type="list[Update | list[Update]]",
            default_text="one update of all trainable roles by all terms",
            example="updates: [{models: [student], terms: [kd]}]",
            section="stages",
        ),
    )
    artifacts: Mapping[str, ArtifactConfig] = field(
        default_factory=dict,
        metadata=declare(
            "name of your choice -> result that the stage produces at its end for later stages",
            type="dict[str, Artifact]",
            default_text="none",
            example="artifacts: {soft: {type: soft_labels, teacher: teacher}}",
            section="stages",
        ),
    )
    export: str = field(
        default="student",
        metadata=declare(
            "role that is the result of the recipe: it is evaluated, and its weights are exported",
            default_text="`student`, or the only trainable role",
            example="export: a",
            section="training",
        ),
    )
    evaluate: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "roles that are evaluated in addition to the exported role",
            type="str | list[str]",
            default_text="none",
            example="evaluate: [a, b]",
            section="records",
        ),
    )
    optimizer: OptimizerConfig = field(
        default=OptimizerConfig(),
        metadata=declare(
            "optimizer of `torch.optim` with its parameters; `groups` lists other settings for some parameters of the "
            "networks, see below",
            type="Optimizer",
            default_text="required for training",
            example="optimizer: {type: SGD, lr: 0.05, groups: [{type: norm, weight_decay: 0}]}",
            section="training",
        ),
    )
    scheduler: PartConfig | None = field(
        default=None,
        metadata=declare(
            "schedule by which learning rates are multiplied, with an optional `warmup`",
            type="Scheduler",
            default_text="constant 1",
            example="scheduler: {type: cosine, warmup: 5}",
            section="training",
        ),
    )
    epochs: int | None = field(
        default=None,
        metadata=declare(
            "length of the stage in epochs; 0: the stage only evaluates",
            check=NOT_NEGATIVE,
            default_text="`epochs` or `steps` is required",
            example="epochs: 240",
            section="training",
        ),
    )
    steps: int | None = field(
        default=None,
        metadata=declare(
            "length of the stage in optimizer steps, in place of `epochs`",
            check=NOT_NEGATIVE,
            default_text="`epochs` or `steps` is required",
            example="steps: 1000",
            section="training",
        ),
    )
    clip: float | None = field(
        default=None,
        metadata=declare(
            "maximum norm of the gradient; a larger gradient is scaled down",
            check=POSITIVE,
            default_text="none",
            example="clip: 1.0",
            section="training",
        ),
    )
    accumulate: int = field(
        default=1,
        metadata=declare(
            "number of batches whose gradients are accumulated in one optimizer step",
            check=AT_LEAST_ONE,
            example="accumulate: 4",
            section="training",
        ),
    )
    ema: float | None = field(
        default=None,
        metadata=declare(
            "decay of a moving average of the exported role's weights; the average is evaluated too",
            check=FRACTION,
            default_text="no average",
            example="ema: 0.999",
            section="training",
        ),
    )
    validation: float | int | None = field(
        default=None,
        metadata=declare(
            "fraction or number of training samples that are held out to select the best epoch. A teacher from "
            "another recipe may have been trained on these samples, but never on the test split",
            type="float",
            check=PROPER_FRACTION_OR_COUNT,
            default_text="none",
            example="validation: 0.1",
            section="data",
        ),
    )
    metrics: tuple[PartConfig, ...] = field(
        default=(),
        metadata=declare(
            "metrics of the evaluation: names of `kdbench list metrics`",
            type="list[Metric]",
            default_text="top1, top5, nll, ece, and agreement if there is a teacher",
            example="metrics: [top1, per_class]",
            section="records",
        ),
    )
    eval_every: int = field(
        default=1,
        metadata=declare(
            "number of epochs between evaluations; the last epoch is always evaluated",
            check=AT_LEAST_ONE,
            example="eval_every: 10",
            section="records",
        ),
    )
    eval_batch_size: int = field(
        default=512,
        metadata=declare(
            "samples per batch of an evaluation", check=AT_LEAST_ONE, example="eval_batch_size: 1000", section="data"
        ),
    )
    checkpoint_every: Mapping[str, float] = field(
        default_factory=dict,
        metadata=declare(
            "interval of additional checkpoints between evaluations: `{steps: N}`, `{minutes: X}` or both",
            type="CheckpointInterval",
            default_text="after every evaluation only",
            example="checkpoint_every: {minutes: 10}",
            section="records",
            in_identity=False,
        ),
    )
    log_every: int = field(
        default=50,
        metadata=declare(
            "number of steps between two lines of the log",
            check=AT_LEAST_ONE,
            example="log_every: 10",
            section="records",
            in_identity=False,
        ),
    )
    precision: Precision = field(
        default="float32",
        metadata=declare("number format of the training step", example="precision: bf16", section="training"),
    )
    sync_batchnorm: bool = field(
        default=False,
        metadata=declare(
            "whether BatchNorm computes its statistics over all processes",
            example="sync_batchnorm: true",
            section="training",
        ),
    )

    def observers(self) -> dict[str, PartWithOperands]:
        """Returns owner -> part for artifact builders and selectors, which read operands although they are no terms.

        The owner (such as `make.NAME`) seeds the random numbers of the part, so it must not change.
        """
        parts = {f"make.{name}": artifact.part for name, artifact in self.artifacts.items()}
        return parts | {f"select.{i}": u.select for i, u in enumerate(self.updates) if u.select is not None}

    def read_operands(
        self, terms: Iterable[str] | None = None, *, include_artifacts: bool = True
    ) -> Iterator[OperandConfig]:
        """Yields all operands of terms, selectors and artifact builders. A combination is replaced by its operands.

        Args:
            terms: names of the terms; None: all terms.
            include_artifacts: whether to include the operands of artifact builders. They are evaluated at the end of
                the stage, not in a training step.
        """
        for name in self.terms if terms is None else terms:
            yield from self.terms[name].read_operands()
        for owner, part in self.observers().items():
            if include_artifacts or not owner.startswith("make."):
                for operand in part.operands.values():
                    yield from operand.leaves()


CHECKPOINT_KEYS = key_table(
    Key("steps", "number of steps between checkpoints", type="int", check=AT_LEAST_ONE, example="steps: 1000"),
    Key("minutes", "minutes between checkpoints", type="float", check=POSITIVE, example="minutes: 10"),
)
"""The keys of `checkpoint_every`."""


LOOP_KEYS = key_table(
    Key(
        "rounds",
        "number of rounds, or a list with one mapping per round: the keys that the round changes",
        type="int | list[Round | None]",
        check=AT_LEAST_ONE,
        default=MISSING,
        example="rounds: 4",
    ),
    Key(
        "stages",
        "stages that are repeated in each round",
        type="dict[str, Stage]",
        default=MISSING,
        example="stages: {train: {epochs: 10}}",
    ),
)
"""The keys of a loop (an entry of `stages` with the key `rounds`)."""
