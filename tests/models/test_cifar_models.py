"""Networks of the CIFAR-100 tables against RepDistiller: parameters, cost, outputs, features, initialisation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kdbench.engine.plan.trace import trace_modules
from kdbench.registry import MODELS

# Parameters with 100 classes and multiply-adds per 32x32 image of the networks released with CRD (RepDistiller,
# commit b84f547), counted there by instantiating them.
RELEASED = {
    "resnet20": (278_324, 40_818_944),
    "resnet32": (472_756, 69_130_496),
    "resnet44": (667_188, 97_442_048),
    "resnet56": (861_620, 125_753_600),
    "resnet110": (1_736_564, 253_155_584),
    "resnet8x4": (1_233_540, 177_071_104),
    "resnet32x4": (7_433_860, 1_083_040_768),
    "wrn_16_1": (180_916, 26_663_168),
    "wrn_16_2": (703_284, 101_118_464),
    "wrn_40_1": (569_780, 83_286_272),
    "wrn_40_2": (2_255_156, 327_610_880),
    "vgg8": (3_965_028, 96_192_512),
    "vgg13": (9_462_180, 284_936_192),
    "resnet50": (23_705_252, 1_298_014_208),
    "mobilenetv2": (812_836, 6_523_648),
    "shufflenetv1": (949_258, 38_691_456),
    "shufflenetv2": (1_355_528, 44_504_448),
}
FEATURES = {
    "resnet20": "relu 16 32 32, layer1 16 32 32, layer2 32 16 16, layer3 64 8 8, pool 64",
    "resnet8x4": "relu 32 32 32, layer1 64 32 32, layer2 128 16 16, layer3 256 8 8, pool 256",
    "wrn_16_2": "conv1 16 32 32, layer1 32 32 32, layer2 64 16 16, layer3 128 8 8, pool 128",
    "vgg8": "block0 64 32 32, block1 128 16 16, block2 256 8 8, block3 512 4 4, block4 512 4 4, pool 512",
    "resnet50": "relu 64 32 32, layer1 256 32 32, layer2 512 16 16, layer3 1024 8 8, layer4 2048 4 4, pool 2048",
    "mobilenetv2": "conv1 16 16 16, blocks.1 12 16 16, blocks.2 16 8 8, blocks.4 48 4 4, blocks.6 160 2 2, pool 1280",
    "shufflenetv1": "relu 24 32 32, layer1 240 16 16, layer2 480 8 8, layer3 960 4 4, pool 960",
    "shufflenetv2": "relu 24 32 32, layer1 116 16 16, layer2 232 8 8, layer3 464 4 4, pool 1024",
}

BUILT = ["resnet20", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
"""One model of each architecture that is small enough to run."""
# Outputs of the released networks (commit as above, run with torch 2.14 in float64) with the state dict of
# `fill_with_waves`: for two images, the sum over the classes of logit times a wave. Parameter names, constants and the
# order of operations must agree.
REFERENCE_OUTPUTS = {
    "resnet20": [87.03227252695049, 121.52431413733007],
    "mobilenetv2": [-63.49615354978421, -44.664019824549484],
    "shufflenetv1": [-38.0055572403669, -13.713878988803735],
    "shufflenetv2": [-16.261028153195888, -45.52278847869337],
    "resnet50": [-110.9630604360696, -120.23369575177112],
}


def build(name: str, **params) -> nn.Module:
    return MODELS.build(name, params)


def on_meta(name: str, **params) -> nn.Module:
    with torch.device("meta"):
        return build(name, **params).eval()


def multiply_adds(model: nn.Module, image: torch.Tensor) -> int:
    calls = {call.path: call for call in trace_modules(model, image)}
    total = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += module.weight.numel() * torch.Size(calls[path].output.shape[2:]).numel()
    return total


def wave(shape: torch.Size, start: int) -> torch.Tensor:
    return torch.sin(0.37 * torch.arange(shape.numel(), dtype=torch.float64) + start).reshape(shape)


def fill_with_waves(model: nn.Module) -> None:
    """Fills the state dict with values that depend only on the names and shapes."""
    for number, (key, value) in enumerate(sorted(model.state_dict().items())):
        if value.is_floating_point():
            values = wave(value.shape, number)
            fan_in = value[0].numel() if value.dim() > 1 else 1
            value.copy_(1 + 0.3 * values if key.endswith("running_var") else values * (2 / fan_in) ** 0.5)


@pytest.mark.parametrize("name", REFERENCE_OUTPUTS)
def test_outputs_equal_those_of_the_released_network_with_the_same_weights(name):
    model = build(name).double().eval()
    fill_with_waves(model)
    with torch.no_grad():
        logits = model(wave(torch.Size((2, 3, 32, 32)), 0))
    assert_close((logits * wave(logits.shape, 1)).sum(dim=1).tolist(), REFERENCE_OUTPUTS[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_and_multiply_adds_equal_those_of_the_released_network(name):
    model = on_meta(name)
    parameters, cost = RELEASED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiply_adds(model, torch.zeros(1, 3, 32, 32, device="meta")) == cost


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_count_is_that_of_the_docstring(name):
    count = RELEASED[name][0]
    text = f"{count / 1e6:.2f} million" if count > 1e6 else f"{round(count / 1000)} thousand"
    assert f"{text} parameters with 100 classes" in MODELS.entry(name).summary


def test_every_shipped_cifar_model_is_compared_with_a_released_one():
    shipped = {n for n, e in MODELS.entries.items() if e.facts.get("image") == (3, 32, 32)}
    assert shipped == set(RELEASED)


@pytest.mark.parametrize("name", FEATURES)
def test_documented_features_have_the_documented_shapes(name):
    calls = {call.path: call for call in trace_modules(on_meta(name), torch.zeros(2, 3, 32, 32, device="meta"))}
    for path, *shape in (entry.split() for entry in FEATURES[name].split(", ")):
        assert calls[path].output.shape == (2, *map(int, shape))
        assert not calls[path].output.overwritten


@pytest.mark.parametrize("name", RELEASED)
def test_no_feature_is_overwritten_and_no_module_is_called_twice(name):
    calls = trace_modules(on_meta(name), torch.zeros(2, 3, 32, 32, device="meta"))
    assert not any(call.output.overwritten or call.input.overwritten or call.call > 1 for call in calls)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "vgg8"])
def test_stages_end_after_their_relu_and_its_input_is_the_preactivation(name):
    torch.manual_seed(0)
    model, image = build(name), torch.randn(4, 3, 32, 32)
    stages = ["block0", "block1", "block4"] if name == "vgg8" else ["layer1", "layer2", "layer3"]
    last = {stage: [m for m in model.get_submodule(stage).modules() if isinstance(m, nn.ReLU)][-1] for stage in stages}
    outputs = {}
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(lambda m, i, o, s=stage: outputs.update({s: o}))
        last[stage].register_forward_hook(lambda m, i, o, s=stage: outputs.update({f"{s}/pre": i[0]}))
    model(image)
    for stage in stages:
        assert (outputs[f"{stage}/pre"] < 0).any()
        torch.testing.assert_close(outputs[stage], outputs[f"{stage}/pre"].relu())


def test_wide_resnet_stages_end_before_their_relu():
    torch.manual_seed(0)
    model = build("wrn_16_2")
    outputs = {}
    for stage in ("layer1", "layer2", "layer3"):
        model.get_submodule(stage).register_forward_hook(lambda m, i, o, s=stage: outputs.update({s: o}))
    model(torch.randn(4, 3, 32, 32))
    assert all((value < 0).any() for value in outputs.values())


def test_wide_resnet_shortcut_reads_the_activated_input_only_if_it_is_a_convolution():
    from kdbench.models.cifar.wide_resnet import WideBlock

    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    for outputs in (8, 12):
        block = WideBlock(8, outputs, 1).eval()
        nn.init.zeros_(block.conv2.weight)  # so that the output is the shortcut
        expected = x if outputs == 8 else block.convShortcut(torch.relu(block.bn1(x)))
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", [*BUILT, "digits_cnn", "digits_mlp"])
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = build(name)
    size = MODELS.entry(name).facts["image"]
    model(torch.randn(4, *size)).logsumexp(1).sum().backward()
    # BatchNorm cancels a bias before it, whose gradient is then rounding noise, so only weights must be non-zero.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", [*BUILT, "digits_cnn", "digits_mlp"])
def test_in_eval_mode_a_sample_does_not_depend_on_its_batch(name):
    torch.manual_seed(0)
    model, image = build(name), torch.randn(4, *MODELS.entry(name).facts["image"])
    model(image)  # changes the moving averages of BatchNorm
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image)[:1], model(image[:1]), rtol=1e-4, atol=1e-5)
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_1", "vgg8"])
def test_convolutions_are_initialised_from_the_fan_out_normal(name):
    torch.manual_seed(0)
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert abs(module.weight.std().item() / expected - 1) < 0.03
            assert module.bias is None or not module.bias.any()


def test_vgg_classifier_is_initialised_with_deviation_0_01():
    torch.manual_seed(0)
    classifier = build("vgg8").classifier
    assert abs(classifier.weight.std().item() / 0.01 - 1) < 0.05
    assert not classifier.bias.any()


def test_the_same_seed_gives_the_same_initial_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build("resnet20").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_classifier_and_first_convolution_have_the_shape_of_the_data():
    for name in RELEASED:
        model = on_meta(name, num_classes=7, in_channels=1)
        assert model(torch.zeros(2, 1, 32, 32, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", [*BUILT, "resnet50"])
def test_larger_images_are_accepted(name):
    assert on_meta(name)(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 100)
