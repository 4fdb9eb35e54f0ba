"""What must not move does not move: frozen roles, frozen paths, and what no term reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.recipes import build_stage, equal_weights, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build import build_network
from kdbench.engine.state.weight_loader import WeightLoader
from kdbench.errors import ConfigError

FROZEN = """
student: {model: {type: t_layers, norm: batch}}
teacher: {model: {type: t_layers, norm: batch, dropout: 0.5}}
terms: {ce: cross_entropy, kd: kd}
optimizer: {type: SGD, lr: 0.5, momentum: 0.9, weight_decay: 0.1}
epochs: 4
batch_size: 16
"""


TEACHER = "teacher: {model: {type: t_layers, norm: batch, dropout: 0.5}}\n"


def freezing(path: str) -> str:
    return FROZEN.replace("norm: batch}}", f"norm: batch}}, freeze: [{path}]}}", 1)


def test_a_frozen_role_keeps_its_bits_its_mode_and_no_gradient():
    run = build_stage(FROZEN)
    before, student = run.weights("teacher"), run.weights()
    run.network.train()
    run.network.role("teacher").train(True)
    run.step(6)
    role = run.network.role("teacher")
    assert not any(module.training for module in role.modules())
    assert equal_weights(before, run.weights("teacher"))
    assert all(p.grad is None and not p.requires_grad for p in role.parameters())
    assert not equal_weights(student, run.weights()), "the student has to move, or the test shows nothing"


def test_a_frozen_role_with_dropout_gives_the_same_targets_in_every_step():
    run = build_stage(FROZEN)
    batch = next(run.windows())[0]
    key = ("teacher", run.plan.resolved_stage.features["teacher"][0])
    one = run.network.run_roles(batch, run.network.wiring(["kd"], ["student"]).runs)[key]
    two = run.network.run_roles(batch, run.network.wiring(["kd"], ["student"]).runs)[key]
    assert torch.equal(one, two)
    student = (
        "student",
        run.plan.resolved_stage.features["student"][0],
    )  # negative control: train mode, other statistics
    assert not torch.equal(
        run.network.run_roles(batch, run.network.wiring(["kd"], ["student"]).runs)[student],
        run.model().eval()(batch["train"].fields["image"]),
    )


def test_frozen_paths_keep_parameters_and_statistics():
    run = build_stage(freezing("layer1"))
    before = run.weights()
    run.network.train()
    run.step(4)
    after = run.weights()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("layer1.") for name in moved)
    assert "layer1.1.running_mean" in after
    control = build_stage(FROZEN)  # negative control: without `freeze` all of it moves
    before = control.weights()
    control.step(4)
    assert not torch.equal(before["layer1.1.running_mean"], control.weights()["layer1.1.running_mean"])
    assert not torch.equal(before["layer1.0.weight"], control.weights()["layer1.0.weight"])


def test_a_frozen_path_may_count_from_the_end():
    run = build_stage(freezing("layer1.-5"))
    assert not run.model().layer1[0].weight.requires_grad and run.model().layer2[0].weight.requires_grad


def test_a_frozen_path_that_does_not_exist_is_told_with_its_place():
    with pytest.raises(ConfigError, match=r"own.yaml:3.*layer9.*Did you mean 'layer"):
        build_stage(freezing("layer9"))


UNREACHED = """
student: t_layers
teacher: t_layers
terms: {hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: layer2}}
optimizer: {type: SGD, lr: 0.5, momentum: 0.9, weight_decay: 0.1}
epochs: 4
batch_size: 16
"""


def test_parameters_that_no_term_reaches_are_in_no_optimiser_and_keep_their_bits():
    run = build_stage(UNREACHED)
    update = run.runner.updates[0]
    held = {id(p) for group in update.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in run.model().named_parameters() if id(p) in held}
    assert names == {"layer1.0.weight", "layer1.0.bias"}
    assert any(name.startswith("terms.hint.") for name in run.plan.updates[0].parameters), "the adapter trains too"
    assert "student.fc.weight" in run.plan.updates[0].unreached_parameters
    before = run.weights()
    run.step(5)
    after = run.weights()
    assert {name for name in after if not torch.equal(before[name], after[name])} == names


def test_a_terms_own_parameters_train_and_those_of_a_term_of_weight_zero_do_not_exist():
    run = build_stage(
        """
        student: t_layers
        terms: {own: t_owner, unused: {type: t_owner, weight: 0}}
        optimizer: {type: SGD, lr: 0.01}
        epochs: 1
        """
    )
    assert list(run.network.terms) == ["own"]
    before = run.network.term("own").edges[0].term.bias.clone()
    run.step()
    assert not torch.equal(before, run.network.term("own").edges[0].term.bias)


def test_the_same_seed_builds_the_same_models_whatever_was_built_before():
    torch.manual_seed(5)
    one = build_stage(FROZEN).weights()
    torch.manual_seed(6)
    assert equal_weights(one, build_stage(FROZEN).weights())
    assert not equal_weights(one, build_stage(FROZEN + "seed: 2\n").weights())


def test_another_role_or_term_does_not_change_a_models_initial_weights():
    one = build_stage(FROZEN).weights()
    assert equal_weights(one, build_stage(FROZEN.replace(", kd: kd", "").replace(TEACHER, "")).weights())


def test_roles_and_terms_may_have_the_names_of_a_modules_own_methods():
    text = """
    student: t_layers
    models: {train: {model: t_layers, frozen: true}, half: {ema: student}}
    terms: {forward: {type: kd, teacher: train}, values: {type: kd, teacher: half}, keys: cross_entropy}
    optimizer: {type: SGD, lr: 0.1}
    epochs: 1
    """
    run = build_stage(text)
    before = run.weights()
    run.step(2)
    assert not equal_weights(before, run.weights()) and equal_weights(
        run.weights("train"), build_stage(text).weights("train")
    )
    assert set(run.runner.training_state().terms) == {"forward", "values", "keys"}


def test_a_part_of_a_frozen_network_answers_alone_as_it_is():
    """The teacher's BatchNorms are folded away, but not into a convolution that is a role of its own."""
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
    prepared = WeightLoader(loaded, loaded.stages[0], plan, World(), stage_files={}, teacher_files={})
    network = build_network(plan.stage, plan.resolved_stage, seed=1, device=torch.device("cpu"), prepare=prepared)
    plain = build_network(plan.stage, plan.resolved_stage, seed=1, device=torch.device("cpu"))
    for bare in (plain.role("teacher").model, network.role("teacher").model):
        assert isinstance(bare.norm1, nn.BatchNorm2d)
    assert isinstance(network.role("teacher").model.norm2, nn.Identity), "the other one is folded"
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(network.role("stem").model(image), plain.role("stem").model(image))


def test_an_adapter_of_a_further_operand_is_used():
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
