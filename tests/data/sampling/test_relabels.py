"""Relabelling: the configured rates, a function of seed and sample; `label_true` keeps the true label."""

from __future__ import annotations

import pytest
import torch

from helpers.data_sources import (
    concatenate,
    evaluation_batches,
    open_source,
    part_config,
    source_config,
    training_batches,
)
from kdbench.data.describe import describe_source
from kdbench.data.loading.build import build_sources
from kdbench.errors import ConfigError

SAMPLES = 4000
PARAMS = {"samples": SAMPLES, "shape": [1, 1, 1]}


def relabelled_split(relabel, seed=1, **changes):
    """Returns all samples of a source, in order."""
    return concatenate(
        evaluation_batches(open_source(source_config(params=PARAMS, relabel=relabel, **changes), seed=seed), 512)
    )


def confusion(batch):
    """Returns P(label | label_true), (10, 10)."""
    counts = torch.zeros(10, 10)
    counts.index_put_((batch["label_true"], batch["label"]), torch.ones(len(batch["label"])), accumulate=True)
    return counts / counts.sum(1, keepdim=True)


def test_symmetric_noise_is_uniform_over_the_other_classes():
    matrix = confusion(relabelled_split(part_config("symmetric_noise", rate=0.4)))
    expected = torch.full((10, 10), 0.4 / 9).fill_diagonal_(0.6)
    assert (matrix - expected).abs().max() < 0.08
    assert abs(matrix.diagonal().mean() - 0.6) < 0.025
    assert (matrix[~torch.eye(10, dtype=torch.bool)] > 0).all()


def test_asymmetric_noise_goes_to_the_next_class_or_by_pairs():
    matrix = confusion(relabelled_split(part_config("asymmetric_noise", rate=0.3)))
    next_class = matrix[torch.arange(10), (torch.arange(10) + 1) % 10]
    assert torch.allclose(matrix.diagonal() + next_class, torch.ones(10))
    assert abs(next_class.mean() - 0.3) < 0.025
    paired = confusion(
        relabelled_split(part_config("asymmetric_noise", rate=0.3, pairs=[[9, 1], ["class3", "class5"]]))
    )
    assert set(map(tuple, paired.nonzero().tolist())) == {*((c, c) for c in range(10)), (9, 1), (3, 5)}


def test_random_labels_are_independent_and_shuffled_labels_keep_the_counts():
    batch = relabelled_split(part_config("random_labels"))
    assert (confusion(batch) - 0.1).abs().max() < 0.06
    assert torch.bincount(batch["label"]).unique().numel() > 1
    batch = relabelled_split(part_config("shuffled_labels"))
    assert torch.bincount(batch["label"]).tolist() == [SAMPLES // 10] * 10
    assert abs((batch["label"] == batch["label_true"]).float().mean() - 0.1) < 0.03


def test_rate_zero_changes_no_label_and_rate_one_all():
    batch = relabelled_split(part_config("symmetric_noise", rate=0))
    assert torch.equal(batch["label"], batch["label_true"])
    batch = relabelled_split(part_config("symmetric_noise", rate=1.0))
    assert (batch["label"] != batch["label_true"]).all()


def test_labels_depend_on_seed_and_sample_alone():
    noise = part_config("symmetric_noise", rate=0.4)
    labels = relabelled_split(noise)["label"]

    def has_expected_labels(source):
        return all(torch.equal(labels[batch["index"]], batch["label"]) for batch in training_batches(source, 3))

    assert has_expected_labels(open_source(source_config(params=PARAMS, relabel=noise, batch_size=7)))
    subset = part_config("random", amount=0.3)
    assert has_expected_labels(open_source(source_config(name="other", params=PARAMS, relabel=noise, subset=subset)))
    assert all(
        has_expected_labels(open_source(source_config(params=PARAMS, relabel=noise), rank=rank, world_size=2))
        for rank in range(2)
    )
    assert not torch.equal(labels, relabelled_split(noise, seed=2)["label"])


def test_true_labels_and_other_sources_do_not_change():
    data = {
        "train": source_config(params=PARAMS, relabel=part_config("random_labels")),
        "other": source_config(name="other", params=PARAMS),
        "eval": source_config(name="eval", split="test", params=PARAMS),
    }
    sources = build_sources(data, validation=0.1, seed=1, device="cpu", data_root="data")
    for name in ("validation", "other", "eval"):
        batch = concatenate(evaluation_batches(sources[name], 512))
        assert torch.equal(batch["label"], batch["index"] % 10)
        assert "label_true" not in batch
    batch = concatenate(training_batches(sources["train"], 0))
    assert torch.equal(batch["label_true"], batch["index"] % 10)
    assert not torch.equal(batch["label"], batch["label_true"])


def test_subset_and_label_fraction_use_the_true_labels():
    batch = relabelled_split(part_config("random_labels"), subset=50, label_fraction=20)
    assert torch.bincount(batch["index"] % 10).tolist() == [5] * 10
    hidden = ~batch["labelled"]
    assert (batch["label"][hidden] == -100).all() and (batch["label_true"][hidden] == -100).all()
    assert torch.bincount(batch["label_true"][batch["labelled"]]).tolist() == [2] * 10


def test_label_of_the_mixing_partner_is_changed_too():
    source = open_source(
        source_config(params=PARAMS, relabel=part_config("random_labels"), views={"image": (part_config("mixup"),)})
    )
    batch = next(training_batches(source, 0))
    assert torch.equal(batch["label_other"], batch["label"].roll(1))
    assert {name for name in source.field_specs()} == set(batch)
    assert set(describe_source(source.config, "data").fields) == set(batch)


@pytest.mark.parametrize(
    ("relabel", "message"),
    [
        (part_config("symmetric_noise", rate=1.2), r"relabel: symmetric_noise: rate must be in \[0, 1\], got 1.2"),
        (part_config("asymmetric_noise", rate=0.1, pairs=[["class1"]]), r"pairs must be a list of \[from, to\]"),
        (part_config("asymmetric_noise", rate=0.1, pairs=[["clas1", 2]]), "no class 'clas1'. Did you mean 'class1'"),
        (part_config("asymmetric_noise", rate=0.1, pairs=[[1, 2], [1, 3]]), "is the first of more than one pair"),
        (part_config("noise"), "no relabelling 'noise'"),
    ],
)
def test_configuration_errors_are_raised_by_the_description(relabel, message):
    with pytest.raises(ConfigError, match=message):
        describe_source(source_config(params=PARAMS, relabel=relabel), "data")
