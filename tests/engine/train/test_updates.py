"""Who moves by what: one update, several in order, peers that teach each other, and roles that follow."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
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


def game(repeat: int = 1):
    return build_stage(GAME.replace("REPEAT", str(repeat)))


def move(run: StageHarness, number: int, window: list[MicroBatch]) -> None:
    """One update alone."""
    update = run.runner.updates[number]
    run.runner.eager.compute_gradients(update, window)
    run.runner.eager._apply(update)


def test_each_update_moves_its_own_models_only():
    run = game()
    window = next(run.windows())
    run.runner.begin_step()
    teacher, student, generator = run.weights("teacher"), run.weights(), run.weights("generator")
    move(run, 0, window)
    assert equal_weights(student, run.weights()) and not equal_weights(generator, run.weights("generator"))
    generator = run.weights("generator")
    move(run, 1, window)
    assert equal_weights(generator, run.weights("generator")) and not equal_weights(student, run.weights())
    assert equal_weights(teacher, run.weights("teacher"))


def test_the_generators_gradient_comes_through_the_frozen_teacher_and_the_student():
    run = game()
    window = next(run.windows())
    run.runner.begin_step()
    noise = window[0]["noise"].fields["z"]
    generator = run.model("generator")
    image = generator(noise)["image"]
    student, teacher = run.model(), run.model("teacher")

    def by_hand(through_teacher: bool):
        ours, theirs = student(image), teacher(image)
        theirs = theirs if through_teacher else theirs.detach()
        loss = -F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
        return torch.autograd.grad(loss, list(generator.parameters()), retain_graph=True)

    expected, wrong = by_hand(True), by_hand(False)
    move(run, 0, window)
    for parameter, value, other in zip(generator.parameters(), expected, wrong, strict=True):
        assert_close(parameter.grad, value, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(parameter.grad, other, rtol=1e-3)  # negative control: the teacher's share counts
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))


def test_the_generators_output_is_detached_where_it_does_not_move():
    run = game()
    batch = next(run.windows())[0]
    key = ("student", Feature("logits"))
    output = ("generator", Feature("image"))
    moving = run.network.run_roles(batch, run.network.wiring(["fool"], ["generator"]).runs)
    assert (
        moving[output].requires_grad
        and moving[key].requires_grad
        and moving["teacher", Feature("logits")].requires_grad
    )
    resting = run.network.run_roles(batch, run.network.wiring(["mimic"], ["student"]).runs)
    assert not resting[output].requires_grad and resting[key].requires_grad
    assert not resting["teacher", Feature("logits")].requires_grad


def by_hand(run, steps: int, repeat: int):
    """The game written out: simultaneous nothing, one move after the other, each over a fresh forward."""
    generator, student, teacher = (run.model(name) for name in ("generator", "student", "teacher"))
    for window in itertools.islice(run.windows(), steps):
        z = window[0]["noise"].fields["z"]
        for model, sign in [(generator, -1.0), *[(student, 1.0)] * repeat]:
            image = generator(z)["image"]
            image = image if model is generator else image.detach()
            loss = F.kl_div(
                student(image).log_softmax(1), teacher(image).log_softmax(1), reduction="batchmean", log_target=True
            )
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(sign * loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.2 * gradient
    return run


def test_ordered_updates_see_the_new_weights_and_repeat_counts():
    for repeat in (1, 3):
        run, expected = game(repeat), by_hand(game(repeat), 3, repeat)
        run.step(3)
        for role in ("generator", "student"):
            for name, value in expected.weights(role).items():
                assert_close(run.weights(role)[name], value, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(game(1).step(3).model().fc.weight, game(3).step(3).model().fc.weight)


def test_a_term_of_a_repeated_update_is_logged_as_the_mean_over_the_repeats():
    run = game(3)
    runner, seen = run.runner, []
    forward = runner.eager.forward

    def spy(batches, counts, wiring, fraction):
        total, values = forward(batches, counts, wiring, fraction)
        seen.extend(float(values[0]) for term in wiring.terms if term == "mimic")
        return total, values

    runner.eager.forward = spy
    runner.begin_step()
    runner.step(next(run.windows()))
    reading = runner.read_log()[0]
    assert reading.steps == 1 and len(seen) == 3
    assert reading.losses["mimic"] == pytest.approx(sum(seen) / 3, rel=1e-6)
    assert reading.losses["mimic"] != pytest.approx(sum(seen), rel=1e-3)  # negative control: the sum is another number


DML = """
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


def dml():
    return build_stage(DML.replace("FIRST", "a").replace("SECOND", "b").replace("EXPORT", "a"))


def test_mutual_learning_equals_two_hand_written_simultaneous_updates():
    run, expected = dml(), dml()
    a, b = expected.model("a"), expected.model("b")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9) for model in (a, b)]
    for window in itertools.islice(expected.windows(), 6):
        batch = window[0]["train"]
        ours, theirs = a(batch.fields["image"]), b(batch.fields["image"])
        losses = [
            F.cross_entropy(own, batch.fields["label"])
            + F.kl_div(own.log_softmax(1), other.detach().log_softmax(1), reduction="batchmean", log_target=True)
            for own, other in ((ours, theirs), (theirs, ours))
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for optimizer in optimizers:  # both gradients are taken before either moves
            optimizer.step()
    run.step(6)
    for role in ("a", "b"):
        for name, value in expected.weights(role).items():
            assert_close(run.weights(role)[name], value, rtol=1e-10, atol=1e-12)


def test_one_peer_after_the_other_would_be_something_else():
    """Negative control of the test above: two ordered updates are not one simultaneous one."""
    text = DML.replace("FIRST", "a").replace("SECOND", "b").replace("EXPORT", "a")
    text = text.replace(
        "  ce: {type: cross_entropy, student: [a, b]}\n",
        "  ce: {type: cross_entropy, student: a}\n  cf: {type: cross_entropy, student: b}\n",
    )
    text = text.replace(
        "  kl: {type: kd, temperature: 1, student: [a, b], teacher: others}\n",
        "  ka: {type: kd, temperature: 1, student: a, teacher: b}\n"
        "  kb: {type: kd, temperature: 1, student: b, teacher: a}\n",
    )
    ordered = build_stage(text + "updates: [{models: [a], terms: [ce, ka]}, {models: [b], terms: [cf, kb]}]\n").step(6)
    together = dml().step(6)
    split = build_stage(text).step(6)
    assert_close(split.model("b").fc.weight, together.model("b").fc.weight, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ordered.model("b").fc.weight, together.model("b").fc.weight, rtol=1e-6)


def test_swapping_the_order_and_the_names_of_peers_changes_nothing():
    run = dml().step(0)
    other = build_stage(
        DML.replace(
            "models: {FIRST: {model: t_layers}, SECOND: {model: {type: t_layers, hidden: 9}}}",
            "models: {y: {model: {type: t_layers, hidden: 9}}, x: {model: t_layers}}",
        )
        .replace("FIRST", "y")
        .replace("SECOND", "x")
        .replace("EXPORT", "x")
    )
    for mine, theirs in (("x", "a"), ("y", "b")):  # the initial weights are those of the role's name
        copy_state(run.model(theirs), other.model(mine))
    run.step(6)
    other.step(6)
    for mine, theirs in (("x", "a"), ("y", "b")):
        for name, value in run.weights(theirs).items():
            assert_close(other.weights(mine)[name], value, rtol=1e-12, atol=1e-14)


FOLLOWERS = """
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


def test_averages_and_snapshots_follow_their_formulas():
    run = build_stage(FOLLOWERS)
    start = run.weights()
    assert all(equal_weights(start, run.weights(role)) for role in ("shadow", "old", "initial"))
    shadow, average = run.weights("shadow"), run.weights()
    snapshots = {0: start}
    per_epoch = run.runner.progress.steps_per_epoch
    assert per_epoch == 2
    for step in range(1, 11):
        run.step()
        student = run.weights()
        for name, value in student.items():
            if value.is_floating_point():
                shadow[name] = 0.8 * shadow[name] + 0.2 * value
                average[name] = 0.9 * average[name] + 0.1 * value
            else:
                shadow[name] = average[name] = value
        for name in student:
            assert_close(run.weights("shadow")[name], shadow[name], rtol=1e-12, atol=1e-13)
            assert_close(run.runner.average.state_dict()[name], average[name], rtol=1e-12, atol=1e-13)
        if step % (2 * per_epoch) == 0:
            snapshots[step] = student
        renewed = (step - 1) // (2 * per_epoch) * (2 * per_epoch)
        assert equal_weights(run.weights("old"), snapshots[renewed]), step
    assert equal_weights(run.weights("initial"), start)
    assert not equal_weights(run.weights("old"), start) and "layer1.1.running_mean" in shadow


def test_roles_that_follow_get_no_gradient_and_stay_in_eval_mode():
    run = build_stage(FOLLOWERS).step(2)
    run.network.train()
    for role in ("shadow", "old", "initial"):
        assert not any(module.training for module in run.network.role(role).modules())
        assert all(p.grad is None for p in run.model(role).parameters())
    assert not any(module.training for module in run.runner.average.modules())


def test_the_average_captures_nothing_and_keeps_the_hooks_of_the_models_own():
    text = FOLLOWERS.replace(
        "terms:", "terms:\n  hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: shadow:layer2}"
    )
    run = build_stage(text.replace("t_layers, norm", "t_hooked, norm"))
    own, average = run.model(), run.runner.average
    assert len(own.layer1._forward_hooks) == 1 and not average.layer1._forward_hooks
    assert len(average.fc._forward_pre_hooks) == 1
    run.step(2)
    assert average(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).isfinite().all()


def test_peers_that_move_together_are_unscaled_by_the_scale_that_their_losses_had():
    """fp16: the scale may grow or shrink after every step, but not between the moves of one."""

    def peers(interval: int) -> StageHarness:
        text = (
            "models: {a: {model: t_layers}, b: {model: {type: t_layers, hidden: 9}}}\nexport: a\n"
            "terms: {ce: {type: cross_entropy, student: a}, cf: {type: cross_entropy, student: b}}\n"
            "updates: [[{models: [a], terms: [ce]}, {models: [b], terms: [cf]}]]\n"
            "optimizer: {type: SGD, lr: 0.2}\nprecision: fp16\nepochs: 2\nbatch_size: 16\n"
        )
        run = build_stage(text)
        run.runner.eager.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=interval)
        return run.step(4)

    growing, constant = peers(1), peers(10**6)
    assert growing.runner.eager.scaler.get_scale() > 64.0 == constant.runner.eager.scaler.get_scale()
    for name in ("a", "b"):
        for one, other in zip(growing.weights(name).values(), constant.weights(name).values(), strict=True):
            assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_limit_on_the_gradients_holds_for_them_as_they_are_without_the_scale():
    """fp16: a gradient that was still scaled would be cut down however small it is."""

    def limited(scale: float, clip: float) -> StageHarness:
        text = (
            "student: t_layers\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.2}\n"
            f"precision: fp16\nclip: {clip}\nepochs: 2\nbatch_size: 16\n"
        )
        run = build_stage(text)
        run.runner.eager.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return run.step(4)

    weak, strong = limited(2.0, 0.1), limited(1024.0, 0.1)
    for one, other in zip(weak.weights().values(), strong.weights().values(), strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)
    free = limited(2.0, 1e6)  # control: the limit is felt
    assert not torch.allclose(free.model().fc.weight, weak.model().fc.weight, rtol=1e-2)


def test_every_step_of_a_stage_draws_for_itself():
    """The same numbers in every log interval, say, would resume to the same bits and still be no dropout."""
    run = build_stage("student: {model: {type: t_layers, dropout: 0.3}}\nterms: {ce: cross_entropy}\n" + BRIEF)
    seeds = []
    for window in itertools.islice(run.windows(), 9):
        run.runner.begin_step()
        seeds.append(torch.initial_seed())
        run.runner.step(window)
        if run.runner.progress.logs_after(run.runner.progress.steps_done):
            run.runner.read_log()
    assert len(set(seeds)) == 9
    other = build_stage(
        "student: {model: {type: t_layers, dropout: 0.3}}\nterms: {ce: cross_entropy}\n" + BRIEF, "seed=7"
    )
    other.runner.begin_step()
    assert torch.initial_seed() not in seeds


BRIEF = "optimizer: {type: SGD, lr: 0.1}\nepochs: 3\nbatch_size: 24\nlog_every: 2\n"
