"""Replay with proxies: two batches that count as one, and which classes count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Size
from torch.testing import assert_close

from kdbench.registry import TERMS


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEW, OLD = logits(4, 5), logits(3, 5, seed=1)
NEW_LABEL, OLD_LABEL = torch.tensor([0, 1, 1, 3]), torch.tensor([4, 0, 4])


def test_new_and_replayed_rows_count_as_one_batch():
    term = TERMS.build("proxy_contrastive", {"temperature": 0.5})
    together = term(torch.cat([NEW, OLD]), torch.cat([NEW_LABEL, OLD_LABEL]))
    assert_close(term(NEW, NEW_LABEL, replayed=OLD, replayed_label=OLD_LABEL), together)
    assert_close(term(OLD, OLD_LABEL, replayed=NEW, replayed_label=NEW_LABEL), together)
    apart = (4 * term(NEW, NEW_LABEL) + 3 * term(OLD, OLD_LABEL)) / 7
    assert abs(float(apart - together)) > 0.1, "apart, neither batch is held away from the other's classes"


def test_a_replayed_row_without_a_label_counts_nowhere():
    term = TERMS.build("proxy_contrastive", {})
    hidden = torch.tensor([4, -100, 4])
    kept = torch.tensor([0, 2])
    left_out = term(NEW, NEW_LABEL, replayed=OLD[kept], replayed_label=OLD_LABEL[kept])
    assert_close(term(NEW, NEW_LABEL, replayed=OLD, replayed_label=hidden), left_out)


def test_a_class_that_does_not_occur_gets_no_gradient():
    student = NEW.clone().requires_grad_()
    TERMS.build("proxy_contrastive", {})(student, NEW_LABEL, replayed=OLD, replayed_label=OLD_LABEL).backward()
    assert (student.grad[:, 2] == 0).all() and (student.grad[:, 4] != 0).all(), "4 occurs among the replayed alone"


def test_the_distance_of_proxies_counts_the_classes_of_both_batches_as_often_as_they_occur():
    teacher = logits(3, 5, seed=2)
    told = TERMS.build("proxy_distance", {})(OLD, teacher, OLD_LABEL, new_label=NEW_LABEL)
    columns = torch.cat([OLD_LABEL, NEW_LABEL])
    assert_close(told, torch.nn.functional.mse_loss(OLD[:, columns], teacher[:, columns]))
    alone = TERMS.build("proxy_distance", {})(OLD, teacher, OLD_LABEL)
    assert_close(alone, torch.nn.functional.mse_loss(OLD[:, OLD_LABEL], teacher[:, OLD_LABEL]))


def test_the_distribution_of_similarities_is_least_where_nothing_changed():
    features = logits(6, 3).requires_grad_()
    term = TERMS.build("similarity_distribution", {"temperature": 0.5})
    at_rest = term(features, features.detach())
    at_rest.backward()
    assert_close(features.grad, torch.zeros_like(features), atol=1e-9, rtol=0)
    for seed in range(3):
        assert term(features + 0.1 * logits(6, 3, seed=seed), features.detach()) > at_rest
    assert_close(term(3 * features, features.detach()), at_rest, msg="lengths do not matter")


def test_one_row_has_nobody_to_be_compared_with():
    term = TERMS.build("similarity_distribution", {})
    assert float(term(logits(1, 3), logits(1, 3, seed=1))) == 0
    two = term(logits(2, 3), logits(2, 3, seed=1))
    assert math.isclose(float(two), 0, abs_tol=1e-12), "with one other row there is no choice"


def test_half_of_what_is_replayed_is_refused():
    term = TERMS.build("proxy_contrastive", {})
    with pytest.raises(ValueError, match="give both or neither"):
        term.check_shapes(student=Size((4, 5)), label=Size((4,)), replayed=Size((3, 5)))
    with pytest.raises(ValueError, match="5 classes and the teacher 6"):
        term.check_shapes(student=Size((4, 5)), replayed=Size((3, 6)), replayed_label=Size((3,)))
