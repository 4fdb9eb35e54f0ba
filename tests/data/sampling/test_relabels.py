"""Changed labels: as many as asked for, a function of seed and sample, with the truth beside them."""

from __future__ import annotations

import pytest
import torch

from kdbench.config.schema import PartConfig
from kdbench.data.describe import describe_source
from kdbench.data.loading.build import build_sources
from kdbench.errors import ConfigError

SAMPLES = 4000
PARAMS = {"samples": SAMPLES, "shape": [1, 1, 1]}


def part(kind, **params):
    return PartConfig(type=kind, params=params)


def collect(batches):
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def in_order(source_of, make, relabel, seed=1, **changes):
    return collect(source_of(make(params=PARAMS, relabel=relabel, **changes), seed=seed).evaluation_batches(512))


def confusion(batch):
    """P(told | true), (10, 10)."""
    table = torch.zeros(10, 10)
    table.index_put_((batch["label_true"], batch["label"]), torch.ones(len(batch["label"])), accumulate=True)
    return table / table.sum(1, keepdim=True)


def test_symmetric_noise_goes_to_every_other_class_alike(source_of, make):
    found = confusion(in_order(source_of, make, part("symmetric_noise", rate=0.4)))
    expected = torch.full((10, 10), 0.4 / 9).fill_diagonal_(0.6)
    assert (found - expected).abs().max() < 0.08
    assert abs(found.diagonal().mean() - 0.6) < 0.025
    off = found[~torch.eye(10, dtype=torch.bool)]
    assert (off > 0).all()


def test_asymmetric_noise_goes_to_the_next_class_or_to_its_pair(source_of, make):
    found = confusion(in_order(source_of, make, part("asymmetric_noise", rate=0.3)))
    following = found[torch.arange(10), (torch.arange(10) + 1) % 10]
    assert torch.allclose(found.diagonal() + following, torch.ones(10))
    assert abs(following.mean() - 0.3) < 0.025
    paired = confusion(
        in_order(source_of, make, part("asymmetric_noise", rate=0.3, pairs=[[9, 1], ["class3", "class5"]]))
    )
    assert set(map(tuple, paired.nonzero().tolist())) == {*((c, c) for c in range(10)), (9, 1), (3, 5)}


def test_random_labels_know_nothing_and_shuffled_ones_keep_the_counts(source_of, make):
    batch = in_order(source_of, make, part("random_labels"))
    assert (confusion(batch) - 0.1).abs().max() < 0.06
    assert torch.bincount(batch["label"]).unique().numel() > 1
    batch = in_order(source_of, make, part("shuffled_labels"))
    assert torch.bincount(batch["label"]).tolist() == [SAMPLES // 10] * 10
    assert abs((batch["label"] == batch["label_true"]).float().mean() - 0.1) < 0.03


def test_rates_of_none_and_of_all(source_of, make):
    batch = in_order(source_of, make, part("symmetric_noise", rate=0))
    assert torch.equal(batch["label"], batch["label_true"])
    batch = in_order(source_of, make, part("symmetric_noise", rate=1.0))
    assert (batch["label"] != batch["label_true"]).all()


def test_labels_depend_on_seed_and_sample_alone(source_of, make):
    noise = part("symmetric_noise", rate=0.4)
    expected = in_order(source_of, make, noise)
    by_index = expected["label"]

    def same(source):
        return all(torch.equal(by_index[batch["index"]], batch["label"]) for batch in source.batches(3))

    assert same(source_of(make(params=PARAMS, relabel=noise, batch_size=7)))
    assert same(source_of(make(name="other", params=PARAMS, relabel=noise, subset=part("random", amount=0.3))))
    assert all(same(source_of(make(params=PARAMS, relabel=noise), rank=rank, world_size=2)) for rank in range(2))
    assert not torch.equal(by_index, in_order(source_of, make, noise, seed=2)["label"])


def test_the_truth_and_other_sources_stay(make):
    data = {
        "train": make(params=PARAMS, relabel=part("random_labels")),
        "other": make(name="other", params=PARAMS),
        "eval": make(name="eval", split="test", params=PARAMS),
    }
    sources = build_sources(data, validation=0.1, seed=1, device="cpu", data_root="data")
    for name in ("validation", "other", "eval"):
        batch = collect(sources[name].evaluation_batches(512))
        assert torch.equal(batch["label"], batch["index"] % 10)
        assert "label_true" not in batch
    batch = collect(sources["train"].batches(0))
    assert torch.equal(batch["label_true"], batch["index"] % 10)
    assert not torch.equal(batch["label"], batch["label_true"])


def test_choices_are_made_by_the_truth(source_of, make):
    batch = in_order(source_of, make, part("random_labels"), subset=50, label_fraction=20)
    assert torch.bincount(batch["index"] % 10).tolist() == [5] * 10
    hidden = ~batch["labelled"]
    assert (batch["label"][hidden] == -100).all() and (batch["label_true"][hidden] == -100).all()
    assert torch.bincount(batch["label_true"][batch["labelled"]]).tolist() == [2] * 10


def test_partners_have_the_changed_label(source_of, make):
    source = source_of(make(params=PARAMS, relabel=part("random_labels"), views={"image": (part("mixup"),)}))
    batch = next(source.batches(0))
    assert torch.equal(batch["label_other"], batch["label"].roll(1))
    assert {name for name in source.field_specs()} == set(batch)
    assert set(describe_source(source.config, "data").fields) == set(batch)


@pytest.mark.parametrize(
    ("relabel", "message"),
    [
        (part("symmetric_noise", rate=1.2), r"relabel: symmetric_noise: rate must be in \[0, 1\], got 1.2"),
        (part("asymmetric_noise", rate=0.1, pairs=[["class1"]]), r"pairs must be a list of \[from, to\]"),
        (part("asymmetric_noise", rate=0.1, pairs=[["clas1", 2]]), "no class 'clas1'. Did you mean 'class1'"),
        (part("asymmetric_noise", rate=0.1, pairs=[[1, 2], [1, 3]]), "begins more than one pair"),
        (part("noise"), "no relabelling 'noise'"),
    ],
)
def test_mistakes_are_told_before_training(make, relabel, message):
    with pytest.raises(ConfigError, match=message):
        describe_source(make(params=PARAMS, relabel=relabel), "data")
