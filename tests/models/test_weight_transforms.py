"""Weight transforms: effective weights, gradients, baking, and errors."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close

from kdbench.errors import ConfigError
from kdbench.models.pruning import pruning_mask
from kdbench.models.quantization import merge_buckets, split_buckets
from kdbench.models.weight_transform import WeightTransform, effective_state_dict
from kdbench.registry import MODELS, WEIGHT_TRANSFORMS

ALL_TRANSFORMS = [
    ("quantize", {}),
    ("quantize", {"bits": 2, "scaling": "symmetric", "bucket": None}),
    ("learned_quantize", {"bits": 2}),
    ("ternary", {"per": "channel"}),
    ("prune", {}),
    ("prune", {"unit": "weight", "renew": True}),
]


def build(name: str, **params) -> WeightTransform:
    return WEIGHT_TRANSFORMS.build(name, params)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))


def images() -> torch.Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def stored_weight(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def count_levels(weight: torch.Tensor, bucket: int | None) -> list[int]:
    """Counts the distinct values of each bucket; padding repeats an existing value."""
    return [len(row.unique()) for row in split_buckets(weight, bucket)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("bucket", [None, 16, 256])
def test_quantised_weights_are_the_nearest_uniform_levels_of_their_bucket(bits, bucket):
    model, transform = network(), build("quantize", bits=bits, bucket=bucket)
    before = model[4].weight.detach().clone()
    transform.apply(model)
    effective = model[4].weight.detach()
    for old, new in zip(split_buckets(before, bucket).double(), split_buckets(effective, bucket).double(), strict=True):
        grid = torch.linspace(old.min().item(), old.max().item(), 2**bits, dtype=torch.float64)
        distance, level = (new[:, None] - grid).abs().min(dim=1)
        assert distance.max() < 1e-6
        # No other level is nearer to the old value.
        min_distance = (old[:, None] - grid).abs().min(dim=1).values
        assert_close((old - grid[level]).abs(), min_distance, rtol=0, atol=1e-6)
    assert max(count_levels(effective, bucket)) <= 2**bits
    if 2**bits < (bucket or 256):
        assert max(count_levels(before, bucket)) > 2**bits, "control: the stored weights have more values"


@pytest.mark.parametrize(("bits", "values"), [(2, 3), (4, 15)])
def test_symmetric_levels_are_integer_multiples_of_the_step_and_include_zero(bits, values):
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = 0
    largest = model[4].weight.abs().max().item()
    build("quantize", bits=bits, scaling="symmetric", bucket=None).apply(model)
    effective = model[4].weight.detach()
    steps = effective / (largest / (2 ** (bits - 1) - 1))
    assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert effective[0, 0] == 0 and len(effective.unique()) <= values
    assert_close(effective.abs().max().item(), largest)


def test_ternary_scale_minimises_the_distance_to_the_stored_weights():
    model = network()
    weight = model[0].weight.detach().double()
    build("ternary", threshold=0.7).apply(model)
    signs = weight.sign() * (weight.abs() > 0.7 * weight.abs().mean())
    scale = weight.abs()[signs != 0].mean()
    assert_close(model[0].weight.detach().double(), signs * scale, rtol=1e-6, atol=1e-7)
    assert len(model[0].weight.unique()) == 3
    for factor in (0.9, 1.1):
        assert (weight - signs * scale).norm() < (weight - signs * scale * factor).norm()


def test_ternary_per_channel_has_one_scale_per_channel():
    model = network()
    build("ternary", per="channel").apply(model)
    effective = model[0].weight.detach().flatten(1)
    assert all(len(row.abs().unique()) <= 2 for row in effective)
    assert len(effective.abs().unique()) == 7  # six scales and zero


def test_ternary_weights_of_a_zero_weight_are_zero():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    build("ternary").apply(nn.Sequential(model))
    assert torch.equal(model.weight, torch.zeros(2, 3))


@pytest.mark.parametrize("fraction", [0.0, 0.34, 0.5, 0.9])
def test_pruned_channels_have_the_smallest_l1_norm_and_are_zero(fraction):
    model, transform = network(), build("prune", fraction=fraction)
    before = model[0].weight.detach().clone()
    transform.apply(model)
    norms = before.abs().sum(dim=(1, 2, 3))
    expected = set(norms.argsort()[: int(fraction * 6)].tolist())
    zero = {i for i in range(6) if not model[0].weight[i].any() and model[0].bias[i] == 0}
    assert zero == expected
    rest = sorted(set(range(6)) - expected)
    assert torch.equal(model[0].weight[rest], before[rest])
    assert not hasattr(model[4], "parametrizations")  # by default the classifier is not pruned


def test_unstructured_pruning_keeps_the_largest_weights():
    model, transform = network(), build("prune", fraction=0.75, unit="weight", skip_last=False)
    before = model[4].weight.detach().clone()
    transform.apply(model)
    effective = model[4].weight.detach()
    pruned = effective == 0
    assert pruned.sum() == int(0.75 * effective.numel())
    assert before[pruned].abs().max() <= before[~pruned].abs().min()
    assert torch.equal(effective[~pruned], before[~pruned])


def test_ties_do_not_change_the_number_of_pruned_units():
    for unit in ("channel", "weight"):
        mask = pruning_mask(torch.ones(4, 3), 0.5, unit)
        assert mask.sum() == (2 if unit == "channel" else 6)


def test_pruned_weights_stay_zero_during_training():
    model = network()
    build("prune", fraction=0.5).apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    zero = model[0].weight.detach() == 0
    before = model[0].weight.detach().clone()
    for _ in range(3):
        model(images()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight.detach() == 0, zero)
    assert not torch.equal(model[0].weight.detach(), before)


def test_a_recomputed_mask_lets_pruned_weights_recover():
    model = network()
    build("prune", fraction=0.5, unit="weight", renew=True).apply(model)
    pruned = model[0].weight.detach() == 0
    model(images()).sum().backward()
    assert stored_weight(model[0]).grad[pruned].any()
    with torch.no_grad():
        stored_weight(model[0])[pruned] += 10
    assert model[0].weight.detach()[pruned].all()
    assert (model[0].weight == 0).sum() == pruned.sum()


@pytest.mark.parametrize(
    ("name", "params"), [ALL_TRANSFORMS[0], ALL_TRANSFORMS[1], ALL_TRANSFORMS[3], ALL_TRANSFORMS[5]]
)
def test_stored_weights_get_the_gradient_of_the_effective_weights(name, params):
    model = network().double()
    build(name, **params).apply(model)
    image = images().double()
    model(image).logsumexp(1).sum().backward()
    plain = network().double()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[4].weight.copy_(model[4].weight)
    plain(image).logsumexp(1).sum().backward()
    assert_close(stored_weight(model[0]).grad, plain[0].weight.grad)
    assert plain[0].weight.grad.abs().min() > 0


def test_learned_points_get_the_summed_gradient_of_their_weights():
    layer = nn.Linear(10, 3, bias=False).double()
    weight = layer.weight.detach().clone()
    build("learned_quantize", bits=2, bucket=8).apply(nn.Sequential(layer))
    points = layer.parametrizations.weight[0].points
    with torch.no_grad():
        points.copy_(torch.tensor([0.7, 0.1, 0.3, 0.95]))  # not sorted
    gradient = torch.randn(3, 10, dtype=torch.float64)
    (layer.weight * gradient).sum().backward()

    rows, gradient_rows = split_buckets(weight, 8), split_buckets(gradient, 8)
    expected = torch.zeros(4, dtype=torch.float64)
    effective = torch.empty_like(rows)
    for i, row in enumerate(rows):
        low, span = row.min(), row.max() - row.min()
        for j, value in enumerate(row):
            k = ((value - low) / span - points.detach()).abs().argmin()
            effective[i, j] = low + span * points[k]
            if 8 * i + j < weight.numel():  # padding has no gradient
                expected[k] += span * gradient_rows[i, j]
    assert_close(points.grad, expected)
    assert_close(layer.weight.detach(), merge_buckets(effective, weight))
    assert stored_weight(layer).grad is None


def test_learned_points_start_at_quantiles_and_training_lowers_the_error():
    torch.manual_seed(0)
    layer = nn.Linear(40, 40, bias=False)
    weight = layer.weight.detach().clone()
    nn.init.normal_(layer.weight)
    weight = layer.weight.detach().clone()
    build("learned_quantize", bits=3, bucket=None).apply(nn.Sequential(layer))
    points = layer.parametrizations.weight[0].points
    scaled = (weight - weight.min()) / (weight.max() - weight.min())
    fraction_below = (scaled.flatten()[:, None] <= points).float().mean(dim=0)
    assert_close(fraction_below, torch.linspace(0, 1, 8), rtol=0, atol=0.01)
    optimizer = torch.optim.Adam([points], lr=0.01)
    errors = []
    for _ in range(100):
        error = (layer.weight - weight).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
    assert len(layer.weight.unique()) <= 8


@pytest.mark.parametrize(("name", "params"), ALL_TRANSFORMS)
def test_baking_stores_the_effective_weights_under_the_plain_names(name, params):
    model, names = network(), list(network().state_dict())
    transform = build(name, **params)
    transform.apply(model)
    model.eval()
    output, effective = model(images()), model[0].weight.detach().clone()
    transform.bake(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(model.state_dict()["0.weight"], effective)
    assert torch.equal(model(images()), output)
    assert isinstance(model[0].weight, nn.Parameter) and type(model[0]) is nn.Conv2d
    network().load_state_dict(model.state_dict())
    transform.bake(model)  # baking twice changes nothing


@pytest.mark.parametrize(("name", "params"), ALL_TRANSFORMS)
def test_effective_state_dict_equals_baking_and_leaves_the_network_unchanged(name, params):
    """A checkpoint is written during training, so the network and its copies must keep their transforms."""
    model, baked = network(), network()
    for transformed in (model, baked):
        build(name, **params).apply(transformed)
    before = copy.deepcopy(model.state_dict())
    effective = effective_state_dict(model)
    build(name, **params).bake(baked)
    assert effective.keys() == baked.state_dict().keys()
    assert all(torch.equal(effective[key], value) for key, value in baked.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    model(images()).sum().backward()
    assert torch.equal(model[0].weight, effective["0.weight"])


@pytest.mark.parametrize(("name", "params"), ALL_TRANSFORMS)
def test_a_state_dict_restores_the_transform(name, params):
    model, restored = network(), network()
    build(name, **params).apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    nn.init.normal_(restored[0].weight)
    build(name, **params).apply(restored)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize(("name", "params"), ALL_TRANSFORMS)
def test_a_deep_copy_is_independent(name, params):
    model = network()
    build(name, **params).apply(model)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate.eval()(images()), model.eval()(images()))
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(-3)
    assert torch.equal(model[0].weight.detach(), before)
    assert not torch.equal(duplicate[0].weight.detach(), before)


@pytest.mark.parametrize(("name", "params"), ALL_TRANSFORMS)
def test_forward_and_backward_read_no_value_on_the_host(name, params):
    with torch.device("meta"):
        model = network()
        build(name, **params).apply(model)
        assert model(torch.zeros(2, 2, 6, 6)).shape == (2, 5)
        model(torch.zeros(2, 2, 6, 6)).sum().backward()
    with FakeTensorMode():
        model = network()
        build(name, **params).apply(model)
        model(torch.zeros(2, 2, 6, 6)).sum().backward()


def test_transforms_are_applied_in_the_order_of_registration():
    model = network()
    prune, ternary = build("prune", fraction=0.5), build("ternary", modules=["0"])
    prune.apply(model)
    pruned = model[0].weight.detach().clone()
    ternary.apply(model)
    reference = nn.Conv2d(2, 6, 3)
    with torch.no_grad():
        reference.weight.copy_(pruned)
    ternary.apply(nn.Sequential(reference))
    assert torch.equal(model[0].weight, reference.weight)
    ternary.bake(model)
    assert not model[0].weight[~pruned.flatten(1).any(dim=1)].any()
    assert not hasattr(model[0], "parametrizations")


def test_baking_keeps_parametrizations_of_other_origin():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    transform = build("quantize", modules=["1"])
    transform.apply(model)
    transform.bake(model)
    assert hasattr(model[0], "parametrizations") and not hasattr(model[1], "parametrizations")


@pytest.mark.parametrize(
    ("params", "targets"),
    [
        ({}, {"layer1.0", "layer2.0", "layer3.0", "fc"}),
        ({"skip_first": True, "skip_last": True}, {"layer2.0", "layer3.0"}),
        ({"modules": ["layer2", "fc"]}, {"layer2.0", "fc"}),
        ({"modules": ["layer2.0"]}, {"layer2.0"}),
    ],
)
def test_only_the_target_layers_are_transformed(params, targets):
    model = MODELS.build("digits_cnn", {})
    build("ternary", **params).apply(model)
    assert {path for path, m in model.named_modules() if hasattr(m, "parametrizations")} == targets


def test_a_quantised_layer_computes_with_its_effective_weight():
    model, plain = network(), network()
    build("quantize", bits=4).apply(model)
    expected = F.conv2d(images(), model[0].weight, model[0].bias)
    assert torch.equal(model[0](images()), expected)
    assert not torch.equal(plain[0](images()), expected)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("quantize", {"bits": 0}, "bits must be from 1 to 16"),
        ("quantize", {"bits": 1, "scaling": "symmetric"}, "from 2 to 16"),
        ("quantize", {"bucket": 0}, "bucket must be at least 1"),
        ("quantize", {"scaling": "log"}, "linear, symmetric"),
        ("learned_quantize", {"bits": 9}, "from 1 to 8"),
        ("ternary", {"threshold": -1}, "threshold must be at least 0"),
        ("prune", {"fraction": 1}, "fraction must be at least 0 and below 1"),
    ],
)
def test_invalid_parameters_are_reported(name, params, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **params)


def test_paths_without_layers_and_an_empty_selection_are_reported():
    with pytest.raises(ConfigError, match=r"'layer9' contains no linear or convolution layer.*layer1"):
        build("ternary", modules=["layer9"]).apply(MODELS.build("digits_cnn", {}))
    with pytest.raises(ConfigError, match="no layer remains"):
        build("ternary", skip_last=True).apply(nn.Sequential(nn.Linear(2, 2)))
