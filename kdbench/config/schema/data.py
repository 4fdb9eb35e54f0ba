"""The dataclass of a source of samples, and the declarations of the keys that set its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdbench.config.schema.keys import AT_LEAST_ONE, FRACTION_OR_COUNT, Key, declare, declare_keys, derived, key_table
from kdbench.config.schema.parts import LOCATION, NO_LOCATION, PartConfig
from kdbench.errors import Location


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A named source of samples: a dataset with views, a subset, and a batch size.

    Attributes:
        views: name of an image field of the batch -> augmentations in order. The view `image` always exists. In
            evaluation, only augmentations that define a view are applied.
        label_fraction: fraction or number of samples that keep their label, or name `STAGE.NAME` of a subset that an
            earlier stage computed. None: all samples keep their label.
        subset: fraction or number of samples (class-balanced, drawn from the seed), a registered subset, or name
            `STAGE.NAME` of a subset that an earlier stage computed. Several subsets are applied in order. None: all
            samples.
        artifact: name `STAGE.NAME` of a dataset that an earlier stage computed, or None. If `artifact` is set, the
            field `dataset` has the type `artifact`.
        locations: key -> location in the recipe, for messages. The keys are `batch_size`, `label_fraction`, `subset`,
            `relabel` and, for the source `train`, `validation`.
    """

    name: str = field(metadata=derived("the key in `data`"))
    dataset: PartConfig = field(
        metadata=declare_keys(
            Key(
                "dataset",
                "a name of `kdbench list datasets` with its parameters",
                type="Dataset",
                default_text="the dataset of the top level",
                example="dataset: digits",
            ),
            Key(
                "type",
                "in place of `dataset`: name of the dataset; the dataset's parameters are further keys of the source",
                type="str",
                example="type: gaussian",
            ),
        )
    )
    split: str = field(
        default="train",
        metadata=declare(
            "split of the dataset",
            default_text="`test` for `eval` and every `eval_NAME`, else `train`",
            example="split: test",
        ),
    )
    batch_size: int = field(
        default=64,
        metadata=declare(
            "samples per step and process",
            check=AT_LEAST_ONE,
            default_text="the value of the top level",
            example="batch_size: 32",
        ),
    )
    views: Mapping[str, tuple[PartConfig, ...]] = field(
        default_factory=lambda: {"image": ()},
        metadata=declare(
            "augmentations, with the same syntax as the key `augment` of the top level",
            name="augment",
            type="list[Augmentation] | dict[str, View]",
            default_text="none; for `train` the value of the top level",
            example="augment: [flip]",
        ),
    )
    label_fraction: float | int | str | None = field(
        default=None,
        metadata=declare(
            "samples that keep their label, with the same syntax as the key of the top level",
            type="float | ArtifactReference",
            check=FRACTION_OR_COUNT,
            default_text="all; for `train` the value of the top level",
            example="label_fraction: 0.1",
        ),
    )
    subset: float | int | str | PartConfig | tuple[float | int | str | PartConfig, ...] | None = field(
        default=None,
        metadata=declare(
            "samples of the source: a fraction or number, a name of `kdbench list subsets` with its parameters, "
            "`{artifact: STAGE.NAME}`, or a list of these, applied in order",
            type="float | Subset | ArtifactReference | list[float | Subset | ArtifactReference]",
            check=FRACTION_OR_COUNT,
            default_text="all",
            example="subset: 0.5",
        ),
    )
    relabel: PartConfig | None = field(
        default=None,
        metadata=declare(
            "change of the labels: a name of `kdbench list relabellings` with its parameters",
            type="Relabelling",
            default_text="none; for `train` the value of the top level",
            example="relabel: random_labels",
        ),
    )
    artifact: str | None = field(
        default=None,
        metadata=declare_keys(
            Key(
                "artifact",
                "in place of `dataset`: name `STAGE.NAME` of a dataset that an earlier stage computes; such a dataset "
                "has no splits",
                type="str",
                example="artifact: paint.pool",
            ),
            Key(
                "initial",
                "with `artifact`: keys of the source for stages that run before the artifact is computed",
                type="Source",
                example="initial: {dataset: digits, subset: 20}",
            ),
        ),
    )
    overlap: bool = field(
        default=False,
        metadata=declare(
            "whether each batch starts with the new half of the previous batch, augmented again",
            example="overlap: true",
        ),
    )
    location: Location = field(default=NO_LOCATION, compare=False, metadata=LOCATION)
    locations: Mapping[str, Location] = field(
        default_factory=dict, compare=False, metadata=derived("the locations of the keys")
    )


VIEW_KEYS = key_table(
    Key(
        "from",
        "view whose result, with the same random draws, is the input of this view",
        type="str",
        example="from: image",
    ),
    Key(
        "then",
        "augmentations that are applied to the result of the view `from`",
        type="list[Augmentation]",
        default=(),
        example="then: [{type: noise, std: 0.3}]",
    ),
)
"""The keys of a view that adds augmentations to the result of another view."""


ARTIFACT_REFERENCE_KEYS = key_table(
    Key("artifact", "name `STAGE.NAME` of an earlier stage's artifact", type="str", example="artifact: query.labels"),
    Key(
        "initial",
        "value for stages that run before the artifact is computed",
        type="float | Subset | list[float | Subset]",
        check=FRACTION_OR_COUNT,
        example="initial: 20",
    ),
)
"""The keys of a mapping `{artifact: STAGE.NAME}`, which may replace a subset or a label fraction."""
