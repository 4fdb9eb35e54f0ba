"""Class-balanced choices."""

from __future__ import annotations

import pytest
import torch

from kdbench.data.sampling.split import amount_to_count, balanced_positions, class_quotas
from kdbench.errors import ConfigError
from kdbench.randomness import generator


def draw(labels, amount, classes, seed=1, positions=None):
    positions = torch.arange(len(labels)) if positions is None else positions
    return balanced_positions(labels, positions, amount, classes, generator(seed, "split", "x"), "train.yaml:1 labels")


def test_a_number_takes_equally_many_of_every_class():
    assert class_quotas([100, 100, 100], 30) == [10, 10, 10]
    assert class_quotas([100, 100, 100], 31) == [11, 10, 10]
    assert class_quotas([2, 100, 100], 30) == [2, 14, 14]
    assert class_quotas([5, 5], 10) == [5, 5]


def test_a_share_takes_the_same_share_of_every_class():
    assert class_quotas([100, 50, 10], 0.1) == [10, 5, 1]
    assert sum(class_quotas([33, 33, 34], 0.1)) == amount_to_count(100, 0.1) == 10
    assert class_quotas([7, 3], 1.0) == [7, 3]


def test_only_the_given_positions_are_chosen_once_and_sorted():
    labels = torch.arange(60) % 3
    positions = torch.arange(0, 60, 2)
    chosen = draw(labels, 12, 3, positions=positions)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(chosen.tolist()) <= set(positions.tolist())
    assert torch.bincount(labels[chosen]).tolist() == [4, 4, 4]


def test_the_choice_is_a_function_of_the_stream():
    labels = torch.arange(60) % 3
    assert torch.equal(draw(labels, 0.5, 3), draw(labels, 0.5, 3))
    assert not torch.equal(draw(labels, 0.5, 3), draw(labels, 0.5, 3, seed=2))


def test_every_sample_is_equally_likely():
    labels = torch.zeros(10, dtype=torch.int64)
    counts = sum(torch.bincount(draw(labels, 3, 1, seed=s), minlength=10) for s in range(600))
    assert 130 < counts.min() <= counts.max() < 230  # 180 expected


@pytest.mark.parametrize("amount", [0, -0.5, 1.5, 61])
def test_impossible_amounts_are_refused(amount):
    with pytest.raises(ConfigError, match=r"train.yaml:1 labels"):
        draw(torch.arange(60) % 3, amount, 3)
