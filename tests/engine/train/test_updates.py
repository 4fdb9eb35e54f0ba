"""Updates of a step: several in order, simultaneous peers, repeats, moving averages, snapshots, scaled gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.network.features import Feature
from kdbench.engine.train.averages import copy_state

GAME = """
models: {generator: {model: t_generator, input: noise.z}}
teacher: {model: {type: t_layers, norm: batch}, input: "generator:image"}
student: {model: t_layers, input: "generator:image"}
data: {noise: {type: gaussian, shape: [6], samples: 64}}
terms:
  fool: {type: kd, weight: -1, temperature: 1, teacher_grad: true}
  mimic: {type: kd, temperature: 1}
updates:
  - {models: [generator], terms: [fool]}
  - {models: [student], terms: [mimic], repeat: REPEAT}
optimizer: {type: SGD, lr: 0.2}
precision: float64
epochs: 2
batch_size: 16
"""


def build_game(repeat: int = 1) -> StageHarness:
    return build_stage(GAME.replace("REPEAT", str(repeat)))


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean over rows of KL(teacher || student) of two logits."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def apply_update(stage: StageHarness, number: int, window: list[MicroBatch]) -> None:
    """Executes one update of a step alone."""
    update = stage.runner.updates[number]
    stage.runner.eager.compute_gradients(update, window)
    stage.runner.eager._apply(update)


def test_update_changes_only_its_own_models():
    stage = build_game()
    window = next(stage.windows())
    stage.runner.begin_step()
    teacher, student, generator = stage.weights("teacher"), stage.weights(), stage.weights("generator")
    apply_update(stage, 0, window)
    assert equal_weights(student, stage.weights()) and not equal_weights(generator, stage.weights("generator"))
    generator = stage.weights("generator")
    apply_update(stage, 1, window)
    assert equal_weights(generator, stage.weights("generator")) and not equal_weights(student, stage.weights())
    assert equal_weights(teacher, stage.weights("teacher"))


def test_gradient_of_the_generator_flows_through_the_frozen_teacher_and_the_student():
    stage = build_game()
    window = next(stage.windows())
    stage.runner.begin_step()
    generator, student, teacher = (stage.model(role) for role in ("generator", "student", "teacher"))
    image = generator(window[0]["noise"].fields["z"])["image"]

    def expected_gradients(detach_teacher: bool) -> tuple[Tensor, ...]:
        target = teacher(image).detach() if detach_teacher else teacher(image)
        loss = -kl_divergence(student(image), target)
        return torch.autograd.grad(loss, list(generator.parameters()), retain_graph=True)

    expected, through_student_only = expected_gradients(False), expected_gradients(True)
    apply_update(stage, 0, window)
    for parameter, value, partial in zip(generator.parameters(), expected, through_student_only, strict=True):
        assert_close(parameter.grad, value, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(parameter.grad, partial, rtol=1e-3)  # negative control: the teacher contributes
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))


def test_output_of_the_generator_is_detached_in_updates_that_do_not_train_it():
    stage = build_game()
    batches = next(stage.windows())[0]
    student, teacher = ("student", Feature("logits")), ("teacher", Feature("logits"))
    image = ("generator", Feature("image"))
    trained = stage.network.run_roles(batches, stage.network.wiring(["fool"], ["generator"]).runs)
    assert all(trained[key].requires_grad for key in (image, student, teacher))
    untrained = stage.network.run_roles(batches, stage.network.wiring(["mimic"], ["student"]).runs)
    assert untrained[student].requires_grad
    assert not untrained[image].requires_grad and not untrained[teacher].requires_grad


def train_game_by_hand(stage: StageHarness, steps: int, repeat: int) -> StageHarness:
    """Trains the models of the game with a plain loop: one update after the other, each with its own forward."""
    generator, student, teacher = (stage.model(name) for name in ("generator", "student", "teacher"))
    for window in itertools.islice(stage.windows(), steps):
        z = window[0]["noise"].fields["z"]
        for model, sign in [(generator, -1.0), *[(student, 1.0)] * repeat]:
            image = generator(z)["image"]
            image = image if model is generator else image.detach()
            loss = sign * kl_divergence(student(image), teacher(image))
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.2 * gradient
    return stage


def test_updates_in_order_use_new_weights_and_are_repeated():
    for repeat in (1, 3):
        stage, expected = build_game(repeat), train_game_by_hand(build_game(repeat), 3, repeat)
        stage.step(3)
        for role in ("generator", "student"):
            for name, value in expected.weights(role).items():
                assert_close(stage.weights(role)[name], value, rtol=1e-9, atol=1e-12)
    once, three_times = (build_game(repeat).step(3).model().fc.weight for repeat in (1, 3))
    assert not torch.allclose(once, three_times)  # negative control


def test_loss_of_a_repeated_update_is_logged_as_the_mean_over_repeats():
    stage = build_game(3)
    runner, losses = stage.runner, []
    compute_losses = runner.eager.compute_losses

    def recording_losses(batches, counts, wiring, fraction):
        total, values = compute_losses(batches, counts, wiring, fraction)
        losses.extend(float(values[0]) for term in wiring.terms if term == "mimic")
        return total, values

    runner.eager.compute_losses = recording_losses
    runner.begin_step()
    runner.step(next(stage.windows()))
    means = runner.read_log()[0]
    assert means.steps == 1 and len(losses) == 3
    assert means.losses["mimic"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert means.losses["mimic"] != pytest.approx(sum(losses), rel=1e-3)  # negative control: not the sum


PEERS = """
models: {FIRST: {model: t_layers}, SECOND: {model: {type: t_layers, hidden: 9}}}
terms:
  ce: {type: cross_entropy, student: [FIRST, SECOND]}
  kl: {type: kd, temperature: 1, student: [FIRST, SECOND], teacher: others}
optimizer: {type: SGD, lr: 0.3, momentum: 0.9}
export: EXPORT
precision: float64
epochs: 3
batch_size: 16
"""
PEERS_A_B = PEERS.replace("FIRST", "a").replace("SECOND", "b").replace("EXPORT", "a")


def test_mutual_learning_equals_two_hand_written_simultaneous_updates():
    stage, expected = build_stage(PEERS_A_B), build_stage(PEERS_A_B)
    models = expected.model("a"), expected.model("b")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9) for model in models]
    for window in itertools.islice(expected.windows(), 6):
        image, label = (window[0]["train"].fields[name] for name in ("image", "label"))
        first, second = (model(image) for model in models)
        losses = [
            F.cross_entropy(student, label) + kl_divergence(student, peer.detach())
            for student, peer in ((first, second), (second, first))
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for optimizer in optimizers:  # both gradients are computed before either peer changes
            optimizer.step()
    stage.step(6)
    for role in ("a", "b"):
        for name, value in expected.weights(role).items():
            assert_close(stage.weights(role)[name], value, rtol=1e-10, atol=1e-12)


def test_peers_that_are_updated_in_order_end_with_other_weights():
    """Negative control of the test above: two ordered updates differ from one simultaneous update."""
    text = PEERS_A_B.replace(
        "  ce: {type: cross_entropy, student: [a, b]}\n",
        "  ce: {type: cross_entropy, student: a}\n  cf: {type: cross_entropy, student: b}\n",
    )
    text = text.replace(
        "  kl: {type: kd, temperature: 1, student: [a, b], teacher: others}\n",
        "  ka: {type: kd, temperature: 1, student: a, teacher: b}\n"
        "  kb: {type: kd, temperature: 1, student: b, teacher: a}\n",
    )
    in_order = text + "updates: [{models: [a], terms: [ce, ka]}, {models: [b], terms: [cf, kb]}]\n"
    ordered, simultaneous, separate_terms = (build_stage(each).step(6) for each in (in_order, PEERS_A_B, text))
    expected = simultaneous.model("b").fc.weight
    assert_close(separate_terms.model("b").fc.weight, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ordered.model("b").fc.weight, expected, rtol=1e-6)


def test_order_and_names_of_peers_have_no_effect():
    stage = build_stage(PEERS_A_B)
    renamed = build_stage(
        PEERS.replace(
            "models: {FIRST: {model: t_layers}, SECOND: {model: {type: t_layers, hidden: 9}}}",
            "models: {y: {model: {type: t_layers, hidden: 9}}, x: {model: t_layers}}",
        )
        .replace("FIRST", "y")
        .replace("SECOND", "x")
        .replace("EXPORT", "x")
    )
    new_names = {"a": "x", "b": "y"}
    for name, new_name in new_names.items():  # initial weights depend on the name of the role
        copy_state(stage.model(name), renamed.model(new_name))
    stage.step(6)
    renamed.step(6)
    for name, new_name in new_names.items():
        for key, value in stage.weights(name).items():
            assert_close(renamed.weights(new_name)[key], value, rtol=1e-12, atol=1e-14)


AVERAGES = """
student: {model: {type: t_layers, norm: batch}}
models: {shadow: {ema: student, decay: 0.8}, old: {snapshot: student, every: 2}, initial: {snapshot: student}}
terms:
  ce: cross_entropy
  consistent: {type: kd, teacher: shadow, weight: 0.5}
  still: {type: kd, teacher: old, weight: 0.5}
  anchor: {type: kd, teacher: initial, weight: 0.1}
optimizer: {type: SGD, lr: 0.3, momentum: 0.9}
ema: 0.9
precision: float64
epochs: 6
batch_size: 32
"""


def test_averages_and_snapshots_equal_their_formulas():
    stage = build_stage(AVERAGES)
    initial = stage.weights()
    assert all(equal_weights(initial, stage.weights(role)) for role in ("shadow", "old", "initial"))
    shadow, average = stage.weights("shadow"), stage.weights()
    snapshots = {0: initial}
    steps_per_epoch = stage.runner.progress.steps_per_epoch
    assert steps_per_epoch == 2
    for step in range(1, 11):
        stage.step()
        student = stage.weights()
        for name, value in student.items():
            if value.is_floating_point():
                shadow[name] = 0.8 * shadow[name] + 0.2 * value
                average[name] = 0.9 * average[name] + 0.1 * value
            else:
                shadow[name] = average[name] = value
        for name in student:
            assert_close(stage.weights("shadow")[name], shadow[name], rtol=1e-12, atol=1e-13)
            assert_close(stage.runner.average.state_dict()[name], average[name], rtol=1e-12, atol=1e-13)
        if step % (2 * steps_per_epoch) == 0:
            snapshots[step] = student
        # A snapshot is taken before the step that follows its epoch.
        snapshot_step = (step - 1) // (2 * steps_per_epoch) * (2 * steps_per_epoch)
        assert equal_weights(stage.weights("old"), snapshots[snapshot_step]), step
    assert equal_weights(stage.weights("initial"), initial)
    assert not equal_weights(stage.weights("old"), initial) and "layer1.1.running_mean" in shadow


def test_averages_and_snapshots_get_no_gradient_and_stay_in_eval_mode():
    stage = build_stage(AVERAGES).step(2)
    stage.network.train()
    for role in ("shadow", "old", "initial"):
        assert not any(module.training for module in stage.network.role(role).modules())
        assert all(p.grad is None for p in stage.model(role).parameters())
    assert not any(module.training for module in stage.runner.average.modules())


def test_average_of_the_exported_role_keeps_hooks_of_the_model_and_has_none_of_the_extractor():
    text = AVERAGES.replace(
        "terms:", "terms:\n  hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: shadow:layer2}"
    )
    stage = build_stage(text.replace("t_layers, norm", "t_hooked, norm"))
    model, average = stage.model(), stage.runner.average
    assert len(model.layer1._forward_hooks) == 1 and not average.layer1._forward_hooks
    assert len(average.fc._forward_pre_hooks) == 1
    stage.step(2)
    assert average(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).isfinite().all()


def test_gradients_of_simultaneous_updates_are_unscaled_by_the_scale_of_their_losses():
    """In fp16 the loss scale may change after every step, but not between the updates of one group."""

    def train_peers(growth_interval: int) -> StageHarness:
        text = (
            "models: {a: {model: t_layers}, b: {model: {type: t_layers, hidden: 9}}}\nexport: a\n"
            "terms: {ce: {type: cross_entropy, student: a}, cf: {type: cross_entropy, student: b}}\n"
            "updates: [[{models: [a], terms: [ce]}, {models: [b], terms: [cf]}]]\n"
            "optimizer: {type: SGD, lr: 0.2}\nprecision: fp16\nepochs: 2\nbatch_size: 16\n"
        )
        stage = build_stage(text)
        stage.runner.eager.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=growth_interval)
        return stage.step(4)

    growing, constant = train_peers(1), train_peers(10**6)
    assert growing.runner.eager.scaler.get_scale() > 64.0 == constant.runner.eager.scaler.get_scale()
    for name in ("a", "b"):
        for first, second in zip(growing.weights(name).values(), constant.weights(name).values(), strict=True):
            assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped_after_unscaling():
    """In fp16, scaled gradients would exceed the limit however small they are."""

    def train_clipped(scale: float, clip: float) -> StageHarness:
        text = (
            "student: t_layers\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.2}\n"
            f"precision: fp16\nclip: {clip}\nepochs: 2\nbatch_size: 16\n"
        )
        stage = build_stage(text)
        stage.runner.eager.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return stage.step(4)

    small_scale, large_scale = train_clipped(2.0, 0.1), train_clipped(1024.0, 0.1)
    for first, second in zip(small_scale.weights().values(), large_scale.weights().values(), strict=True):
        assert_close(first, second, rtol=1e-3, atol=1e-4)
    unlimited = train_clipped(2.0, 1e6)  # negative control: the limit has an effect
    assert not torch.allclose(unlimited.model().fc.weight, small_scale.model().fc.weight, rtol=1e-2)


DROPOUT = """
student: {model: {type: t_layers, dropout: 0.3}}
terms: {ce: cross_entropy}
optimizer: {type: SGD, lr: 0.1}
epochs: 3
batch_size: 24
log_every: 2
"""


def test_every_step_of_a_stage_has_its_own_random_numbers():
    """Equal random numbers in every log interval would resume to the same bits and still be no dropout."""
    stage = build_stage(DROPOUT)
    runner, seeds = stage.runner, []
    for window in itertools.islice(stage.windows(), 9):
        runner.begin_step()
        seeds.append(torch.initial_seed())
        runner.step(window)
        if runner.progress.logs_after(runner.progress.steps_done):
            runner.read_log()
    assert len(set(seeds)) == 9
    build_stage(DROPOUT, "seed=7").runner.begin_step()
    assert torch.initial_seed() not in seeds
