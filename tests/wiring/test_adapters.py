"""Adapters: they make the target's shape, learn, and refuse what they cannot do in words."""

import re

import pytest
import torch
from torch import nn

from kdbench.registry import ADAPTERS, TERMS

FITS = [
    ("identity", (3, 4, 4), (3, 4, 4), {}),
    ("linear", (6,), (4,), {}),
    ("linear", (6,), (4,), {"bias": False}),
    ("linear", (5, 6), (5, 4), {}),
    ("mlp", (6,), (4,), {}),
    ("mlp", (5, 6), (5, 4), {"hidden": 9}),
    ("conv1x1", (6, 4, 5), (3, 4, 5), {}),
    ("conv1x1", (6, 4, 5), (3, 4, 5), {"batch_norm": True}),
    ("conv_regressor", (6, 4, 4), (3, 4, 4), {}),
    ("conv_regressor", (6, 8, 4), (3, 4, 2), {}),
    ("conv_regressor", (6, 4, 2), (3, 8, 4), {}),
    ("conv_regressor", (6, 7, 5), (3, 4, 5), {"relu": False}),
    ("conv_regressor", (6, 2, 1), (3, 1, 1), {}),
]

REFUSED = [
    ("identity", (3, 4, 4), (3, 2, 2), "linear or mlp for vectors"),
    ("linear", (3, 4, 4), (6, 4, 4), "Take conv1x1 or conv_regressor"),
    ("linear", (5, 6), (4, 6), "tokens"),
    ("mlp", (3, 4, 4), (10,), "vectors"),
    ("conv1x1", (3, 4, 4), (6, 2, 2), "4x4 and 2x2"),
    ("conv1x1", (10,), (6,), "Take linear or mlp"),
    ("conv_regressor", (10,), (6, 2, 2), "feature maps"),
    ("conv_regressor", (3, 3, 3), (6, 8, 8), "cannot make 8x8 of 3x3"),
    ("conv_regressor", (3, 8, 4), (6, 4, 8), "cannot make 4x8 of 8x4"),
]


def build(name, source, target, **params):
    return ADAPTERS.build(name, params, source=source, target=target)


@pytest.mark.parametrize(("name", "source", "target", "params"), FITS)
def test_makes_the_shape_of_the_target_and_learns(name, source, target, params):
    torch.manual_seed(0)
    adapter = build(name, source, target, **params)
    features = torch.randn(4, *source, requires_grad=True)
    out = adapter(features)
    assert out.shape == (4, *target)
    out.square().sum().backward()
    assert features.grad.abs().sum() > 0
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize(("name", "source", "target", "words"), REFUSED)
def test_refuses_in_words(name, source, target, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build(name, source, target)


def test_a_hidden_width_below_one_is_refused():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        build("mlp", (4,), (4,), hidden=0)


def test_one_by_one_acts_on_each_place_alike():
    torch.manual_seed(0)
    adapter = build("conv1x1", (6, 4, 5), (3, 4, 5))
    features = torch.randn(2, 6, 4, 5)
    moved = adapter(features.flip(2, 3))
    torch.testing.assert_close(moved, adapter(features).flip(2, 3))


def test_the_regressor_normalises_and_ends_in_relu_on_request():
    torch.manual_seed(0)
    features = 7 + 5 * torch.randn(8, 6, 4, 4)
    plain = build("conv_regressor", (6, 4, 4), (3, 4, 4), relu=False)(features)
    torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert build("conv_regressor", (6, 4, 4), (3, 4, 4))(features).min() >= 0
    assert build("conv1x1", (6, 4, 4), (3, 4, 4), batch_norm=True).projection[0].bias is None


def test_the_default_adapter_of_every_term_is_registered():
    named = [entry.facts["adapter"] for entry in TERMS.entries.values() if "adapter" in entry.facts]
    assert named
    assert set(named) <= set(ADAPTERS.entries)


def test_every_adapter_takes_the_shapes_from_the_plan_and_has_a_summary():
    for entry in ADAPTERS.entries.values():
        assert entry.facts["injected"] == ("source", "target")
        assert 10 < len(entry.summary) <= 120
        assert issubclass(entry.load(), nn.Module)
