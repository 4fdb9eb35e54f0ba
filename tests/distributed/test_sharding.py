"""Which roles lie in parts, by which blocks, and what cannot be parted is refused in words before anything runs."""

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
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_the_key_nothing_lies_in_parts():
    assert stage_plan(recipe_from_text(PLAIN)).sharded_roles == ()


@needs_sharding
def test_true_takes_every_role_that_can_be_parted():
    assert stage_plan(recipe_from_text(PLAIN + "shard: true\n")).sharded_roles == ("teacher", "student")
    followed = PLAIN + "models: {shadow: {ema: student}}\nshard: true\n"
    assert stage_plan(recipe_from_text(followed)).sharded_roles == ("teacher",)
    assert stage_plan(recipe_from_text(PLAIN + "shard: student\n")).sharded_roles == ("student",)


SHADOW = "models: {shadow: {ema: student}}\n"
REFUSED = {
    f"shard: [student]\n{SHADOW}": r"role 'student' .*: role 'shadow' \(ema\) needs all of its weights",
    f"shard: [shadow]\n{SHADOW}": "role 'shadow' cannot lie in parts: it is the ema of 'student'",
    "shard: [again]\nmodels: {again: {reuse: teacher}}\n": "it is the same as 'teacher'",
    "shard: [student]\nema: 0.9\n": "`ema` averages whole weights",
    "shard: true\nprecision: fp16\n": "take precision: bf16",
    "shard: true\nupdates: [{models: [student], terms: [ce, kd, hint]}]\n": "a stage with `updates`",
    "shard: [bits]\nmodels: {bits: {model: t_blocks, transform: [{type: quantize, bits: 4}]}}\n": "on whole weights",
    "shard: [student]\nmake: {counts: class_counts}\n": "is made by one process",
}


@needs_sharding
@pytest.mark.parametrize("extra", REFUSED)
def test_what_cannot_be_parted_is_refused_with_its_place(extra):
    with pytest.raises(ConfigError, match=REFUSED[extra]) as error:
        stage_plan(recipe_from_text(PLAIN + extra))
    assert str(error.value).startswith("own.yaml:") and " shard:" in str(error.value)


@needs_sharding
def test_a_feature_inside_a_block_is_refused_where_a_backward_begins_there():
    """The teacher's is read inside a block too, without harm: nothing goes back through it."""
    inside = TEXT.replace("FEATURE", "blocks.0.conv")
    with pytest.raises(ConfigError, match=r"role 'student' cannot lie in parts: blocks.0.conv lies inside a block"):
        stage_plan(recipe_from_text(inside + "shard: [student]\n"))
    assert stage_plan(recipe_from_text(inside + "shard: true\n")).sharded_roles == ("teacher",)


def test_an_unknown_role_is_refused_when_the_recipe_is_read():
    with pytest.raises(ConfigError, match=r"own.yaml:\d+ shard: no role 'studnt'. Did you mean 'student'"):
        recipe_from_text(PLAIN + "shard: [studnt]\n")


def test_a_torch_that_cannot_sum_parts_is_told(monkeypatch):
    monkeypatch.setattr("kdbench.engine.distributed.sharding._fsdp", lambda: None)
    with pytest.raises(ConfigError, match=rf"torch {torch.__version__[:3]}.* cannot sum the gradients of parts"):
        stage_plan(recipe_from_text(PLAIN + "shard: true\n"))


def test_parts_are_no_part_of_a_runs_identity():
    assert identity(recipe_from_text(PLAIN)) == identity(recipe_from_text(PLAIN + "shard: true\n"))


@needs_sharding
def test_one_process_steps_as_if_nothing_were_said():
    plain, parted = build_stage(PLAIN).step(2), build_stage(PLAIN + "shard: true\n").step(2)
    assert all(torch.equal(parted.weights()[name], value) for name, value in plain.weights().items())


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("resnet20", {}, [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]),
        ("torchvision/resnet18", {}, [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in range(2)]),
        ("torchvision/vit_b_16", {}, [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("vgg8", {}, None),
    ],
)
def test_blocks_are_found(model, params, expected):
    with torch.device("meta"):
        built = MODELS.build(model, params, "here", num_classes=10)
    found = block_paths(built)
    assert found == expected if expected is not None else all("." in path or path for path in found)
    assert not any(one != other and one.startswith(f"{other}.") for one in found for other in found)


def test_tied_weights_leave_a_network_whole():
    tied = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)))
    assert block_paths(tied) == ["0", "1"]
    tied[1][0].weight = tied[0][0].weight
    assert block_paths(tied) == []
