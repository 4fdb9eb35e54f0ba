"""Heads of continual learning: logits masked per task, and the nearest-mean classifier."""

import pytest
import torch

from kdbench.errors import ConfigError
from kdbench.registry import MODELS


def test_masked_classes_have_no_probability_and_no_gradient():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masked = MODELS.build("task_logits", {"keep": [1, 3]}, input_shape=(5,))(logits)
    assert torch.equal(masked[:, [1, 3]], logits[:, [1, 3]])
    torch.testing.assert_close(masked.softmax(1)[:, [1, 3]], logits[:, [1, 3]].softmax(1))
    assert (masked.softmax(1)[:, [0, 2, 4]] == 0).all()
    torch.nn.functional.cross_entropy(masked, torch.tensor([1, 3, 1, 3, 1, 3])).backward()
    assert logits.grad is not None and (logits.grad[:, [0, 2, 4]] == 0).all() and (logits.grad[:, [1, 3]] != 0).all()


def test_masked_classes_add_nothing_to_a_divergence_in_half_precision():
    student, teacher = torch.randn(2, 4, 5).bfloat16()
    head = MODELS.build("task_logits", {"keep": [0, 2]}, input_shape=(5,))
    log_p, log_q = (head(x).float().log_softmax(1) for x in (student, teacher))
    divergence = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True)
    assert torch.isfinite(divergence).all() and (divergence[:, [1, 3, 4]] == 0).all()


@pytest.mark.parametrize("keep", [[], [5], [-1, 2]])
def test_invalid_class_numbers_are_reported(keep):
    with pytest.raises(ConfigError, match="class numbers from 0 to 4"):
        MODELS.build("task_logits", {"keep": keep}, input_shape=(5,))


def test_the_nearest_mean_has_the_direction_of_the_feature():
    means = [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]
    model = MODELS.build("nearest_mean", {"means": means}, num_classes=3, input_shape=(2,))
    feature = torch.tensor([[5.0, 1.0], [0.1, 0.2], [-0.01, 0.0]])
    unit = torch.nn.functional.normalize(feature.double(), dim=1)
    expected = -torch.cdist(unit, torch.nn.functional.normalize(torch.tensor(means).double(), dim=1))
    torch.testing.assert_close(model(feature).double(), expected, rtol=1e-5, atol=1e-6)
    assert model(feature).argmax(1).tolist() == [0, 1, 2]


def test_nearest_mean_reports_means_and_features_of_the_wrong_shape():
    with pytest.raises(ConfigError, match="3 lists of 4 values"):
        MODELS.build("nearest_mean", {"means": [[1.0, 0.0]]}, num_classes=3, input_shape=(4,))
    with pytest.raises(ConfigError, match="the input must be a vector"):
        MODELS.build("nearest_mean", {}, num_classes=3, input_shape=(4, 2, 2))
