"""Networks side by side as one: the same bits as each alone in float64, and what cannot be stacked is found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdbench.engine.network.features import Feature, FeatureExtractor
from kdbench.registry import MODELS
from kdbench.speed.concurrent.stacked_network import StackedNetwork, difference, unstackable_layer

LOGITS = (Feature(),)


def networks(name: str, count: int = 3, **params: object) -> list[nn.Module]:
    """Networks of one architecture in float64, each with weights of its own."""
    torch.manual_seed(1)
    return [MODELS.build(name, params, num_classes=5).double().train() for _ in range(count)]


def images(shape: tuple[int, ...], rows: int = 6, count: int = 3) -> list[Tensor]:
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
def test_stacked_networks_give_the_bits_of_each_alone(name, shape, features, channels_last):
    models, inputs = networks(name), images(shape)
    if channels_last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
        inputs = [value.contiguous(memory_format=torch.channels_last) for value in inputs]
    assert difference(models, features, frozenset(), inputs, torch.float64) == 0.0


def test_networks_with_frozen_parts_are_stacked_as_they_are():
    models = networks("digits_cnn")
    for model in models:
        model.get_submodule("layer1").eval().requires_grad_(False)
    before = [copy.deepcopy(model.get_submodule("layer1").state_dict()) for model in models]
    assert difference(models, LOGITS, frozenset(), images((1, 8, 8)), torch.float64) == 0.0
    stacked = StackedNetwork(models, LOGITS)
    stacked.share()
    stacked(images((1, 8, 8)))
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.get_submodule("layer1").state_dict().items())


class Mixes(nn.Module):
    """Sums over all channels: side by side, one network's values would reach another's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        return self.fc((x - x.mean(1, keepdim=True)).mean((2, 3)))


def test_a_network_that_mixes_its_channels_is_noticed():
    torch.manual_seed(1)
    models = [Mixes().double() for _ in range(3)]
    assert unstackable_layer(models[0]) == ""  # its layers alone do not tell
    assert difference(models, LOGITS, frozenset(), images((1, 8, 8)), torch.float64) > 1e-3


def test_parts_of_the_stack_in_another_order_are_noticed(monkeypatch):
    """A negative control of the comparison itself: gradients handed to the wrong network."""
    models = networks("digits_mlp")
    inputs = images((1, 8, 8))
    assert difference(models, LOGITS, frozenset(), inputs, torch.float64) == 0.0
    right = StackedNetwork._pairs

    def swapped(self):
        last = len(self.models) - 1
        for own, stacked, place in right(self):
            rows = own.shape[0]
            assert isinstance(place, slice)
            number = int(place.start) // rows
            other = {0: last, last: 0}.get(number, number)
            yield own, stacked, slice(other * rows, (other + 1) * rows)

    monkeypatch.setattr(StackedNetwork, "_pairs", swapped)
    assert difference(models, LOGITS, frozenset(), inputs, torch.float64) > 1e-3


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.LayerNorm(5), "LayerNorm"),
        (nn.Dropout(0.5), "Dropout"),
        (nn.BatchNorm1d(5, momentum=None), "averages over all batches"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_layers_that_are_not_known_to_treat_channels_apart_are_named(layer, said):
    model = nn.Sequential(nn.Linear(4, 5), layer)
    assert said in unstackable_layer(model) and "(1)" in unstackable_layer(model)
    with pytest.raises(ValueError, match=said):
        StackedNetwork([model, copy.deepcopy(model)], LOGITS)


def test_the_networks_themselves_become_views_of_the_stack():
    models = networks("digits_cnn")
    plain = [copy.deepcopy(model) for model in models]
    stacked = StackedNetwork(models, LOGITS)
    stacked.share()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (*models, *plain)]
    for _ in range(2):
        inputs = images((1, 8, 8))
        stacked.net.zero_grad()
        torch.autograd.backward([own[LOGITS[0]].square().mean() for own in stacked(inputs)])
        stacked.hand_out()
        for model, value in zip(plain, inputs, strict=True):
            model.zero_grad()
            FeatureExtractor(model, LOGITS)(value)[LOGITS[0]].square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for model, other in zip(models, plain, strict=True):
        for (name, value), (_, wanted) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(value, wanted), name
    assert not torch.equal(*(model.get_parameter("fc.weight") for model in models[:2]))
    first = next(models[0].parameters())
    assert first.untyped_storage().nbytes() == 3 * first.numel() * first.element_size()
