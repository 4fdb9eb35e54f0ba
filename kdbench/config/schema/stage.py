"""A stage of a recipe."""

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
    """One stage: the recipe's top level merged with the stage's own keys.

    Attributes:
        epochs, steps: the length; exactly one of them is set, 0 only evaluates.
        updates: empty: one update of all trainable roles by all terms.
        validation: the held-out samples are the source `validation`, which selects the best epoch.
    """

    name: str = field(metadata=derived("the key in `stages`"))
    roles: Mapping[str, RoleConfig] = field(
        metadata=declare_keys(
            Key(
                "models",
                "role name -> network",
                type="dict[str, Role]",
                default={},
                example="models: {a: resnet20, b: resnet20}",
                section="networks",
            ),
            Key(
                "teacher",
                "the network `models.teacher`; frozen by default",
                type="Role",
                example="teacher: {model: resnet56}",
                section="networks",
            ),
            Key(
                "student", "the network `models.student`", type="Role", example="student: resnet20", section="networks"
            ),
        )
    )
    data: Mapping[str, SourceConfig] = field(
        metadata=declare_keys(
            Key(
                "dataset",
                "the dataset of the sources `train` (split train) and `eval` (split test): a name of `kdbench list "
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
                "augmentations of `train` in order, or a mapping of views to lists, which adds fields to the batch. "
                "The dataset's normalisation comes last (`dataset: {type: NAME, normalize: false}` omits it)",
                type="list[Augmentation] | dict[str, View]",
                default_text="none",
                example="augment: [{type: crop, padding: 4}, flip]",
                section="data",
            ),
            Key(
                "label_fraction",
                "fraction (up to 1) or number (2 or more) of training samples that keep their label, or a subset "
                "from an earlier stage",
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
                "source name -> source: more sources, or changes to `train` and `eval`",
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
                "name of your choice -> term of the loss; also a list, whose names are the types (a second `kd` is "
                "`kd_2`)",
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
            "updates of one step, in order; a list within the list is a group that updates simultaneously",
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
            "the role that is the result",
            default_text="`student`, or the only trainable role",
            example="export: a",
            section="training",
        ),
    )
    evaluate: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "roles to evaluate in addition to the result",
            type="str | list[str]",
            default_text="none",
            example="evaluate: [a, b]",
            section="records",
        ),
    )
    optimizer: OptimizerConfig = field(
        default=OptimizerConfig(),
        metadata=declare(
            "an optimizer of `torch.optim` with its parameters, and `groups`: other settings for some parameters, "
            "by `path`, by `type` of module, `type: norm` or `type: bias`; the first match wins",
            type="Optimizer",
            default_text="required if anything trains",
            example="optimizer: {type: SGD, lr: 0.05, groups: [{type: norm, weight_decay: 0}]}",
            section="training",
        ),
    )
    scheduler: PartConfig | None = field(
        default=None,
        metadata=declare(
            "factor of the learning rate: a schedule, with an optional `warmup`",
            type="Scheduler",
            default_text="constant 1",
            example="scheduler: {type: cosine, warmup: 5}",
            section="training",
        ),
    )
    epochs: int | None = field(
        default=None,
        metadata=declare(
            "length in epochs; 0 only evaluates",
            check=NOT_NEGATIVE,
            default_text="`epochs` or `steps` is required",
            example="epochs: 240",
            section="training",
        ),
    )
    steps: int | None = field(
        default=None,
        metadata=declare(
            "length in optimizer steps, in place of `epochs`",
            check=NOT_NEGATIVE,
            default_text="`epochs` or `steps` is required",
            example="steps: 1000",
            section="training",
        ),
    )
    clip: float | None = field(
        default=None,
        metadata=declare(
            "largest norm of the gradient", check=POSITIVE, default_text="none", example="clip: 1.0", section="training"
        ),
    )
    accumulate: int = field(
        default=1,
        metadata=declare("micro-batches per step", check=AT_LEAST_ONE, example="accumulate: 4", section="training"),
    )
    ema: float | None = field(
        default=None,
        metadata=declare(
            "decay of a moving average of the result, which is evaluated too",
            check=FRACTION,
            default_text="no average",
            example="ema: 0.999",
            section="training",
        ),
    )
    validation: float | int | None = field(
        default=None,
        metadata=declare(
            "fraction or number of training samples held out to select the best epoch. A teacher from another "
            "recipe may have been trained on them, never on the test split",
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
            "a list of `kdbench list metrics`",
            type="list[Metric]",
            default_text="top1, top5, nll, ece, and agreement if there is a teacher",
            example="metrics: [top1, per_class]",
            section="records",
        ),
    )
    eval_every: int = field(
        default=1,
        metadata=declare(
            "epochs between evaluations; the last epoch is always evaluated",
            check=AT_LEAST_ONE,
            example="eval_every: 10",
            section="records",
        ),
    )
    eval_batch_size: int = field(
        default=512,
        metadata=declare(
            "samples per step of an evaluation", check=AT_LEAST_ONE, example="eval_batch_size: 1000", section="data"
        ),
    )
    checkpoint_every: Mapping[str, float] = field(
        default_factory=dict,
        metadata=declare(
            "additional checkpoints between evaluations: `{steps: N}`, `{minutes: X}` or both",
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
            "steps between lines of the log",
            check=AT_LEAST_ONE,
            example="log_every: 10",
            section="records",
            in_identity=False,
        ),
    )
    precision: Precision = field(
        default="float32",
        metadata=declare("number format of training", example="precision: bf16", section="training"),
    )
    sync_batchnorm: bool = field(
        default=False,
        metadata=declare(
            "whether BatchNorm normalises over all processes", example="sync_batchnorm: true", section="training"
        ),
    )

    def observers(self) -> dict[str, PartWithOperands]:
        """Returns the parts other than terms that read operands: artifacts and selectors, by owner.

        The owner's name is a key of random streams (`seeded(seed, owner)`): it must not change.
        """
        parts = {f"make.{name}": artifact.part for name, artifact in self.artifacts.items()}
        return parts | {f"select.{i}": u.select for i, u in enumerate(self.updates) if u.select is not None}

    def read_operands(
        self, terms: Iterable[str] | None = None, *, include_artifacts: bool = True
    ) -> Iterator[OperandConfig]:
        """Yields the operands of terms, selectors and artifacts; of a combination the leaves.

        Args:
            terms: names of terms; all by default.
            include_artifacts: whether to include operands that are read at the end of the stage, not in its steps.
        """
        for name in self.terms if terms is None else terms:
            yield from self.terms[name].read_operands()
        for owner, part in self.observers().items():
            if include_artifacts or not owner.startswith("make."):
                for operand in part.operands.values():
                    yield from operand.leaves()


CHECKPOINT_KEYS = key_table(
    Key("steps", "steps between checkpoints", type="int", check=AT_LEAST_ONE, example="steps: 1000"),
    Key("minutes", "minutes between checkpoints", type="float", check=POSITIVE, example="minutes: 10"),
)
"""The keys of `checkpoint_every`."""


LOOP_KEYS = key_table(
    Key(
        "rounds",
        "number of rounds, or a list with the keys that each round changes",
        type="int | list[Round | None]",
        check=AT_LEAST_ONE,
        default=MISSING,
        example="rounds: 4",
    ),
    Key(
        "stages",
        "the stages of a round",
        type="dict[str, Stage]",
        default=MISSING,
        example="stages: {train: {epochs: 10}}",
    ),
)
"""The keys of a loop, an entry of `stages` with `rounds`."""
