"""The weigher that leaves out what a network takes for some classes."""

import pytest
import torch

from kdbench.errors import ConfigError
from kdbench.registry import SAMPLE_WEIGHTS


def test_only_samples_whose_first_choice_is_another_class_count():
    judge = torch.eye(5)[[0, 3, 1, 3, 4]].requires_grad_()
    weight = SAMPLE_WEIGHTS.build("outside", {"classes": [3, 4]})(judge)
    assert weight.tolist() == [1, 0, 1, 0, 0] and not weight.requires_grad


@pytest.mark.parametrize("classes", [[], [-1]])
def test_refuses_what_is_no_class(classes):
    with pytest.raises(ConfigError, match="lists class numbers"):
        SAMPLE_WEIGHTS.build("outside", {"classes": classes})
