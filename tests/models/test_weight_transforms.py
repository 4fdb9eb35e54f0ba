"""What transforms leave of a weight, and where its gradient goes."""

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

EVERY = [
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


def stored(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def levels(weight: torch.Tensor, bucket: int | None) -> list[int]:
    """How many different values each bucket holds; the filling repeats one that is there."""
    return [len(row.unique()) for row in split_buckets(weight, bucket)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("bucket", [None, 16, 256])
def test_quantised_weights_lie_on_even_levels_between_the_extremes_of_their_bucket(bits, bucket):
    model, transform = network(), build("quantize", bits=bits, bucket=bucket)
    before = model[4].weight.detach().clone()
    transform.apply(model)
    used = model[4].weight.detach()
    for old, new in zip(split_buckets(before, bucket).double(), split_buckets(used, bucket).double(), strict=True):
        grid = torch.linspace(old.min().item(), old.max().item(), 2**bits, dtype=torch.float64)
        distance, nearest = (new[:, None] - grid).abs().min(dim=1)
        assert distance.max() < 1e-6
        # No other level is nearer to the old value.
        best = (old[:, None] - grid).abs().min(dim=1).values
        assert_close((old - grid[nearest]).abs(), best, rtol=0, atol=1e-6)
    assert max(levels(used, bucket)) <= 2**bits
    if 2**bits < (bucket or 256):
        assert max(levels(before, bucket)) > 2**bits  # else the test could not fail


@pytest.mark.parametrize(("bits", "values"), [(2, 3), (4, 15)])
def test_symmetric_levels_are_whole_multiples_of_one_step_and_hold_zero(bits, values):
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = 0
    largest = model[4].weight.abs().max().item()
    build("quantize", bits=bits, scaling="symmetric", bucket=None).apply(model)
    used = model[4].weight.detach()
    steps = used / (largest / (2 ** (bits - 1) - 1))
    assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert used[0, 0] == 0 and len(used.unique()) <= values
    assert_close(used.abs().max().item(), largest)


def test_ternary_weights_are_the_closest_of_their_kind_for_their_threshold():
    model = network()
    weight = model[0].weight.detach().double()
    build("ternary", threshold=0.7).apply(model)
    large = weight.abs() > 0.7 * weight.abs().mean()
    size = weight.abs()[large].mean()
    assert_close(model[0].weight.detach().double(), weight.sign() * large * size, rtol=1e-6, atol=1e-7)
    assert len(model[0].weight.unique()) == 3
    for other in (0.9 * size, 1.1 * size):  # this size is the best one for these places
        assert (weight - weight.sign() * large * size).norm() < (weight - weight.sign() * large * other).norm()


def test_ternary_per_channel_gives_each_channel_its_own_size():
    model = network()
    build("ternary", per="channel").apply(model)
    used = model[0].weight.detach().flatten(1)
    assert all(len(row.abs().unique()) <= 2 for row in used)
    assert len(used.abs().unique()) == 7  # six sizes and zero


def test_ternary_of_zeros_is_zero():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    build("ternary").apply(nn.Sequential(model))
    assert torch.equal(model.weight, torch.zeros(2, 3))


@pytest.mark.parametrize("fraction", [0.0, 0.34, 0.5, 0.9])
def test_pruned_channels_are_those_of_least_l1_norm_and_exactly_zero(fraction):
    model, transform = network(), build("prune", fraction=fraction)
    before = model[0].weight.detach().clone()
    transform.apply(model)
    norms = before.abs().sum(dim=(1, 2, 3))
    expected = set(norms.argsort()[: int(fraction * 6)].tolist())
    zero = {i for i in range(6) if not model[0].weight[i].any() and model[0].bias[i] == 0}
    assert zero == expected
    kept = sorted(set(range(6)) - expected)
    assert torch.equal(model[0].weight[kept], before[kept])
    assert not hasattr(model[4], "parametrizations")  # the classifier is left out unless said


def test_unstructured_pruning_keeps_the_largest_weights():
    model, transform = network(), build("prune", fraction=0.75, unit="weight", skip_last=False)
    before = model[4].weight.detach().clone()
    transform.apply(model)
    used = model[4].weight.detach()
    assert (used == 0).sum() == int(0.75 * used.numel())
    assert before[used == 0].abs().max() <= before[used != 0].abs().min()
    assert torch.equal(used[used != 0], before[used != 0])


def test_ties_do_not_change_how_many_are_pruned():
    for unit in ("channel", "weight"):
        mask = pruning_mask(torch.ones(4, 3), 0.5, unit)
        assert mask.sum() == (2 if unit == "channel" else 6)


def test_pruned_weights_stay_zero_while_the_others_train():
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


def test_a_renewed_mask_lets_pruned_weights_return():
    model = network()
    build("prune", fraction=0.5, unit="weight", renew=True).apply(model)
    gone = model[0].weight.detach() == 0
    model(images()).sum().backward()
    assert stored(model[0]).grad[gone].any()
    with torch.no_grad():
        stored(model[0])[gone] += 10
    assert model[0].weight.detach()[gone].all()
    assert (model[0].weight == 0).sum() == gone.sum()


@pytest.mark.parametrize(("name", "params"), [EVERY[0], EVERY[1], EVERY[3], EVERY[5]])
def test_the_gradient_at_the_used_weights_goes_straight_to_the_stored_ones(name, params):
    model = network().double()
    build(name, **params).apply(model)
    image = images().double()
    model(image).logsumexp(1).sum().backward()
    plain = network().double()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[4].weight.copy_(model[4].weight)
    plain(image).logsumexp(1).sum().backward()
    assert_close(stored(model[0]).grad, plain[0].weight.grad)
    assert plain[0].weight.grad.abs().min() > 0


def test_learnt_points_get_the_gradient_of_the_weights_that_took_them():
    layer = nn.Linear(10, 3, bias=False).double()
    weight = layer.weight.detach().clone()
    build("learned_quantize", bits=2, bucket=8).apply(nn.Sequential(layer))
    points = layer.parametrizations.weight[0].points
    with torch.no_grad():
        points.copy_(torch.tensor([0.7, 0.1, 0.3, 0.95]))  # in no order
    scale = torch.randn(3, 10, dtype=torch.float64)
    (layer.weight * scale).sum().backward()

    rows, grads = split_buckets(weight, 8), split_buckets(scale, 8)
    expected, real = torch.zeros(4, dtype=torch.float64), 0
    used = torch.empty_like(rows)
    for i, row in enumerate(rows):
        low, span = row.min(), row.max() - row.min()
        for j, value in enumerate(row):
            k = ((value - low) / span - points.detach()).abs().argmin()
            used[i, j] = low + span * points[k]
            if real < 30:  # not the filling
                expected[k] += span * grads[i, j]
            real += 1
    assert_close(points.grad, expected)
    assert_close(layer.weight.detach(), merge_buckets(used, weight))
    assert stored(layer).grad is None


def test_learnt_points_start_at_quantiles_and_learning_them_lowers_the_error():
    torch.manual_seed(0)
    layer = nn.Linear(40, 40, bias=False)
    weight = layer.weight.detach().clone()
    nn.init.normal_(layer.weight)
    weight = layer.weight.detach().clone()
    build("learned_quantize", bits=3, bucket=None).apply(nn.Sequential(layer))
    points = layer.parametrizations.weight[0].points
    scaled = (weight - weight.min()) / (weight.max() - weight.min())
    below = (scaled.flatten()[:, None] <= points).float().mean(dim=0)
    assert_close(below, torch.linspace(0, 1, 8), rtol=0, atol=0.01)
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


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_baked_weights_are_what_the_forward_saw_under_the_plain_names(name, params):
    model, names = network(), list(network().state_dict())
    transform = build(name, **params)
    transform.apply(model)
    model.eval()
    output, used = model(images()), model[0].weight.detach().clone()
    transform.bake(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(model.state_dict()["0.weight"], used)
    assert torch.equal(model(images()), output)
    assert isinstance(model[0].weight, nn.Parameter) and type(model[0]) is nn.Conv2d
    network().load_state_dict(model.state_dict())
    transform.bake(model)  # nothing is left to do


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_the_used_weights_are_read_off_without_touching_the_network(name, params):
    """At every checkpoint: a network that trains on must not lose its transform, nor may two of a kind share it."""
    model, baked = network(), network()
    for one in (model, baked):
        build(name, **params).apply(one)
    before = copy.deepcopy(model.state_dict())
    read = effective_state_dict(model)
    build(name, **params).bake(baked)
    assert read.keys() == baked.state_dict().keys()
    assert all(torch.equal(read[key], value) for key, value in baked.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    model(images()).sum().backward()
    assert torch.equal(model[0].weight, read["0.weight"])


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_a_state_dict_takes_the_transform_along(name, params):
    model, other = network(), network()
    build(name, **params).apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    nn.init.normal_(other[0].weight)
    build(name, **params).apply(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_a_deep_copy_is_independent(name, params):
    model = network()
    build(name, **params).apply(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-3)
    assert torch.equal(model[0].weight.detach(), before)
    assert not torch.equal(twin[0].weight.detach(), before)


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_needs_no_values(name, params):
    with torch.device("meta"):
        model = network()
        build(name, **params).apply(model)
        assert model(torch.zeros(2, 2, 6, 6)).shape == (2, 5)
        model(torch.zeros(2, 2, 6, 6)).sum().backward()
    with FakeTensorMode():
        model = network()
        build(name, **params).apply(model)
        model(torch.zeros(2, 2, 6, 6)).sum().backward()


def test_transforms_follow_each_other_in_their_order():
    model = network()
    prune, ternary = build("prune", fraction=0.5), build("ternary", modules=["0"])
    prune.apply(model)
    pruned = model[0].weight.detach().clone()
    ternary.apply(model)
    alone = nn.Conv2d(2, 6, 3)
    with torch.no_grad():
        alone.weight.copy_(pruned)
    ternary.apply(nn.Sequential(alone))
    assert torch.equal(model[0].weight, alone.weight)
    ternary.bake(model)
    assert not model[0].weight[~pruned.flatten(1).any(dim=1)].any()
    assert not hasattr(model[0], "parametrizations")


def test_baking_leaves_other_parametrisations_alone():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    transform = build("quantize", modules=["1"])
    transform.apply(model)
    transform.bake(model)
    assert hasattr(model[0], "parametrizations") and not hasattr(model[1], "parametrizations")


@pytest.mark.parametrize(
    ("params", "changed"),
    [
        ({}, {"layer1.0", "layer2.0", "layer3.0", "fc"}),
        ({"skip_first": True, "skip_last": True}, {"layer2.0", "layer3.0"}),
        ({"modules": ["layer2", "fc"]}, {"layer2.0", "fc"}),
        ({"modules": ["layer2.0"]}, {"layer2.0"}),
    ],
)
def test_changes_the_chosen_layers_only(params, changed):
    model = MODELS.build("digits_cnn", {})
    build("ternary", **params).apply(model)
    assert {path for path, m in model.named_modules() if hasattr(m, "parametrizations")} == changed


def test_the_students_of_a_quantised_network_compute_as_a_plain_one_with_its_weights():
    model, plain = network(), network()
    build("quantize", bits=4).apply(model)
    used = F.conv2d(images(), model[0].weight, model[0].bias)
    assert torch.equal(model[0](images()), used)
    assert not torch.equal(plain[0](images()), used)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("quantize", {"bits": 0}, "bits must be from 1 to 16"),
        ("quantize", {"bits": 1, "scaling": "symmetric"}, "from 2 to 16"),
        ("quantize", {"bucket": 0}, "bucket must be at least 1"),
        ("quantize", {"scaling": "log"}, "linear, symmetric"),
        ("learned_quantize", {"bits": 9}, "from 1 to 8"),
        ("ternary", {"threshold": -1}, "not be negative"),
        ("prune", {"fraction": 1}, "from 0 to below 1"),
    ],
)
def test_refuses_in_words(name, params, said):
    with pytest.raises(ConfigError, match=said):
        build(name, **params)


def test_refuses_paths_of_no_layer_and_an_empty_choice():
    with pytest.raises(ConfigError, match=r"'layer9' names no layer.*layer1"):
        build("ternary", modules=["layer9"]).apply(MODELS.build("digits_cnn", {}))
    with pytest.raises(ConfigError, match="no layer is left"):
        build("ternary", skip_last=True).apply(nn.Sequential(nn.Linear(2, 2)))
