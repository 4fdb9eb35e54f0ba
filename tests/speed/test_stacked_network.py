"""Stacked networks: the same bits in float64 as each network alone; layers that cannot be stacked are reported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdbench.engine.network.features import Feature, FeatureExtractor
from kdbench.registry import MODELS
from kdbench.speed.concurrent.stacked_network import StackedNetwork, stacking_difference, unstackable_layer

LOGITS = (Feature(),)


def build_networks(name: str, count: int = 3, **params: object) -> list[nn.Module]:
    """Builds networks of one architecture in float64 with different weights."""
    torch.manual_seed(1)
    return [MODELS.build(name, params, num_classes=5).double().train() for _ in range(count)]


def random_images(shape: tuple[int, ...], rows: int = 6, count: int = 3) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(rows, *shape, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "shape", "features"),
    [
        ("digits_cnn", (1, 8, 8), (Feature("layer1"), Feature("layer3"), Feature())),
        ("digits_mlp", (1, 8, 8), (Feature("layer2"), Feature())),
        ("resnet20", (3, 32, 32), (Feature("layer2.-1.relu2", side="in"), Feature("pool"), Feature())),
        ("vgg8", (3, 32, 32), LOGITS),
        ("wrn_16_1", (3, 32, 32), LOGITS),
        ("mobilenetv2", (3, 32, 32), LOGITS),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_stacked_networks_equal_single_networks_bit_for_bit(name, shape, features, channels_last):
    models, inputs = build_networks(name), random_images(shape)
    if channels_last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
        inputs = [value.contiguous(memory_format=torch.channels_last) for value in inputs]
    assert stacking_difference(models, features, frozenset(), inputs, torch.float64) == 0.0


def test_frozen_modules_stay_frozen_in_the_stack():
    models = build_networks("digits_cnn")
    for model in models:
        model.get_submodule("layer1").eval().requires_grad_(False)
    before = [copy.deepcopy(model.get_submodule("layer1").state_dict()) for model in models]
    assert stacking_difference(models, LOGITS, frozenset(), random_images((1, 8, 8)), torch.float64) == 0.0
    stacked = StackedNetwork(models, LOGITS)
    stacked.alias_parameters()
    stacked(random_images((1, 8, 8)))
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.get_submodule("layer1").state_dict().items())


class Mixes(nn.Module):
    """Subtracts the mean over all channels, which in a stack would mix the values of several networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        return self.fc((x - x.mean(1, keepdim=True)).mean((2, 3)))


def test_network_that_mixes_channels_is_detected():
    torch.manual_seed(1)
    models = [Mixes().double() for _ in range(3)]
    assert unstackable_layer(models[0]) == ""  # no layer reveals it
    assert stacking_difference(models, LOGITS, frozenset(), random_images((1, 8, 8)), torch.float64) > 1e-3


def test_swapped_networks_are_detected(monkeypatch):
    """Negative control of the comparison itself: gradients reach the wrong network."""
    models = build_networks("digits_mlp")
    inputs = random_images((1, 8, 8))
    assert stacking_difference(models, LOGITS, frozenset(), inputs, torch.float64) == 0.0
    pairs = StackedNetwork._pairs

    def swapped(self):
        last = len(self.models) - 1
        for tensor, stacked, index in pairs(self):
            rows = tensor.shape[0]
            assert isinstance(index, slice)
            number = int(index.start) // rows
            swapped_number = {0: last, last: 0}.get(number, number)
            yield tensor, stacked, slice(swapped_number * rows, (swapped_number + 1) * rows)

    monkeypatch.setattr(StackedNetwork, "_pairs", swapped)
    assert stacking_difference(models, LOGITS, frozenset(), inputs, torch.float64) > 1e-3


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(5), "LayerNorm"),
        (nn.Dropout(0.5), "Dropout"),
        (nn.BatchNorm1d(5, momentum=None), "averages over all previous batches"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_unstackable_layer_is_reported_with_its_path(layer, reason):
    model = nn.Sequential(nn.Linear(4, 5), layer)
    assert reason in unstackable_layer(model) and "(1)" in unstackable_layer(model)
    with pytest.raises(ValueError, match=reason):
        StackedNetwork([model, copy.deepcopy(model)], LOGITS)


def test_parameters_become_views_of_the_stack():
    models = build_networks("digits_cnn")
    plain = [copy.deepcopy(model) for model in models]
    stacked = StackedNetwork(models, LOGITS)
    stacked.alias_parameters()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (*models, *plain)]
    for _ in range(2):
        inputs = random_images((1, 8, 8))
        stacked.network.zero_grad()
        torch.autograd.backward([features[LOGITS[0]].square().mean() for features in stacked(inputs)])
        stacked.distribute_gradients()
        for model, value in zip(plain, inputs, strict=True):
            model.zero_grad()
            FeatureExtractor(model, LOGITS)(value)[LOGITS[0]].square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for model, reference in zip(models, plain, strict=True):
        expected = reference.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert not torch.equal(*(model.get_parameter("fc.weight") for model in models[:2]))
    first = next(models[0].parameters())
    assert first.untyped_storage().nbytes() == 3 * first.numel() * first.element_size()
