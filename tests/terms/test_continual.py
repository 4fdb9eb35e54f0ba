"""Replay with class proxies: two batches as one, and the classes that count."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from kdbench.registry import TERMS


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEW, REPLAYED = random_logits(4, 5), random_logits(3, 5, seed=1)
NEW_LABEL, REPLAYED_LABEL = torch.tensor([0, 1, 1, 3]), torch.tensor([4, 0, 4])


def test_new_and_replayed_rows_count_as_one_batch():
    term = TERMS.build("proxy_contrastive", {"temperature": 0.5})
    joint = term(torch.cat([NEW, REPLAYED]), torch.cat([NEW_LABEL, REPLAYED_LABEL]))
    assert_close(term(NEW, NEW_LABEL, replayed=REPLAYED, replayed_label=REPLAYED_LABEL), joint)
    assert_close(term(REPLAYED, REPLAYED_LABEL, replayed=NEW, replayed_label=NEW_LABEL), joint)
    separate = (4 * term(NEW, NEW_LABEL) + 3 * term(REPLAYED, REPLAYED_LABEL)) / 7
    assert abs(float(separate - joint)) > 0.1, "control: separate batches have no negatives from each other"


def test_replayed_row_with_hidden_label_is_left_out():
    term = TERMS.build("proxy_contrastive", {})
    hidden = torch.tensor([4, -100, 4])
    labelled = torch.tensor([0, 2])
    expected = term(NEW, NEW_LABEL, replayed=REPLAYED[labelled], replayed_label=REPLAYED_LABEL[labelled])
    assert_close(term(NEW, NEW_LABEL, replayed=REPLAYED, replayed_label=hidden), expected)


def test_class_that_does_not_occur_gets_no_gradient():
    student = NEW.clone().requires_grad_()
    TERMS.build("proxy_contrastive", {})(
        student, NEW_LABEL, replayed=REPLAYED, replayed_label=REPLAYED_LABEL
    ).backward()
    assert (student.grad[:, 2] == 0).all()
    assert (student.grad[:, 4] != 0).all(), "class 4 occurs only among the replayed rows"


def test_proxy_distance_counts_the_classes_of_both_batches_as_often_as_they_occur():
    teacher = random_logits(3, 5, seed=2)
    term = TERMS.build("proxy_distance", {})
    columns = torch.cat([REPLAYED_LABEL, NEW_LABEL])
    expected = torch.nn.functional.mse_loss(REPLAYED[:, columns], teacher[:, columns])
    assert_close(term(REPLAYED, teacher, REPLAYED_LABEL, new_label=NEW_LABEL), expected)
    expected = torch.nn.functional.mse_loss(REPLAYED[:, REPLAYED_LABEL], teacher[:, REPLAYED_LABEL])
    assert_close(term(REPLAYED, teacher, REPLAYED_LABEL), expected)


def test_similarity_distribution_is_smallest_at_equality():
    features = random_logits(6, 3).requires_grad_()
    term = TERMS.build("similarity_distribution", {"temperature": 0.5})
    equal = term(features, features.detach())
    equal.backward()
    assert_close(features.grad, torch.zeros_like(features), atol=1e-9, rtol=0)
    for seed in range(3):
        assert term(features + 0.1 * random_logits(6, 3, seed=seed), features.detach()) > equal
    assert_close(term(3 * features, features.detach()), equal, msg="lengths do not matter")


def test_similarity_distribution_of_fewer_than_three_rows_is_zero():
    term = TERMS.build("similarity_distribution", {})
    assert float(term(random_logits(1, 3), random_logits(1, 3, seed=1))) == 0
    two_rows = term(random_logits(2, 3), random_logits(2, 3, seed=1))
    assert math.isclose(float(two_rows), 0, abs_tol=1e-12), "the distribution over one other row is constant"
