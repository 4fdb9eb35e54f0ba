"""Merging of layers: the keys of a lower layer that remain."""

from __future__ import annotations

import pytest

from kdbench.config.compose.merge import merge, remove_key, stale_keys
from kdbench.config.compose.shorthand import contract, expand

SGD = {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}}


def test_mappings_merge_by_key_and_lists_replace():
    lower = {"a": {"x": 1, "y": 2}, "b": [1, 2]}
    assert merge(lower, {"a": {"y": 3}, "b": [4]}) == {"a": {"x": 1, "y": 3}, "b": [4]}
    assert lower == {"a": {"x": 1, "y": 2}, "b": [1, 2]}


def test_other_type_replaces_the_part():
    assert merge(SGD, {"optimizer": {"type": "AdamW", "lr": 1e-3}}) == {"optimizer": {"type": "AdamW", "lr": 1e-3}}
    assert merge(SGD, {"optimizer": {"type": "SGD", "lr": 1}})["optimizer"]["momentum"] == 0.9


def test_other_combiner_replaces_the_combination():
    lower = {"teacher": {"combine": "kdcl_naive", "of": ["a", "b"], "label": "train.label"}}
    upper = {"teacher": {"combine": "mean_logits", "of": ["a", "b"]}}
    assert merge(lower, upper) == upper
    assert merge(lower, {"teacher": {"combine": "kdcl_naive", "of": ["a", "c"]}})["teacher"]["label"] == "train.label"


def test_weights_of_another_kind_replace_and_steps_replace_epochs():
    lower = {"teacher": {"weights": {"recipe": "a", "model": "b"}}, "epochs": 3}
    upper = {"teacher": {"weights": {"path": "x.pt"}}, "steps": 5}
    assert merge(lower, upper) == {"teacher": {"weights": {"path": "x.pt"}}, "steps": 5}


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (SGD, {"optimizer": {"type": "AdamW", "lr": 1e-3}}),
        ({"epochs": 3}, {"steps": 5}),
        ({"terms": {"a": {"type": "kd", "temperature": 2}}}, {"terms": {"a": {"type": "dkd", "alpha": 1}}}),
        ({"data": {"e": {"dataset": {"type": "x", "p": 1}}}}, {"data": {"e": {"dataset": {"type": "y"}}}}),
    ],
)
def test_plain_merge_without_stale_keys_equals_merge(lower: dict, upper: dict):
    def plain(a: dict, b: dict) -> dict:
        inner = {k: plain(a[k], v) if isinstance(v, dict) and isinstance(a.get(k), dict) else v for k, v in b.items()}
        return {**a, **inner}

    mixed = plain(lower, upper)
    for key in stale_keys(lower, upper):
        remove_key(mixed, key)
    assert mixed == merge(lower, upper)


SHORT = {
    "student": "resnet20",
    "models": {"a": "x", "b": {"model": "y", "input": "a:z"}},
    "dataset": "digits",
    "data": {"e": "digits", "n": {"type": "gaussian"}, "v": {"dataset": "digits", "augment": ["flip"]}},
    "augment": {"image": ["flip"], "other": [{"type": "crop", "padding": 2}]},
    "terms": {"ce": "cross_entropy", "kd": {"type": "kd", "temperature": 2}},
    "stages": {"s": {"optimizer": "SGD", "student": "z"}},
}


def test_expansion_and_contraction_are_inverse():
    long = expand(SHORT)
    assert long["student"] == {"model": {"type": "resnet20"}}
    assert long["data"]["e"] == {"dataset": {"type": "digits"}}
    assert long["stages"]["s"]["optimizer"] == {"type": "SGD"}
    assert expand(long) == long
    assert contract(long) == {**SHORT, "data": {**SHORT["data"], "n": {"type": "gaussian"}}}
