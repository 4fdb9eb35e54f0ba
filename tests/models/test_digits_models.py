"""The CNN and the MLP of the digits recipes."""

import pytest
import torch

from kdbench.registry import MODELS


@pytest.mark.parametrize(("name", "parameters"), [("digits_cnn", 42_698), ("digits_mlp", 5_962)])
def test_parameter_count_is_that_of_the_docstring(name, parameters):
    model = MODELS.build(name, {})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{round(parameters / 1000)} thousand" in MODELS.entry(name).summary
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_mlp_accepts_other_image_sizes_and_widths():
    model = MODELS.build("digits_mlp", {"hidden": 5, "image_size": 4, "in_channels": 3}, num_classes=2)
    assert model.layer1(torch.zeros(2, 48)).shape == (2, 5)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 2)
