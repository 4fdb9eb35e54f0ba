"""Subsets: the sizes of the formulas, disjoint parts, and no dependence on anything but the seed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers.data_sources import open_source, part_config, source_config, training_batches
from kdbench.data.describe import describe_source
from kdbench.data.loading.build import build_sources
from kdbench.data.sampling.subsets import ClientShard, LongTailSubset
from kdbench.errors import ConfigError
from kdbench.randomness import generator

SAMPLES = 200
PARAMS = {"samples": SAMPLES}
ALL_INDICES = list(range(SAMPLES))


def select(*steps, seed=1, **options):
    """Returns the indices of a source with these subsets, of 200 samples in 10 classes (label = index % 10)."""
    subset = steps[0] if len(steps) == 1 else steps
    source = open_source(source_config(batch_size=1, params=PARAMS, subset=subset), seed=seed, **options)
    assert source.num_samples == len(source.indices)
    return source.indices.tolist()


def class_counts(indices):
    return torch.bincount(torch.tensor(indices) % 10, minlength=10).tolist()


def test_amount_is_short_for_balanced():
    for amount in (30, 0.25):
        assert select(amount) == select(part_config("balanced", amount=amount))


@pytest.mark.parametrize("kind", ["balanced", "random"])
@pytest.mark.parametrize("amount", [30, 0.25])
def test_draw_and_its_rest_are_disjoint_and_together_the_split(kind, amount):
    draw = select(part_config(kind, amount=amount))
    rest = select(part_config(kind, amount=amount, rest=True))
    assert len(draw) == (30 if amount == 30 else 50)
    assert sorted(draw + rest) == ALL_INDICES
    assert draw != select(part_config(kind, amount=amount), seed=2)


def test_balanced_draws_equally_from_all_classes_and_random_does_not():
    assert class_counts(select(part_config("balanced", amount=50))) == [5] * 10
    assert class_counts(select(part_config("random", amount=50))) != [5] * 10


def test_random_may_draw_from_some_classes_only():
    """Forgets half of class 3: the retain set has the other half and all other classes."""
    forget = select(part_config("random", amount=0.5, classes=[3]))
    retain = select(part_config("random", amount=0.5, classes=["class3"], rest=True))
    assert class_counts(forget) == [0, 0, 0, 10, 0, 0, 0, 0, 0, 0]
    assert sorted(forget + retain) == ALL_INDICES


def test_classes_are_selected_by_number_and_by_name():
    selected = select(part_config("classes", keep=[0, "class1"]))
    assert selected == [index for index in ALL_INDICES if index % 10 < 2]
    rest = select(part_config("classes", keep=[0, 1], rest=True))
    assert sorted(selected + rest) == ALL_INDICES


def test_long_tail_is_exponential():
    ratio = 0.1
    expected = [math.floor(20 * ratio ** (c / 9) + 1e-9) for c in range(10)]
    assert expected[0] == 20 and expected[-1] == 2
    assert class_counts(select(part_config("long_tail", ratio=ratio))) == expected
    assert class_counts(select(part_config("long_tail", ratio=1))) == [20] * 10


def test_long_tail_takes_no_more_than_a_class_has():
    labels = torch.tensor([0] * 3 + [1] * 30 + [2] * 30)
    indices = LongTailSubset(0.5).select(labels, torch.arange(63), 3, generator(1, "split"))
    assert torch.bincount(labels[indices]).tolist() == [3, math.floor(21 * 0.5**0.5), 10]


@pytest.mark.parametrize(
    "scheme", [{}, {"scheme": "dirichlet", "alpha": 0.3}, {"scheme": "classes"}, {"scheme": "classes", "slices": 3}]
)
@pytest.mark.parametrize("of", [1, 3, 7])
def test_shards_are_disjoint_and_together_the_split(scheme, of):
    shards = [select(part_config("shard", of=of, number=k, **scheme)) for k in range(of)]
    assert all(shards)
    assert sorted(itertools.chain(*shards)) == ALL_INDICES
    if of > 1:
        assert shards[0] != select(part_config("shard", of=of, number=0, **scheme), seed=2)


def test_iid_shards_are_of_equal_size():
    sizes = [len(select(part_config("shard", of=7, number=k))) for k in range(7)]
    assert max(sizes) - min(sizes) <= 1
    for number, size in enumerate(sizes):
        assert ClientShard(7, number).size(SAMPLES) == size


def test_shards_of_the_scheme_classes_have_few_classes():
    for number in range(5):
        counts = class_counts(select(part_config("shard", of=5, number=number, scheme="classes", slices=2)))
        assert sum(count > 0 for count in counts) == 2 and sum(counts) == 40


def test_small_alpha_gives_clients_few_classes_and_large_alpha_all():
    """At large alpha the mean entropy of a client's classes is that of the full split."""
    labels = torch.arange(2000) % 10

    def mean_entropy(alpha):
        clients = ClientShard(5, 0, "dirichlet", alpha).client_ids(labels, 10, generator(1, "split"))
        entropy = 0.0
        for client in range(5):
            frequencies = torch.bincount(labels[clients == client], minlength=10).double()
            frequencies = frequencies / frequencies.sum()
            entropy -= float(torch.xlogy(frequencies, frequencies).sum()) / 5
        return entropy

    assert mean_entropy(0.05) < 0.6 * math.log(10)
    assert mean_entropy(0.05) < mean_entropy(0.5) < mean_entropy(1000)
    assert mean_entropy(1000) > 0.99 * math.log(10)


def test_subsets_of_a_list_are_applied_in_order():
    classes, draw = part_config("classes", keep=[0, 1, 2]), part_config("random", amount=20)
    indices = select(classes, draw)
    assert len(indices) == 20 and all(index % 10 < 3 for index in indices)
    assert len(select(draw, classes)) < 20
    private = part_config("random", amount=0.2, rest=True)
    clients = [select(private, part_config("shard", of=3, number=k)) for k in range(3)]
    public = select(part_config("random", amount=0.2))
    assert sorted(itertools.chain(public, *clients)) == ALL_INDICES


def test_clients_have_disjoint_samples_over_a_whole_epoch():
    data = {
        f"client{k}": source_config(
            name=f"client{k}",
            batch_size=8,
            params=PARAMS,
            subset=part_config("shard", of=4, number=k, alpha=1.0),
        )
        for k in range(4)
    }
    data["eval"] = source_config(name="eval", split="test")
    sources = build_sources(data, validation=None, seed=3, device="cpu", data_root="data")
    clients = []
    for name in list(data)[:4]:
        index = torch.cat([batch["index"] for batch in training_batches(sources[name], 0)])
        assert torch.equal(index.sort().values, sources[name].indices)
        assert sources[name].indices.dtype == torch.int64
        clients.append(set(index.tolist()))
    for first, second in itertools.combinations(clients, 2):
        assert not first & second
    assert set().union(*clients) == set(ALL_INDICES)


def test_subset_does_not_depend_on_ranks_and_the_name_of_the_source():
    for subset in (
        part_config("shard", of=3, number=1, scheme="dirichlet"),
        part_config("random", amount=0.5),
        part_config("long_tail", ratio=0.2),
    ):
        expected = select(subset)
        assert all(select(subset, world_size=2, rank=rank) == expected for rank in range(2))
        config = source_config(name="other", batch_size=1, params=PARAMS, subset=subset)
        assert open_source(config).indices.tolist() == expected


def test_validation_samples_are_in_no_shard():
    data = {
        name: source_config(name=name, batch_size=4, params=PARAMS, subset=part_config("shard", of=2, number=k))
        for k, name in enumerate(("train", "other"))
    }
    sources = build_sources(data, validation=0.2, seed=1, device="cpu", data_root="data")
    validation = sources["validation"].indices.tolist()
    shards = [sources[name].indices.tolist() for name in data]
    assert len(validation) == 40
    assert sorted(itertools.chain(validation, *shards)) == ALL_INDICES


def test_size_is_described_unless_it_depends_on_labels():
    for subset in (
        part_config("balanced", amount=30, rest=True),
        part_config("random", amount=0.3),
        part_config("shard", of=7, number=6),
        (part_config("random", amount=0.3, rest=True), part_config("shard", of=3, number=1), 0.5),
    ):
        config = source_config(batch_size=1, params=PARAMS, subset=subset)
        spec = describe_source(config, "data")
        assert (spec.samples, spec.population) == (open_source(config).num_samples, SAMPLES)
    for subset in (
        part_config("classes", keep=[1]),
        part_config("shard", of=2, scheme="dirichlet"),
        part_config("long_tail", ratio=0.1),
    ):
        assert describe_source(source_config(params=PARAMS, subset=subset), "data").samples is None


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (
            part_config("shard", of=2, number=2),
            r"subset: shard: number must be from 0 to 1 \(there are 2 shards\), got 2",
        ),
        (part_config("shard", of=0), "of must be at least 1"),
        (part_config("shard", of=2, alpha=0), "alpha must be above 0"),
        (part_config("shard", of=2, slices=0), "slices must be at least 1"),
        (part_config("long_tail", ratio=100), "write an imbalance of 100 as 0.01"),
        (part_config("classes", keep=[10]), "there is no class 10; classes are numbered from 0 to 9"),
        (part_config("classes", keep=["clas3"]), "no class 'clas3'. Did you mean 'class3'"),
        (part_config("classes", keep=[]), "at least one class"),
        (part_config("random", amount=1.5), r"amount must be a fraction in \(0, 1\]"),
        (part_config("shards", of=2), "no subset 'shards'"),
    ],
)
def test_configuration_errors_are_raised_by_the_description_and_the_source(subset, message):
    config = source_config(params=PARAMS, subset=subset)
    for call in (lambda: describe_source(config, "data"), lambda: open_source(config)):
        with pytest.raises(ConfigError, match=message) as error:
            call()
        assert "data.train" in str(error.value)


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (part_config("random", amount=400), "random: 400 samples were asked for, but there are only 200"),
        (part_config("random", amount=30, classes=[1]), "30 samples were asked for, but there are only 20"),
        (part_config("shard", of=300), "200 samples are too few for 300 shards"),
        (part_config("shard", of=150, scheme="classes"), "too few for 150 shards of 2 slices"),
        (part_config("shard", of=150, scheme="dirichlet", alpha=0.01), "leaves one of 150 shards without any sample"),
    ],
)
def test_too_few_samples_are_rejected(subset, message):
    with pytest.raises(ConfigError, match=message):
        select(subset)
