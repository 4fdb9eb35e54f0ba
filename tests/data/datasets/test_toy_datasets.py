"""Digits and synthetic: always there, always the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from kdbench.config.schema import PartConfig, SourceConfig
from kdbench.data.datasets.digits import Digits
from kdbench.data.datasets.synthetic import Synthetic
from kdbench.data.describe import describe_source
from kdbench.errors import ConfigError


def test_digits_halves_are_scikit_learns_images_once_each():
    train, test = Digits(split="train").load(), Digits(split="test").load()
    values = torch.cat([train.images, test.images]).mul(16).flatten(1)
    labels = torch.cat([train.labels, test.labels])
    found = sorted((label, tuple(row)) for label, row in zip(labels.tolist(), values.tolist(), strict=True))
    data, target = load_digits(return_X_y=True)
    assert found == sorted((label, tuple(row)) for label, row in zip(target.tolist(), data.tolist(), strict=True))
    assert (
        (len(train.labels), len(test.labels)) == (len(Digits(split="train")), len(Digits(split="test"))) == (901, 896)
    )
    counts = torch.bincount(train.labels) - torch.bincount(test.labels)
    assert set(counts.tolist()) <= {0, 1}


def test_digits_never_change():
    """The checksums that runs keep: a change of the halves or of the scaling must not pass unseen."""
    assert Digits(split="train").checksum().startswith("ff01e24e")
    assert Digits(split="test").checksum().startswith("826c421d")


def test_digits_are_normalised_to_zero_mean_and_unit_deviation(source_of, make):
    batch = next(source_of(make(dataset="digits", batch_size=901)).evaluation_batches(901))
    assert abs(batch["image"].mean()) < 0.02
    assert abs(batch["image"].std() - 1) < 0.02
    raw = next(source_of(make(dataset="digits", params={"normalize": False})).evaluation_batches(901))["image"]
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
    centres = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(5)]).flatten(1)
    nearest = torch.cdist(test.images.float().flatten(1), centres).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95
    assert np.ptp(np.bincount(train.labels)) == 0


def test_description_agrees_with_the_sources(source_of, make, part):
    for one in (
        make(dataset="digits", label_fraction=50, views={"image": (part("crop", size=6), part("cutmix")), "strong": ()}),
        make(params={"shape": [1, 9, 9], "samples": 40, "classes": 4}, subset=20),
        make(name="noise", dataset="gaussian", params={"shape": [3, 2]}),
    ):
        spec, source = describe_source(one, "data"), source_of(one)
        assert spec.fields == source.field_specs()
        assert spec.samples == source.num_samples
        assert spec.classes == (len(source.classes) or None)
        assert spec.problem is None


def test_description_refuses_what_cannot_be_built(make, part):
    with pytest.raises(ConfigError, match=r"recipe.yaml:3 data.train: dataset 'digits' has no split 'valid'"):
        describe_source(make(dataset="digits", split="valid"), "data")
    with pytest.raises(ConfigError, match=r"no augmentation 'flop'"):
        describe_source(make(dataset="digits", views={"image": (part("flop"),)}), "data")
    with pytest.raises(ConfigError, match=r"gaussian: shape must be"):
        describe_source(SourceConfig(name="n", dataset=PartConfig(type="gaussian", params={"shape": [0]})), "data")


def test_registrations_state_the_facts():
    from kdbench.registry import DATASETS

    for name, dataset in (("digits", Digits),):
        facts = DATASETS.entry(name).facts
        for split, count in facts["samples"].items():
            assert count == len(dataset(split=split).load().labels)
        assert facts["shape"] == dataset().shape
        assert facts["classes"] == len(dataset().classes)
