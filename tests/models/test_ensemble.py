"""The ensemble model `mean_output`."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from kdbench.registry import MODELS


@pytest.mark.parametrize("shape", [(4, 10), (4, 3, 2, 2)])
def test_mean_output_averages_its_inputs_without_parameters(shape):
    model = MODELS.build("mean_output", {})
    outputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    result = model(*outputs)
    assert_close(result, (outputs[0] + outputs[1] + outputs[2]) / 3)
    result.sum().backward()
    assert all((output.grad - 1 / 3).abs().max() < 1e-12 for output in outputs)
    assert not list(model.parameters()) and not model.state_dict()
