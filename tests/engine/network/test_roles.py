"""Frozen roles, frozen modules and unreached parameters keep their values; all others train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.recipes import build_stage, equal_weights, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build import build_network
from kdbench.engine.state.weight_loader import WeightLoader
from kdbench.errors import ConfigError

TEACHER = "teacher: {model: {type: t_layers, norm: batch, dropout: 0.5}}\n"

FROZEN = f"""
student: {{model: {{type: t_layers, norm: batch}}}}
{TEACHER}terms: {{ce: cross_entropy, kd: kd}}
optimizer: {{type: SGD, lr: 0.5, momentum: 0.9, weight_decay: 0.1}}
epochs: 4
batch_size: 16
"""


def recipe_with_frozen_module(path: str) -> str:
    return FROZEN.replace("norm: batch}}", f"norm: batch}}, freeze: [{path}]}}", 1)


def test_frozen_role_keeps_weights_and_eval_mode_and_gets_no_gradient():
    stage = build_stage(FROZEN)
    teacher_before, student_before = stage.weights("teacher"), stage.weights()
    stage.network.train()
    stage.network.role("teacher").train(True)
    stage.step(6)
    role = stage.network.role("teacher")
    assert not any(module.training for module in role.modules())
    assert equal_weights(teacher_before, stage.weights("teacher"))
    assert all(p.grad is None and not p.requires_grad for p in role.parameters())
    assert not equal_weights(student_before, stage.weights())  # control: the step trains


def test_frozen_role_with_dropout_gives_equal_targets_in_every_step():
    stage = build_stage(FROZEN)
    batches = next(stage.windows())[0]
    runs = stage.network.wiring(["kd"], ["student"]).runs
    features = stage.plan.resolved_stage.features
    teacher, student = ("teacher", features["teacher"][0]), ("student", features["student"][0])
    first = stage.network.run_roles(batches, runs)[teacher]
    second = stage.network.run_roles(batches, runs)[teacher]
    assert torch.equal(first, second)
    # Negative control: the student is in training mode, where BatchNorm uses the statistics of the batch.
    in_training = stage.network.run_roles(batches, runs)[student]
    assert not torch.equal(in_training, stage.model().eval()(batches["train"].fields["image"]))


def test_frozen_modules_keep_parameters_and_statistics():
    stage = build_stage(recipe_with_frozen_module("layer1"))
    before = stage.weights()
    stage.network.train()
    stage.step(4)
    after = stage.weights()
    changed_names = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed_names and not any(name.startswith("layer1.") for name in changed_names)
    assert "layer1.1.running_mean" in after
    control = build_stage(FROZEN)  # negative control: without `freeze` all of them change
    before = control.weights()
    control.step(4)
    assert not torch.equal(before["layer1.1.running_mean"], control.weights()["layer1.1.running_mean"])
    assert not torch.equal(before["layer1.0.weight"], control.weights()["layer1.0.weight"])


def test_frozen_path_may_count_from_the_end():
    model = build_stage(recipe_with_frozen_module("layer1.-5")).model()
    assert not model.layer1[0].weight.requires_grad and model.layer2[0].weight.requires_grad


def test_unknown_frozen_path_is_reported_with_its_location():
    with pytest.raises(ConfigError, match=r"own.yaml:3.*layer9.*Did you mean 'layer"):
        build_stage(recipe_with_frozen_module("layer9"))


UNREACHED = """
student: t_layers
teacher: t_layers
terms: {hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: layer2}}
optimizer: {type: SGD, lr: 0.5, momentum: 0.9, weight_decay: 0.1}
epochs: 4
batch_size: 16
"""


def test_parameters_that_no_term_reaches_are_in_no_optimizer_and_keep_their_values():
    stage = build_stage(UNREACHED)
    optimizer = stage.runner.updates[0].optimizer
    optimized_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, p in stage.model().named_parameters() if id(p) in optimized_ids}
    assert names == {"layer1.0.weight", "layer1.0.bias"}
    update_plan = stage.plan.updates[0]
    assert any(name.startswith("terms.hint.") for name in update_plan.parameters), "the adapter trains too"
    assert "student.fc.weight" in update_plan.unreached_parameters
    before = stage.weights()
    stage.step(5)
    after = stage.weights()
    assert {name for name in after if not torch.equal(before[name], after[name])} == names


def test_parameters_of_a_term_train_and_a_term_of_weight_zero_has_none():
    stage = build_stage(
        """
        student: t_layers
        terms: {own: t_owner, unused: {type: t_owner, weight: 0}}
        optimizer: {type: SGD, lr: 0.01}
        epochs: 1
        """
    )
    assert list(stage.network.terms) == ["own"]
    term = stage.network.term("own").edges[0].term
    before = term.bias.clone()
    stage.step()
    assert not torch.equal(before, term.bias)


def test_initial_weights_depend_on_the_seed_and_not_on_torchs_generator():
    torch.manual_seed(5)
    weights = build_stage(FROZEN).weights()
    torch.manual_seed(6)
    assert equal_weights(weights, build_stage(FROZEN).weights())
    assert not equal_weights(weights, build_stage(FROZEN + "seed: 2\n").weights())


def test_initial_weights_do_not_depend_on_further_roles_and_terms():
    weights = build_stage(FROZEN).weights()
    assert equal_weights(weights, build_stage(FROZEN.replace(", kd: kd", "").replace(TEACHER, "")).weights())


def test_roles_and_terms_may_have_the_names_of_module_methods():
    text = """
    student: t_layers
    models: {train: {model: t_layers, frozen: true}, half: {ema: student}}
    terms: {forward: {type: kd, teacher: train}, values: {type: kd, teacher: half}, keys: cross_entropy}
    optimizer: {type: SGD, lr: 0.1}
    epochs: 1
    """
    stage = build_stage(text)
    before = stage.weights()
    stage.step(2)
    assert not equal_weights(before, stage.weights())
    assert equal_weights(stage.weights("train"), build_stage(text).weights("train"))
    assert set(stage.runner.training_state().terms) == {"forward", "values", "keys"}


def test_module_that_is_a_role_of_its_own_keeps_its_output_when_batchnorm_is_folded():
    """The teacher's BatchNorms are folded, but not into a convolution that another role reuses."""
    text = """
    teacher: {model: {type: t_conv, norm: batch}}
    student: {model: t_conv}
    models: {stem: {reuse: 'teacher:conv1', input: train.image}}
    terms: {ce: cross_entropy, hint: {type: hint, student: conv1, teacher: 'stem:logits', weight: 0.1}}
    optimizer: {type: SGD, lr: 0.1}
    epochs: 1
    batch_size: 16
    """
    loaded = recipe_from_text(text)
    plan = stage_plan(loaded)
    loader = WeightLoader(loaded, loaded.stages[0], plan, World(), stage_files={}, teacher_files={})
    folded = build_network(plan.stage, plan.resolved_stage, seed=1, device=torch.device("cpu"), prepare=loader)
    plain = build_network(plan.stage, plan.resolved_stage, seed=1, device=torch.device("cpu"))
    for model in (plain.role("teacher").model, folded.role("teacher").model):
        assert isinstance(model.norm1, nn.BatchNorm2d)
    assert isinstance(folded.role("teacher").model.norm2, nn.Identity), "the other BatchNorm is folded"
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(folded.role("stem").model(image), plain.role("stem").model(image))


def test_adapter_of_a_router_operand_is_built():
    text = """
    student: {model: t_layers}
    models: {second: {model: t_layers, frozen: true}}
    teacher: {model: t_layers}
    terms: {kd: {type: kd, teacher: [teacher, second], route: {type: top_k, k: 2, read: {path: layer1, adapter: mlp}}}}
    optimizer: {type: SGD, lr: 0.1}
    epochs: 1
    batch_size: 16
    """
    names = [name for name, _ in build_stage(text).network.named_parameters()]
    assert any("route.operands.read.adapter" in name for name in names)
