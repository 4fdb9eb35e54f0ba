"""Subsets: the formula's samples, disjoint where they should be, by the seed alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kdbench.config.schema import PartConfig
from kdbench.data.describe import describe_source
from kdbench.data.loading.build import build_sources
from kdbench.data.sampling.subsets import ClientShard, LongTailSubset
from kdbench.errors import ConfigError
from kdbench.randomness import generator

SAMPLES = 200
EVERYTHING = list(range(SAMPLES))


def kept(source_of, make, *steps, seed=1, **options):
    """The positions that a source with these steps gives, of 200 samples in 10 classes (label = position % 10)."""
    subset = steps[0] if len(steps) == 1 else steps
    source = source_of(make(batch_size=1, params={"samples": SAMPLES}, subset=subset), seed=seed, **options)
    assert source.num_samples == len(source.positions)
    return source.positions.tolist()


def counts(positions):
    return torch.bincount(torch.tensor(positions) % 10, minlength=10).tolist()


def part(kind, **params):
    return PartConfig(type=kind, params=params)


def test_the_number_and_its_part_are_one(source_of, make):
    for amount in (30, 0.25):
        assert kept(source_of, make, amount) == kept(source_of, make, part("balanced", amount=amount))


@pytest.mark.parametrize("kind", ["balanced", "random"])
@pytest.mark.parametrize("amount", [30, 0.25])
def test_a_draw_and_its_rest_are_disjoint_and_the_whole(source_of, make, kind, amount):
    drawn = kept(source_of, make, part(kind, amount=amount))
    rest = kept(source_of, make, part(kind, amount=amount, rest=True))
    assert len(drawn) == (30 if amount == 30 else 50)
    assert sorted(drawn + rest) == EVERYTHING
    assert drawn != kept(source_of, make, part(kind, amount=amount), seed=2)


def test_random_disregards_classes_and_balanced_does_not(source_of, make):
    assert counts(kept(source_of, make, part("balanced", amount=50))) == [5] * 10
    assert counts(kept(source_of, make, part("random", amount=50))) != [5] * 10


def test_random_may_draw_among_some_classes_only(source_of, make):
    """Forgetting half of class 3: the retain set has the other half and all other classes."""
    forget = kept(source_of, make, part("random", amount=0.5, classes=[3]))
    retain = kept(source_of, make, part("random", amount=0.5, classes=["class3"], rest=True))
    assert counts(forget) == [0, 0, 0, 10, 0, 0, 0, 0, 0, 0]
    assert sorted(forget + retain) == EVERYTHING


def test_classes_by_number_and_by_name(source_of, make):
    old = kept(source_of, make, part("classes", keep=[0, "class1"]))
    assert old == [p for p in EVERYTHING if p % 10 < 2]
    new = kept(source_of, make, part("classes", keep=[0, 1], rest=True))
    assert sorted(old + new) == EVERYTHING


def test_a_long_tail_is_exponential(source_of, make):
    ratio = 0.1
    expected = [math.floor(20 * ratio ** (c / 9) + 1e-9) for c in range(10)]
    assert expected[0] == 20 and expected[-1] == 2
    assert counts(kept(source_of, make, part("long_tail", ratio=ratio))) == expected
    assert counts(kept(source_of, make, part("long_tail", ratio=1))) == [20] * 10


def test_a_long_tail_takes_no_more_than_a_class_has():
    labels = torch.tensor([0] * 3 + [1] * 30 + [2] * 30)
    chosen = LongTailSubset(0.5).select(labels, torch.arange(63), 3, generator(1, "split"))
    assert torch.bincount(labels[chosen]).tolist() == [3, math.floor(21 * 0.5**0.5), 10]


@pytest.mark.parametrize(
    "scheme", [{}, {"scheme": "dirichlet", "alpha": 0.3}, {"scheme": "classes"}, {"scheme": "classes", "slices": 3}]
)
@pytest.mark.parametrize("of", [1, 3, 7])
def test_shards_are_disjoint_and_together_the_whole(source_of, make, scheme, of):
    shards = [kept(source_of, make, part("shard", of=of, number=k, **scheme)) for k in range(of)]
    assert all(shards)
    assert sorted(itertools.chain(*shards)) == EVERYTHING
    if of > 1:
        assert shards[0] != kept(source_of, make, part("shard", of=of, number=0, **scheme), seed=2)


def test_iid_shards_are_of_equal_size(source_of, make):
    sizes = [len(kept(source_of, make, part("shard", of=7, number=k))) for k in range(7)]
    assert max(sizes) - min(sizes) <= 1
    for number, size in enumerate(sizes):
        assert ClientShard(7, number).size(SAMPLES) == size


def test_shards_by_class_see_few_classes(source_of, make):
    for number in range(5):
        seen = counts(kept(source_of, make, part("shard", of=5, number=number, scheme="classes", slices=2)))
        assert sum(count > 0 for count in seen) == 2 and sum(seen) == 40


def test_a_small_alpha_gives_clients_few_classes_and_a_large_one_all():
    """The mean entropy of a client's classes follows Dirichlet(alpha); at large alpha it is that of the whole."""
    labels = torch.arange(2000) % 10

    def entropy(alpha):
        owners = ClientShard(5, 0, "dirichlet", alpha).client_ids(labels, 10, generator(1, "split"))
        found = 0.0
        for client in range(5):
            share = torch.bincount(labels[owners == client], minlength=10).double()
            share = share / share.sum()
            found -= float(torch.xlogy(share, share).sum()) / 5
        return found

    assert entropy(0.05) < 0.6 * math.log(10)
    assert entropy(0.05) < entropy(0.5) < entropy(1000)
    assert entropy(1000) > 0.99 * math.log(10)


def test_steps_are_applied_in_order(source_of, make):
    some = part("classes", keep=[0, 1, 2])
    both = kept(source_of, make, some, part("random", amount=20))
    assert len(both) == 20 and all(p % 10 < 3 for p in both)
    other = kept(source_of, make, part("random", amount=20), some)
    assert len(other) < 20
    clients = [
        kept(source_of, make, part("random", amount=0.2, rest=True), part("shard", of=3, number=k)) for k in range(3)
    ]
    public = kept(source_of, make, part("random", amount=0.2))
    assert sorted(itertools.chain(public, *clients)) == EVERYTHING


def test_no_private_sample_reaches_another_client(make):
    """By `index`, which is the position in the split, over a whole epoch of every source."""
    data = {
        f"client{k}": make(
            name=f"client{k}",
            batch_size=8,
            params={"samples": SAMPLES},
            subset=part("shard", of=4, number=k, alpha=1.0),
        )
        for k in range(4)
    }
    data["eval"] = make(name="eval", split="test")
    sources = build_sources(data, validation=None, seed=3, device="cpu", data_root="data")
    seen = {}
    for name in list(data)[:4]:
        index = torch.cat([batch["index"] for batch in sources[name].batches(0)])
        assert torch.equal(index.sort().values, sources[name].positions)
        assert sources[name].positions.dtype == torch.int64
        seen[name] = set(index.tolist())
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other
    assert set().union(*seen.values()) == set(EVERYTHING)


def test_ranks_and_the_name_of_the_source_change_nothing(source_of, make):
    for step in (
        part("shard", of=3, number=1, scheme="dirichlet"),
        part("random", amount=0.5),
        part("long_tail", ratio=0.2),
    ):
        expected = kept(source_of, make, step)
        assert all(kept(source_of, make, step, world_size=2, rank=rank) == expected for rank in range(2))
        other = source_of(make(name="other", batch_size=1, params={"samples": SAMPLES}, subset=step))
        assert other.positions.tolist() == expected


def test_what_is_held_out_reaches_no_shard(make):
    data = {
        name: make(name=name, batch_size=4, params={"samples": SAMPLES}, subset=part("shard", of=2, number=k))
        for k, name in enumerate(("train", "other"))
    }
    sources = build_sources(data, validation=0.2, seed=1, device="cpu", data_root="data")
    held_out = sources["validation"].positions.tolist()
    shards = [sources[name].positions.tolist() for name in data]
    assert len(held_out) == 40
    assert sorted(itertools.chain(held_out, *shards)) == EVERYTHING


def test_the_size_is_known_before_labels_are_where_it_can_be(source_of, make):
    known = (
        part("balanced", amount=30, rest=True),
        part("random", amount=0.3),
        part("shard", of=7, number=6),
        (part("random", amount=0.3, rest=True), part("shard", of=3, number=1), 0.5),
    )
    for subset in known:
        config = make(batch_size=1, params={"samples": SAMPLES}, subset=subset)
        spec = describe_source(config, "data")
        assert (spec.samples, spec.population) == (source_of(config).num_samples, SAMPLES)
    for subset in (part("classes", keep=[1]), part("shard", of=2, scheme="dirichlet"), part("long_tail", ratio=0.1)):
        assert describe_source(make(params={"samples": SAMPLES}, subset=subset), "data").samples is None


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (part("shard", of=2, number=2), r"subset: shard: number must be from 0 to 1 \(there are 2 shards\), got 2"),
        (part("shard", of=0), "of must be at least 1"),
        (part("shard", of=2, alpha=0), "alpha must be above 0"),
        (part("shard", of=2, slices=0), "slices must be at least 1"),
        (part("long_tail", ratio=100), "write an imbalance of 100 as 0.01"),
        (part("classes", keep=[10]), "no class 10; there are 10, numbered from 0"),
        (part("classes", keep=["clas3"]), "no class 'clas3'. Did you mean 'class3'"),
        (part("classes", keep=[]), "at least one class"),
        (part("random", amount=1.5), r"amount must be a share in \(0, 1\]"),
        (part("shards", of=2), "no subset 'shards'"),
    ],
)
def test_mistakes_are_told_before_training(make, subset, message):
    config = make(params={"samples": SAMPLES}, subset=subset)
    for call in (
        lambda: describe_source(config, "data"),
        lambda: build_sources({"train": config}, validation=None, seed=1, device="cpu", data_root="data"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "data.train" in str(caught.value)


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (part("random", amount=400), "random: 400 samples were asked for, but there are only 200"),
        (part("random", amount=30, classes=[1]), "30 samples were asked for, but there are only 20"),
        (part("shard", of=300), "200 samples are too few for 300 shards"),
        (part("shard", of=150, scheme="classes"), "too few for 150 shards of 2 slices"),
        (part("shard", of=150, scheme="dirichlet", alpha=0.01), "leaves one of 150 shards without any sample"),
    ],
)
def test_too_few_samples_are_told(source_of, make, subset, message):
    with pytest.raises(ConfigError, match=message):
        kept(source_of, make, subset)
