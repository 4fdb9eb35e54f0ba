"""Adapters: result shape, gradients, and the messages for shapes that an adapter cannot map."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from kdbench.registry import ADAPTERS, TERMS

SUITABLE = [
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

UNSUITABLE = [
    ("identity", (3, 4, 4), (3, 2, 2), "linear or mlp for vectors"),
    ("linear", (3, 4, 4), (6, 4, 4), "Use conv1x1 or conv_regressor"),
    ("linear", (5, 6), (4, 6), "tokens"),
    ("mlp", (3, 4, 4), (10,), "vectors"),
    ("conv1x1", (3, 4, 4), (6, 2, 2), "4x4 to 2x2"),
    ("conv1x1", (10,), (6,), "Use linear or mlp"),
    ("conv_regressor", (10,), (6, 2, 2), "feature maps"),
    ("conv_regressor", (3, 3, 3), (6, 8, 8), "cannot map 3x3 to 8x8"),
    ("conv_regressor", (3, 8, 4), (6, 4, 8), "cannot map 8x4 to 4x8"),
]


def build_adapter(name, source, target, **params):
    return ADAPTERS.build(name, params, source=source, target=target)


@pytest.mark.parametrize(("name", "source", "target", "params"), SUITABLE)
def test_result_has_the_target_shape_and_every_parameter_gets_a_gradient(name, source, target, params):
    torch.manual_seed(0)
    adapter = build_adapter(name, source, target, **params)
    features = torch.randn(4, *source, requires_grad=True)
    result = adapter(features)
    assert result.shape == (4, *target)
    result.square().sum().backward()
    assert features.grad.abs().sum() > 0
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize(("name", "source", "target", "message"), UNSUITABLE)
def test_unsuitable_shapes_raise(name, source, target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_adapter(name, source, target)


def test_hidden_width_below_one_raises():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        build_adapter("mlp", (4,), (4,), hidden=0)


def test_conv1x1_is_equal_at_every_position():
    torch.manual_seed(0)
    adapter = build_adapter("conv1x1", (6, 4, 5), (3, 4, 5))
    features = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(adapter(features.flip(2, 3)), adapter(features).flip(2, 3))


def test_conv_regressor_normalises_and_ends_with_an_optional_relu():
    torch.manual_seed(0)
    features = 7 + 5 * torch.randn(8, 6, 4, 4)
    without_relu = build_adapter("conv_regressor", (6, 4, 4), (3, 4, 4), relu=False)(features)
    torch.testing.assert_close(without_relu.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert build_adapter("conv_regressor", (6, 4, 4), (3, 4, 4))(features).min() >= 0
    assert build_adapter("conv1x1", (6, 4, 4), (3, 4, 4), batch_norm=True).projection[0].bias is None


def test_default_adapter_of_every_term_is_registered():
    names = [entry.facts["adapter"] for entry in TERMS.entries.values() if "adapter" in entry.facts]
    assert names
    assert set(names) <= set(ADAPTERS.entries)


def test_every_adapter_has_injected_shapes_and_a_summary():
    for entry in ADAPTERS.entries.values():
        assert entry.facts["injected"] == ("source", "target")
        assert 10 < len(entry.summary) <= 120
        assert issubclass(entry.load(), nn.Module)
