"""Class-balanced draws."""

from __future__ import annotations

import pytest
import torch

from kdbench.data.sampling.split import amount_to_count, balanced_indices, class_quotas
from kdbench.errors import ConfigError
from kdbench.randomness import generator


def draw(labels, amount, classes, seed=1, indices=None):
    indices = torch.arange(len(labels)) if indices is None else indices
    return balanced_indices(labels, indices, amount, classes, generator(seed, "split", "x"), "train.yaml:1 labels")


def test_number_takes_equally_many_of_every_class():
    assert class_quotas([100, 100, 100], 30) == [10, 10, 10]
    assert class_quotas([100, 100, 100], 31) == [11, 10, 10]
    assert class_quotas([2, 100, 100], 30) == [2, 14, 14]
    assert class_quotas([5, 5], 10) == [5, 5]


def test_fraction_takes_the_same_fraction_of_every_class():
    assert class_quotas([100, 50, 10], 0.1) == [10, 5, 1]
    assert sum(class_quotas([33, 33, 34], 0.1)) == amount_to_count(100, 0.1) == 10
    assert class_quotas([7, 3], 1.0) == [7, 3]


def test_drawn_indices_are_sorted_unique_and_among_the_candidates():
    labels = torch.arange(60) % 3
    candidates = torch.arange(0, 60, 2)
    indices = draw(labels, 12, 3, indices=candidates)
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert set(indices.tolist()) <= set(candidates.tolist())
    assert torch.bincount(labels[indices]).tolist() == [4, 4, 4]


def test_draw_is_a_function_of_the_stream():
    labels = torch.arange(60) % 3
    assert torch.equal(draw(labels, 0.5, 3), draw(labels, 0.5, 3))
    assert not torch.equal(draw(labels, 0.5, 3), draw(labels, 0.5, 3, seed=2))


def test_every_sample_is_equally_likely():
    labels = torch.zeros(10, dtype=torch.int64)
    counts = sum(torch.bincount(draw(labels, 3, 1, seed=s), minlength=10) for s in range(600))
    assert 130 < counts.min() <= counts.max() < 230  # 180 expected


@pytest.mark.parametrize("amount", [0, -0.5, 1.5, 61])
def test_impossible_amounts_are_rejected(amount):
    with pytest.raises(ConfigError, match=r"train.yaml:1 labels"):
        draw(torch.arange(60) % 3, amount, 3)
