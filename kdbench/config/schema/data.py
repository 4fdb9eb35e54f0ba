"""Sources of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdbench.config.schema.keys import AT_LEAST_ONE, FRACTION_OR_COUNT, Key, declare, declare_keys, derived, key_table
from kdbench.config.schema.parts import LOCATION, NO_LOCATION, PartConfig
from kdbench.errors import Location


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A named source of samples.

    Attributes:
        views: image field -> its augmentations in order. `image` always exists. Evaluation sources augment nothing,
            except what belongs to a view itself.
        label_fraction: fraction or number of samples that keep their label, or `STAGE.NAME` of a subset; None keeps
            all.
        subset: fraction or number of samples (class-balanced, drawn from the seed), a part of SUBSETS, or `STAGE.NAME`
            of a subset; several are applied in order. None keeps all samples.
        artifact: `STAGE.NAME` of a dataset; `dataset` is then the part `artifact`.
        locations: locations of `batch_size`, `labels`, `subset`, `relabel` and (of `train`) `validation`, for messages.
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
                "in place of `dataset`: the dataset's name, with its parameters as keys beside it",
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
            default_text="that of the top level",
            example="batch_size: 32",
        ),
    )
    views: Mapping[str, tuple[PartConfig, ...]] = field(
        default_factory=lambda: {"image": ()},
        metadata=declare(
            "augmentations, as at the top level",
            name="augment",
            type="list[Augmentation] | dict[str, View]",
            default_text="none; of `train` those of the top level",
            example="augment: [flip]",
        ),
    )
    label_fraction: float | int | str | None = field(
        default=None,
        metadata=declare(
            "samples that keep their label, as at the top level",
            type="float | ArtifactReference",
            check=FRACTION_OR_COUNT,
            default_text="all; of `train` that of the top level",
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
            default_text="none; of `train` that of the top level",
            example="relabel: random_labels",
        ),
    )
    artifact: str | None = field(
        default=None,
        metadata=declare_keys(
            Key(
                "artifact",
                "in place of `dataset`: a dataset that an earlier stage produced; it has no splits",
                type="str",
                example="artifact: paint.pool",
            ),
            Key(
                "initial",
                "with `artifact`: the source's keys while no stage has produced it yet",
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
    Key("from", "view whose augmentations and random draws this view continues", type="str", example="from: image"),
    Key(
        "then",
        "augmentations after those of that view",
        type="list[Augmentation]",
        default=(),
        example="then: [{type: noise, std: 0.3}]",
    ),
)
"""The keys of a view that continues another view."""


ARTIFACT_REFERENCE_KEYS = key_table(
    Key("artifact", "`STAGE.NAME` of an artifact of an earlier stage", type="str", example="artifact: query.labels"),
    Key(
        "initial",
        "the value while no stage has produced it yet",
        type="float | Subset | list[float | Subset]",
        check=FRACTION_OR_COUNT,
        example="initial: 20",
    ),
)
"""The keys of `{artifact: STAGE.NAME}` in place of a subset or a label fraction."""
