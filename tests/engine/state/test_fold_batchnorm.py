"""BatchNorm folded into convolutions: the same function, the same addresses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kdbench.engine.network.features import Feature, FeatureExtractor
from kdbench.engine.state.fold_batchnorm import fold_batchnorm
from kdbench.registry import MODELS


def ready(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Gives every BatchNorm statistics and coefficients of its own, as training would."""
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
def test_gives_the_same_logits(name, pairs):
    size = MODELS.entry(name).facts["image"] if "/" not in name else (3, 64, 64)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, image = ready(MODELS.build(name, {}), dtype), torch.randn(3, *size, dtype=dtype)
        folded, count = fold_batchnorm(model, image[:2])
        assert count == pairs
        assert difference(model, folded, image) < bound


def test_leaves_the_original_and_its_hooks_alone():
    model, image = ready(MODELS.build("resnet20", {})), torch.randn(2, 3, 32, 32).double()
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
    model, image = ready(MODELS.build("resnet20", {})), torch.randn(2, 3, 32, 32).double()
    folded, count = fold_batchnorm(model, image, FEATURES)
    assert count == 21 - 2  # conv1 of layer1.0, and the input of bn1 of layer1.1, stay what they are
    with torch.no_grad():
        expected, got = FeatureExtractor(model, FEATURES)(image), FeatureExtractor(folded, FEATURES)(image)
    for feature in FEATURES:
        torch.testing.assert_close(got[feature], expected[feature], rtol=1e-10, atol=1e-10)


class Branch(nn.Module):
    """Reads a convolution's output in the ways that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, affine=how != "no affine")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        match self.how:
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
    "how", ["read elsewhere", "overwritten", "changed on the way", "returned", "convolution twice", "norm twice"]
)
def test_keeps_apart_what_is_not_a_plain_pair(how):
    model = ready(Branch(how))
    folded, count = fold_batchnorm(model, torch.randn(2, 3, 8, 8).double())
    assert count == 0 and folded is model


@pytest.mark.parametrize("how", ["plain", "no affine"])
def test_folds_with_and_without_affine_and_bias(how):
    for bias in (True, False):
        model = Branch(how)
        if not bias:
            model.conv.bias = None
        model, image = ready(model), torch.randn(2, 3, 8, 8).double()
        folded, count = fold_batchnorm(model, image)
        assert count == 1 and difference(model, folded, image) < 1e-12


def test_norm_that_still_learns_is_left():
    model = ready(Branch("plain"))
    model.norm.train()
    assert fold_batchnorm(model, torch.randn(2, 3, 8, 8).double())[1] == 0


def test_gradients_pass_through_to_what_stands_upstream():
    model = ready(MODELS.build("digits_cnn", {}))
    image = torch.randn(2, 1, 8, 8).double().requires_grad_()
    folded, _ = fold_batchnorm(model, image)
    expected, got = (torch.autograd.grad(m(image).square().sum(), image)[0] for m in (model, folded))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_keeps_the_memory_format():
    model = ready(MODELS.build("vgg8", {})).to(memory_format=torch.channels_last)
    folded, _ = fold_batchnorm(model, torch.randn(2, 3, 32, 32).double())
    weight = folded.get_submodule("block1.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
