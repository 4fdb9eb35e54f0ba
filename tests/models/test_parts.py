"""Generators, masks, gates, heads, discriminators: sizes, gradients, and what their docstrings promise."""

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
    # name, parameters, shape of what it sees, shape of what it gives, number of parameters
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


@pytest.mark.parametrize(("name", "params", "seen", "given", "size"), CASES, ids=ids)
def test_has_the_shapes_and_the_size_that_it_tells(name, params, seen, given, size):
    with torch.device("meta"):
        model = build(name, **params)
        assert model(torch.zeros(3, *seen)).shape == (3, *given)
    if size is not None:
        assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize(("name", "params", "seen", "given", "size"), CASES, ids=ids)
def test_gradients_reach_every_parameter_and_the_input(name, params, seen, given, size):
    model, value = build(name, **params), torch.randn(8, *seen, requires_grad=True)
    if name == "affine_augmentor":  # its last layer starts at zero, and lets nothing through before its first step
        nn.init.normal_(model.settings.weight, std=0.1)
    output = model(value)
    (output * torch.randn(output.shape)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters() if p.ndim > 1)
    assert value.grad.any()


@pytest.mark.parametrize(("name", "params", "seen", "given", "size"), CASES, ids=ids)
def test_reads_no_value_on_the_host_and_survives_a_copy(name, params, seen, given, size):
    with FakeTensorMode():
        build(name, **params)(torch.zeros(4, *seen)).sum().backward()
    model, value = build(name, **params).eval(), torch.randn(4, *seen)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(value), model(value))
    assert_close(model(value)[:1], model(value[:1]), rtol=1e-4, atol=1e-5)  # in eval a sample is alone


def test_generated_images_lie_where_normalised_images_lie():
    model = build("latent_generator", image_shape=(3, 32, 32))
    image = model(torch.randn(64, 64))
    assert_close(image.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert_close(image.std(dim=(0, 2, 3)), torch.ones(3), rtol=1e-2, atol=0)
    assert not torch.equal(image[0], image[1])
    assert not list(model.standard.parameters())


def test_a_generator_says_which_sizes_it_makes():
    with pytest.raises(ConfigError, match="multiples of 4, got 7x8"):
        build("latent_generator", image_shape=(1, 7, 8))
    with pytest.raises(ConfigError, match="width must be an even"):
        build("latent_generator", width=5)
    with pytest.raises(ConfigError, match="image_shape must be channels"):
        build("latent_generator", image_shape=(8, 8))


def fused_by_hand(model: nn.Module, feature: torch.Tensor, deeper: torch.Tensor) -> torch.Tensor:
    """What ReviewKD fuses, place by place: a deeper map of half the size, under two weights for each place."""
    own = F.conv2d(feature, model.enter[0].weight)
    own = (own - own.mean((0, 2, 3), keepdim=True)) / (own.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    kernel, bias = model.weights[0].weight[:, :, 0, 0], model.weights[0].bias
    out = torch.zeros_like(own)
    for y in range(own.shape[2]):
        for x in range(own.shape[3]):
            here, below = own[:, :, y, x], deeper[:, :, y // 2, x // 2]
            share = torch.sigmoid(torch.cat([here, below], 1) @ kernel.T + bias)
            out[:, :, y, x] = share[:, :1] * here + share[:, 1:] * below
    return out


def test_a_review_fusion_weighs_its_own_map_and_the_deeper_one_at_every_place():
    model = build("review_fusion", input_shape=(5, 4, 4), width=6, channels=7, fuse=True).double()
    feature, deeper = torch.randn(3, 5, 4, 4).double(), torch.randn(3, 6, 2, 2).double()
    seen = []
    model.fused.register_forward_hook(lambda *call: seen.append(call[2]))
    assert model(feature, deeper).shape == (3, 7, 4, 4)
    assert_close(seen[0], fused_by_hand(model, feature, deeper))
    other = fused_by_hand(model, feature, deeper.flip(3))
    assert (seen[0] - other).abs().max() > 0.1, "control: the deeper map's places matter"
    with pytest.raises(ConfigError, match="it sees two things"):
        model(feature)


def test_a_bank_gives_the_images_asked_for_and_only_they_get_gradient():
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


def turned(model: nn.Module, *settings: float) -> nn.Module:
    """An augmentor that gives every image these settings; infinite ones stand for their bounds."""
    with torch.no_grad():
        model.settings.bias.copy_(torch.tensor(settings).clamp(-1e4, 1e4))
    return model


def test_an_augmentor_starts_as_the_identity():
    image = torch.randn(4, 1, 8, 8)
    assert_close(build("affine_augmentor", brightness=1.0, contrast=1.0)(image), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "place", "expected"),
    [
        ({"rotation": 90.0}, 0, lambda image: torch.rot90(image, 1, (2, 3))),
        ({"shift": 0.25}, 1, lambda image: F.pad(image[..., 2:], (0, 2, 0, 0), mode="replicate")),
        ({"shift": 0.25}, 2, lambda image: F.pad(image[..., 2:, :], (0, 0, 0, 2), mode="replicate")),
        ({"brightness": 0.5}, 5, lambda image: image + 0.5),
        ({"contrast": 1.0}, 6, lambda image: 2 * image - image.mean(dim=(1, 2, 3), keepdim=True)),
    ],
)
def test_a_bound_is_the_most_that_an_augmentor_does(bounds, place, expected):
    off = dict.fromkeys(("rotation", "shift", "scale", "shear", "brightness", "contrast"), 0.0)
    image = torch.randn(2, 1, 8, 8)
    settings = [math.inf if i == place else 0.0 for i in range(7)]
    assert_close(
        turned(build("affine_augmentor", **(off | bounds)), *settings)(image), expected(image), rtol=0, atol=1e-4
    )
    assert_close(turned(build("affine_augmentor", **off), *settings)(image), image, rtol=0, atol=1e-5)


def test_an_augmentor_grows_and_shears_the_image_about_its_middle():
    off = dict.fromkeys(("rotation", "shift", "scale", "shear", "brightness", "contrast"), 0.0)
    ramp = torch.linspace(-7, 7, 8).expand(1, 1, 8, 8).contiguous()  # the value is the place, left to right
    inner = (..., slice(2, 6), slice(2, 6))
    smaller = turned(build("affine_augmentor", **(off | {"scale": 0.25})), 0, 0, 0, math.inf, 0, 0, 0)(ramp)
    assert_close(smaller[inner], 1.25 * ramp[inner])
    larger = turned(build("affine_augmentor", **(off | {"scale": 0.25})), 0, 0, 0, -math.inf, 0, 0, 0)(ramp)
    assert_close(larger[inner], ramp[inner] / 1.25)
    sheared = turned(build("affine_augmentor", **(off | {"shear": 0.2})), 0, 0, 0, 0, math.inf, 0, 0)(ramp)
    assert_close(sheared[inner], (ramp + 0.2 * ramp.mT)[inner])


def test_an_augmentor_learns_to_raise_a_loss():
    model, image = build("affine_augmentor"), torch.randn(8, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (-(model(image) - image).square().mean()).backward()
        optimizer.step()
    assert (model(image) - image).square().mean() > 0.1


@pytest.mark.parametrize("shape", [(64, 4, 4), (12,)])
def test_a_mask_weighs_whole_channels_between_0_and_1(shape):
    model, feature = build("feature_mask", input_shape=shape).eval(), torch.randn(3, *shape)
    seen = {}
    model.gate.register_forward_hook(lambda m, i, o: seen.update(mask=o))
    output = model(feature)
    mask = seen["mask"]
    assert mask.shape == (3, shape[0]) and mask.min() > 0 and mask.max() < 1
    assert_close(output, feature * mask.reshape(3, shape[0], *[1] * (len(shape) - 1)))
    assert mask.std(dim=0).min() > 0  # it depends on the sample


def test_a_gate_without_activation_is_linear():
    model, one, two = build("gate_mlp"), torch.randn(4, 10), torch.randn(4, 10)
    assert_close(model(one + two) + model(torch.zeros(4, 10)), model(one) + model(two))
    shares = build("gate_mlp", softmax=True, ways=3)(one)
    assert_close(shares.sum(dim=1), torch.ones(4))
    assert (shares > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_both_heads_predict_the_mixture_of_their_distributions(alpha):
    model, feature = build("dual_head", alpha=alpha, beta=2.0, scale=3.0).double(), torch.randn(5, 64, 4, 4).double()
    pooled = feature.mean(dim=(2, 3))
    first = model.ce(pooled).softmax(1)
    second = (model.kd(3 * pooled / pooled.norm(dim=1, keepdim=True)) / 2).softmax(1)
    assert_close(model(feature).softmax(1), alpha * first + (1 - alpha) * second)
    assert_close(model(feature).exp(), alpha * first + (1 - alpha) * second)


def test_a_paraphraser_hands_on_its_factor_and_learns_to_reconstruct():
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


def test_an_exit_gives_a_feature_of_the_deepest_ones_shape():
    model = build("exit_head", input_shape=(32, 8, 8), channels=64, reduce=4)
    assert model.bottleneck(torch.randn(2, 32, 8, 8)).shape == (2, 64, 2, 2)
    assert model.fc.in_features == 64


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("exit_head", {"channels": 6}, "multiple of 4"),
        ("exit_head", {"reduce": 9}, "from 1 to the map's size"),
        ("exit_head", {"input_shape": (10,)}, "reads a map"),
        ("projector", {"size": 8}, "can only shrink"),
        ("connector", {"input_shape": (4, 5)}, "reads a vector or a map"),
        ("dual_head", {"alpha": 1.5}, "alpha must be from 0 to 1"),
        ("dual_head", {"beta": 0}, "beta must be above 0"),
        ("paraphraser", {"rate": 0.001}, "leaves none of the 64"),
        ("translator", {"channels": 0}, "at least 1"),
        ("gate_mlp", {"ways": 1}, "at least two ways"),
        ("gate_mlp", {"activation": "tanh"}, "none, relu"),
        ("feature_mask", {"input_shape": (3,)}, "too few"),
        ("feature_mask", {"input_shape": (5, 5)}, "masks vectors and maps"),
        ("affine_augmentor", {"shift": -1}, "no bound may be negative"),
        ("image_bank", {"samples": 0}, "samples must be at least 1"),
        ("logit_discriminator", {"input_shape": MAP}, "reads vectors"),
        ("feature_discriminator", {"width": 0}, "at least 1"),
    ],
)
def test_refuses_in_words(name, params, said):
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        build(name, **params)
