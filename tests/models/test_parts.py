"""Generators, masks, gates, heads and discriminators: shapes, parameter counts, gradients, documented properties."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close

from kdbench.errors import ConfigError
from kdbench.registry import MODELS

MAP, VECTOR, TOKENS = (64, 4, 4), (10,), (5, 12)
CASES = [
    # name, parameters, input shape per sample, output shape per sample, number of parameters (None: not documented)
    ("latent_generator", {}, (64,), (1, 8, 8), 255_873),
    ("latent_generator", {"width": 32}, (64,), (1, 8, 8), 22_497),
    ("latent_generator", {"input_shape": (100,), "image_shape": (3, 32, 32)}, (100,), (3, 32, 32), None),
    ("latent_generator", {"tanh": False, "affine": True}, (64,), (1, 8, 8), 255_875),
    ("affine_augmentor", {}, (1, 8, 8), (1, 8, 8), 6_087),
    ("affine_augmentor", {"in_channels": 3}, (3, 32, 32), (3, 32, 32), None),
    ("shared_pattern", {}, (1, 8, 8), (1, 8, 8), 64),
    ("feature_mask", {}, MAP, MAP, 133_351),
    ("feature_mask", {"input_shape": (64,)}, (64,), (64,), None),
    ("gate_mlp", {"ways": 3}, VECTOR, (3,), 220 + 63),
    ("gate_mlp", {"input_shape": MAP, "hidden": 0, "batch_norm": True}, MAP, (2,), 130 + 4),
    ("gate_mlp", {"input_shape": TOKENS, "activation": "relu", "softmax": True}, TOKENS, (2,), None),
    ("linear_head", {}, MAP, (10,), 650),
    ("cosine_head", {}, MAP, (10,), 640),
    ("linear_head", {"input_shape": TOKENS, "num_classes": 3, "bias": False}, TOKENS, (3,), 36),
    ("exit_head", {}, (32, 8, 8), (10,), 3_498),
    ("projector", {"channels": 48, "size": 2}, MAP, (48, 2, 2), None),
    ("projector", {}, MAP, MAP, 13_568),
    ("dual_head", {"scale": 100.0}, MAP, (10,), 1_300),
    ("review_fusion", {"channels": 48}, MAP, (48, 4, 4), 64 * 64 + 128 + 9 * 64 * 48 + 96),
    ("review_fusion", {"channels": 48, "input_shape": (20,), "width": 8}, (20,), (48,), 20 * 8 + 16 + 9 * 8 * 48 + 96),
    ("connector", {"channels": 48, "input_shape": MAP}, MAP, (48, 4, 4), 64 * 48 + 96),
    ("connector", {"channels": 48, "input_shape": (20,)}, (20,), (48,), 20 * 48 + 96),
    ("paraphraser", {}, MAP, MAP, 129_312),
    ("paraphraser", {"rate": 0.25, "batch_norm": True}, MAP, MAP, None),
    ("translator", {}, MAP, (32, 4, 4), 64_896),
    ("logit_discriminator", {}, VECTOR, (1,), 70),
    ("logit_discriminator", {"outputs": 2, "input_shape": (100,)}, (100,), (2,), 5050 + 1275 + 52),
    ("feature_discriminator", {}, MAP, (1,), 73_921),
    ("feature_discriminator", {"input_shape": VECTOR}, VECTOR, (1,), None),
]
ids = [f"{name}-{number}" for number, (name, *_) in enumerate(CASES)]


def build(name: str, **params) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(name, params)


@pytest.mark.parametrize(("name", "params", "input_shape", "output_shape", "size"), CASES, ids=ids)
def test_shapes_and_parameter_counts_are_as_documented(name, params, input_shape, output_shape, size):
    with torch.device("meta"):
        model = build(name, **params)
        assert model(torch.zeros(3, *input_shape)).shape == (3, *output_shape)
    if size is not None:
        assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize(("name", "params", "input_shape", "output_shape", "size"), CASES, ids=ids)
def test_gradients_reach_every_parameter_and_the_input(name, params, input_shape, output_shape, size):
    model, value = build(name, **params), torch.randn(8, *input_shape, requires_grad=True)
    if name == "affine_augmentor":  # its last layer starts at zero, which blocks all gradients
        nn.init.normal_(model.settings.weight, std=0.1)
    output = model(value)
    (output * torch.randn(output.shape)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters() if p.ndim > 1)
    assert value.grad.any()


@pytest.mark.parametrize(("name", "params", "input_shape", "output_shape", "size"), CASES, ids=ids)
def test_reads_no_value_on_the_host_and_can_be_copied(name, params, input_shape, output_shape, size):
    with FakeTensorMode():
        build(name, **params)(torch.zeros(4, *input_shape)).sum().backward()
    model, value = build(name, **params).eval(), torch.randn(4, *input_shape)
    duplicate = copy.deepcopy(model)
    duplicate.load_state_dict(model.state_dict())
    assert torch.equal(duplicate(value), model(value))
    assert_close(model(value)[:1], model(value[:1]), rtol=1e-4, atol=1e-5)  # eval outputs do not depend on the batch


def test_generated_images_have_the_mean_and_deviation_of_normalised_images():
    model = build("latent_generator", image_shape=(3, 32, 32))
    image = model(torch.randn(64, 64))
    assert_close(image.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert_close(image.std(dim=(0, 2, 3)), torch.ones(3), rtol=1e-2, atol=0)
    assert not torch.equal(image[0], image[1])
    assert not list(model.standard.parameters())


def test_a_generator_reports_unsupported_sizes():
    with pytest.raises(ConfigError, match="multiples of 4, got 7x8"):
        build("latent_generator", image_shape=(1, 7, 8))
    with pytest.raises(ConfigError, match="width must be an even"):
        build("latent_generator", width=5)
    with pytest.raises(ConfigError, match="image_shape must be channels"):
        build("latent_generator", image_shape=(8, 8))


def reference_fusion(model: nn.Module, feature: torch.Tensor, deeper: torch.Tensor) -> torch.Tensor:
    """Fuses position by position with a deeper map of half the size, as ReviewKD does."""
    x = F.conv2d(feature, model.enter[0].weight)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    kernel, bias = model.weights[0].weight[:, :, 0, 0], model.weights[0].bias
    fused = torch.zeros_like(x)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            value, deeper_value = x[:, :, row, column], deeper[:, :, row // 2, column // 2]
            weights = torch.sigmoid(torch.cat([value, deeper_value], 1) @ kernel.T + bias)
            fused[:, :, row, column] = weights[:, :1] * value + weights[:, 1:] * deeper_value
    return fused


def test_review_fusion_weights_both_maps_at_every_position():
    model = build("review_fusion", input_shape=(5, 4, 4), width=6, channels=7, fuse=True).double()
    feature, deeper = torch.randn(3, 5, 4, 4).double(), torch.randn(3, 6, 2, 2).double()
    hooked = []
    model.fused.register_forward_hook(lambda *call: hooked.append(call[2]))
    assert model(feature, deeper).shape == (3, 7, 4, 4)
    assert_close(hooked[0], reference_fusion(model, feature, deeper))
    flipped = reference_fusion(model, feature, deeper.flip(3))
    assert (hooked[0] - flipped).abs().max() > 0.1, "control: the positions of the deeper map matter"
    with pytest.raises(ConfigError, match="inputs are the student's feature and the `fused` map"):
        model(feature)


def test_image_bank_returns_the_indexed_images_and_only_they_get_a_gradient():
    bank = build("image_bank", samples=6, image_shape=(3, 4, 4))
    index = torch.tensor([4, 1, 4])
    assert torch.equal(bank(index), bank.pixels.detach()[index])
    bank(index).sum().backward()
    assert bank.pixels.grad.flatten(1)[:, 0].tolist() == [0, 1, 0, 0, 2, 0]
    assert [name for name, _ in bank.named_parameters()] == ["pixels"]
    assert abs(build("image_bank", samples=500, std=0.5).pixels.std().item() - 0.5) < 0.01
    with FakeTensorMode():
        build("image_bank")(torch.zeros(2, dtype=torch.int64)).sum().backward()
    with torch.device("meta"):
        assert build("image_bank", samples=9)(torch.zeros(2, dtype=torch.int64)).shape == (2, 1, 8, 8)


def with_settings(model: nn.Module, *settings: float) -> nn.Module:
    """Sets the predicted settings of every image; an infinite setting gives the bound."""
    with torch.no_grad():
        model.settings.bias.copy_(torch.tensor(settings).clamp(-1e4, 1e4))
    return model


def test_the_initial_augmentation_is_the_identity():
    image = torch.randn(4, 1, 8, 8)
    assert_close(build("affine_augmentor", brightness=1.0, contrast=1.0)(image), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "setting", "expected"),
    [
        ({"rotation": 90.0}, 0, lambda image: torch.rot90(image, 1, (2, 3))),
        ({"shift": 0.25}, 1, lambda image: F.pad(image[..., 2:], (0, 2, 0, 0), mode="replicate")),
        ({"shift": 0.25}, 2, lambda image: F.pad(image[..., 2:, :], (0, 0, 0, 2), mode="replicate")),
        ({"brightness": 0.5}, 5, lambda image: image + 0.5),
        ({"contrast": 1.0}, 6, lambda image: 2 * image - image.mean(dim=(1, 2, 3), keepdim=True)),
    ],
)
def test_an_infinite_setting_gives_the_bound(bounds, setting, expected):
    off = dict.fromkeys(("rotation", "shift", "scale", "shear", "brightness", "contrast"), 0.0)
    image = torch.randn(2, 1, 8, 8)
    settings = [math.inf if i == setting else 0.0 for i in range(7)]
    assert_close(
        with_settings(build("affine_augmentor", **(off | bounds)), *settings)(image), expected(image), rtol=0, atol=1e-4
    )
    assert_close(with_settings(build("affine_augmentor", **off), *settings)(image), image, rtol=0, atol=1e-5)


def test_scale_and_shear_are_about_the_center_of_the_image():
    off = dict.fromkeys(("rotation", "shift", "scale", "shear", "brightness", "contrast"), 0.0)
    ramp = torch.linspace(-7, 7, 8).expand(1, 1, 8, 8).contiguous()  # the value is the column position
    inner = (..., slice(2, 6), slice(2, 6))
    smaller = with_settings(build("affine_augmentor", **(off | {"scale": 0.25})), 0, 0, 0, math.inf, 0, 0, 0)(ramp)
    assert_close(smaller[inner], 1.25 * ramp[inner])
    larger = with_settings(build("affine_augmentor", **(off | {"scale": 0.25})), 0, 0, 0, -math.inf, 0, 0, 0)(ramp)
    assert_close(larger[inner], ramp[inner] / 1.25)
    sheared = with_settings(build("affine_augmentor", **(off | {"shear": 0.2})), 0, 0, 0, 0, math.inf, 0, 0)(ramp)
    assert_close(sheared[inner], (ramp + 0.2 * ramp.mT)[inner])


def test_an_augmentor_can_be_trained_to_increase_a_loss():
    model, image = build("affine_augmentor"), torch.randn(8, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (-(model(image) - image).square().mean()).backward()
        optimizer.step()
    assert (model(image) - image).square().mean() > 0.1


@pytest.mark.parametrize("shape", [(64, 4, 4), (12,)])
def test_feature_mask_scales_each_channel_by_a_value_between_0_and_1(shape):
    model, feature = build("feature_mask", input_shape=shape).eval(), torch.randn(3, *shape)
    hooked = []
    model.gate.register_forward_hook(lambda *call: hooked.append(call[2]))
    output = model(feature)
    mask = hooked[0]
    assert mask.shape == (3, shape[0]) and mask.min() > 0 and mask.max() < 1
    assert_close(output, feature * mask.reshape(3, shape[0], *[1] * (len(shape) - 1)))
    assert mask.std(dim=0).min() > 0, "the mask depends on the sample"


def test_a_gate_without_activation_is_linear():
    model, first, second = build("gate_mlp"), torch.randn(4, 10), torch.randn(4, 10)
    assert_close(model(first + second) + model(torch.zeros(4, 10)), model(first) + model(second))
    weights = build("gate_mlp", softmax=True, ways=3)(first)
    assert_close(weights.sum(dim=1), torch.ones(4))
    assert (weights > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_dual_head_predicts_the_mixture_of_both_distributions(alpha):
    model, feature = build("dual_head", alpha=alpha, beta=2.0, scale=3.0).double(), torch.randn(5, 64, 4, 4).double()
    pooled = feature.mean(dim=(2, 3))
    first = model.ce(pooled).softmax(1)
    second = (model.kd(3 * pooled / pooled.norm(dim=1, keepdim=True)) / 2).softmax(1)
    assert_close(model(feature).softmax(1), alpha * first + (1 - alpha) * second)
    assert_close(model(feature).exp(), alpha * first + (1 - alpha) * second)


def test_a_paraphraser_exposes_its_factor_and_can_be_trained_to_reconstruct():
    model, feature = build("paraphraser", input_shape=(8, 4, 4)), torch.rand(16, 8, 4, 4)
    assert model.encoder(feature).shape == (16, 4, 4, 4)
    assert build("translator", channels=4, input_shape=(6, 4, 4))(torch.rand(2, 6, 4, 4)).shape == (2, 4, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(feature) - feature).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_bottleneck_of_an_exit_has_the_shape_of_the_deepest_feature():
    model = build("exit_head", input_shape=(32, 8, 8), channels=64, reduce=4)
    assert model.bottleneck(torch.randn(2, 32, 8, 8)).shape == (2, 64, 2, 2)
    assert model.fc.in_features == 64


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("exit_head", {"channels": 6}, "multiple of 4"),
        ("exit_head", {"reduce": 9}, "from 1 to the size of the input"),
        ("exit_head", {"input_shape": (10,)}, "must be a feature map"),
        ("projector", {"size": 8}, r"size must be from 1 to the size of the input \(4x4\), got 8"),
        ("connector", {"input_shape": (4, 5)}, "must be a vector or a feature map"),
        ("dual_head", {"alpha": 1.5}, "alpha must be from 0 to 1"),
        ("dual_head", {"beta": 0}, "beta must be above 0"),
        ("paraphraser", {"rate": 0.001}, "the 64 input channels must be at least 1"),
        ("translator", {"channels": 0}, "at least 1"),
        ("gate_mlp", {"ways": 1}, "ways must be at least 2"),
        ("gate_mlp", {"activation": "tanh"}, "none, relu"),
        ("feature_mask", {"input_shape": (3,)}, "too few"),
        ("feature_mask", {"input_shape": (5, 5)}, "must be a vector or a feature map"),
        ("affine_augmentor", {"shift": -1}, "all bounds must be at least 0"),
        ("image_bank", {"samples": 0}, "samples must be at least 1"),
        ("logit_discriminator", {"input_shape": MAP}, "must be a vector"),
        ("feature_discriminator", {"width": 0}, "at least 1"),
    ],
)
def test_invalid_parameters_are_reported(name, params, message):
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        build(name, **params)
