"""BatchNorm folded into convolutions: equal outputs, equal feature addresses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kdbench.engine.network.features import Feature, FeatureExtractor
from kdbench.engine.state.fold_batchnorm import fold_batchnorm
from kdbench.registry import MODELS


def with_random_statistics(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Gives every BatchNorm different statistics and coefficients, as training would."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.to(dtype).eval().requires_grad_(False)


def difference(model: nn.Module, folded: nn.Module, image: Tensor) -> float:
    with torch.no_grad():
        expected = model(image)
        return ((folded(image) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("resnet20", 21), ("wrn_16_1", 6), ("vgg8", 5), ("digits_cnn", 3), ("torchvision/resnet18", 20)],
)
def test_folding_keeps_the_logits(name, pairs):
    size = MODELS.entry(name).facts["image"] if "/" not in name else (3, 64, 64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, image = with_random_statistics(MODELS.build(name, {}), dtype), torch.randn(3, *size, dtype=dtype)
        folded, count = fold_batchnorm(model, image[:2])
        assert count == pairs
        assert difference(model, folded, image) < tolerance


def test_folding_changes_neither_the_original_nor_its_hooks():
    model, image = with_random_statistics(MODELS.build("resnet20", {})), torch.randn(2, 3, 32, 32).double()
    before = copy.deepcopy(model.state_dict())
    folded, _ = fold_batchnorm(model, image, [Feature("layer1")])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in (*model.modules(), *folded.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not any(p.requires_grad for p in folded.parameters())


FEATURES = [
    Feature("layer1"), Feature("layer2.0.bn1"), Feature("layer3.-1.relu2", side="in"), Feature("layer3.1.bn1"),
    Feature("layer1.0.conv1"), Feature("layer1.1.bn1", side="in"), Feature("layer2.0.downsample"), Feature("pool"),
]  # fmt: skip


def test_features_keep_their_addresses_and_values():
    model, image = with_random_statistics(MODELS.build("resnet20", {})), torch.randn(2, 3, 32, 32).double()
    folded, count = fold_batchnorm(model, image, FEATURES)
    assert count == 21 - 2  # conv1 of layer1.0, and the input of bn1 of layer1.1, are features
    with torch.no_grad():
        expected, actual = FeatureExtractor(model, FEATURES)(image), FeatureExtractor(folded, FEATURES)(image)
    for feature in FEATURES:
        torch.testing.assert_close(actual[feature], expected[feature], rtol=1e-10, atol=1e-10)


class Branch(nn.Module):
    """Uses a convolution's output in one of several ways."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, affine=use != "no affine")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        match self.use:
            case "read elsewhere":
                return self.norm(y) + y
            case "overwritten":
                return self.norm(y.add_(1.0))
            case "changed on the way":
                return self.norm(y.relu())
            case "returned":
                return self.norm(y), y
            case "convolution twice":
                return self.norm(y) + self.conv(x)
            case "norm twice":
                return self.norm(y) + self.norm(y)
        return self.norm(y)


@pytest.mark.parametrize(
    "use", ["read elsewhere", "overwritten", "changed on the way", "returned", "convolution twice", "norm twice"]
)
def test_a_pair_with_other_uses_is_not_folded(use):
    model = with_random_statistics(Branch(use))
    folded, count = fold_batchnorm(model, torch.randn(2, 3, 8, 8).double())
    assert count == 0 and folded is model


@pytest.mark.parametrize("use", ["plain", "no affine"])
def test_pairs_fold_with_and_without_affine_and_bias(use):
    for bias in (True, False):
        model = Branch(use)
        if not bias:
            model.conv.bias = None
        model, image = with_random_statistics(model), torch.randn(2, 3, 8, 8).double()
        folded, count = fold_batchnorm(model, image)
        assert count == 1 and difference(model, folded, image) < 1e-12


def test_a_norm_in_train_mode_is_not_folded():
    model = with_random_statistics(Branch("plain"))
    model.norm.train()
    assert fold_batchnorm(model, torch.randn(2, 3, 8, 8).double())[1] == 0


def test_gradients_flow_through_a_folded_network():
    model = with_random_statistics(MODELS.build("digits_cnn", {}))
    image = torch.randn(2, 1, 8, 8).double().requires_grad_()
    folded, _ = fold_batchnorm(model, image)
    expected, actual = (torch.autograd.grad(m(image).square().sum(), image)[0] for m in (model, folded))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_folding_keeps_the_memory_format():
    model = with_random_statistics(MODELS.build("vgg8", {})).to(memory_format=torch.channels_last)
    folded, _ = fold_batchnorm(model, torch.randn(2, 3, 32, 32).double())
    weight = folded.get_submodule("block1.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
