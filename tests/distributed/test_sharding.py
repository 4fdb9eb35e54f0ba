"""Sharding: the selected roles and blocks; roles that cannot be sharded are reported before anything runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.recipes import build_stage, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from helpers.sharding import needs_sharding
from kdbench.config.identity import identity
from kdbench.engine.distributed.sharding import block_paths
from kdbench.errors import ConfigError
from kdbench.registry import MODELS

TEXT = """
student: {model: t_blocks}
teacher: {model: t_blocks}
terms: {ce: cross_entropy, kd: kd, hint: {type: hint, student: FEATURE, teacher: blocks.0.conv}}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
"""
PLAIN = TEXT.replace("FEATURE", "blocks.0")


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_the_key_no_role_is_sharded():
    assert stage_plan(recipe_from_text(PLAIN)).sharded_roles == ()


@needs_sharding
def test_true_selects_every_role_that_can_be_sharded():
    assert stage_plan(recipe_from_text(PLAIN + "shard: true\n")).sharded_roles == ("teacher", "student")
    with_ema = PLAIN + "models: {shadow: {ema: student}}\nshard: true\n"
    assert stage_plan(recipe_from_text(with_ema)).sharded_roles == ("teacher",)
    assert stage_plan(recipe_from_text(PLAIN + "shard: student\n")).sharded_roles == ("student",)


SHADOW = "models: {shadow: {ema: student}}\n"
REJECTED = {
    f"shard: [student]\n{SHADOW}": r"role 'student' .*: role 'shadow' \(ema\) needs the full weights of 'student'",
    f"shard: [shadow]\n{SHADOW}": "role 'shadow' cannot be sharded: it is the ema of role 'student'",
    "shard: [again]\nmodels: {again: {reuse: teacher}}\n": "it reuses the module of role 'teacher'",
    "shard: [student]\nema: 0.9\n": "`ema` averages full weights",
    "shard: true\nprecision: fp16\n": "with precision: bf16, sharding works",
    "shard: true\nupdates: [{models: [student], terms: [ce, kd, hint]}]\n": "a stage with `updates`",
    "shard: [bits]\nmodels: {bits: {model: t_blocks, transform: [{type: quantize, bits: 4}]}}\n": "needs full weights",
    "shard: [student]\nartifacts: {counts: class_counts}\n": "one process builds the artifacts",
}


@needs_sharding
@pytest.mark.parametrize("extra", REJECTED)
def test_role_that_cannot_be_sharded_is_reported_with_its_location(extra):
    with pytest.raises(ConfigError, match=REJECTED[extra]) as error:
        stage_plan(recipe_from_text(PLAIN + extra))
    assert str(error.value).startswith("own.yaml:") and " shard:" in str(error.value)


@needs_sharding
def test_feature_inside_a_block_is_reported_if_a_backward_starts_there():
    """The teacher's feature is inside a block too, which is allowed: no gradient flows through the teacher."""
    inside = TEXT.replace("FEATURE", "blocks.0.conv")
    with pytest.raises(ConfigError, match=r"role 'student' cannot be sharded: blocks.0.conv is inside a block"):
        stage_plan(recipe_from_text(inside + "shard: [student]\n"))
    assert stage_plan(recipe_from_text(inside + "shard: true\n")).sharded_roles == ("teacher",)


def test_unknown_role_is_reported_when_the_recipe_is_read():
    with pytest.raises(ConfigError, match=r"own.yaml:\d+ shard: .*'studnt'.* Did you mean 'student'"):
        recipe_from_text(PLAIN + "shard: [studnt]\n")


def test_torch_without_summed_gradients_is_reported(monkeypatch):
    monkeypatch.setattr("kdbench.engine.distributed.sharding._fsdp", lambda: None)
    with pytest.raises(ConfigError, match=rf"torch {torch.__version__[:3]}.* cannot sum the gradients of sharded"):
        stage_plan(recipe_from_text(PLAIN + "shard: true\n"))


def test_sharding_does_not_change_the_identity_of_a_run():
    assert identity(recipe_from_text(PLAIN)) == identity(recipe_from_text(PLAIN + "shard: true\n"))


@needs_sharding
def test_sharding_changes_nothing_in_one_process():
    plain, sharded = build_stage(PLAIN).step(2), build_stage(PLAIN + "shard: true\n").step(2)
    assert all(torch.equal(sharded.weights()[name], value) for name, value in plain.weights().items())


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("resnet20", {}, [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]),
        ("torchvision/resnet18", {}, [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in range(2)]),
        ("torchvision/vit_b_16", {}, [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("vgg8", {}, None),
    ],
)
def test_block_paths_of_known_networks(model, params, expected):
    with torch.device("meta"):
        network = MODELS.build(model, params, "test", num_classes=10)
    paths = block_paths(network)
    assert paths == expected if expected is not None else all("." in path or path for path in paths)
    assert not any(path != parent and path.startswith(f"{parent}.") for path in paths for parent in paths)


def test_network_with_tied_parameters_has_no_blocks():
    layers = [nn.Linear(3, 3) for _ in range(2)]
    network = nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in layers))
    assert block_paths(network) == ["0", "1"]
    layers[1].weight = layers[0].weight
    assert block_paths(network) == []
