"""Digits and synthetic: datasets without a download, whose content never changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from helpers.data_sources import augmentation, evaluation_batches, open_source, source_config
from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.digits import Digits
from kdbench.data.datasets.synthetic import Synthetic
from kdbench.data.describe import describe_source
from kdbench.errors import ConfigError
from kdbench.registry import DATASETS


def test_digits_splits_contain_every_image_of_scikit_learn_once():
    train, test = Digits(split="train").load(), Digits(split="test").load()
    values = torch.cat([train.images, test.images]).mul(16).flatten(1)
    labels = torch.cat([train.labels, test.labels])
    samples = sorted((label, tuple(row)) for label, row in zip(labels.tolist(), values.tolist(), strict=True))
    data, target = load_digits(return_X_y=True)
    assert samples == sorted((label, tuple(row)) for label, row in zip(target.tolist(), data.tolist(), strict=True))
    assert (
        (len(train.labels), len(test.labels)) == (len(Digits(split="train")), len(Digits(split="test"))) == (901, 896)
    )
    counts = torch.bincount(train.labels) - torch.bincount(test.labels)
    assert set(counts.tolist()) <= {0, 1}


def test_digits_checksums_never_change():
    """Runs store these checksums, so a change of the halves or of the scaling has to fail here."""
    assert Digits(split="train").checksum().startswith("ff01e24e")
    assert Digits(split="test").checksum().startswith("826c421d")


def test_digits_are_normalised_to_zero_mean_and_unit_deviation():
    batch = next(evaluation_batches(open_source(source_config(dataset="digits", batch_size=901)), 901))
    assert abs(batch["image"].mean()) < 0.02
    assert abs(batch["image"].std() - 1) < 0.02
    raw = next(evaluation_batches(open_source(source_config(dataset="digits", params={"normalize": False})), 901))[
        "image"
    ]
    assert (raw.min(), raw.max()) == (0, 1)


def test_synthetic_is_a_function_of_its_parameters():
    def checksum(**params):
        return Synthetic(**params).checksum()

    assert checksum() == checksum()
    assert len({checksum(), checksum(seed=1), checksum(split="test"), checksum(samples=500), checksum(classes=4)}) == 5


@pytest.mark.parametrize("shape", [[3, 16, 16], [1, 8, 8], [20], [4, 30]])
def test_synthetic_classes_can_be_learned(shape):
    params = {"shape": shape, "classes": 5, "samples": 200}
    train, test = Synthetic(**params).load(), Synthetic(split="test", **params).load()
    assert train.images.shape == (200, *shape)
    assert not torch.equal(train.images, test.images)
    centers = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(5)]).flatten(1)
    nearest = torch.cdist(test.images.float().flatten(1), centers).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95
    assert np.ptp(np.bincount(train.labels)) == 0


def test_spec_agrees_with_the_source():
    for config in (
        source_config(
            dataset="digits",
            label_fraction=50,
            views={"image": (augmentation("crop", size=6), augmentation("cutmix")), "strong": ()},
        ),
        source_config(params={"shape": [1, 9, 9], "samples": 40, "classes": 4}, subset=20),
        source_config(name="noise", dataset="gaussian", params={"shape": [3, 2]}),
    ):
        spec, source = describe_source(config, "data"), open_source(config)
        assert spec.fields == source.field_specs()
        assert spec.samples == source.num_samples
        assert spec.classes == (len(source.classes) or None)
        assert spec.problem is None


def test_description_raises_the_errors_of_building():
    with pytest.raises(ConfigError, match=r"recipe.yaml:3 data.train: dataset 'digits' has no split 'valid'"):
        describe_source(source_config(dataset="digits", split="valid"), "data")
    with pytest.raises(ConfigError, match=r"no augmentation 'flop'"):
        describe_source(source_config(dataset="digits", views={"image": (augmentation("flop"),)}), "data")
    with pytest.raises(ConfigError, match=r"gaussian: shape must be"):
        describe_source(SourceConfig(name="n", dataset=PartConfig(type="gaussian", params={"shape": [0]})), "data")


def test_facts_of_the_registration_are_true():
    facts = DATASETS.entry("digits").facts
    for split, count in facts["samples"].items():
        assert count == len(Digits(split=split).load().labels)
    assert facts["shape"] == Digits().shape
    assert facts["classes"] == len(Digits().classes)
