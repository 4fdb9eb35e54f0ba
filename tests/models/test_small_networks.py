"""Residual networks and vision transformers for small images: sizes, trunk and branch, masked patches."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from kdbench.engine.plan.trace import trace_modules
from kdbench.errors import ConfigError
from kdbench.models.small.vit import sincos_positions, split_patches
from kdbench.registry import MODELS

SIZES = [
    ("digits_resnet", {}, 77_754),
    ("digits_resnet", {"blocks": 2}, 174_970),
    ("digits_resnet", {"blocks": [3, 3, 3]}, 272_186),
    ("residual_trunk", {}, 19_376),
    ("residual_trunk", {"stages": 1}, 4_848),
    ("digits_vit", {}, 51_402),
    ("masked_vit", {}, 65_060),
    ("hidden_patches", {}, 0),
]
FEATURES = {
    "digits_resnet": "relu 16 8 8, layer1 16 8 8, layer1.0 16 8 8, layer2 32 4 4, layer3 64 2 2, pool 64",
    "residual_trunk": "relu 16 8 8, layer1 16 8 8, layer2 32 4 4",
    "digits_vit": "blocks.0 17 32, blocks.3 17 32, blocks.1.attn 17 32, norm 17 32",
    "masked_vit": "blocks.0 5 32, blocks.3 5 32, norm 5 32, decoder_pred 12 4",
}


def build(name: str, **params) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(name, params)


def inputs(name: str, *lead: int, channels: int = 1, size: int = 8) -> list[torch.Tensor]:
    """Returns the inputs of a model: an image, and for masked models one score per 2x2 patch."""
    image = torch.randn(*lead, channels, size, size)
    return [image, torch.randn(*lead, (size // 2) ** 2)] if name in ("masked_vit", "hidden_patches") else [image]


@pytest.mark.parametrize(("name", "params", "size"), SIZES)
def test_parameter_counts_are_as_documented(name, params, size):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, **params).parameters()) == size


@pytest.mark.parametrize("name", FEATURES)
def test_documented_features_have_the_documented_shapes(name):
    with torch.device("meta"):
        model, values = build(name).eval(), inputs(name, 2)
    if len(values) == 1:
        calls = {call.path: call.output.shape for call in trace_modules(model, values[0])}
    else:
        calls = {}
        for path, module in model.named_modules():
            module.register_forward_hook(lambda m, i, o, path=path: calls.update({path: tuple(o.shape)}))
        model(*values)
    for path, *shape in (entry.split() for entry in FEATURES[name].split(", ")):
        assert calls[path] == (2, *map(int, shape))


@pytest.mark.parametrize("name", ["digits_resnet", "residual_trunk", "digits_vit", "masked_vit"])
def test_gradients_reach_every_parameter_and_no_value_is_read(name):
    model = build(name)
    output = model(*inputs(name, 8))
    (output * torch.randn(output.shape)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters() if p.ndim > 1)
    with FakeTensorMode():
        build(name)(*inputs(name, 2)).sum().backward()


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit", "masked_vit", "hidden_patches"])
def test_in_eval_mode_a_sample_does_not_depend_on_its_batch_and_a_copy_is_the_same(name):
    model, values = build(name).eval(), inputs(name, 4)
    assert_close(model(*values)[:1], model(*[value[:1] for value in values]), rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(*values), model(*values))


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit", "masked_vit", "hidden_patches"])
def test_accepts_colour_images_of_another_size(name):
    injected = {"num_classes": 7, "in_channels": 3, "image_size": 32}
    with torch.device("meta"):
        model = MODELS.build(name, {}, **injected)
        output = model(*inputs(name, 2, channels=3, size=32))
    assert output.shape == ((2, 7) if name.startswith("digits") else (2, 252, 12))


def test_a_shallow_network_can_load_every_weight_from_blocks_of_a_deeper_one():
    deep, shallow = build("digits_resnet", blocks=4), build("digits_resnet", blocks=[2, 1, 2])
    state = deep.state_dict()
    rename = {"layer1.1": "layer1.2", "layer3.1": "layer3.3"}

    def source_key(key: str) -> str:
        return next((new + key[len(old) :] for old, new in rename.items() if key.startswith(f"{old}.")), key)

    for key, value in shallow.state_dict().items():
        assert state[source_key(key)].shape == value.shape
    shallow.load_state_dict({key: state[source_key(key)] for key in shallow.state_dict()})


@pytest.mark.parametrize("blocks", [1, 2])
def test_trunk_and_branch_together_equal_digits_resnet(blocks):
    network = build("digits_resnet", blocks=blocks).eval()
    trunk, branch = build("residual_trunk", blocks=blocks).eval(), build("residual_branch", blocks=blocks).eval()
    state = network.state_dict()
    trunk.load_state_dict({key: state[key] for key in trunk.state_dict()})
    branch.load_state_dict({key: state[key] for key in branch.state_dict()})
    assert set(trunk.state_dict()) | set(branch.state_dict()) == set(state)
    (image,) = inputs("digits_resnet", 3)
    assert torch.equal(branch(trunk(image)), network(image))


def test_patches_with_the_lowest_scores_are_visible_in_the_order_of_their_positions():
    visible, hidden = split_patches(torch.tensor([[0.3, -1.0, 0.2, 5.0], [1, 1, 1, 1]]), 2)
    assert visible.tolist() == [[1, 2], [0, 1]] and hidden.tolist() == [[0, 3], [2, 3]]
    mask = torch.tensor([[True, False, False, True]])
    assert split_patches(mask, 2)[0].tolist() == [[1, 2]]


def test_the_prediction_depends_on_visible_patches_and_not_on_hidden_ones():
    model = build("masked_vit").eval()
    image, _ = inputs("masked_vit", 1)
    scores = torch.ones(1, 16)
    scores[0, [0, 5, 10, 15]] = 0  # the patches on the diagonal
    modified = image.clone()
    modified[..., :2, 2:] += 1  # the first row of patches without its first
    assert torch.equal(model(modified, scores), model(image, scores))
    modified[..., 0, 0] += 1
    assert not torch.equal(model(modified, scores), model(image, scores))


@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_patches_are_the_pixels_at_the_hidden_positions(channels):
    image, scores = inputs("hidden_patches", 2, channels=channels)
    pixels = build("hidden_patches", in_channels=channels, visible=5)(image, scores)
    _, hidden = split_patches(scores, 5)
    for sample in range(2):
        for number, position in enumerate(hidden[sample].tolist()):
            row, column = 2 * (position // 4), 2 * (position % 4)
            patch = image[sample, :, row : row + 2, column : column + 2]
            assert torch.equal(pixels[sample, number], patch.permute(1, 2, 0).flatten())
    standardised = build("hidden_patches", in_channels=channels, visible=5, standardise=True)(image, scores)
    assert_close(standardised.mean(dim=2), torch.zeros(2, 11), rtol=0, atol=1e-5)
    assert_close(standardised.std(dim=2), torch.ones(2, 11), rtol=1e-3, atol=0)


def test_the_prediction_is_in_the_order_of_the_hidden_patches():
    """Overfits one image from the positions alone; only the right order of positions gives such a low loss."""
    model, target = build("masked_vit", depth=1), build("hidden_patches")
    image = torch.randn(1, 1, 8, 8).expand(16, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        scores = torch.randn(16, 16, generator=generator)
        loss = (model(image, scores) - target(image, scores)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * image.var()


def test_digits_vit_can_load_the_encoder_of_masked_vit():
    masked, vit = build("masked_vit"), build("digits_vit")
    result = vit.load_state_dict(masked.state_dict(), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"}
    assert all(key.startswith(("decoder_", "mask_token")) for key in result.unexpected_keys)
    (image,) = inputs("digits_vit", 2)
    assert torch.equal(vit.encode(image), masked.encode(image))


def test_position_embeddings_are_distinct_and_of_equal_norm():
    positions = sincos_positions(3, 4, 16)
    assert positions.shape == (12, 16)
    assert (torch.cdist(positions, positions) + torch.eye(12) > 0.1).all()
    assert_close(positions.norm(dim=1), torch.full((12,), 8.0).sqrt())


def test_self_attention_equals_torch_multihead_attention():
    from kdbench.models.layers import SelfAttention

    torch.manual_seed(0)
    attention, reference = SelfAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.weight.copy_(attention.proj.weight)
        reference.out_proj.bias.copy_(attention.proj.bias)
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(attention(tokens), reference(tokens, tokens, tokens, need_weights=False)[0])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("digits_resnet", {"blocks": 0}, "a list of three"),
        ("digits_resnet", {"blocks": [1, 2]}, "a list of three"),
        ("digits_resnet", {"width": 0}, "width must be at least 1"),
        ("residual_trunk", {"stages": 3}, "stages must be 1 or 2"),
        ("residual_branch", {"input_shape": (5,)}, "must be a feature map"),
        ("residual_branch", {"stride": 0}, "at least 1"),
        ("digits_vit", {"patch": 3}, "must divide the image"),
        ("digits_vit", {"dim": 30}, "multiple of 4 and of heads"),
        ("digits_vit", {"depth": 0}, "depth must be at least 1"),
        ("masked_vit", {"visible": 16}, "from 1 to 15, because the image has 16 patches"),
        ("masked_vit", {"decoder_dim": 30}, "decoder_dim must be"),
        ("hidden_patches", {"visible": 0}, "from 1 to 15"),
    ],
)
def test_invalid_parameters_are_reported(name, params, message):
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        build(name, **params)
